"""Frozen through the loop: the tower learns through a language model that does not move by one bit, clipped adaptively, on questions about shapes."""
import jax
import numpy as np

from vlm_jax.settings import plain
from vlm_jax.training.checkpoints import restore_parameters
from vlm_jax.training.config import load_config
from vlm_jax.training.loop import train
from vlm_jax.training.trees import flatten

SOURCE = dict(name="shapes_questions", split="train", size=16, objects=[1, 2])


def config_of():
    config = plain(load_config("configs/siglip/shapes.py:variant=test"))
    stage = {key: value for key, value in config["stages"][0].items() if key != "train"}
    stage.update(steps=2, data=dict(questions=dict(source=SOURCE, batch_size=4)), train=[["language/.*", None], [".*", {}]], model=None, processor=None,
                 task=None, mesh=None, optimizer=dict(name="sgd", momentum=None), schedule=dict(name="constant", peak=0.1),
                 clip=dict(norm=1.0, adaptive=[["image/.*", dict(limit=0.5)]]))
    config.update(
        name="frozen", log_every=1, checkpoint=dict(every=1, keep=3), mesh=dict(data=1), task=dict(name="generation"),
        model=dict(name="frozen", preset="test", image=dict(image_size=16, widths=[16], depths=[2], strides=[2], stochastic_depth=0.1),
                   language=dict(vocab_size=310, width=12, depth=1, mlp_dim=16, num_heads=3)),
        processor=dict(image=[["resize", dict(size=16)], ["value_range", dict(low=-1, high=1)]],
                       text=[["tokenize", dict(tokenizer=dict(train_on=dict(SOURCE, count=50), vocab_size=300))]],
                       format=dict(kind="causal", length=32, image_tokens=2, begin=False)),
        stages=[stage], evaluations={})
    return config


def test_the_language_model_keeps_every_bit(tmp_path):
    summary = train(config_of(), tmp_path / "run", devices=jax.devices()[:1])
    assert np.isfinite(summary["loss"]) and summary["step"] == 2
    (first, _), (second, _) = (restore_parameters(tmp_path / "run", step) for step in (1, 2))
    moved = set()
    for (path, before), after in zip(flatten(first).items(), flatten(second).values(), strict=True):
        if path.startswith("language/"):
            np.testing.assert_array_equal(before, after, err_msg=path)
        elif (np.asarray(before) != np.asarray(after)).any():
            moved.add(path)
    assert {"projection/kernel", "image/stem/kernel", "image/stages_0/first/shortcut/gain", "image/stages_0/blocks/skip_gain"} <= moved
    assert any(path.startswith("language/blocks/") for path in flatten(first))

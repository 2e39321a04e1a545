"""A model that generates text, tuned with adapters by a config, evaluated, loaded and asked: all parts together."""
import dataclasses
import json

import jax
import numpy as np
import pytest

import vlm_jax
from vlm_jax.data.sources import build_source
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation.answering import score_predictions
from vlm_jax.settings import plain
from vlm_jax.training import adapters, setup
from vlm_jax.training.config import load_config, resolve
from vlm_jax.training.dry_run import abstract_batch
from vlm_jax.training.loop import train
from vlm_jax.training.trees import flatten

SOURCE = dict(name="shapes_questions", split="train", size=16, objects=[1, 2])
TOWER = dict(width=12, depth=1, mlp_dim=16, num_heads=3)


def config_of():
    """Questions about shapes; adapters with a rate of their own for one module are trained on a random base."""
    config = plain(load_config("configs/siglip/shapes.py:variant=test"))
    stage = {key: value for key, value in config["stages"][0].items() if key != "train"}
    stage.update(steps=1, data=dict(questions=dict(source=SOURCE, batch_size=4)))
    lora = dict(targets=["language/.*/(query|value)"], rank=2, alpha=4, dropout=0.1)
    stage.update(lora=lora, train=[["language/decoder/.*/lora/.*", dict(lr=2.0)], [".*", None]], model=None, processor=None, task=None, mesh=None)
    config.update(
        name="questions", log_every=1, checkpoint=dict(every=10, keep=3), mesh=dict(data=1), task=dict(name="generation", label_smoothing=0.1),
        model=dict(name="pali", preset=None, image=dict(image_size=16, patch_size=8, **TOWER),
                   language=dict(vocab_size=310, width=12, encoder_depth=1, decoder_depth=1, mlp_dim=16, num_heads=3, head_dim=4)),
        processor=dict(image=[["resize", dict(size=16)], ["value_range", dict(low=-1, high=1)]],
                       text=[["tokenize", dict(tokenizer=dict(train_on=dict(SOURCE, count=50), vocab_size=300))]],
                       format=dict(kind="encoder_decoder", length=28, target_length=6, image_tokens=4)),
        stages=[stage],
        evaluations=dict(answers=dict(evaluator="vqa", source=dict(SOURCE, split="heldout_pairs", count=3), max_tokens=4, batch_size=2)))
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("generation") / "run"
    return workdir, train(config_of(), workdir, devices=jax.devices()[:1])


def test_a_run_ends_with_answers(run):
    workdir, summary = run
    assert np.isfinite(summary["loss"]) and summary["evaluations"]["answers"]["pictures"] == 3
    folder = workdir / "evaluations" / "answers" / "1"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert score_predictions(folder / "predictions.jsonl") == pytest.approx(metrics) and (folder / "answers.png").exists()
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"token_accuracy", "perplexity"} <= set(next(row for row in rows if row["kind"] == "train"))
    assert any("answers.png" in text or "data:image" in text for text in [(workdir / "report.html").read_text()])


def test_a_tuned_run_is_loaded_and_asked(run):
    loaded = vlm_jax.load(run[0])
    assert adapters.adapted(loaded.params)
    records = [build_source(SOURCE)[i] for i in range(3)]
    images, prompts = [record["image"] for record in records], [record["prompt"] for record in records]
    answers = loaded.generator(batch_size=2).answer(images, prompts, max_tokens=4)
    assert len(answers) == 3 and all(isinstance(text, str) for text in answers)
    with pytest.raises(DataError, match="prompt 1: .*raise it to"):
        loaded.generator(batch_size=2).answer(images[:2], [prompts[0], "a red circle " * 40], max_tokens=4)
    with pytest.raises(ConfigError, match="2 images for 3 prompts"):
        loaded.generator().answer(images[:2], prompts)


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch_and_int8_kernels_answer_too(run):
    loaded = vlm_jax.load(run[0])
    records = [build_source(SOURCE)[i] for i in range(3)]
    images, prompts = [record["image"] for record in records], [record["prompt"] for record in records]
    one, two = (loaded.generator(batch_size=size).answer(images, prompts, max_tokens=4) for size in (1, 2))
    assert one == two
    small = dataclasses.replace(loaded, params=adapters.quantize(loaded.params, ["language/.*"]))
    assert len(small.generator(batch_size=2).answer(images[:2], prompts[:2], max_tokens=4)) == 2


def test_a_dry_run_knows_what_the_loader_gives(run):
    """The shapes that dry runs and compiling take from settings are those that the processor makes."""
    config = resolve(config_of())
    stages = setup.read(config)
    planned = abstract_batch(setup.build(config, 0, stages, jax.devices()[:1], data=False))["questions"]
    parts = setup.build(config, 0, stages, jax.devices()[:1])
    made = next(parts.batches(0))["questions"]
    assert {key: (leaf.shape, str(leaf.dtype)) for key, leaf in planned.items() if key != "example_id"} == {
        key: (value.shape, str(value.dtype)) for key, value in made.items() if key != "example_id"}
    moments = [path for path in flatten(parts.abstract_state["optimizer"]) if "language" in path]
    assert moments and all(path.endswith(("/lora/a", "/lora/b")) for path in moments)
    rates = {path: leaf.lr for path, leaf in parts.rules.leaves.items() if path.endswith("query/lora/a")}
    assert rates == {path: 2.0 if "/decoder/" in path else 1.0 for path in rates} and len(set(rates.values())) == 2


def test_an_adapted_run_is_written_whole_or_for_peft(run, tmp_path):
    """PaLI has no class in transformers, and the errors say so; its adapters can be merged."""
    loaded = vlm_jax.load(run[0])
    for kind in ("hf", "peft"):
        with pytest.raises(ConfigError, match="pali"):
            vlm_jax.save(loaded, tmp_path / kind, format=kind)
    assert not adapters.adapted(adapters.merge(loaded.params))

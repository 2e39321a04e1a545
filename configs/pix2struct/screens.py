"""A small Pix2Struct that reads screens of any aspect ratio into their schema. Lee et al., "Pix2Struct" (2023); the schema is ScreenAI's (2024), section 3.

Launch:   python -m vlm_jax.train --config configs/pix2struct/screens.py --workdir runs/screens
Measured: not yet.
Try here: python -m vlm_jax.train --config configs/pix2struct/screens.py:variant=test --workdir runs/screens_test
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out
from vlm_jax.configs.pali.recipe import trained_text
from vlm_jax.training.config import parse_arg


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,steps=3000,topology=...,layout=auto"."""
    arg = parse_arg(arg, variant="full", steps=3000, topology="", layout="auto")
    test = arg.variant == "test"
    # The prompt is always the same, and not in the picture, so that the model does not need to read it.
    train = dict(name="screens", split="train", size=96 if test else 160, tasks=["ocr"] if test else ["schema"])

    config = ml.ConfigDict()
    config.name = "pix2struct_screens"
    config.seed = 0
    config.model = dict(name="pix2struct", preset="test" if test else "small")
    patches, patch = (20, 8) if test else (64, 16)
    config.processor = dict(
        image=[["decode", {}], ["flexible_patches", {"max_patches": patches, "patch_size": patch}]],
        text=trained_text(dict(train, count=200 if test else 2000), 512 if test else 1024),
        format=dict(kind="encoder_decoder", length=16, target_length=64 if test else 192, truncate_target=True))
    config.task = dict(name="generation", z_loss=1e-4)
    lay_out(config, arg, "", parameters=10_000_000)
    config.stages = [dict(
        steps=2 if test else arg.steps,
        data=dict(screens=dict(source=train, batch_size=8 if test else 64)),
        train=[(r".*", {})],
        optimizer=dict(name="adafactor", b1=0.0, decay_cap=0.8),
        schedule=dict(name="cosine", peak=1e-2, warmup=1 if test else 200),
        clip=1.0,
    )]
    held_out = dict(train, split="validation", count=8 if test else 500)
    config.evaluations = dict(held_out=dict(evaluator="vqa", source=held_out, metrics=["exact_match", "anls"], max_tokens=8 if test else 192,
                                            every=2 if test else 1_000))
    config.checkpoint = dict(every=2 if test else 500, keep=2)
    config.log_every = 1 if test else 20
    return config

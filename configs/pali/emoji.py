"""Captions of emoji in fourteen languages by one PaLI; the prompt says the language. Chen et al. 2022, section 3.2.

Launch:   python -m vlm_jax.train --config configs/pali/emoji.py --workdir runs/pali_emoji
Measured: experiments/pali_emoji, CIDEr-D of each language on held-out combinations (skin tone x person x role).
Try here: python -m vlm_jax.train --config configs/pali/emoji.py:variant=test --workdir runs/pali_emoji_test
"""
import ml_collections as ml

from vlm_jax.configs.common import lay_out, study_stage
from vlm_jax.configs.pali.recipe import drawn, trained_text
from vlm_jax.data.worlds.emoji_names import LANGUAGES
from vlm_jax.training.config import parse_arg


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,steps=2500,images=true,topology=...,layout=auto"."""
    arg = parse_arg(arg, variant="full", steps=2500, images=True, topology="", layout="auto")
    test = arg.variant == "test"
    size, patch = (24, 8) if test else (48, 12)
    patches, vocabulary = (size // patch) ** 2, 3000 if test else 8192
    train = dict(name="emoji_captions", split="train", size=72)

    config = ml.ConfigDict()
    config.name = "pali_emoji"
    config.seed = 0
    config.model = dict(name="pali", preset="test" if test else "emoji", language=dict(vocab_size=vocabulary))
    config.processor = dict(
        image=drawn(size, arg.images), text=trained_text(dict(train, limit=500) if test else train, vocabulary),
        format=dict(kind="encoder_decoder", length=patches + 8, target_length=40, image_tokens=patches, truncate_target=True))
    config.task = dict(name="generation")
    lay_out(config, arg, "", parameters=20_000_000)
    config.stages = [study_stage(test, arg.steps, train, batch_size=128, warmup=100, stream="captions")]
    every = 2 if test else 10_000   # and at the end
    languages = ["en", "de"] if test else list(LANGUAGES)
    held_out = dict(name="emoji_captions", split="heldout_attributes", languages=languages, size=72)
    config.evaluations = dict(heldout_attributes=dict(evaluator="captioning", source=dict(held_out, limit=12) if test else held_out, every=every))
    config.checkpoint = dict(every=2 if test else 500, keep=2)
    config.log_every = 1 if test else 20
    return config

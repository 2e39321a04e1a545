"""A run of seconds in which whatever can go wrong on the way back would show: two stages, dropout, augmentation, a moving average, two evaluations.

Launch: python -m vlm_jax.train --config experiments/kill_resume/config.py --workdir runs/kill_resume
It saves every second step and keeps two steps, so that a save, a collection of old steps or an evaluation is nearly always under way.
"""
import ml_collections as ml

from vlm_jax.configs.common import pictures, retrieval, trained_text, zero_shot
from vlm_jax.training.config import parse_arg


def get_config(arg=None):
    """Returns the config; `arg` is "steps=6,workers=0": steps of each of the two stages, worker processes of the loader."""
    arg = parse_arg(arg, steps=6, workers=0)
    train = dict(name="shapes", split="train", size=32)
    held_out = dict(name="shapes", split="heldout_pairs", size=32, limit=6)
    config = ml.ConfigDict()
    config.name = "kill_resume"
    config.seed = 7
    config.model = dict(name="siglip", preset="test", image=dict(dropout=0.1), text=dict(dropout=0.1))
    config.processor = dict(image=pictures(24), text=trained_text(dict(train, limit=2000), vocab_size=300, length=16))
    config.task = dict(name="contrastive", loss="sigmoid")
    config.mesh = dict(data=1)
    augmented = dict(image=[["decode", {}], ["random_resized_crop", {"size": 24}], ["value_range", {"low": -1.0, "high": 1.0}]], text=config.processor.text)
    first = dict(
        steps=arg.steps,
        data=dict(pairs=dict(source=train, batch_size=8, processor=augmented, workers=arg.workers)),
        train=[(r".*", {})],
        optimizer=dict(name="adamw", b1=0.9, b2=0.95, weight_decay=1e-4),
        schedule=dict(name="cosine", peak=1e-3, warmup=2),
        clip=1.0,
    )
    config.stages = [first, dict(first, optimizer=dict(name="adafactor", weight_decay=1e-3), schedule=dict(name="constant", peak=1e-4), ema=dict(decay=0.7))]
    config.evaluations = dict(heldout=zero_shot(held_out, 4, templates=["a {}"]), search=retrieval(held_out, 6))
    config.checkpoint = dict(every=2, keep=2)
    config.log_every = 1
    return config

"""The quickstart's data with CLIP's towers and softmax loss, beside configs/siglip/emoji.py. Radford et al. 2021.

Launch:   python -m vlm_jax.train --config configs/clip/emoji.py --workdir runs/clip_emoji
Try here: python -m vlm_jax.train --config configs/clip/emoji.py:variant=test --workdir runs/clip_emoji_test
"""
from vlm_jax.configs.siglip import emoji
from vlm_jax.training.config import parse_arg


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,steps=450,topology=...,layout=auto"."""
    arg = parse_arg(arg, variant="full", steps=450, topology="", layout="auto")
    config = emoji.get_config(f"variant={arg.variant},steps={arg.steps},topology={arg.topology},layout={arg.layout}")
    config.name = "clip_emoji"
    config.model = dict(name="clip", preset="test" if arg.variant == "test" else "emoji")
    config.task.loss = "softmax"
    return config

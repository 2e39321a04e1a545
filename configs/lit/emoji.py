"""LiT in two stages on emoji: an image tower is trained with a small text tower, then locked while a new text tower learns to read it. Zhai et al. 2022.

Launch:   python -m vlm_jax.train --config configs/lit/emoji.py --workdir runs/lit_emoji
Try here: python -m vlm_jax.train --config configs/lit/emoji.py:variant=test --workdir runs/lit_emoji_test
"""
from vlm_jax.configs.siglip import emoji
from vlm_jax.training.config import parse_arg


def get_config(arg=None):
    """Returns the config; `arg` is "variant=full|test,steps=300,topology=...,layout=auto": the steps of each stage."""
    arg = parse_arg(arg, variant="full", steps=300, topology="", layout="auto")
    config = emoji.get_config(f"variant={arg.variant},steps={arg.steps},topology={arg.topology},layout={arg.layout}")
    config.name = "lit_emoji"
    first = config.stages[0].to_dict() if hasattr(config.stages[0], "to_dict") else dict(config.stages[0])
    second = dict(first, train=[(r"image/.*", None), (r".*", {})], init_from=dict(previous=True, mapping=[(r"(image/.*)", r"\1")], missing="keep"))
    config.stages = [first, second]
    return config

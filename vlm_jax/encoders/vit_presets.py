"""Presets of towers that are models by themselves.

Sources: ViT: Dosovitskiy et al. 2021, table 1, the released models (class token, exact GELU); NaFlex: Tschannen et al., "SigLIP 2" (2025), table 1.
"""
from typing import Any

from vlm_jax.encoders.variants import variant


def _vit(size: str, pixels: int) -> dict[str, Any]:
    return dict(variant(size), image_size=pixels, pool="cls", activation="gelu")


VIT: dict[str, dict[str, Any]] = {
    "test": dict(image_size=24, patch_size=8, width=32, depth=2, mlp_dim=64, num_heads=2, pool="cls"),
    "b16-224": _vit("B/16", 224),
    "b32-224": _vit("B/32", 224),
    "l16-224": _vit("L/16", 224),
    "l32-224": _vit("L/32", 224),
    "h14-224": _vit("H/14", 224),
}

NAFLEX: dict[str, dict[str, Any]] = {
    "test": dict(max_patches=9, num_positions=9, patch_size=4, width=32, depth=2, mlp_dim=64, num_heads=2),
    "b16": variant("B/16"),
    "so400m16": variant("So400m/16"),
}

TEXT: dict[str, dict[str, Any]] = {
    "test": dict(vocab_size=512, length=16, width=32, depth=2, mlp_dim=64, num_heads=2, projection=None),
}

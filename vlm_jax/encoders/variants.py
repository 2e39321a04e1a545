"""Sizes of towers by name.

Sources: Ti, S, B, L, H, g, G: Zhai et al., "Scaling Vision Transformers" (2022), table 2; Steiner et al., "How to train your ViT?" (2021), table 1;
So400m: Alabdulmohsin et al., "Getting ViT in Shape" (2023), section 5; M (a size between S and B): the table of the big_vision code;
g-opt: Tschannen et al., "SigLIP 2" (2025), whose released tower has these sizes;
e: Chen et al., "PaLI" (2022), table 1; 22B: Dehghani et al., "Scaling Vision Transformers to 22 Billion Parameters" (2023), table 1;
F0 to F6: Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization" (2021), table 1 (depths, and the dropout before a classifier);
NF-ResNets: Brock et al., "Characterizing signal propagation to close the performance gap in unnormalized ResNets" (2021), and its released code.
"""
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.settings import choose

VARIANTS: dict[str, dict[str, int]] = {
    "Ti": dict(width=192, depth=12, mlp_dim=768, num_heads=3),
    "S": dict(width=384, depth=12, mlp_dim=1536, num_heads=6),
    "M": dict(width=512, depth=12, mlp_dim=2048, num_heads=8),
    "B": dict(width=768, depth=12, mlp_dim=3072, num_heads=12),
    "L": dict(width=1024, depth=24, mlp_dim=4096, num_heads=16),
    "So400m": dict(width=1152, depth=27, mlp_dim=4304, num_heads=16),
    "H": dict(width=1280, depth=32, mlp_dim=5120, num_heads=16),
    "g": dict(width=1408, depth=40, mlp_dim=6144, num_heads=16),
    "g-opt": dict(width=1536, depth=40, mlp_dim=6144, num_heads=16),
    "G": dict(width=1664, depth=48, mlp_dim=8192, num_heads=16),
    "e": dict(width=1792, depth=56, mlp_dim=15_360, num_heads=16),
    "22B": dict(width=6144, depth=48, mlp_dim=24_576, num_heads=48),
}

# What an NF-ResNet has otherwise than an NFNet; with it `encoders.nfnet.NFNet` is an NF-ResNet-50.
NF_RESNET: dict[str, Any] = dict(widths=(256, 512, 1024, 2048), depths=(3, 4, 6, 3), stem="pool", bottleneck=0.25, group_size=None, middle=1, shortcut="stride",
                                 squeeze=None, final_ratio=None, activation="relu")


def _nfnet(number: int, dropout: float) -> dict[str, Any]:
    return dict(depths=tuple((number + 1) * depth for depth in (1, 2, 6, 3)), dropout=dropout)


# Convolutional towers, `encoders.nfnet.NFNet`.
NFNETS: dict[str, dict[str, Any]] = {
    **{f"F{number}": _nfnet(number, dropout) for number, dropout in enumerate((0.2, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5))},
    "NF-ResNet-50": NF_RESNET,
    "NF-ResNet-101": dict(NF_RESNET, depths=(3, 4, 23, 3)),
}


def variant(name: str) -> dict[str, Any]:
    """The settings that a name stands for: "B" or "B/16", with a patch size for the latter; "F6", "NF-ResNet-50".

    Raises:
      ConfigError: for an unknown size or a patch that is not a positive whole number.
    """
    size, slash, patch = name.partition("/")
    settings: dict[str, Any] = dict(choose({**VARIANTS, **NFNETS}, size, "variant"))
    if slash:
        if not patch.isdigit() or int(patch) == 0:
            raise ConfigError(f'variant: "{name}" names the patch size "{patch}"; write a whole number, as in "{size}/16".')
        settings["patch_size"] = int(patch)
    return settings

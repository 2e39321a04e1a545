"""Presets of the models that read pictures in the encoder of an encoder-decoder: PaLI, PaLI-X, PaLI-3, ScreenAI, and small ones for tests and studies.

Sources, and what they leave open:
  PaLI (Chen et al. 2022), section 3.1 and table 1: ViT-G or ViT-e with mT5-L or mT5-XXL.
  PaLI-X (2023), section 3.1: ViT-22B (Dehghani et al. 2023, table 1) and a UL2 of 32 B parameters with 50 + 50 layers. Width, MLP and heads are UL2-20B's (Tay
    et al. 2022), the vocabulary mT5's; with them the language part has 32 B. ViT-22B computes attention and MLP side by side and normalises queries and keys;
    `Vit` does neither, and has the same matrices.
  PaLI-3 (2023), section 2: SigLIP ViT-G/14 and UL2-3B, whose sizes are not published; these are T5 1.1 XL's, 2.85 B where the ScreenAI paper counts 2.93 B.
  ScreenAI (Baechler et al. 2024), table 1: B/16 with mT5-base, H/14 with mT5-L, G/14 with UL2-3B; 2,024, 2,916 and 3,364 patches.
"""
from typing import Any

from vlm_jax.language.presets import ENCODER_DECODER

Settings = dict[str, Any]
_UL2_32B = dict(ENCODER_DECODER["mt5-xxl"], encoder_depth=50, decoder_depth=50, width=4096, mlp_dim=16_384, num_heads=16, head_dim=256, activation="silu")


def _pali(image: str, language: str | Settings, pixels: int) -> Settings:
    return dict(image=dict(variant=image, image_size=pixels), language=dict(ENCODER_DECODER[language] if isinstance(language, str) else language))


def _small(size: int, patch: int, width: int, heads: int, image_depth: int, depth: int, vocab_size: int, scan: bool = False) -> Settings:
    """A tower and a T5 1.1 of one width; unrolled, which is the faster way on a CPU."""
    language = dict(ENCODER_DECODER["t5-v1.1-small"], vocab_size=vocab_size, width=width, encoder_depth=depth, decoder_depth=depth, mlp_dim=3 * width,
                    num_heads=heads, head_dim=width // heads)
    return dict(image=dict(image_size=size, patch_size=patch, width=width, depth=image_depth, mlp_dim=4 * width, num_heads=heads), language=language, scan=scan)


PALI: dict[str, Settings] = {
    "test": _small(24, 8, 64, 2, 2, 2, 2048, scan=True),
    "shapes": _small(48, 12, 128, 4, 4, 2, 2048),
    "emoji": _small(48, 12, 192, 3, 6, 3, 8192),
    "pali-3b": _pali("G/14", "mt5-large", 224),
    "pali-15b": _pali("G/14", "mt5-xxl", 224),
    "pali-17b": _pali("e/14", "mt5-xxl", 224),
    "pali-17b-588": _pali("e/14", "mt5-xxl", 588),
    "pali-x-55b": _pali("22B/14", _UL2_32B, 224),
    "pali-3-5b": _pali("G/14", "t5-v1.1-xl", 224),
    "pali-3-5b-812": _pali("G/14", "t5-v1.1-xl", 812),
    "pali-3-5b-1064": _pali("G/14", "t5-v1.1-xl", 1064),
}


def _screenai(image: str, language: str, patches: int) -> Settings:
    return dict(image=dict(variant=image, max_patches=patches), language=dict(ENCODER_DECODER[language]), patching="flexible")


SCREENAI: dict[str, Settings] = {
    "test": dict(image=dict(max_patches=20, patch_size=8, max_rows=32, width=64, depth=2, mlp_dim=128, num_heads=2), language=PALI["test"]["language"],
                 patching="flexible"),
    "screenai-670m": _screenai("B/16", "mt5-base", 2024),
    "screenai-2b": _screenai("H/14", "mt5-large", 2916),
    "screenai-5b": _screenai("G/14", "t5-v1.1-xl", 3364),
}

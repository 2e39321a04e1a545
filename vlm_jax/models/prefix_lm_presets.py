"""Presets of the prefix language models: PaliGemma 1 and 2, and small ones for tests and studies.

Sources: Beyer et al., "PaliGemma" (2024), section 3.1: So400m/14 with Gemma 2B. Steiner et al., "PaliGemma 2" (2024), table 1: So400m/14 with Gemma 2 2B, 9B
and 27B. The released tables have 257,216 rows: Gemma's 256,000, 1,024 places, 128 segments, and padding to a multiple of 64.
"""
from typing import Any

from vlm_jax.language.presets import DECODER

Settings = dict[str, Any]
VOCABULARY = 257_216
RESOLUTIONS = (224, 448, 896)


def _paligemma(language: str, pixels: int) -> Settings:
    return dict(image=dict(variant="So400m/14", image_size=pixels), language=dict(DECODER[language], vocab_size=VOCABULARY))


def _small(size: int, patch: int, width: int, heads: int, image_depth: int, depth: int, vocab_size: int, scan: bool = False) -> Settings:
    """A tower and a decoder of one width, without the large MLPs of Gemma; unrolled, which is the faster way on a CPU."""
    return dict(image=dict(image_size=size, patch_size=patch, width=width, depth=image_depth, mlp_dim=4 * width, num_heads=heads),
                language=dict(vocab_size=vocab_size, width=width, depth=depth, mlp_dim=3 * width, num_heads=heads, num_kv_heads=1, norm="rms_plus_one",
                              activation="gelu_tanh", embed_scale=width ** 0.5), scan=scan)


PALIGEMMA: dict[str, Settings] = {
    "test": _small(24, 8, 64, 2, 2, 2, 2048, scan=True),
    "shapes": _small(48, 8, 128, 4, 4, 4, 2048),
    "emoji": _small(48, 12, 192, 3, 6, 4, 8192),
    **{f"paligemma-3b-{pixels}": _paligemma("gemma-2b", pixels) for pixels in RESOLUTIONS},
    **{f"paligemma2-{size}-{pixels}": _paligemma(language, pixels) for size, language in (("3b", "gemma2-2b"), ("10b", "gemma2-9b"), ("28b", "gemma2-27b"))
       for pixels in RESOLUTIONS},
}

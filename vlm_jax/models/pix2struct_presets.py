"""Presets of Pix2Struct. Lee et al., "Pix2Struct" (2023), section 3: base and large; the released tables have 50,244 words and 4,096 rows and columns."""
from typing import Any

Settings = dict[str, Any]


def _pix2struct(width: int, depth: int, mlp_dim: int, num_heads: int, vocab_size: int = 50_244, image: Settings | None = None, **settings: Any) -> Settings:
    language = dict(vocab_size=vocab_size, width=width, encoder_depth=depth, decoder_depth=depth, mlp_dim=mlp_dim, num_heads=num_heads,
                    head_dim=width // num_heads, activation="gelu_tanh", gated=True, relative=dict(encoder=False), tied=False)
    return dict(image=image or {}, language=language, **settings)


PIX2STRUCT: dict[str, Settings] = {
    "test": _pix2struct(64, 2, 96, 2, 2048, dict(max_patches=20, patch_size=8, max_rows=32)),
    "small": _pix2struct(128, 3, 256, 4, 4096, dict(max_patches=64, patch_size=16, max_rows=128), scan=False),
    "base": _pix2struct(768, 12, 2048, 12),
    "large": _pix2struct(1536, 18, 3968, 24),
}

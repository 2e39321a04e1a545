"""Presets of the dual encoder families: published models, and small ones that train in minutes on two CPU cores.

Sources: SigLIP: Zhai et al. 2023 and the released models (text length 64; 16 for So400m/14 at 224 px). SigLIP 2: Tschannen et al. 2025 (Gemma's
vocabulary of 256,000 entries, length 64; g-opt pairs with a So400m text tower). CLIP: Radford et al. 2021, table 20. LiT: Zhai et al. 2022, image
towers with class token, text towers of the same size (not the paper's BERT). Contrastive NFNets: Alayrac et al., "Flamingo" (2022), appendix B.1.3 (an NFNet-F6
and a text encoder of BERT's architecture, mean pooling, a joint space of 1376; the sizes of the text encoder are BERT's base ones, which is our choice, and it
has learned positions, pre-norm blocks and no padding mask, as `TextTransformer` has). The test suite asserts the parameter counts of the published ones.
"""
from typing import Any

Settings = dict[str, Any]


def _small(size: int, patch: int, width: int, depth: int, heads: int, text_depth: int, vocab_size: int, **options: Any) -> Settings:
    """Two towers of one width with texts of 16 tokens; unrolled, which is the faster way on a CPU."""
    sizes = dict(width=width, mlp_dim=4 * width, num_heads=heads)
    return dict(image=dict(image_size=size, patch_size=patch, depth=depth, **sizes),
                text=dict(vocab_size=vocab_size, length=16, depth=text_depth, **sizes), embed_dim=width, scan=False, **options)


def _quickstart(**options: Any) -> dict[str, Settings]:
    """What every family has for its tests and studies. The tables are larger than the tokenisers trained for them, so that those may vary."""
    return {
        "test": {**_small(24, 8, 64, 2, 2, 2, vocab_size=2048, **options), "scan": True},
        "shapes": _small(48, 8, 128, 4, 4, 2, vocab_size=512, **options),
        "emoji": _small(48, 12, 192, 6, 3, 2, vocab_size=2048, **options),
    }


def _siglip(size: str, patch: int, pixels: int, width: int, vocab_size: int, length: int, text_size: str | None = None) -> Settings:
    return dict(image=dict(variant=f"{size}/{patch}", image_size=pixels, pool="map"),
                text=dict(variant=text_size or size, vocab_size=vocab_size, length=length, pool="last", projection="linear"), embed_dim=width)


def _with(settings: Settings, image: Settings, text: Settings) -> Settings:
    return {**settings, "image": {**settings["image"], **image}, "text": {**settings["text"], **text}}


SIGLIP: dict[str, Settings] = {
    **_quickstart(),
    "small": _siglip("S", 16, 224, 384, 32_000, 64),
    "b16-224": _siglip("B", 16, 224, 768, 32_000, 64),
    "b16-256": _siglip("B", 16, 256, 768, 32_000, 64),
    "b16-384": _siglip("B", 16, 384, 768, 32_000, 64),
    "b16-512": _siglip("B", 16, 512, 768, 32_000, 64),
    "l16-256": _siglip("L", 16, 256, 1024, 32_000, 64),
    "l16-384": _siglip("L", 16, 384, 1024, 32_000, 64),
    "so400m14-224": _siglip("So400m", 14, 224, 1152, 32_000, 16),
    "so400m14-384": _siglip("So400m", 14, 384, 1152, 32_000, 64),
}

SIGLIP2: dict[str, Settings] = {
    **_quickstart(),
    "b32-256": _siglip("B", 32, 256, 768, 256_000, 64),
    **{f"b16-{pixels}": _siglip("B", 16, pixels, 768, 256_000, 64) for pixels in (224, 256, 384, 512)},
    **{f"l16-{pixels}": _siglip("L", 16, pixels, 1024, 256_000, 64) for pixels in (256, 384, 512)},
    **{f"so400m14-{pixels}": _siglip("So400m", 14, pixels, 1152, 256_000, 64) for pixels in (224, 384)},
    **{f"so400m16-{pixels}": _siglip("So400m", 16, pixels, 1152, 256_000, 64) for pixels in (256, 384, 512)},
    **{f"g-opt16-{pixels}": _siglip("g-opt", 16, pixels, 1536, 256_000, 64, text_size="So400m") for pixels in (256, 384)},
}

_CLIP_IMAGE = dict(pool="cls", patch_bias=False, norm_before=True, activation="quick_gelu", norm_eps=1e-5, projection="linear_no_bias")
_CLIP_TEXT = dict(causal=True, pool="eot", activation="quick_gelu", norm_eps=1e-5, projection="linear_no_bias", initialization="clip")


def _clip(size: str, pixels: int, text_width: int, embed_dim: int) -> Settings:
    sizes = dict(width=text_width, depth=12, mlp_dim=4 * text_width, num_heads=text_width // 64)
    return dict(image=dict(variant=size, image_size=pixels, **_CLIP_IMAGE),
                text=dict(vocab_size=49_408, length=77, eot_id=49_407, **sizes, **_CLIP_TEXT), embed_dim=embed_dim, loss="softmax")


CLIP: dict[str, Settings] = {
    # The quickstart's own SentencePiece models end a text with id 1.
    **{name: _with(settings, _CLIP_IMAGE, {**_CLIP_TEXT, "eot_id": 1}) for name, settings in _quickstart(loss="softmax").items()},
    "b32-224": _clip("B/32", 224, 512, 512),
    "b16-224": _clip("B/16", 224, 512, 512),
    "l14-224": _clip("L/14", 224, 768, 768),
    "l14-336": _clip("L/14", 336, 768, 768),
}


def _lit(size: str, width: int) -> Settings:
    return dict(image=dict(variant=f"{size}/16", image_size=224, pool="cls"),
                text=dict(variant=size, vocab_size=32_000, length=16, pool="last", projection="linear"), embed_dim=width, loss="softmax")


LIT: dict[str, Settings] = {
    **{name: _with(settings, dict(pool="cls"), {}) for name, settings in _quickstart(loss="softmax").items()},
    "b16-b": _lit("B", 768),
    "l16-l": _lit("L", 1024),
}


def _nfnet(image: Settings, text: Settings, embed_dim: int, **options: Any) -> Settings:
    return dict(image=dict(kind="nfnet", pool="gap", projection="linear_no_bias", **image), text=dict(pool="gap", projection="linear_no_bias", **text),
                embed_dim=embed_dim, loss="softmax", **options)


NFNET_CONTRASTIVE: dict[str, Settings] = {
    "test": _nfnet(dict(image_size=24, widths=(32, 48), depths=(1, 2), strides=(1, 2), group_size=8),
                   dict(vocab_size=2048, length=16, width=64, depth=2, mlp_dim=256, num_heads=2), 48),
    "f0": _nfnet(dict(variant="F0", image_size=192), dict(variant="B", vocab_size=32_000, length=64), 1376),
    "f6": _nfnet(dict(variant="F6", image_size=288), dict(variant="B", vocab_size=32_000, length=64), 1376),
}

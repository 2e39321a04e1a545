"""Presets of Frozen: a language model that is never trained reads pictures as a few embeddings; its tower learns through it.

Source: Tsimpoukelli et al., "Multimodal Few-Shot Learning with Frozen Language Models" (2021), section 3: an NF-ResNet-50 trained from scratch, whose pooled
vector a linear map turns into two embeddings, and a transformer of 7 billion parameters with relative positions and a vocabulary of 32,000.

Differs from the paper: positions are rotations of queries and keys, which are relative as the paper's are (pictures may stand at places that training has
not seen), but not learned. Sizes of the language model, which the paper does not list, are those usual for 7 billion parameters.
"""
from typing import Any

Settings = dict[str, Any]


def _frozen(image: Settings, vocab_size: int, width: int, depth: int, heads: int, **options: Any) -> Settings:
    language = dict(vocab_size=vocab_size, width=width, depth=depth, mlp_dim=4 * width, num_heads=heads, norm="layer", norm_eps=1e-5, activation="gelu",
                    gated=False)
    return dict(image=dict(tower="nf_resnet", **image), language=language, projection="prefix", prefix_tokens=2, **options)


FROZEN: dict[str, Settings] = {
    "test": _frozen(dict(image_size=24, widths=(32, 48), depths=(1, 2), strides=(1, 2)), 512, 32, 2, 2),
    "shapes": _frozen(dict(image_size=32, widths=(64, 128, 256), depths=(1, 1, 1), strides=(1, 2, 2)), 1024, 128, 4, 4, scan=False),
    "frozen-7b": _frozen(dict(image_size=224), 32_000, 4096, 32, 32),
}

"""Presets of the convolutional towers, without a classifier (`num_classes=1000` adds one), with the stochastic depth of their training.

Sources: sizes in `encoders.variants`; images: Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization" (2021), table 1, the
resolutions of training (tests used larger ones: 256, 320, 352, 416, 512, 544, 576). Frozen's NF-ResNet-50 reads 224 pixels.
"""
from typing import Any

from vlm_jax.encoders.variants import NF_RESNET, variant

PIXELS = (192, 224, 256, 320, 384, 416, 448)   # F0 to F6

NFNET: dict[str, dict[str, Any]] = {
    "test": dict(image_size=24, widths=(32, 48), depths=(1, 2), strides=(1, 2), group_size=8),
    "test-nf-resnet": dict(NF_RESNET, image_size=24, widths=(32, 48), depths=(1, 2), strides=(1, 2)),
    **{f"f{number}": dict(variant(f"F{number}"), image_size=pixels, stochastic_depth=0.25) for number, pixels in enumerate(PIXELS)},
    "nf-resnet-50": dict(variant("NF-ResNet-50"), image_size=224),
}

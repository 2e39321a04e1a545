import pytest

from vlm_jax.encoders.variants import VARIANTS, variant
from vlm_jax.errors import ConfigError


def test_variants():
    assert variant("So400m/14") == dict(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=14)
    assert variant("g-opt") == dict(width=1536, depth=40, mlp_dim=6144, num_heads=16)
    assert all(sizes["width"] % sizes["num_heads"] == 0 for sizes in VARIANTS.values())


@pytest.mark.parametrize("name, message", [("B/x", 'names the patch size "x"'), ("B/0", "whole number"), ("So400", 'Did you mean "So400m"')])
def test_errors(name, message):
    with pytest.raises(ConfigError, match=message):
        variant(name)


def test_convolutional_towers():
    assert variant("F6") == dict(depths=(7, 14, 42, 21), dropout=0.5) and variant("F0")["dropout"] == 0.2
    assert variant("NF-ResNet-50")["depths"] == (3, 4, 6, 3) and variant("NF-ResNet-101")["depths"] == (3, 4, 23, 3)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.data.images import FlexiblePatches
from vlm_jax.encoders.flexible_vit import FlexibleVit
from vlm_jax.errors import ConfigError

VIT = FlexibleVit(max_patches=9, patch_size=3, max_rows=8, width=12, depth=2, mlp_dim=20, num_heads=3)


def test_padding_changes_nothing_and_places_matter():
    image = np.random.default_rng(0).integers(0, 256, (13, 11, 3), np.uint8)
    patches = jnp.asarray(FlexiblePatches(7, 3)(image))[None]
    count = int((patches[0, :, 0] > 0).sum())
    assert VIT.input_shape() == (9, 29) and count < 7
    variables = jax.jit(VIT.init)(jax.random.key(0), patches)
    apply = jax.jit(VIT.apply)
    tokens, out = apply(variables, patches)
    assert tokens.shape == (1, 7, 12) and out["blocks"]["output"].shape == (2, 1, 7, 12)
    noise = patches.at[:, count:, 2:].set(7.0)
    np.testing.assert_allclose(apply(variables, noise)[0][:, :count], tokens[:, :count], atol=1e-6)
    moved = patches.at[0, :count, :2].set(patches[0, :count, 1::-1])   # rows and columns swapped
    assert float(jnp.abs(apply(variables, moved)[0] - tokens)[:, :count].max()) > 1e-3


def test_patches_of_another_size_are_an_error():
    with pytest.raises(ConfigError, match=r"patches have shape \(1, 4, 50\).*2 \+ 27"):
        jax.eval_shape(VIT.init, jax.random.key(0), jnp.zeros((1, 4, 50)))

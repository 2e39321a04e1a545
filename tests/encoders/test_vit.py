import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.encoders.vit import Vit, extract_patches
from vlm_jax.errors import ConfigError

SIZES = dict(image_size=(14, 9), patch_size=4, width=12, depth=2, mlp_dim=20, num_heads=3)
IMAGE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 14, 9, 3)), jnp.float32)


def shapes(vit, image, **keys):
    return jax.eval_shape(lambda: vit.init_with_output({"params": jax.random.key(0), "dropout": jax.random.key(1)}, image, **keys))


def test_patches_and_kernel_equal_a_convolution():
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4, 3, 5)), jnp.float32)
    convolution = jax.lax.conv_general_dilated(IMAGE, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    product = jnp.einsum("bhwpqc,pqcd->bhwd", extract_patches(IMAGE, 4), kernel)
    np.testing.assert_allclose(product, convolution, atol=1e-5)


@pytest.mark.parametrize("pool, tokens, output", [("map", 6, (2, 12)), ("gap", 6, (2, 12)), ("cls", 7, (2, 12)), ("none", 6, (2, 6, 12))])
def test_shapes_of_outputs_and_intermediates(pool, tokens, output):
    (pooled, out), variables = shapes(Vit(**SIZES, pool=pool), IMAGE)
    assert pooled.shape == output and out["pooled"].shape == output
    assert out["stem"].shape == out["tokens"].shape == (2, 6, 12)
    assert out["positions"].shape == (2, tokens, 12)
    assert {name: value.shape for name, value in out["blocks"].items()} == dict.fromkeys(("output", "attention", "mlp"), (2, 2, tokens, 12))
    assert variables["params"]["position_embedding"].shape == (tokens, 12)
    assert ("class_token" in variables["params"]) == (pool == "cls")


def test_projection_fixed_positions_and_patch_dropout():
    vit = Vit(**SIZES, pool="cls", positions="sincos2d", patch_bias=False, norm_before=True, projection="linear_no_bias", embed_dim=5,
              patch_dropout=0.5, dropout=0.1)
    (pooled, out), variables = shapes(vit, IMAGE, train=True)
    assert pooled.shape == (2, 5) and out["pooled"].shape == (2, 12) and out["tokens"].shape == (2, 3, 12)
    assert "position_embedding" not in variables["params"]
    assert set(variables["params"]["patch_embedding"]) == set(variables["params"]["projection"]) == {"kernel"}


def test_other_image_sizes_resample_the_positions():
    vit = Vit(**{**SIZES, "depth": 1}, pool="gap")
    variables = jax.jit(vit.init)(jax.random.key(0), IMAGE)
    (pooled, out), _ = shapes(vit, jnp.zeros((2, 25, 16, 3)))
    assert out["positions"].shape == (2, 24, 12)
    position = jax.jit(lambda image: vit.apply(variables, image)[1]["positions"])(jnp.zeros((1, 25, 16, 3)))
    bias = variables["params"]["patch_embedding"]["bias"]
    np.testing.assert_allclose(position[0, 0], variables["params"]["position_embedding"][0] + bias, atol=1e-6)   # the corner stays


def test_permuting_patches_with_their_positions_changes_nothing():
    vit = Vit(**{**SIZES, "depth": 1})
    variables = jax.jit(vit.init)(jax.random.key(0), IMAGE)
    order = jnp.array([4, 2, 0, 5, 1, 3])
    patches = extract_patches(IMAGE, 4).reshape(2, 6, 4, 4, 3)[:, order]
    shuffled = patches.reshape(2, 3, 2, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 12, 8, 3)
    params = dict(variables["params"], position_embedding=variables["params"]["position_embedding"][order])
    apply = jax.jit(lambda params, image: vit.apply({"params": params}, image)[0])
    np.testing.assert_allclose(apply(params, shuffled), apply(variables["params"], IMAGE[:, :12, :8]), atol=1e-5)


@pytest.mark.parametrize("settings, image, message", [
    (dict(pool="last"), IMAGE, '"last" is not for images'),
    (dict(positions="rope"), IMAGE, '"rope" is unknown'),
    (dict(projection="linear"), IMAGE, "embed_dim is missing"),
    (dict(projection="mlp"), IMAGE, '"mlp" is unknown'),
    (dict(), jnp.zeros((2, 3, 9, 3)), "an image of 3 x 9 holds no patch of 4"),
    (dict(), jnp.zeros((2, 14, 9, 4)), "give \\[batch, height, width, 3\\]"),
])
def test_errors(settings, image, message):
    with pytest.raises(ConfigError, match=message):
        shapes(Vit(**SIZES, **settings), image)

"""A convolutional tower and a resampler on eight simulated devices: value and gradient equal those of one device."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.connectors.resampler import PerceiverResampler
from vlm_jax.encoders.nfnet import NFNet
from vlm_jax.sharding import layout, make_mesh, parameter_shardings
from vlm_jax.sharding.mesh import batch_sharding

TOWER = NFNet(widths=(16,), depths=(3,), strides=(1,), group_size=4, stem="pool", image_size=12, pool="none")
RESAMPLER = PerceiverResampler(num_latents=4, depth=2, num_heads=2, head_dim=8, width=16, max_frames=2)
IMAGES = np.random.default_rng(0).normal(size=(8, 3, 12, 12, 3)).astype(np.float32)   # three frames each


def loss(params, images):
    features, _ = TOWER.apply({"params": params["image"]}, images.reshape(-1, *images.shape[2:]))
    tokens, _ = RESAMPLER.apply({"params": params["resampler"]}, features.reshape(*images.shape[:2], *features.shape[1:]))
    return jnp.square(tokens - 1).mean()


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    shapes = {"image": jax.eval_shape(TOWER.init, jax.random.key(0), jnp.zeros((1, 12, 12, 3))),
              "resampler": jax.eval_shape(RESAMPLER.init, jax.random.key(0), jnp.zeros((1, 1, 9, 32)))}
    return {name: jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), tree["params"]) for name, tree in shapes.items()}


@pytest.fixture(scope="module")
def expected(params):
    return jax.jit(jax.value_and_grad(loss))(params, IMAGES)


@pytest.mark.parametrize("sizes, rules", [
    (dict(data=2, fsdp=2, tensor=2), "fsdp_tensor"), pytest.param(dict(data=1, fsdp=4, sequence=2), "fsdp", marks=pytest.mark.slow)])
def test_meshes_agree_with_one_device(params, expected, sizes, rules):
    mesh = make_mesh(**sizes)
    shardings = parameter_shardings(mesh, params, layout(rules)["sharding"], min_size=8)
    assert any("fsdp" in str(sharding.spec) for sharding in jax.tree.leaves(shardings["image"]))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings), jax.device_put(IMAGES, batch_sharding(mesh))
        value, gradient = jax.jit(jax.value_and_grad(loss))(*placed)
    assert float(value) == pytest.approx(float(expected[0]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-7), gradient, expected[1])

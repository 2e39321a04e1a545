import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.nn import LayerNorm, layer_norm


def plain(x, scale, bias, eps):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps) * scale + bias


def test_layer_norm_and_its_gradient_equal_the_formula():
    rng = np.random.default_rng(0)
    x, scale, bias, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 7), (7,), (7,), (2, 5, 7)))
    x = 3 * x + 20   # a mean far from zero
    ours = jax.value_and_grad(lambda *a: (weight * layer_norm(*a, 1e-6)).sum(), (0, 1, 2))(x, scale, bias)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in (x, scale, bias)]
        truth = jax.value_and_grad(lambda *a: (np.asarray(weight, np.float64) * plain(*a, 1e-6)).sum(), (0, 1, 2))(*wide)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth)):
        assert np.abs(a - np.asarray(b)).max() <= 2e-5 * np.abs(b).max()


def test_statistics_are_float32_whatever_the_dtype():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 300)) + 10, jnp.bfloat16)
    y, variables = LayerNorm(dtype="bfloat16").init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16 and variables["params"]["scale"].dtype == jnp.float32
    exact = plain(x.astype(jnp.float32), 1.0, 0.0, 1e-6)
    assert float(jnp.abs(y.astype(jnp.float32) - exact).max()) <= 2 ** -8 * float(jnp.abs(exact).max())

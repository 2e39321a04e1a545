import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.nn import Linear, initializer


@pytest.mark.parametrize("inputs, features, contract, equation", [
    ((5,), (3, 4), 1, "bti,ihk->bthk"), ((3, 4), (5,), 2, "bthk,hko->bto"), ((7,), (2,), 1, "bti,io->bto"),
])
def test_linear_contracts_trailing_axes(inputs, features, contract, equation):
    x = np.random.default_rng(0).normal(size=(2, 3, *inputs)).astype(np.float32)
    layer = Linear(features if len(features) > 1 else features[0], contract=contract, bias_init=1.0)
    params = layer.init(jax.random.key(0), x)["params"]
    assert params["kernel"].shape == (*inputs, *features) and params["bias"].shape == features
    expected = np.einsum(equation, x, params["kernel"]) + params["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)


def test_kernel_is_initialised_as_a_matrix():
    x = jnp.ones((1, 64))
    split = Linear((4, 16)).init(jax.random.key(1), x)["params"]["kernel"]
    whole = Linear(64).init(jax.random.key(1), x)["params"]["kernel"]
    np.testing.assert_array_equal(split.reshape(64, 64), whole)
    assert abs(float(jnp.abs(whole).max()) - (6 / 128) ** 0.5) < 0.01


def test_dtypes():
    layer = Linear(3, dtype="bfloat16", param_dtype="float32")
    y, variables = layer.init_with_output(jax.random.key(0), jnp.ones((2, 5)))
    assert y.dtype == jnp.bfloat16 and variables["params"]["kernel"].dtype == jnp.float32


def test_initializers_by_name():
    assert float(initializer("zeros")(jax.random.key(0), (3, 3), jnp.float32).sum()) == 0
    assert abs(float(initializer(0.5)(jax.random.key(0), (4000,), jnp.float32).std()) - 0.5) < 0.03
    bound = float(jnp.abs(initializer("torch_uniform")(jax.random.key(0), (25, 400), jnp.float32)).max())
    assert 0.19 < bound <= 0.2
    with pytest.raises(ConfigError, match='Did you mean "xavier_uniform"'):
        initializer("xavier_unifrm")

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn import ACTIVATIONS

X = np.linspace(-6, 6, 101)
FORMULAS = {
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "squared_relu": lambda x: max(x, 0) ** 2,
    "relu": lambda x: max(x, 0),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "relu6": lambda x: min(max(x, 0), 6),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "mish": lambda x: x * math.tanh(math.log1p(math.exp(x))),
    "hard_swish": lambda x: x * min(max(x + 3, 0), 6) / 6,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "linear": lambda x: x,
}


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_values_and_slopes(name):
    function, formula = ACTIVATIONS[name], FORMULAS[name]
    np.testing.assert_allclose(function(jnp.asarray(X, jnp.float32)), [formula(x) for x in X], atol=2e-6, rtol=2e-6)
    points = X + 1e-3   # off the kink of relu
    slopes = jax.vmap(jax.grad(function))(jnp.asarray(points, jnp.float32))
    np.testing.assert_allclose(slopes, [(formula(x + 1e-5) - formula(x - 1e-5)) / 2e-5 for x in points], atol=2e-5)


def test_gelu_tanh_has_second_derivatives_and_keeps_bfloat16():
    function = ACTIVATIONS["gelu_tanh"]
    reference = lambda x: jax.nn.gelu(x, approximate=True)   # noqa: E731
    np.testing.assert_allclose(jax.grad(jax.grad(function))(0.7), jax.grad(jax.grad(reference))(0.7), rtol=1e-5)
    assert function(jnp.ones(3, jnp.bfloat16)).dtype == jnp.bfloat16

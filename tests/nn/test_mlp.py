import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn import ACTIVATIONS, Mlp

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)


def linear(x, layer):
    return x @ layer["kernel"] + layer.get("bias", 0.0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biases", [("gate", "up", "down"), (), ("down",)], ids=str)
def test_formula_and_parameters(gated, biases):
    module = Mlp(7, "silu", bias_init=0.3, gated=gated, biases=biases)
    y, variables = module.init_with_output(jax.random.key(0), X)
    params = variables["params"]
    assert set(params) == ({"gate", "up", "down"} if gated else {"up", "down"})
    assert {name for name, layer in params.items() if "bias" in layer} == set(biases) & set(params)
    hidden = ACTIVATIONS["silu"](linear(X, params["gate" if gated else "up"])) * (linear(X, params["up"]) if gated else 1.0)
    np.testing.assert_allclose(y, linear(hidden, params["down"]), atol=1e-6)

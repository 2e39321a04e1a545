import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.nn import AttentionPooling, pool

X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 6)), jnp.float32)
TOKENS = jnp.array([[4, 9, 1, 1, 1], [1, 4, 4, 4, 4], [4, 4, 9, 4, 9]])


def test_poolings_without_parameters():
    np.testing.assert_array_equal(pool(X, "none"), X)
    np.testing.assert_allclose(pool(X, "gap"), np.asarray(X).mean(1), atol=1e-6)
    np.testing.assert_array_equal(pool(X, "cls"), X[:, 0])
    np.testing.assert_array_equal(pool(X, "last"), X[:, -1])
    np.testing.assert_array_equal(pool(X, "argmax", tokens=TOKENS), X[jnp.arange(3), jnp.array([1, 1, 2])])
    # The last row has no end of text: its last token stands in.
    np.testing.assert_array_equal(pool(X, "eot", tokens=TOKENS, eot_id=1), X[jnp.arange(3), jnp.array([2, 0, 4])])


def test_pooling_errors():
    with pytest.raises(ConfigError, match='"mean" is unknown'):
        pool(X, "mean")
    with pytest.raises(ConfigError, match="needs token ids and eot_id"):
        pool(X, "eot", tokens=TOKENS)


def test_attention_pooling_is_one_probe_that_ignores_order():
    head = AttentionPooling(num_heads=2, mlp_dim=7)
    pooled, variables = jax.jit(head.init_with_output)(jax.random.key(0), X)
    assert pooled.shape == (3, 6) and variables["params"]["probe"].shape == (1, 6)
    changed = jnp.stack([X[0, ::-1], X[1], X[1, ::-1]])   # another order, another neighbour
    np.testing.assert_allclose(jax.jit(head.apply)(variables, changed), pooled[jnp.array([0, 1, 1])], atol=1e-5)

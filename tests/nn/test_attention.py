import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.nn import SelfAttention, attention, attention_weights

B, T, S, H, K = 2, 5, 7, 3, 4
RNG = np.random.default_rng(0)
QUERY, KEY, VALUE, WEIGHT = (jnp.asarray(RNG.normal(size=(B, n, H, K)), jnp.float32) for n in (T, S, S, T))
MASK = RNG.random((B, 1, T, S)) < 0.6
CASES = [dict(), dict(causal=True), dict(mask=MASK), dict(lengths=np.array([3, 7])),
         dict(causal=True, mask=MASK, lengths=np.array([6, 2]), scale=0.3)]


def reference(query, key, value, *, causal=False, mask=None, lengths=None, scale=None):
    """Dense and plain, with the whole mask written out."""
    allowed = np.ones((B, 1, T, S), bool)
    for b, t, s in np.ndindex(B, T, S):
        allowed[b, 0, t, s] = (not causal or s <= t + S - T) and (mask is None or bool(mask[b, 0, t, s])) and (lengths is None or s < int(lengths[b]))
    logits = jnp.einsum("bthk,bshk->bhts", query, key) * (K ** -0.5 if scale is None else scale)
    weights = jax.nn.softmax(jnp.where(allowed, logits, -1e30)) * allowed.any(-1, keepdims=True)
    return jnp.einsum("bhts,bshk->bthk", weights, value)


@pytest.mark.parametrize("case", CASES, ids=lambda c: "+".join(c) or "full")
def test_values_and_gradients_equal_the_plain_formula(case):
    def loss(function):
        return jax.jit(jax.value_and_grad(lambda *a: (WEIGHT * function(*a, **case)).sum(), (0, 1, 2)))(QUERY, KEY, VALUE)
    for a, b in zip(jax.tree.leaves(loss(attention)), jax.tree.leaves(loss(reference))):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


def test_rows_without_keys_give_zeros_and_finite_gradients():
    lengths = jnp.array([0, 7])
    out, pullback = jax.vjp(lambda *a: attention(*a, lengths=lengths), QUERY, KEY, VALUE)
    assert not np.asarray(out[0]).any() and np.asarray(out[1]).any()
    for gradient in pullback(jnp.ones_like(out)):
        assert np.isfinite(gradient).all() and not np.asarray(gradient[0]).any()
    weights = attention_weights(QUERY, KEY, lengths=lengths)
    np.testing.assert_allclose(weights.sum(-1), np.broadcast_to(np.array([0.0, 1.0])[:, None, None], (B, H, T)), atol=1e-6)


def test_weights_give_the_output():
    weights = attention_weights(QUERY, KEY, causal=True)
    np.testing.assert_allclose(jnp.einsum("bhts,bshk->bthk", weights, VALUE), attention(QUERY, KEY, VALUE, causal=True), atol=1e-6)


def test_large_logits_and_low_precision():
    out = attention(1e3 * QUERY, 1e3 * KEY, VALUE)
    assert np.isfinite(out).all()
    half = [x.astype(jnp.bfloat16) for x in (QUERY, KEY, VALUE)]
    out = attention(*half)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), attention(QUERY, KEY, VALUE), atol=0.05)


def test_self_attention_errors_and_masks():
    with pytest.raises(ConfigError, match="num_heads: 4 heads do not divide the width 6"):
        SelfAttention(4).init(jax.random.key(0), jnp.ones((1, 2, 6)))
    with pytest.raises(ValueError, match="four axes"):
        attention(QUERY, KEY, VALUE, mask=jnp.ones((T, S), bool))
    x = jnp.asarray(RNG.normal(size=(1, 4, 6)), jnp.float32)
    layer = SelfAttention(3, causal=True)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    changed = layer.apply(variables, x.at[0, 2].add(1.0))
    np.testing.assert_array_equal(changed[0, :2], y[0, :2])
    assert np.abs(changed[0, 2:] - y[0, 2:]).max() > 1e-3

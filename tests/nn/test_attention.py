import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.nn import SelfAttention, Visibility, attention, attention_weights

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


# Grouped queries, visibility, biases and soft caps; the reference repeats keys and values and writes everything out.
G = 2
QUERY4 = jnp.asarray(RNG.normal(size=(B, T, 4, K)), jnp.float32)
KEY2, VALUE2 = (jnp.asarray(RNG.normal(size=(B, S, G, K)), jnp.float32) for _ in range(2))
SEEN = Visibility(np.array([[-1, 2, 3, 4, 6], [0, 1, 5, 8, -1]]), np.array([[0, 1, 2, -1, 3, 5, 6], [0, -1, 1, 2, 3, 4, 8]]), window=4)
NEW_CASES = {
    "grouped": dict(),
    "visibility": dict(visibility=SEEN, lengths=np.array([7, 5])),
    "bias": dict(bias=(B, 4, T, S), mask=RNG.random((B, 4, T, S)) < 0.7),
    "shared bias": dict(bias=(1, 4, 1, S), scale=1.0, causal=True),
    "bias of keys": dict(bias=(1, 1, T, 1)),
    "soft cap": dict(soft_cap=0.8, causal=True),
    "all": dict(bias=(1, 4, T, S), soft_cap=1.5, visibility=SEEN, scale=0.7),
}


def new_reference(query, key, value, bias, *, soft_cap=None, scale=None, visibility=None, mask=None, causal=False, lengths=None):
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    allowed = jnp.ones((query.shape[0], 1, query.shape[1], key.shape[1]), bool)
    if visibility is not None:
        allowed &= visibility.allowed()
    if mask is not None:
        allowed = allowed & mask
    if lengths is not None:
        allowed &= (np.arange(key.shape[1])[None] < lengths[:, None])[:, None, None]
    if causal:
        allowed &= jnp.tril(jnp.ones(allowed.shape[2:], bool), key.shape[1] - query.shape[1])
    logits = jnp.einsum("bthk,bshk->bhts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits = (logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)) + bias
    weights = jax.nn.softmax(jnp.where(allowed, logits, -1e30)) * allowed.any(-1, keepdims=True)
    return jnp.einsum("bhts,bshk->bthk", weights, value)


def values_and_gradients(function, arrays):
    weight = jnp.asarray(np.random.default_rng(5).normal(size=arrays[0].shape), jnp.float32)
    return jax.tree.leaves(jax.jit(jax.value_and_grad(lambda *a: (weight * function(*a)).sum(), tuple(range(len(arrays)))))(*arrays))


@pytest.mark.parametrize("blocks", [False, True], ids=["at once", "blocks"])
@pytest.mark.parametrize("case", NEW_CASES)
def test_groups_bias_and_soft_cap_equal_the_plain_formula(case, blocks, monkeypatch):
    if blocks:   # of three keys: the last block overlaps the one before it
        monkeypatch.setattr(sys.modules["vlm_jax.nn.attention"], "KEYS_AT_ONCE", 0)
        monkeypatch.setattr(sys.modules["vlm_jax.nn.attention"], "FEW_QUERIES", 0)
        monkeypatch.setattr(sys.modules["vlm_jax.nn.blockwise"], "BLOCK", 3)
    settings = dict(NEW_CASES[case])
    shape = settings.pop("bias", None)
    bias = jnp.zeros((1, 1, 1, 1)) if shape is None else jnp.asarray(RNG.normal(size=shape), jnp.float32)
    arrays = (QUERY4, KEY2, VALUE2) + (() if shape is None else (bias,))
    ours = values_and_gradients(lambda q, k, v, bias=None: attention(q, k, v, bias=bias, **settings), arrays)
    theirs = values_and_gradients(lambda q, k, v, bias=bias: new_reference(q, k, v, bias, **settings), arrays)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, atol=3e-5, rtol=3e-5)
    weights = attention_weights(QUERY4, KEY2, bias=None if shape is None else bias, **settings)
    mixed = jnp.einsum("bhts,bshk->bthk", weights, jnp.repeat(VALUE2, 2, axis=2))
    np.testing.assert_allclose(mixed, new_reference(QUERY4, KEY2, VALUE2, bias, **settings), atol=1e-5)


def test_many_keys_leave_no_array_of_queries_by_keys():
    shapes = [jax.ShapeDtypeStruct((1, 2500, heads, 4), jnp.float32) for heads in (2, 1, 1)]
    positions = jnp.arange(2500)[None]

    def loss(query, key, value):
        return attention(query, key, value, visibility=Visibility(positions, positions, window=100)).sum()

    def largest(jaxpr):
        sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
        inner = [getattr(x, "jaxpr", x) for eqn in jaxpr.eqns for p in eqn.params.values() for x in (p if isinstance(p, (list, tuple)) else [p])]
        return max(sizes + [largest(x) for x in inner if hasattr(x, "eqns")], default=0)
    traced = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*shapes)
    assert largest(traced.jaxpr) < 2500 * 2500 / 2
    kept = jax.eval_shape(lambda *a: jax.vjp(loss, *a)[1], *shapes)
    assert max(leaf.size for leaf in jax.tree.leaves(kept)) <= 2 * 2500 * 4


def test_grouped_heads_are_not_repeated_and_must_divide():
    text = jax.jit(attention).lower(QUERY4, KEY2, VALUE2).as_text()
    assert f"tensor<{B}x4x{S}x{K}xf32>" not in text and f"tensor<{B}x{S}x4x{K}xf32>" not in text
    with pytest.raises(ConfigError, match="2 key and value heads do not divide the 3 query heads; choose num_kv_heads"):
        attention(QUERY, KEY2, VALUE2)
    with pytest.raises(ValueError, match="the visibility is of 5 queries and 7 keys, not of 5 and 6"):
        attention(QUERY4, KEY2[:, :6], VALUE2[:, :6], visibility=SEEN)
    with pytest.raises(ValueError, match="the bias has shape"):
        attention(QUERY4, KEY2, VALUE2, bias=jnp.zeros((T, S)))

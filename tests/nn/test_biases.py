import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.nn import RelativeBias, Visibility, alibi, alibi_slopes, attention, biases, blockwise, positions_of, relative_buckets
from vlm_jax.nn.biases import look_up


@pytest.mark.parametrize("heads, max_bias", [(1, 8), (2, 8), (3, 8), (5, 4), (8, 8), (12, 8), (40, 16)])
def test_alibi_equals_transformers(heads, max_bias):
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    theirs = mpt.build_mpt_alibi_tensor(heads, 9, max_bias).numpy()
    ours = alibi(alibi_slopes(heads, max_bias), np.arange(9)[None])
    np.testing.assert_allclose(ours[0], theirs, rtol=1e-6)


def test_alibi_is_slope_times_distance_to_the_softmax():
    rng, positions = np.random.default_rng(0), np.array([[0, 1, 2, 3, -1]])
    query, key, value = (jnp.asarray(rng.normal(size=(1, 5, 3, 4)), jnp.float32) for _ in range(3))
    slopes, seen = alibi_slopes(3), Visibility(positions, positions)
    distances = slopes[:, None, None] * -np.abs(positions[0][:, None] - positions[0][None])
    np.testing.assert_allclose(attention(query, key, value, visibility=seen, bias=alibi(slopes, positions)),
                               attention(query, key, value, visibility=seen, bias=jnp.asarray(distances, jnp.float32)[None]), atol=1e-6)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (8, 20), (7, 300), (12, 9), (64, 40)])
def test_buckets_equal_transformers(buckets, max_distance, bidirectional):
    torch = pytest.importorskip("torch")
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    relative = torch.arange(-400, 401)
    theirs = t5.T5Attention._relative_position_bucket(relative, bidirectional, buckets, max_distance).numpy()
    ours = jax.jit(lambda q, k: relative_buckets(q, k, buckets=buckets, max_distance=max_distance, bidirectional=bidirectional))(
        np.array([[400]]), np.arange(801)[None])
    np.testing.assert_array_equal(ours[0, 0], theirs)


@pytest.mark.parametrize("keys_at_once", [128, 4, 6])
def test_the_table_is_looked_up_and_learned(monkeypatch, keys_at_once):
    monkeypatch.setattr(biases, "KEYS_AT_ONCE", keys_at_once)
    rng = np.random.default_rng(0)
    table, weight = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), jnp.asarray(rng.normal(size=(2, 3, 5, 6)), jnp.float32)
    buckets = jnp.asarray(rng.integers(0, 8, (2, 5, 6)))

    def loss(function):
        return jax.value_and_grad(lambda t: (weight * function(t)).sum())(table)
    (ours, slope), (theirs, expected) = loss(lambda t: look_up(t, buckets)), loss(lambda t: jnp.moveaxis(t[buckets], -1, 1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(slope, expected, atol=1e-5)


@pytest.mark.parametrize("heads, groups, bidirectional", [(3, 3, True), (6, 2, False)])
def test_in_blocks_a_relative_bias_is_never_whole_and_is_as_if_it_were(monkeypatch, heads, groups, bidirectional):
    """37 keys in blocks of 16, rows with padding before and within: values, and gradients of queries, keys and the table."""
    rng = np.random.default_rng(0)
    valid = rng.random((2, 37)) < 0.8
    positions = positions_of(jnp.asarray(valid))
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    query, key, value, weight = draw(2, 37, heads, 5), draw(2, 37, groups, 5), draw(2, 37, groups, 5), draw(2, 37, heads, 5)
    seen = Visibility(positions, positions, causal=not bidirectional)

    def loss(table, query, key, dense):
        bias = RelativeBias(table, positions, positions, 20, bidirectional)
        return (weight * attention(query, key, value, visibility=seen, bias=bias.dense() if dense else bias)).sum()
    table = draw(8, heads)
    expected = jax.value_and_grad(loss, (0, 1, 2))(table, query, key, True)
    monkeypatch.setattr(sys.modules["vlm_jax.nn.attention"], "KEYS_AT_ONCE", 20)   # the package has a function of that name
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    monkeypatch.setattr(RelativeBias, "dense", _refuse_more_than(16, RelativeBias.dense))
    found = jax.value_and_grad(loss, (0, 1, 2))(table, query, key, False)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), found, expected)


def _refuse_more_than(keys, dense):
    def checked(self):
        assert self.key_position.shape[1] <= keys
        return dense(self)
    return checked


def test_errors():
    with pytest.raises(ConfigError, match="choose at least 2 and a max_distance above 16"):
        relative_buckets(np.zeros((1, 1), int), np.zeros((1, 1), int), buckets=32, max_distance=16, bidirectional=False)
    with pytest.raises(ConfigError, match="0 heads"):
        alibi_slopes(0)

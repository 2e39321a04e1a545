import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.nn import Visibility, alibi, alibi_slopes, attention, relative_bias, relative_buckets


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


def test_the_table_is_looked_up_and_learned():
    rng = np.random.default_rng(0)
    table, weight = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32), jnp.asarray(rng.normal(size=(2, 3, 5, 6)), jnp.float32)
    buckets = jnp.asarray(rng.integers(0, 8, (2, 5, 6)))

    def loss(function):
        return jax.value_and_grad(lambda t: (weight * function(t)).sum())(table)
    (ours, slope), (theirs, expected) = loss(lambda t: relative_bias(t, buckets)), loss(lambda t: jnp.moveaxis(t[buckets], -1, 1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(slope, expected, atol=1e-5)


def test_errors():
    with pytest.raises(ConfigError, match="choose at least 2 and a max_distance above 16"):
        relative_buckets(np.zeros((1, 1), int), np.zeros((1, 1), int), buckets=32, max_distance=16, bidirectional=False)
    with pytest.raises(ConfigError, match="0 heads"):
        alibi_slopes(0)

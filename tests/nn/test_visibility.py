from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn import Visibility, attention, positions_of


def by_hand(v, b, t, s):
    query, key = int(v.query_position[b, t]), int(v.key_position[b, s])
    if query < 0 or key < 0 or (v.query_segment is not None and v.query_segment[b, t] != v.key_segment[b, s]):
        return False
    prefix = v.key_prefix is not None and bool(v.key_prefix[b, s])
    both = prefix and v.query_prefix is not None and bool(v.query_prefix[b, t])
    near = v.window is None or v.window < 1 or abs(query - key) < v.window or both
    return near and (not v.causal or key <= query or prefix)


@given(st.integers(0, 2 ** 32 - 1), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([None, 0, 1, 2, 4]))
def test_allowed_equals_the_rule_for_each_pair(seed, causal, segments, prefix, query_prefix, window):
    rng = np.random.default_rng(seed)
    positions = [rng.integers(-1, 6, (2, n)) for n in (5, 7)]
    settings = dict(window=window, causal=causal)
    if segments:
        settings.update(query_segment=rng.integers(0, 2, (2, 5)), key_segment=rng.integers(0, 2, (2, 7)))
    if prefix:
        settings.update(key_prefix=rng.random((2, 7)) < 0.4, query_prefix=rng.random((2, 5)) < 0.5 if query_prefix else None)
    visibility = Visibility(*positions, **settings)
    allowed = visibility.allowed()
    assert allowed.shape == (2, 1, 5, 7)
    for b, t, s in np.ndindex(2, 5, 7):
        assert bool(allowed[b, 0, t, s]) == by_hand(visibility, b, t, s)
    part = visibility.allowed(slice(1, 4), slice(2, None))
    np.testing.assert_array_equal(part, allowed[:, :, 1:4, 2:])


def test_the_window_may_be_data_and_segments_come_in_pairs():
    positions = jnp.arange(6)[None]
    allowed = jax.jit(lambda window: Visibility(positions, positions, window=window).allowed())
    np.testing.assert_array_equal(allowed(jnp.asarray(2))[0, 0].sum(1), [1, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(allowed(jnp.asarray(0))[0, 0].sum(1), [1, 2, 3, 4, 5, 6])
    with pytest.raises(ValueError, match="give both or neither"):
        Visibility(positions, positions, query_segment=positions).allowed()


ATTEND = jax.jit(lambda q, k, v, valid: attention(q, k, v, visibility=Visibility(positions_of(valid), positions_of(valid), window=3)))


@given(st.lists(st.booleans(), min_size=9, max_size=9).filter(any))
def test_padding_anywhere_changes_no_result(valid):
    """Rows with padding between, before and after their tokens read what the tokens alone do, and nothing at the padding."""
    rng, valid = np.random.default_rng(0), np.array([valid])
    count = int(valid.sum())
    arrays = [rng.normal(size=(1, 9, heads, 4)).astype(np.float32) for heads in (4, 2, 2)]
    padded = [np.where(valid[:, :, None, None], np.zeros_like(x), 7.0).astype(np.float32) for x in arrays]
    for x, y in zip(padded, arrays):
        x[valid] = y[0, :count]
    whole = ATTEND(*arrays, jnp.arange(9)[None] < count)
    out = ATTEND(*padded, valid)
    np.testing.assert_allclose(out[0][valid[0]], whole[0, :count], atol=1e-6)
    assert not np.asarray(out)[~valid].any()

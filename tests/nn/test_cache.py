from functools import partial
import math
import re

from flax import linen as nn
from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.nn import Cache, Linear, Stack, Visibility, attention
from vlm_jax.sharding import make_mesh

L, B, S, H, G, K = 2, 2, 9, 4, 2, 3
D = H * K


class Block(nn.Module):
    """Attention alone, through the cache where there is one."""

    @nn.compact
    def __call__(self, x, slots=None, positions=None, state=None, layer=None, window=None):
        query, key, value = (Linear((heads, K), name=name)(x) for name, heads in (("query", H), ("key", G), ("value", G)))
        if state is None:
            visibility = Visibility(positions, positions, window=window)
        else:
            state, key, value = state.write(layer, key, value, slots)
            visibility = Visibility(slots.position, slots.key_position, window=window)
        x = x + Linear(D, contract=2, name="out")(attention(query, key, value, visibility=visibility))
        return (x, {}) if state is None else (x, {}, state)


PARAMS = Stack(Block, L).init(jax.random.key(0), jnp.zeros((1, 1, D)), positions=jnp.zeros((1, 1), int))
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, S, D)), jnp.float32)


@partial(jax.jit, static_argnames=("window", "scan"))
def uncached(x, valid, window=None, scan=True):
    positions = jnp.where(valid, jnp.cumsum(valid, 1) - 1, -1)
    return Stack(Block, L, scan).apply(PARAMS, x, positions=positions, window=window)[0]


@partial(jax.jit, static_argnames=("window", "scan", "fresh"))
def extend(cache, x, valid, window=None, scan=True, fresh=False):
    cache, slots = cache.extend(valid, fresh=fresh)
    x, _, cache = Stack(Block, L, scan).apply(PARAMS, x, slots=slots, state=cache, window=window)
    return x, cache


def create(length=S, batch=B, **options):
    return Cache.create(L, batch, length, G, K, **options)


def fill(cache, x, valid, sizes, **options):
    """The outputs of tokens given to the cache in pieces of these sizes."""
    outputs, begin = [], 0
    for size in sizes:
        out, cache = extend(cache, x[:, begin:begin + size], valid[:, begin:begin + size], fresh=options.pop("fresh", False), **options)
        outputs.append(out)
        begin += size
    return np.concatenate(outputs, 1), cache


@settings(max_examples=10)
@given(st.integers(0, 2 ** 32 - 1), st.sampled_from([(5, 1, 1, 1, 1), (5, 4), (4, 1, 4)]), st.booleans(), st.booleans(), st.sampled_from([None, 3]))
def test_pieces_with_padding_equal_the_whole_without_cache(seed, sizes, fresh, split, window):
    valid = np.random.default_rng(seed).random((B, S)) < 0.7
    valid[0] = True
    cache = create().unstacked() if split else create()
    out, cache = fill(cache, X, valid, sizes, window=window, scan=not split, fresh=fresh)
    np.testing.assert_allclose(out[valid], np.asarray(uncached(X, valid, window=window))[valid], atol=1e-5)
    counts = valid.sum(1)
    np.testing.assert_array_equal(cache.next_position, counts)
    np.testing.assert_array_equal(cache.index, counts)
    np.testing.assert_array_equal(cache.position, np.where(np.arange(S) < counts[:, None], np.arange(S), -1))   # padding takes no slot


@pytest.mark.parametrize("sizes", [(1,) * 7, (5, 1, 1), (2, 3, 2)], ids=str)
def test_a_ring_of_the_window_equals_the_whole(sizes):
    x, valid = X[:, :7], np.ones((B, 7), bool)
    valid[1, 2] = False
    out, cache = fill(create(3, ring=True), x, valid, sizes, window=3, fresh=sizes[0] > 3)
    np.testing.assert_allclose(out[valid], np.asarray(uncached(x, valid, window=3))[valid], atol=1e-5)
    assert sorted(np.asarray(cache.position[0])) == [4, 5, 6] and sorted(np.asarray(cache.position[1])) == [3, 4, 5]


@pytest.mark.parametrize("options", [dict(), dict(ring=True)], ids=["plain", "ring"])
def test_keep_takes_back_the_newest_tokens(options):
    """What a draft got wrong is as if it had never been written."""
    valid = np.ones((B, 8), bool)
    window, length = (3, 6) if options else (None, S)
    _, cache = fill(create(length, **options), X[:, :3], valid[:, :3], (1, 1, 1), window=window)
    _, cache = extend(cache, X[:, 5:9], np.array([[1, 1, 1, 1], [0, 1, 1, 1]], bool), window=window)
    cache = cache.keep(jnp.array([2, 0]))
    np.testing.assert_array_equal(cache.next_position, [5, 3])
    np.testing.assert_array_equal(cache.written, [2, 0])
    out, cache = extend(cache, X[:, 3:5], valid[:, :2], window=window)
    rows = [np.concatenate([X[0, :3], X[0, 5:7], X[0, 3:5]]), X[1, :5]]
    for row, tokens, answer in zip(rows, (7, 5), out):
        whole = uncached(row[None], np.ones((1, tokens), bool), window=window)
        np.testing.assert_allclose(answer, whole[0, -2:], atol=1e-5)


def test_rows_gather_everything_and_invalid_tokens_change_nothing():
    valid = np.array([[True] * 5, [True, True, False, False, True]])
    _, cache = extend(create(5, encoded=(jnp.arange(L * B * 2.0).reshape(L, B, 2, 1, 1), jnp.zeros((L, B, 2, 1, 1)), jnp.array([[1, 0], [1, 1]], bool))),
                      X[:, :5], valid)
    picked = cache.rows(jnp.array([1, 1, 0]))
    np.testing.assert_array_equal(picked.key, cache.key[:, [1, 1, 0]])
    np.testing.assert_array_equal(picked.position, cache.position[jnp.array([1, 1, 0])])
    np.testing.assert_array_equal(picked.read_encoded(1)[0][:, 0, 0, 0], [6, 6, 4])
    np.testing.assert_array_equal(jax.tree.leaves(picked.unstacked().rows(jnp.array([2, 0])).stacked())[0], cache.key[:, [0, 1]])
    _, after = extend(cache, X[:, 5:6], np.array([[False], [False]]))   # row 0 is full: a finished row goes on with padding
    for old, new in zip(jax.tree.leaves(cache.replace(written=after.written)), jax.tree.leaves(after)):
        used = np.asarray(cache.position) >= 0
        np.testing.assert_array_equal(old if old.ndim < 5 else np.asarray(old)[:, used] if old.shape[2] == 5 else old,
                                      new if new.ndim < 5 else np.asarray(new)[:, used] if new.shape[2] == 5 else new)


def test_lengths_are_checked():
    with pytest.raises(ConfigError, match="cache: 6 tokens do not fit into its 5 slots; make cache_length at least 6"):
        create(5).extend(np.ones((B, 6), bool))
    with pytest.raises(ConfigError, match="choose a positive cache_length"):
        create(0)
    assert create(5).length == 5


def test_facts_about_tokens_are_placed_where_their_keys_are():
    valid = np.array([[True, False, True], [False, True, True]])
    facts = np.array([[5, 9, 6], [9, 7, 8]])
    cache, slots = create(4).extend(valid)
    np.testing.assert_array_equal(slots.place(facts, -1), [[5, 6, -1, -1], [7, 8, -1, -1]])
    _, slots = cache.extend(valid, positions=np.array([[10, 0, 12], [0, 11, 13]]))
    np.testing.assert_array_equal(slots.place(facts, -1), [[-1, -1, 5, 6], [-1, -1, 7, 8]])
    np.testing.assert_array_equal(slots.key_position, [[0, 1, 10, 12], [0, 1, 11, 13]])
    np.testing.assert_array_equal(create(4).extend(valid, fresh=True)[1].place(facts), facts)
    np.testing.assert_array_equal(create(4, ring=True).extend(valid)[1].place(facts, -1)[:, 4:], facts)


def large_copies(cache, batch, scan):
    """Lines of the optimised program of ten steps with a donated cache that copy or transpose as much as a layer's keys."""
    def step(carry):
        count, x, cache = carry
        x, cache = extend(cache, x, jnp.ones((batch, 1), bool), scan=scan)
        return count + 1, x, cache

    def loop(cache, x):
        return jax.lax.while_loop(lambda carry: carry[0] < 10, step, (0, x, cache))
    text = jax.jit(loop, donate_argnums=0).lower(cache, jnp.ones((batch, 1, D))).compile().as_text()
    found = [(line, re.search(r"= f32\[([\d,]+)\]\S* (copy|transpose)\(", line)) for line in text.splitlines()]
    return [(line.strip(), match[2]) for line, match in found if match and math.prod(map(int, match[1].split(","))) >= batch * 64 * G * K]


@pytest.mark.parametrize("batch", [1, 8, 33])
@pytest.mark.parametrize("form", ["scan", "unrolled", "layers apart"])
def test_steps_write_in_place(batch, form):
    cache = create(64, batch)
    if form == "layers apart":   # nor is anything laid out anew for the products, which on CPUs read the arrays as they are
        assert not large_copies(cache.unstacked(), batch, False)
        return
    whole = f"f32[{L},{batch},64,{G},{K}]"
    assert not [line for line, kind in large_copies(cache, batch, form == "scan") if kind == "copy" and f"= {whole}" in line]


def test_rows_and_heads_split_over_a_mesh_give_the_same():
    valid = np.ones((8, S), bool)
    valid[3, :2] = False
    x = jnp.concatenate([X, X + 1, 2 * X, -X])
    plain, _ = fill(create(batch=8), x, valid, (7, 1, 1))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        cache = create(batch=8)
        cache = jax.device_put(cache, cache.shardings(mesh))
        assert cache.key.sharding.shard_shape(cache.key.shape) == (L, 2, S, G // 2, K)
        split, cache = fill(cache, x, valid, (7, 1, 1))
        assert cache.key.sharding.shard_shape(cache.key.shape) == (L, 2, S, G // 2, K)
        text = extend.lower(cache, x[:, :2], valid[:, :2]).compile().as_text()
    np.testing.assert_allclose(split[valid], plain[valid], atol=1e-5)
    assert not [line for line in text.splitlines() if "all-gather(" in line and f",{S}," in line.split("all-gather(")[0]]

"""Digests: the same on every layout, different for every change."""
from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from vlm_jax.training import digests as digests_module
from vlm_jax.training.digests import checksum, digest, digests, flat_index, host_digest

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint8", "int16", "bool", "int4", "complex64"]


def sample(dtype, shape=(8, 6)):
    values = np.random.default_rng(0).integers(0, 7, shape)
    return jnp.asarray(values).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_changed_or_moved_element_shows(dtype):
    x = sample(dtype)
    changed = x.at[3, 5].set(jnp.where(x[3, 5] == 0, 1, 0).astype(x.dtype))
    assert digest(x) != digest(changed)
    assert digest(x) != digest(x[::-1])
    assert digest(x) == digest(jnp.array(x, copy=True))
    assert len(digest(x)) == 16
    assert host_digest(np.asarray(x)) == digest(x)


def test_every_single_bit_of_a_float_counts():
    x = np.array([1.5, -2.0, 3.25], np.float32)
    seen = {digest(x)}
    for bit in range(32):
        flipped = x.copy()
        flipped.view(np.uint32)[1] ^= np.uint32(1 << bit)
        seen.add(digest(flipped))
    assert len(seen) == 33


@pytest.mark.parametrize("shape, spec", [((8, 1), P("a")), ((2, 4), P("a", "b")), ((2, 4), P("b", "a")), ((1, 8), P(None)), ((4, 2), P(("a", "b")))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_agree(shape, spec, dtype):
    x = sample(dtype, (8, 8, 3))
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(shape), ("a", "b"))
    assert digest(jax.device_put(x, NamedSharding(mesh, spec))) == digest(np.asarray(x)) == digest(x)


def test_nothing_is_gathered():
    """Devices exchange sums, not the array."""
    mesh = Mesh(np.array(jax.devices()[:8]), ("a",))
    x = jax.ShapeDtypeStruct((64, 48), jnp.float32, sharding=NamedSharding(mesh, P("a")))
    text = digests_module._compiled(mesh).lower(x).compile().as_text()
    assert "[64,48]" not in text and "[8,48]" in text


def test_scalars_and_empty_arrays():
    assert digest(3) == digest(jnp.int32(3)) == digest(np.int64(3)) != digest(4)
    assert digest(True) != digest(False)
    assert digest(jnp.zeros((0, 3))) == "0" * 16
    assert digest(0.0) != digest(-0.0)
    assert digest(jnp.nan) == digest(jnp.nan)
    assert digests({"a": 1, "b": jnp.zeros((0,))}) == {"a": digest(1), "b": "0" * 16}


@given(st.lists(st.integers(1, 2**20), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_flat_index_is_exact_beyond_32_bits(shape, random):
    if np.prod([float(n) for n in shape]) >= 2**64:
        shape = shape[:3]
    coordinates = [random.choice([0, n - 1, random.randrange(n)]) for n in shape]
    expected = 0
    for coordinate, size in zip(coordinates, shape):
        expected = expected * size + coordinate
    low, high = flat_index([jnp.uint32(c) for c in coordinates], shape)
    assert (int(high) << 32) + int(low) == expected


def test_large_array_by_shape_only():
    """An array of more than 2^32 elements is traced with two index words; nothing of that size is made."""
    text = jax.jit(digests_module._lanes).lower(jax.ShapeDtypeStruct((3, 2**31), jnp.int8)).as_text()
    assert "3x2147483648" in text
    low, high = flat_index([jnp.uint32(2), jnp.uint32(2**31 - 1)], (3, 2**31))
    assert (int(high) << 32) + int(low) == 3 * 2**31 - 1


def test_checksum_ignores_order_and_containers():
    assert checksum({"a": 1, "b": (1, 2)}) == checksum({"b": [1, 2], "a": 1})
    assert checksum({"a": 1}) != checksum({"a": 2})


@pytest.mark.parametrize("size", [1, 65535, 65536, 65537, 200_003])
def test_the_host_computes_the_same_in_pieces(size):
    x = np.random.default_rng(size).normal(size=size).astype(np.float32)
    assert host_digest(x) == digest(x)
    assert host_digest(np.asfortranarray(x.reshape(1, -1).T)) == digest(x.reshape(-1, 1))
    assert host_digest(x[::-1]) == digest(x[::-1].copy())


def test_the_host_counts_positions_beyond_32_bits():
    first = 5 * 2**32 + 3 * 2**20
    low, high = first % 2**32, first // 2**32
    position = np.uint32((low * int(digests_module._POSITION_LOW) + high * int(digests_module._POSITION_HIGH) + int(digests_module._SEED)) % 2**32)
    assert digests_module._offset(first) == position

"""The kernel, interpreted, against the arithmetic of `attention`, and when it is taken."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.language.embeddings import token_positions, visibility_of
from vlm_jax.nn import kernels
from vlm_jax.nn.attention import attention
from vlm_jax.training.flops import count_flops

TOKENS = 260   # three blocks, the last of which is mostly padding


def arrays(heads=4, groups=2, tokens=TOKENS, dtype=jnp.float32, width=8):
    keys = jax.random.split(jax.random.key(0), 4)
    return [3 * jax.random.normal(key, (2, tokens, n, width), dtype) for key, n in zip(keys, (heads, groups, groups, heads))]


def facts(name):
    """Visibility as models make it."""
    valid = np.ones((2, TOKENS), bool)
    if name in ("ordered", "packed and padded"):
        valid[0, :7], valid[0, 50:60], valid[1, 200:] = False, False, False
    segments = np.repeat([[1, 2, 3]], 2, 0).repeat([100, 60, TOKENS - 160], 1)
    segments[1] = -1
    inputs = {"segment_ids": jnp.asarray(segments)} if name.startswith("packed") else {}
    inputs |= {} if valid.all() else {"valid": jnp.asarray(valid)}
    return visibility_of(token_positions(jnp.asarray(valid), inputs.get("segment_ids")), inputs), valid


CASES = {
    "full": dict(groups=4), "causal": dict(causal=True), "causal, one head of keys": dict(causal=True, groups=1, soft_cap=2.0),
    "ordered": dict(facts="ordered"), "packed": dict(facts="packed", scale=0.2), "packed and padded": dict(facts="packed and padded"),
    "packed, window": dict(facts="packed", window=37), "window both ways": dict(facts="full", window=37, both=True),
    "padded, both ways": dict(facts="ordered", both=True), "window 0": dict(facts="full", window=0),
}
SLOW = ("packed", "causal", "window both ways", "window 0", "padded, both ways")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES])
def test_the_kernel_computes_attention(name):
    case = dict(CASES[name])
    *inputs, cotangent = arrays(groups=case.pop("groups", 2))
    valid = np.ones((2, TOKENS), bool)
    if "facts" in case:
        visibility, valid = facts(case.pop("facts"))
        case["visibility"] = visibility.replace(window=case.pop("window", None), causal=not case.pop("both", False))

    def both(function, **extra):
        out, pull = jax.vjp(lambda *x: function(*x, **case, **extra), *inputs)
        return out, *pull(cotangent)
    expected, found = jax.jit(lambda: both(attention))(), jax.jit(lambda: both(kernels.attend, interpret=True))()
    for ours, theirs in zip(found, expected):
        assert float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max()) < 1e-5
    for x in found:
        assert not np.asarray(x)[~valid].any(), "padding reads, and is read by, nobody"


@pytest.mark.parametrize("groups", [2, 1])
def test_rows_and_heads_are_split(groups, monkeypatch):
    *inputs, cotangent = arrays(heads=2, groups=groups, tokens=128)
    visibility = visibility_of(token_positions(jnp.ones((2, 128), bool)), {"segment_ids": jnp.arange(256).reshape(2, 128) // 50})

    def loss(*x):
        return (kernels.attend(*x, visibility=visibility, interpret=True) * cotangent).sum()
    expected = jax.grad(lambda *x: (attention(*x, visibility=visibility) * cotangent).sum(), (0, 1, 2))(*inputs)
    with jax.set_mesh(jax.make_mesh((2, 1, 2), ("data", "fsdp", "tensor"), devices=jax.devices()[:4], axis_types=(jax.sharding.AxisType.Auto,) * 3)):
        text = str(jax.make_jaxpr(loss)(*inputs))
        found = jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)
    assert "shard_map" in text
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(jnp.abs(theirs).max()))


@pytest.fixture
def tpu(monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def shapes(tokens=1024, heads=4, groups=2, keys=None, dtype=jnp.bfloat16, rows=2):
    return [jax.ShapeDtypeStruct((rows, n, h, 128), dtype) for n, h in ((tokens, heads), (keys or tokens, groups), (keys or tokens, groups))]


def test_it_is_taken_where_what_tokens_read_is_known(tpu):
    assert kernels.fits(*shapes())
    assert not kernels.fits(*shapes(512)) and not kernels.fits(*shapes(keys=2048)) and not kernels.fits(*shapes(dtype=jnp.float32))
    assert not kernels.fits(*shapes(), softmax_dtype="bfloat16")
    for name in ("mask", "bias", "lengths"):
        assert not kernels.fits(*shapes(), **{name: jnp.ones(1)})
    valid = jnp.ones((2, 1024), bool)

    def seen(window=None, **inputs):
        return kernels.fits(*shapes(), visibility=visibility_of(token_positions(valid), inputs).replace(window=window))
    assert seen() and seen(valid=valid) and seen(segment_ids=valid) and seen(window=5)
    assert not seen(positions=valid) and not seen(prefix=valid) and not seen(window=5, valid=valid) and not seen(window=jnp.asarray(5))
    assert not kernels.fits(*shapes(), visibility=visibility_of(token_positions(valid)))


def test_it_is_not_taken_elsewhere(monkeypatch):
    assert not kernels.fits(*shapes()), "on a CPU"
    monkeypatch.setattr(kernels, "platform", lambda: "tpu")
    assert not kernels.fits(*shapes()), "eight devices, and no mesh that says how arrays lie on them"


@pytest.mark.parametrize("sizes, heads, groups, taken", [((2, 1, 2, 1), 4, 2, True), ((2, 1, 2, 1), 4, 1, True), ((1, 2, 1, 1), 3, 3, True),
                                                         ((2, 1, 2, 1), 3, 3, False), ((4, 1, 2, 1), 4, 2, False), ((1, 1, 1, 2), 4, 2, False)])
def test_on_a_mesh(tpu, sizes, heads, groups, taken):
    names, kinds = ("data", "fsdp", "tensor", "sequence"), (jax.sharding.AxisType.Auto,) * 4
    with jax.set_mesh(jax.make_mesh(sizes, names, devices=jax.devices()[:np.prod(sizes)], axis_types=kinds)):
        assert kernels.fits(*shapes(heads=heads, groups=groups)) == taken


def test_attention_takes_it_and_its_work_is_counted(tpu):
    query, key, value = shapes(heads=2, groups=1, rows=3)
    text = str(jax.make_jaxpr(lambda *x: attention(*x, causal=True))(query, key, value))
    assert "splash_mha_fwd" in text
    assert count_flops(lambda *x: attention(*x, causal=True), query, key, value) == 2 * 2 * 3 * 2 * 1024 * 1024 * 128

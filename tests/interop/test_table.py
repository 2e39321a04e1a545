"""Weight tables: transforms and their inverses, stacking, what does not fit, and parameters that go straight to their devices."""
import jax
from jax.sharding import NamedSharding, PartitionSpec
import ml_dtypes
import numpy as np
import pytest

from vlm_jax.errors import CheckpointError
from vlm_jax.interop import transforms as T
from vlm_jax.interop.filling import Leaf
from vlm_jax.interop.safetensors import open_file, write_file
from vlm_jax.interop.table import Arrays, Ignored, Row, Tied, read, write
from vlm_jax.sharding import make_mesh

RNG = np.random.default_rng(0)
HEADS, GROUPS, SIZE, WIDTH, LAYERS = 4, 2, 3, 10, 3


def numbers(*shape, dtype=np.float32):
    return RNG.normal(size=shape).astype(dtype)


TRANSFORMS = {
    "linear": (T.linear, [(5, 7)], [(7, 5)]), "heads_out": (T.heads_out(4), [(12, 10)], [(10, 4, 3)]), "heads_in": (T.heads_in(4), [(10, 12)], [(4, 3, 10)]),
    "heads_bias": (T.heads_bias(4), [(12,)], [(4, 3)]), "heads_out_plain": (T.heads_out_plain(4), [(10, 12)], [(10, 4, 3)]),
    "heads_in_plain": (T.heads_in_plain(4), [(12, 10)], [(4, 3, 10)]), "conv": (T.conv_patches, [(6, 3, 2, 4)], [(2, 4, 3, 6)]),
    "linear_patches": (T.linear_patches(2, 3), [(6, 12)], [(2, 2, 3, 6)]), "scalar": (T.scalar, [(1,)], [()]), "first": (T.first_axis, [(1, 5)], [(5,)]),
    "qkv": (T.qkv(4, 3, 2), [(24, 10)], [(10, 4, 3), (10, 2, 3), (10, 2, 3)]), "qkv_bias": (T.qkv_bias(4, 3, 2), [(24,)], [(4, 3), (2, 3), (2, 3)]),
    "qkv_plain": (T.qkv_plain(4, 3), [(10, 36)], [(10, 4, 3)] * 3), "interleaved": (T.qkv_interleaved(4), [(36, 10)], [(10, 4, 3)] * 3),
    "interleaved_bias": (T.qkv_interleaved_bias(4), [(36,)], [(4, 3)] * 3), "reshape": (T.reshape((2, -1), (-1,)), [(2, 3)], [(6,)]),
    "chain": (T.chain(T.first_axis, T.linear), [(1, 5, 7)], [(7, 5)]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_inverse(name):
    transform, theirs, ours = TRANSFORMS[name]
    given = [numbers(*shape, dtype=ml_dtypes.bfloat16) for shape in theirs]
    made = T.as_tuple(transform.to_ours(*given))
    assert [array.shape for array in made] == ours
    back = T.as_tuple(transform.to_theirs(*made))
    for one, other in zip(back, given, strict=True):
        assert one.dtype == other.dtype and np.ascontiguousarray(one).tobytes() == other.tobytes()


def test_a_fused_projection_keeps_its_meaning():
    weight, x = numbers(36, 10), numbers(10)
    query, key, value = T.qkv_interleaved(4).to_ours(weight)
    heads = (weight @ x).reshape(4, 3, 3)      # head, query | key | value, size
    for number, kernel in enumerate((query, key, value)):
        np.testing.assert_allclose(np.einsum("d,dhk->hk", x, kernel), heads[:, number], rtol=1e-5)


ROWS = [Row("h.{i}.w.weight", "blocks/w/kernel", T.linear),
        Row("h.{i}.qkv", ("blocks/q/kernel", "blocks/k/kernel", "blocks/v/kernel"), T.qkv(HEADS, SIZE, GROUPS)),
        Row(("wa", "wb"), "joined", T.Transform(lambda a, b: np.concatenate([a, b]), lambda x: (x[:4], x[4:]))), Row("emb", "embedding"),
        Tied("head", "emb"), Ignored(r"h\.\d+\.mask")]


def theirs():
    tensors = {f"h.{i}.w.weight": numbers(6, WIDTH) for i in range(LAYERS)} | {f"h.{i}.qkv": numbers((HEADS + 2 * GROUPS) * SIZE, WIDTH) for i in range(LAYERS)}
    return tensors | {"wa": numbers(4, 2), "wb": numbers(4, 2), "emb": numbers(16, 8)}


def shapes():
    sizes = {"blocks": {"w": {"kernel": (LAYERS, WIDTH, 6)}, "q": {"kernel": (LAYERS, WIDTH, HEADS, SIZE)}, "k": {"kernel": (LAYERS, WIDTH, GROUPS, SIZE)},
                        "v": {"kernel": (LAYERS, WIDTH, GROUPS, SIZE)}}, "joined": (8, 2), "embedding": (16, 8)}
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, np.float32), sizes, is_leaf=lambda x: isinstance(x, tuple))


def test_there_and_back_through_a_file(tmp_path):
    tensors = theirs()
    write_file(tmp_path / "a.safetensors", {**tensors, "head": tensors["emb"], "h.0.mask": np.ones(2)})
    params = read(ROWS, open_file(tmp_path / "a.safetensors"), shapes())
    np.testing.assert_array_equal(params["blocks"]["w"]["kernel"][1], tensors["h.1.w.weight"].T)
    made = write(ROWS, params)
    assert set(made) == set(tensors)
    for name, value in tensors.items():
        found = made[name].compute()
        assert found.shape == made[name].shape and found.dtype == made[name].dtype and np.array_equal(found, value), name


def test_older_names_and_prefixes():
    tensors = theirs()
    older = {f"base.{name.replace('h.', 'layer.', 1)}": value for name, value in tensors.items()}
    rows = [Row(f"base.{row.theirs}", row.ours, row.transform) if isinstance(row, Row) and isinstance(row.theirs, str)
            else Row(("base.wa", "base.wb"), row.ours, row.transform) for row in ROWS[:4]]
    one = read(rows, Arrays(older), shapes(), prefix="base.", renames=[(r"^(base\.)?layer\.", r"\1h.")])
    two = read(rows, Arrays({name.removeprefix("base."): value for name, value in older.items()}), shapes(), prefix="base.",
               renames=[(r"^(base\.)?layer\.", r"\1h.")])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, two))


@pytest.mark.parametrize("fsdp, tensor", [(4, 2), (8, 1)])
def test_straight_to_the_devices(fsdp, tensor):
    mesh = make_mesh(data=1, fsdp=fsdp, tensor=tensor)
    specs = {"blocks": {"w": {"kernel": PartitionSpec(None, "tensor", None)}, "q": {"kernel": PartitionSpec(None, None, "fsdp" if fsdp == 4 else None)},
                        "k": {"kernel": PartitionSpec(None, None, "tensor")}, "v": {"kernel": PartitionSpec()}},
             "joined": PartitionSpec("fsdp"), "embedding": PartitionSpec(("fsdp", "tensor"))}
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    tensors = theirs()
    whole, parts = read(ROWS, Arrays(tensors), shapes()), read(ROWS, Arrays(tensors), shapes(), shardings)
    for one, other, sharding in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), jax.tree.leaves(shardings), strict=True):
        assert other.sharding == sharding and np.array_equal(one, other)
    half = read(ROWS, Arrays(tensors), shapes(), shardings, "bfloat16")
    assert half["embedding"].dtype == ml_dtypes.bfloat16 and np.array_equal(half["embedding"], tensors["emb"].astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize("shape, layer", [((3, 40, 9), True), ((50, 7), False), ((5,), False), ((4, 6), True), ((), False), ((4,), True)])
def test_on_an_accelerator_parts_are_written_into_the_array(shape, layer, monkeypatch):
    """The way of accelerators, taken here on a CPU device."""
    from vlm_jax.interop import filling
    monkeypatch.setattr(filling, "PIECE_BYTES", 64)
    leaf = Leaf(shape, np.float32, jax.sharding.SingleDeviceSharding(jax.devices()[0]), on_host=False)
    value = np.asarray(numbers(*shape[::-1])).T
    for number in range(shape[0]) if layer else [None]:
        leaf.put(number, value if number is None else value[number])
    np.testing.assert_array_equal(leaf.finish(), value)


def test_what_does_not_fit():
    tensors = theirs()

    def fails(changed, message, rows=ROWS, given=None):
        with pytest.raises(CheckpointError, match=message) as error:
            read(rows, Arrays(changed), shapes() if given is None else given)
        assert "\n" not in str(error.value)

    fails({name: value for name, value in tensors.items() if name != "wb"} | {"wbx": tensors["wb"]}, "1 tensors are missing: 'wb'. Did you mean \"wbx\"")
    fails({**tensors, "h.3.w.weight": tensors["wa"]}, "1 tensors are not consumed: 'h.3.w.weight'. Did you mean")
    fails({**tensors, "h.2.qkv": numbers(5, 5)}, r"'h.2.qkv' .*does not fit|'h.2.qkv' gives")
    fails({**tensors, "head": tensors["emb"] + 1}, "'head' differs from 'emb'")
    fails({**tensors, "h.1.w.weight": tensors["h.1.w.weight"].astype(np.float16)}, "has dtype float16, other layers have float32")
    fails(tensors, "no row for 'embedding'", ROWS[:3])
    fails(tensors, "two rows for embedding", [*ROWS, Row("x", "embedding")])
    fails(tensors, "row for embeding, which the model does not have. Did you mean \"embedding\"", [*ROWS[:3], Row("emb", "embeding")])
    assert read(ROWS, Arrays({**tensors, "head": tensors["emb"].copy()}), shapes())["embedding"].shape == (16, 8)

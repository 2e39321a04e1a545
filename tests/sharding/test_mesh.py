"""The mesh, the part of a process, and batches on devices."""
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec as P
import numpy as np
import pytest

from vlm_jax.errors import ConfigError, DataError
from vlm_jax.sharding import batch_sharding, make_mesh, process_part, put_batch, replicated
from vlm_jax.sharding.mesh import AXES


def test_the_free_axis_takes_the_rest():
    mesh = make_mesh(fsdp=2, tensor=2)
    assert dict(mesh.shape) == dict(data=2, fsdp=2, tensor=2, sequence=1, expert=1)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh(data=1, fsdp=-1).shape["fsdp"] == 8
    assert make_mesh(devices=jax.devices()[:3]).size == 3


@pytest.mark.parametrize("sizes, words", [
    (dict(data=3), "data=3 has 3 devices, 8 are present; set one axis to -1"),
    (dict(fsdp=3), "multiple of 3 devices, 8 are present"),
    (dict(fsdp=-1), "data and fsdp are both -1"),
    (dict(data=0), "mesh.data is 0; give a positive number"),
    (dict(tensor="two"), "mesh.tensor is 'two'"),
])
def test_sizes_that_cannot_work(sizes, words):
    with pytest.raises(ConfigError, match=words):
        make_mesh(**sizes)


def fake_mesh(processes, **sizes):
    """A mesh of pretended devices, `processes` in mesh order."""
    devices = np.empty(len(processes), object)
    devices[:] = [SimpleNamespace(process_index=p) for p in processes]
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    return SimpleNamespace(devices=devices.reshape(shape), axis_names=AXES, shape=dict(zip(AXES, shape)))


def test_each_process_reads_a_contiguous_block():
    mesh = fake_mesh([0, 0, 1, 1, 2, 2, 3, 3], data=4, fsdp=2)
    assert [process_part(mesh, p) for p in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert process_part(make_mesh()) == (0, 1)


def test_processes_along_the_tensor_axis_share_their_rows():
    mesh = fake_mesh([0, 1, 0, 1, 2, 3, 2, 3], data=4, tensor=2)
    assert [process_part(mesh, p) for p in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]


def test_rows_that_are_not_contiguous_are_refused():
    with pytest.raises(ConfigError, match="contiguous block of rows"):
        process_part(fake_mesh([0, 1, 0, 1], data=4), 0)


@pytest.mark.parametrize("sizes", [dict(), dict(data=2, fsdp=-1), dict(data=4, tensor=2)])
def test_put_batch_splits_the_rows(sizes):
    mesh = make_mesh(**sizes)
    batch = {"pairs": {"image": np.arange(16 * 3, dtype=np.float32).reshape(16, 3), "weight": np.ones(16, np.float32)}}
    out = put_batch(batch, mesh)["pairs"]
    assert out["image"].sharding == batch_sharding(mesh)
    assert out["image"].addressable_shards[0].data.shape == (16 // (mesh.shape["data"] * mesh.shape["fsdp"]), 3)
    assert np.array_equal(out["image"], batch["pairs"]["image"])
    total = jax.jit(lambda x: x.sum(0), out_shardings=replicated(mesh))(out["image"])
    assert total.sharding.spec == P()


def test_rows_that_do_not_divide_are_padded_with_weight_nought():
    batch = {"image": np.ones((5, 2), np.float32), "mask": np.ones(5, bool), "weight": np.ones(5, np.float32), "example_id": np.arange(5)}
    out = put_batch(batch, make_mesh())
    assert {name: len(value) for name, value in out.items()} == dict(image=8, mask=8, weight=8, example_id=8)
    assert np.array_equal(out["weight"], [1] * 5 + [0] * 3) and not np.asarray(out["mask"])[5:].any()
    assert np.array_equal(out["example_id"], [0, 1, 2, 3, 4, -1, -1, -1])
    assert out["image"].dtype == np.float32 and not np.asarray(out["image"])[5:].any()


def test_put_batch_without_a_mesh():
    out = put_batch({"a": {"image": np.ones((5, 2), np.float32)}})
    assert isinstance(out["a"]["image"], jax.Array) and out["a"]["image"].shape == (5, 2)


def test_put_batch_refuses_what_it_cannot_mark():
    with pytest.raises(DataError, match="batch.pairs: 5 rows do not divide by 8 devices"):
        put_batch({"pairs": {"image": np.ones((5, 2))}}, make_mesh())
    with pytest.raises(DataError, match="one row for each example"):
        put_batch({"image": np.ones((8, 2)), "weight": np.ones(7)}, make_mesh())
    with pytest.raises(DataError, match="one row for each example"):
        put_batch({"image": np.ones((8, 2)), "weight": np.float32(1)}, make_mesh())


PROGRAM = """
import sys, jax, numpy as np
jax.distributed.initialize("127.0.0.1:" + sys.argv[2], 2, int(sys.argv[1]), heartbeat_timeout_seconds=10)
from vlm_jax.sharding import make_mesh, process_part, put_batch, batch_sharding, replicated
mesh = make_mesh(data=2, fsdp=2)
k, n = process_part(mesh)
assert (k, n) == (int(sys.argv[1]), 2), (k, n)
rows = np.arange(8, dtype=np.float32)[k * 4:][:3 if n == 2 else 4]          # three rows each: one is padded
batch = put_batch({"x": rows, "weight": np.ones(3, np.float32)}, mesh)
assert batch["x"].shape == (8,) and batch["x"].sharding == batch_sharding(mesh)
total = jax.jit(lambda b: (b["x"] * b["weight"] + 100 * jax.numpy.arange(8)).sum(), out_shardings=replicated(mesh))(batch)
print("TOTAL", float(total), float(jax.jit(lambda b: b["weight"].sum(), out_shardings=replicated(mesh))(batch)))
"""


def test_two_processes_put_their_own_rows():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
    children = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(k), port], env=environment, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE) for k in range(2)]
    try:
        answers = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    for out, err in answers:
        assert "TOTAL 2818.0 6.0" in out, err[-2000:]


def test_mesh_of_other_axes_still_lays_out_a_batch():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    assert batch_sharding(mesh).spec == P(("data",))

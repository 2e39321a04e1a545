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
from vlm_jax.sharding import batch_sharding, make_mesh, padded_rows, process_part, put_batch, replicated
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


def test_processes_of_a_torus_need_not_be_neighbours_in_the_mesh():
    mesh = fake_mesh([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3], data=4, fsdp=4)   # hosts of 2 x 2 chips
    assert [process_part(mesh, p) for p in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]


@pytest.mark.parametrize("processes, sizes", [([0, 1, 1, 2], dict(data=2, tensor=2)), ([0, 0, 0, 1], dict(data=4))])
def test_rows_that_processes_share_only_in_part_are_refused(processes, sizes):
    with pytest.raises(ConfigError, match="share some of their rows with another process, but not all"):
        process_part(fake_mesh(processes, **sizes), 0)


def test_tensor_over_all_processes_makes_all_read_all_rows():
    mesh = fake_mesh([0, 1, 2, 3, 0, 1, 2, 3], data=2, tensor=4)
    assert [process_part(mesh, p) for p in range(4)] == [(0, 1)] * 4


def fake_devices(slices, per_slice, processes_per_slice=1, platform="tpu"):
    """Pretended devices in a shuffled order, as a runtime may list them."""
    each = per_slice // processes_per_slice
    devices = [SimpleNamespace(id=s * per_slice + k, slice_index=s, process_index=s * processes_per_slice + k // each, platform=platform,
                               device_kind="pretended", coords=(k, 0, 0), core_on_chip=0) for s in range(slices) for k in range(per_slice)]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


@pytest.mark.parametrize("slices", [1, 4])
def test_data_spans_the_slices_and_the_other_axes_stay_inside(slices, monkeypatch):
    monkeypatch.setattr("vlm_jax.sharding.mesh._mesh", lambda devices: SimpleNamespace(devices=devices, axis_names=AXES, shape=dict(zip(AXES, devices.shape))))
    mesh = make_mesh(fsdp=2, tensor=2, slices=slices, devices=fake_devices(4, 8, processes_per_slice=2))
    assert mesh.devices.shape == (8, 2, 2, 1, 1)
    of_rows = [{device.slice_index for device in row.flat} for row in mesh.devices]
    assert of_rows == [{0}, {0}, {1}, {1}, {2}, {2}, {3}, {3}]
    assert sorted(process_part(mesh, p) for p in range(8)) == [(k, 8) for k in range(8)]


@pytest.mark.parametrize("sizes, words", [
    (dict(data=1, fsdp=32), "data=1 does not divide by the 4 slices"),
    (dict(data=2, fsdp=16, slices=4), "data=2 does not divide by the 4 slices"),
    (dict(slices=2), "lie in 4 slice.s.; set mesh.slices=4"),
    (dict(slices=0), "mesh.slices is 0; give a positive number"),
    (dict(slices=-1), "mesh.slices is -1; give a positive number."),
])
def test_slices_that_cannot_work(sizes, words):
    with pytest.raises(ConfigError, match=words):
        make_mesh(devices=fake_devices(4, 8), **sizes)


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(ConfigError, match="8, 4 devices; use slices of one size"):
        make_mesh(data=12, devices=fake_devices(1, 8) + [SimpleNamespace(**{**vars(d), "slice_index": 1, "id": d.id + 8}) for d in fake_devices(1, 4)])


def test_simulated_devices_stand_for_slices():
    mesh = make_mesh(fsdp=2, slices=2)
    assert [[d.id for d in row.flat] for row in mesh.devices] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ConfigError, match="data=8 does not divide by the 3 slices"):
        make_mesh(data=-1, slices=3)
    with pytest.raises(ConfigError, match="data=1 does not divide by the 2 slices"):
        make_mesh(data=1, fsdp=8, slices=2)


def test_padded_rows_are_those_of_the_arrays():
    mesh = make_mesh(data=2, fsdp=4)
    assert [padded_rows(mesh, rows) for rows in (1, 8, 9, 16)] == [8, 8, 16, 16]
    assert put_batch({"x": np.ones(9), "weight": np.ones(9)}, mesh)["x"].shape == (16,)


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
from jax.sharding import NamedSharding, PartitionSpec as P
from vlm_jax.sharding import make_mesh, process_part, put_batch, batch_sharding, replicated, to_host
mesh = make_mesh(data=2, fsdp=2)
k, n = process_part(mesh)
assert (k, n) == (int(sys.argv[1]), 2), (k, n)
rows = np.arange(8, dtype=np.float32)[k * 4:][:3 if n == 2 else 4]          # three rows each: one is padded
batch = put_batch({"x": rows, "weight": np.ones(3, np.float32)}, mesh)
assert batch["x"].shape == (8,) and batch["x"].sharding == batch_sharding(mesh)
total = jax.jit(lambda b: (b["x"] * b["weight"] + 100 * jax.numpy.arange(8)).sum(), out_shardings=replicated(mesh))(batch)
table = jax.device_put(np.arange(12.0).reshape(4, 3), NamedSharding(mesh, P("data")))
assert not table.is_fully_addressable and np.array_equal(to_host({"table": table, "n": np.ones(2)})["table"], np.arange(12.0).reshape(4, 3))
order = np.array(jax.devices())[[0, 2, 1, 3]].reshape(2, 2, 1, 1, 1)          # as on a torus: no process's devices are neighbours
torus = jax.sharding.Mesh(order, mesh.axis_names)
k, n = process_part(torus)
ids = put_batch({"example_id": np.arange(8).reshape(2, 4)[k], "weight": np.ones(4)}, torus)["example_id"]
assert n == 2 and sorted(to_host(ids)) == list(range(8)), to_host(ids)
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

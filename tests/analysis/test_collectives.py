"""Collectives read from HLO: the three forms of replica groups, kinds, bytes and axes, on saved lines and on programs with known collectives."""
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import pytest

from tests.analysis.test_hlo import loop
from vlm_jax.analysis.collectives import axes_of, bytes_by_axis, find_collectives, replica_groups, summarise
from vlm_jax.analysis.hlo import parse

MESH = {"data": 4, "fsdp": 2}
WHOLE = PartitionSpec()


@pytest.mark.parametrize("text, groups", [
    ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
    ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("channel_id=3", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("replica_groups=[2,4]<=[8], x={1}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([4,2]T(1,0)) {'axis_0'}, dimensions={0}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("replica_groups=mesh['a'=4,'b'=2] {'b'}, x={3}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ("replica_groups=mesh['a'=4,'b'=2] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("replica_groups=mesh['a'=4,'b'=2] {'a':(1)2,'b'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
])
def test_replica_groups(text, groups):
    assert np.asarray(replica_groups(text, 8)).tolist() == groups


def test_unknown_groups_are_an_error():
    with pytest.raises(ValueError, match="unknown form"):
        replica_groups("replica_groups=circle(8)", 8)


def test_axes():
    assert axes_of([[0, 1], [2, 3]], MESH) == ("fsdp",)
    assert axes_of([[0, 2, 4, 6], [1, 3, 5, 7]], MESH) == ("data",)
    assert axes_of([[0, 1, 2, 3, 4, 5, 6, 7]], MESH) == ("data", "fsdp")
    assert axes_of([[0], [1]], MESH) == ()


def test_bodies_of_loops_count_as_often_as_they_run():
    (one,) = find_collectives(parse(loop(limit=11)), {"data": 2, "fsdp": 2})
    assert (one.kind, one.axes, one.group, one.times, one.payload, one.total) == ("all-reduce", ("fsdp",), 2, 11, 128, 11 * 128)


TPU = """HloModule jit_f

%start (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p = bf16[4,8]{1,0:S(1)} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%p), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %c = (bf16[4,8], bf16[16,8]) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.3 (q: bf16[4,8], r: bf16[8,8]) -> (bf16[8,8], bf16[16,8]) {
  %q = bf16[4,8]{1,0} parameter(0)
  %r = bf16[8,8]{1,0} parameter(1)
  %all-gather.2 = bf16[16,8]{1,0} all-gather(%q), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %t = (bf16[8,8], bf16[16,8]) tuple(%r, %all-gather.2)
}

%end (s: bf16[4,8]) -> bf16[16,8] {
  %s = bf16[4,8]{1,0} parameter(0)
  %all-gather.3 = bf16[16,8]{1,0} all-gather(%s), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  ROOT %d = bf16[16,8]{1,0} custom-call(%s, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%scatter (u: f32[16,8], i: s32[]) -> f32[2,8] {
  %u = f32[16,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %all-reduce.9 = f32[16,8]{1,0} all-reduce(%u), channel_id=6, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice = f32[2,8]{1,0} dynamic-slice(%all-reduce.9, %i, %zero), dynamic_slice_sizes={2,8}
}

ENTRY %main (x: bf16[4,8], y: bf16[8,8], z: f32[16,8], i: s32[]) -> f32[2,8] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = bf16[8,8]{1,0} parameter(1)
  %z = f32[16,8]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %fusion.1 = (bf16[4,8], bf16[16,8]) fusion(%x), kind=kCustom, calls=%start
  %fusion.2 = (bf16[8,8], bf16[16,8]) fusion(%x, %y), kind=kOutput, calls=%async_collective_fusion.3
  %fusion.3 = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%end
  %cps = (f32[16,8]{1,0}, f32[16,8]{1,0}, u32[], u32[]) collective-permute-start(%z), channel_id=7, source_target_pairs={{0,2},{2,4},{4,6},{6,0}}
  %cpd = f32[16,8]{1,0} collective-permute-done(%cps)
  ROOT %fusion.4 = f32[2,8]{1,0} fusion(%cpd, %i), kind=kCustom, calls=%scatter
}
"""


def test_what_a_tpu_makes_of_them():
    """A gather in three fused parts counts once; a sum of which a slice is kept is a reduce-scatter; a permutation counts at its start."""
    found = {one.kind: one for one in find_collectives(parse(TPU), {"data": 4, "fsdp": 2})}
    assert set(found) == {"all-gather", "reduce-scatter", "collective-permute"} and len(find_collectives(parse(TPU), {"data": 4, "fsdp": 2})) == 3
    assert (found["all-gather"].payload, found["all-gather"].sent, found["all-gather"].group) == (16 * 8 * 2, 16 * 8 * 2 * 3 / 4, 4)
    assert (found["reduce-scatter"].payload, found["reduce-scatter"].sent) == (16 * 8 * 4, 16 * 8 * 4 * 7 / 8)
    permute = found["collective-permute"]
    assert (permute.sent, permute.axes, permute.pairs) == (16 * 8 * 4, ("data",), ((0, 2), (2, 4), (4, 6), (6, 0)))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def collectives_of(function, mesh, shape, spec, out=WHOLE):
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    text = jax.jit(function, out_shardings=NamedSharding(mesh, out)).lower(x).compile().as_text()
    return find_collectives(parse(text), dict(mesh.shape))


def test_sum_over_an_axis(mesh):
    (row,) = summarise(collectives_of(lambda x: x.sum(0), mesh, (8, 1000), PartitionSpec("data")))
    assert (row["kind"], row["axes"], row["group"], row["count"], row["bytes"]) == ("all-reduce", ["data"], 4, 1, 2 * 4000 * 3 / 4)


def test_gather(mesh):
    (row,) = summarise(collectives_of(lambda x: x * 2, mesh, (8, 1000), PartitionSpec(None, "fsdp")))
    assert (row["kind"], row["axes"], row["bytes"]) == ("all-gather", ["fsdp"], 8 * 4000 / 2)


@pytest.mark.parametrize("name, per_turn", [("psum", 2 * 4000 * 3 / 4), ("ppermute", 4000), ("all_gather", 4 * 4000 * 3 / 4), ("psum_scatter", 4000 * 3 / 4),
                                            ("all_to_all", 4000 * 3 / 4)])
def test_known_collectives_in_a_scan(mesh, name, per_turn):
    """Each of JAX's collectives in a loop of six turns, over `data`, on 1000 float32 a device."""
    operations = {"psum": lambda x: jax.lax.psum(x, "data"), "ppermute": lambda x: jax.lax.ppermute(x, "data", [(k, (k + 1) % 4) for k in range(4)]),
                  "all_gather": lambda x: jax.lax.all_gather(x, "data").sum(0), "all_to_all": lambda x: jax.lax.all_to_all(x, "data", 0, 0, tiled=True),
                  "psum_scatter": lambda x: jnp.tile(jax.lax.psum_scatter(x, "data", tiled=True), 4)}

    @partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec(("data", "fsdp")), out_specs=PartitionSpec(("data", "fsdp")), check_vma=False)
    def function(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(operations[name](c)), None), x, None, length=6)[0]
    found = collectives_of(function, mesh, (8000,), PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp")))
    assert bytes_by_axis(found) == {"data": 6 * per_turn}
    assert sum(one.times for one in found) == 6

"""The findings of programs with known properties: memory, warnings, the largest batch, the roofline; and the table that shows them."""
import dataclasses
import json
import subprocess
import sys

import pytest

from vlm_jax.analysis import search
from vlm_jax.analysis.collectives import Collective
from vlm_jax.analysis.hlo import parse
from vlm_jax.analysis.memory import breakdown, global_batch_buffers, grown_buffers, large_buffers
from vlm_jax.analysis.program import Program, child_environment
from vlm_jax.analysis.report import findings, table
from vlm_jax.analysis.roofline import group_bandwidth, roofline, seconds_of
from vlm_jax.analysis.warnings import check, rematerialized
from vlm_jax.compile import run
from vlm_jax.sharding.topologies import CHIPS, parse_topology

GIB = 2 ** 30


def program(**changes) -> Program:
    """A program for v5e-16 (4 x 4) with 1 GiB of parameters and 3 GiB of temporaries."""
    places = [[0, k % 4, k // 4, 0] for k in range(16)]
    values = dict(name="train", config="c", stage=0, topology="v5e-16", mesh={"data": 4, "fsdp": 4}, places=places, rows={"pairs": 256},
                  state={"params": GIB, "optimizer": GIB, "task": 0, "batch": 2 ** 20}, needed=None,
                  useful_flops=16 * 197e12 * 0.3, executed_flops=16 * 197e12 * 0.4,
                  memory={"argument": 2 * GIB, "output": 2 * GIB, "alias": 2 * GIB, "temp": 3 * GIB, "code": 0}, parameters=2 ** 28, replicated=(0.0, []),
                  dtype="bfloat16", jax="0", hlo="")
    return Program(**{**values, **changes})


def module(*arrays: str, dims: str = "64,8"):
    """A module with one instruction for each array, as "bf16[4,8]", that no argument has the shape of."""
    lines = [f"  %x{k} = {array}{{1,0}} exponential(%p), metadata={{op_name=\"jit(f)/layer{k}\"}}" for k, array in enumerate(arrays)]
    return parse("HloModule m\n\nENTRY %main (p: f32[" + dims + "]) -> f32[] {\n  %p = f32[" + dims + "]{1,0} parameter(0)\n" + "\n".join(lines)
                 + "\n  ROOT %r = f32[] constant(0)\n}\n")


V5E16 = parse_topology("v5e-16")


def test_memory_of_a_device():
    memory = breakdown(program(), V5E16)
    assert memory["parameters"] == GIB and memory["temporaries"] == 3 * GIB and memory["peak"] == 5 * GIB and memory["fits"]
    assert memory["share"] == pytest.approx(5 / 15.75) and "results" not in memory and "task" not in memory
    assert not breakdown(program(memory=None, needed=20 * GIB), V5E16)["fits"]


def test_each_warning_and_only_it():
    def kinds(one, large=(), grown=()):
        return [warning["kind"] for warning in check(one, V5E16, breakdown(one, V5E16), large, grown)]
    row = {"shape": "f32[9,9]", "bytes": 3 * GIB, "source": "jit(f)/x", "count": 1}
    assert kinds(program()) == []
    assert kinds(program(memory=None, needed=20 * GIB)) == ["fits"]
    assert kinds(program(replicated=(0.5, ["a/kernel"]))) == ["replicated"]
    assert kinds(program(replicated=(0.01, ["a/bias"]))) == []
    assert kinds(program(replicated=(1.0, ["a"]), mesh={"data": 16}, state={"params": 5 * GIB, "optimizer": 5 * GIB, "batch": 1})) == ["replicated"]
    assert kinds(program(), large=[row]) == ["activation"] and kinds(program(), grown=[row]) == ["grows"]
    log = ("2026 W spmd] [SPMD] Involuntary full rematerialization. The compiler cannot go from sharding {devices=[2]} to {replicated} efficiently for "
           'HLO operation %dot.5 = f32[8,64] dot(%a, %b), metadata={op_name="jit(step)/mlp/dot"}. As the last resort, SPMD will replicate')
    assert kinds(program(log=log + "\n" + log)) == ["rematerialization"] and rematerialized(log) == ["f32[8,64] (jit(step)/mlp/dot)"]


def test_buffers_that_are_large_or_grow():
    big, small = module("bf16[4096,64]", "f32[16,4096]", "f32[64,8]"), module("bf16[2048,64]", "f32[16,4096]")
    assert [row["shape"] for row in large_buffers(big, 2 ** 18)] == ["bf16[4096,64]", "f32[16,4096]"] and large_buffers(big, 2 ** 30) == []
    assert [row["shape"] for row in grown_buffers(big, small, 2, 2 ** 10)] == ["bf16[4096,64]"]
    assert [row["shape"] for row in global_batch_buffers(program(rows={"pairs": 4096}), big, 2 ** 10)] == ["bf16[4096,64]", "f32[16,4096]"]
    assert global_batch_buffers(program(rows={"pairs": 4096}, mesh={"data": 1}), big, 2 ** 10) == []
    patches = module("bf16[4096,64]", "f32[256,16,64]")   # of 256 rows 16 patches each, on 16 devices: the dimension may be either
    assert global_batch_buffers(program(rows={"pairs": 4096}), patches, 2 ** 10) == []


def fake_compiler(fixed: int, slope: int, seen: list, bump: int = 0):
    """Memory linear in the rows of a device, `bump` more above 100 rows, and the compiler's refusal above the chip's."""
    def compile_jobs(config, topology, jobs):
        rows = jobs[0]["batch"] // 16
        size = fixed + slope * rows + (bump if rows > 100 else 0)
        seen.append(rows)
        fits = size <= CHIPS["v5e"].memory_bytes
        memory = {"argument": fixed, "output": 0, "alias": 0, "temp": size - fixed, "code": 0} if fits else None
        return [program(rows={"pairs": rows * 16}, memory=memory, needed=None if fits else size)]
    return compile_jobs


@pytest.mark.parametrize("rows, bump", [(16, 0), (1, 0), (500, 0), (16, GIB)])
def test_largest_batch(rows, bump):
    """Found from above and from below, confirmed by a compiled program, and stepped back where memory is not linear."""
    seen: list[int] = []
    compiler = fake_compiler(2 * GIB, GIB // 16, seen, bump)
    given = compiler(None, V5E16, [{"batch": rows * 16}])[0]
    found = search.largest_batch({}, V5E16, given, compile_jobs=compiler)
    best = (CHIPS["v5e"].memory_bytes - 2 * GIB - bump) // (GIB // 16)
    assert found["verified"] and found["rows_per_shard"] in seen and found["batch"] == 16 * found["rows_per_shard"]
    assert 0.8 * best <= found["rows_per_shard"] <= best and found["bytes"] <= CHIPS["v5e"].memory_bytes and len(seen) <= 12


def test_largest_batch_estimated_and_impossible():
    found = search.largest_batch({}, V5E16, program(), verify=False)
    assert not found["verified"] and found["rows_per_shard"] == int((15.75 * 0.98 - 2 - 2 ** -10) / (3 / 16)) // 8 * 8 or found["rows_per_shard"] % 8 == 0
    compiler = fake_compiler(20 * GIB, GIB, [])
    assert search.largest_batch({}, V5E16, compiler(None, V5E16, [{"batch": 64}])[0], compile_jobs=compiler) is None


def test_half_a_topology():
    assert {name: search.halved(parse_topology(name)).name for name in ("v5e-256", "v5p-16", "cpu-8", "v5e:16x16*4")} == {
        "v5e-256": "v5e:8x16", "v5p-16": "v5p:2x2x1", "cpu-8": "cpu:4", "v5e:16x16*4": "v5e:8x16*4"}
    assert search.halved(parse_topology("v5e-1")) is None


def test_roofline_names_what_binds():
    chip = CHIPS["v5e"]
    gather = Collective("all-gather", ("data",), 4, 4 * 10 ** 9, 3e9, 1, (0, 1, 2, 3))
    estimate = roofline(program(), 0.1 * chip.memory_bandwidth, [gather], V5E16)
    assert estimate["compute"] == pytest.approx(0.4) and estimate["memory"] == pytest.approx(0.1) and estimate["network"] == pytest.approx(3e9 / 50e9)
    assert estimate["bound"] == "compute" and estimate["mfu"] == pytest.approx(0.75) and estimate["seconds_without_overlap"] == pytest.approx(0.56)
    assert estimate["examples_per_second_per_device"] == pytest.approx(16 / 0.4)
    assert roofline(program(), 2 * chip.memory_bandwidth, [], V5E16)["bound"] == "memory"


def test_bandwidth_of_groups():
    """A row of a 16 x 16 torus closes, a row of 4 x 4 does not; a group over both dimensions has the links of both; slices talk over the slow network."""
    wide, places = parse_topology("v5e-256"), [[0, k % 16, k // 16, 0] for k in range(256)]
    torus = program(places=places, mesh={"data": 16, "fsdp": 16})
    assert group_bandwidth(range(16), torus, wide) == 100e9 and group_bandwidth(range(256), torus, wide) == 200e9
    assert group_bandwidth(range(4), program(), V5E16) == 50e9 and group_bandwidth([0, 1], program(), V5E16) == 50e9
    two = parse_topology("v5e:4x4*2")
    pair = program(places=[[k // 16, k % 4, k % 16 // 4, 0] for k in range(32)], mesh={"data": 32})
    total = Collective("all-reduce", ("data",), 32, 10 ** 9, 2e9 * 31 / 32, 1, tuple(range(32)))
    assert seconds_of(total, pair, two) == pytest.approx(2e9 * 31 / 32 / 100e9 + 2e9 / 16 / 2 / 3.125e9)
    ring = Collective("collective-permute", ("data",), 2, 10 ** 6, 1e6, 1, (0, 1), ((0, 1), (1, 2)))
    assert seconds_of(ring, pair, two) == pytest.approx(1e6 / 50e9)
    assert seconds_of(dataclasses.replace(ring, pairs=((0, 1), (15, 16))), pair, two) == pytest.approx(1e6 / 3.125e9)
    assert seconds_of(total, program(places=[]), parse_topology("cpu-8")) is None


def test_findings_and_table():
    found = findings({}, V5E16, program(hlo=None or "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} parameter(0)\n}\n"))
    json.dumps(found)
    text = table(found)
    for part in ("v5e-16: 16 devices of v5e (4x4)", "mesh data=4 x fsdp=4", "256, 16.0 a device", "5.000 of 15.75 (32%): fits", "compute", "binds",
                 "no warnings", "largest batch that fits", "estimated, not compiled"):
        assert part in text, part
    assert "DOES NOT FIT" in table(findings({}, V5E16, program(memory=None, needed=20 * GIB)))


def test_command_line(tmp_path, capsys):
    found = run(["--config", "configs/siglip/shapes.py:variant=test", "--quick", "--batch", "16", "--config.model.remat=full", "--json",
                 str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text())[0]["batch"] == {"pairs": 16} == found[0]["batch"]
    assert found[0]["flops"]["executed"] > 1.1 * found[0]["flops"]["useful"]   # the blocks once more
    assert {row["kind"] for row in found[0]["collectives"]} == {"all-reduce", "collective-permute"}
    assert "siglip_shapes · train, stage 1 · local: 8 devices of cpu" in capsys.readouterr().out


REPLICATES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from vlm_jax.sharding.topologies import parse_topology
mesh = Mesh(np.array(parse_topology("v5e-8").devices).reshape(2, 4), ("a", "b"))
split = lambda *names: NamedSharding(mesh, P(*names))
def gather(x, i):
    rows = jax.lax.with_sharding_constraint(x[i], split(None, ("a", "b")))
    return jax.lax.with_sharding_constraint(jnp.sin(rows), split("b", None))
jax.jit(gather).lower(jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=split(None, ("a", "b"))),
                      jax.ShapeDtypeStruct((64,), jnp.int32, sharding=split("a"))).compile()
"""


def test_what_libtpu_says_of_rematerialization_reaches_the_log():
    pytest.importorskip("libtpu")
    done = subprocess.run([sys.executable, "-c", REPLICATES], env=child_environment(parse_topology("v5e-8")), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert any(operation.startswith("f32[64,") for operation in rematerialized(done.stderr)), done.stderr[-2000:]

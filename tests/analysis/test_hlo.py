"""The reader of HLO text: shapes, memory spaces, loops, on lines as XLA prints them and on programs compiled here."""
import jax
import jax.numpy as jnp
import pytest

from vlm_jax.analysis.hlo import Buffer, parse, shapes
from vlm_jax.analysis.memory import traffic

LOOP = """HloModule jit_f, is_scheduled=true

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%cond (p.0: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(LIMIT)
  %p.0 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%p.0), index=0
  ROOT %lt = pred[]{:T(512)} compare(%gte.0, %limit), direction=DIRECTION
}

%body (p.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)S(1)}) parameter(0)
  %gte.1 = s32[] get-tuple-element(%p.1), index=0
  %gte.2 = f32[4,8]{1,0:T(8,128)S(1)} get-tuple-element(%p.1), index=1
  %step = s32[] constant(STEP)
  %next = s32[] add(%gte.1, %step)
  %reduced = f32[4,8]{1,0} all-reduce(%gte.2), channel_id=1, replica_groups={{0,1},{2,3}}, use_global_device_ids=true, to_apply=%add.1
  ROOT %out = (s32[], f32[4,8]{1,0}) tuple(%next, %reduced)
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %zero = s32[] constant(START)
  %begin = (s32[], f32[4,8]{1,0}) tuple(%zero, %a)
  %loop = (s32[], f32[4,8]{1,0}) while(%begin), condition=%cond, body=%body, metadata={op_name="jit(f)/while (strange)" id=3}
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def loop(start=0, step=1, limit=5, direction="LT"):
    return LOOP.replace("START", str(start)).replace("STEP", str(step)).replace("LIMIT", str(limit)).replace("DIRECTION", direction)


def test_shapes():
    assert shapes("bf16[16,196,768]{2,1,0:T(8,128)(2,1)S(1)}") == (Buffer("bf16", (16, 196, 768), 1),)
    assert shapes("(s32[], /*index=1*/f32[2,3]{1,0}, pred[<=4])") == (Buffer("s32", ()), Buffer("f32", (2, 3)), Buffer("pred", (4,)))
    assert [buffer.bytes for buffer in shapes("(bf16[3,5], u4[3], f8e4m3fn[7], token[])")] == [30, 2, 7, 0]


def test_lines():
    module = parse(loop())
    loop_line = module.computations["main"]["loop"]
    assert module.entry == "main" and loop_line.opcode == "while" and loop_line.operands == ("begin",) and loop_line.called("body") == ["body"]
    assert loop_line.source == "jit(f)/while (strange)" and module.root("main").name == "result"
    assert module.computations["body"]["gte.2"].buffers[0].space == 1
    with pytest.raises(ValueError, match="ENTRY"):
        parse("HloModule empty")


@pytest.mark.parametrize("settings, turns", [
    (dict(), 5), (dict(limit=16), 16), (dict(start=2), 3), (dict(step=2), 3), (dict(step=2, limit=6), 3), (dict(direction="LE"), 6), (dict(limit=0), 0),
    (dict(start=7, step=-1, limit=0, direction="GT"), 7), (dict(start=7, step=-1, limit=0, direction="GE"), 8)])
def test_loops_on_counters(settings, turns):
    runs = parse(loop(**settings)).runs()
    assert runs["main"] == 1 and runs["body"] == (turns or 1)   # nobody compiles a loop of no turns


def test_known_trip_count_wins():
    text = loop().replace('metadata={op_name', 'backend_config={"known_trip_count":{"n":"9"}}, metadata={op_name')
    assert parse(text).runs()["body"] == 9


def test_loops_that_jax_compiles():
    """A scan in a scan: the inner body runs their product; the reduction inside counts no turn of its own."""
    def inner(carry, x):
        return carry + jnp.sin(x) @ jnp.ones((8, 8)), None

    def outer(carry, x):
        return jax.lax.scan(inner, carry, x)[0], None
    text = jax.jit(lambda c, x: jax.lax.scan(outer, c, x)[0]).lower(jnp.ones((8, 8)), jnp.ones((3, 7, 8, 8))).compile().as_text()
    assert 21 in parse(text).runs().values() and 3 in parse(text).runs().values()


def test_traffic_counts_loops_and_slices():
    """One pass over an array is a read and a write; a scan over rows reads each row once, not the whole array at every turn."""
    x = jnp.ones((64, 1024))
    once = traffic(parse(jax.jit(lambda x: x * 2 + 1).lower(x).compile().as_text()))
    assert once == 2 * x.nbytes

    def rows(c, row):
        return c + row, None
    scanned = traffic(parse(jax.jit(lambda x: jax.lax.scan(rows, jnp.zeros(1024), x)[0]).lower(x).compile().as_text()))
    assert 3 * x.nbytes <= scanned <= 8 * x.nbytes   # each turn: the row, the sum before and after, and the compiler's copies
    assert traffic(parse(loop())) == 5 * (32 * 4 + 3 * 4)   # of the summed array the result is in main memory, its operand on the chip

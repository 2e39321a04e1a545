"""The analysis of a config's programs for a topology, as plain data for JSON and as a table to read."""
from collections.abc import Mapping
from typing import Any

from vlm_jax.analysis import search
from vlm_jax.analysis.collectives import bytes_by_axis, find_collectives, summarise
from vlm_jax.analysis.hlo import parse
from vlm_jax.analysis.memory import breakdown, large_buffers, memory_limit, traffic
from vlm_jax.analysis.program import Program, compile_programs
from vlm_jax.analysis.roofline import roofline, seconds_by_axis
from vlm_jax.analysis.warnings import activation_threshold, check
from vlm_jax.sharding.topologies import Topology, parse_topology

GIB = 2 ** 30


def analyse(config: Mapping[str, Any], topology: str, what: str = "train", stage: int = 0, quick: bool = False, batch: int | None = None) -> list[dict]:
    """Compiles a config's program(s) for a topology and returns the findings of each, as JSON can hold them.

    Args:
      what: "train", "evaluate" or "generate".
      quick: compile once; what would take further programs (a verified largest batch, buffers compared at half the devices) is estimated.
      batch: rows of all streams together, instead of the config's.
    Raises:
      ConfigError: see `compile_programs`.
    """
    target = parse_topology(topology)
    job = {"what": what, "stage": stage, **({"batch": batch} if batch else {})}
    programs = compile_programs(config, target, [job])
    return [findings(config, target, program, what, stage, quick) for program in programs]


def findings(config: Mapping[str, Any], target: Topology, program: Program, what: str = "train", stage: int = 0, quick: bool = True) -> dict:
    """Returns what is known of one compiled program; further programs are compiled unless `quick`."""
    memory = breakdown(program, target)
    result: dict[str, Any] = {
        "config": program.config, "program": program.name, "stage": program.stage, "topology": target.name, "chip": target.chip.name,
        "shape": list(target.shape), "slices": target.slices, "devices": program.devices, "mesh": program.mesh,
        "batch": program.rows, "parameters": program.parameters,
        "memory": memory, "replicated_share": program.replicated[0], "jax": program.jax, "compile_seconds": program.seconds.get("compile"),
        "flops": {"useful": program.useful_flops, "executed": program.executed_flops}, "unverified_figures": list(target.chip.unverified)}
    large, grown, how = [], [], ""
    if program.hlo:
        module = parse(program.hlo)
        collectives = find_collectives(module, program.mesh)
        threshold = activation_threshold(memory_limit(target))
        large = large_buffers(module, threshold)[:5]
        grown, how = search.growing(config, target, program, module, threshold / 20, stage=stage, verify=not quick)
        moved = traffic(module)
        seconds = seconds_by_axis(program, collectives, target)
        result |= {"collectives": [{**row, "seconds": seconds[(row["kind"], tuple(row["axes"]))]} for row in summarise(collectives)],
                   "collective_bytes_by_axis": bytes_by_axis(collectives), "collective_bytes": sum(one.total for one in collectives),
                   "memory_traffic_bytes": moved, "roofline": roofline(program, moved, collectives, target),
                   "largest_buffers": large_buffers(module, 2 ** 20)[:8], "growth": how}
    if what == "train":
        verify = not quick and target.chip.platform != "cpu"   # the memory of a CPU is not what bounds a batch
        result["largest_batch"] = search.largest_batch(config, target, program, stage=stage, verify=verify)
    result["warnings"] = check(program, target, memory, large, grown[:5])
    return result


def table(found: Mapping[str, Any]) -> str:
    """Returns the findings of one program as text."""
    memory, lines = found["memory"], []
    rows = sum(found["batch"].values())
    mesh = " x ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1) or "1 device"
    slices = f", {found['slices']} slices" if found["slices"] > 1 else ""
    lines.append(f"{found['config']} · {found['program']}, stage {found['stage'] + 1} · {found['topology']}: {found['devices']} devices of {found['chip']}"
                 f" ({'x'.join(str(size) for size in found['shape'])}{slices}) · mesh {mesh}")
    lines.append(f"{found['parameters'] / 1e6:,.1f} M parameters ({found['replicated_share']:.1%} of them whole on every device) · batch {rows:,}, "
                 f"{rows / found['devices']:,.1f} a device")
    lines += ["", "Memory of a device, GiB"]
    for key, size in memory.items():
        if key not in ("peak", "limit", "share", "fits"):
            lines.append(f"  {key:<24}{size / GIB:>10.3f}")
    limit = f" of {memory['limit'] / GIB:,.2f} ({memory['share']:.0%})" if memory["limit"] else ""
    lines.append(f"  {'peak':<24}{memory['peak'] / GIB:>10.3f}{limit}: {'fits' if memory['fits'] else 'DOES NOT FIT'}")
    if found.get("largest_batch"):
        largest = found["largest_batch"]
        state = "compiled" if largest["verified"] else "estimated, not compiled"
        lines.append(f"  largest batch that fits {largest['batch']:>10,} ({largest['rows_per_shard']:,} rows a device; {state})")
    if found.get("collectives") is not None:
        lines += ["", f"{'Collectives of a step':<22}{'along':<16}{'group':>6}{'times':>9}{'GB sent a device':>18}{'ms':>9}"]
        for row in found["collectives"]:
            time = f"{1e3 * row['seconds']:>9.2f}" if row["seconds"] is not None else f"{'-':>9}"
            lines.append(f"  {row['kind']:<20}{','.join(row['axes']):<16}{row['group']:>6}{row['count']:>9,.0f}{row['bytes'] / 1e9:>18.4f}{time}")
        if not found["collectives"]:
            lines.append("  none")
    lines += ["", "Work of a step"]
    lines.append(f"  products, useful        {found['flops']['useful'] / 1e12:>12,.3f} TFLOP on all devices")
    lines.append(f"  products, executed      {found['flops']['executed'] / 1e12:>12,.3f} TFLOP ({_ratio(found['flops'])} of the useful)")
    if found.get("roofline"):
        lines += _roofline_lines(found)
    lines += [""] + ([f"warning: {one['message']}" for one in found["warnings"]] or ["no warnings"])
    if found["unverified_figures"]:
        lines.append(f"note: {', '.join(found['unverified_figures'])} of {found['chip']} could not be verified against a published figure.")
    return "\n".join(lines)


def _ratio(flops: Mapping[str, float]) -> str:
    return f"{flops['executed'] / flops['useful']:.2f}" if flops["useful"] else "-"


def _roofline_lines(found: Mapping[str, Any]) -> list[str]:
    estimate, lines = found["roofline"], []
    lines.append(f"  memory traffic          {found['memory_traffic_bytes'] / 1e9:>12,.3f} GB a device")
    lines += ["", "Roofline, ms a step"]
    for key in ("compute", "memory", "network"):
        value = f"{1e3 * estimate[key]:>12.2f}" if estimate[key] is not None else f"{'unknown':>12}"
        lines.append(f"  {key:<24}{value}{'  binds' if key == estimate['bound'] else ''}")
    if estimate["seconds"] is not None:
        lines.append(f"  {'step':<24}{1e3 * estimate['seconds']:>12.2f}  to {1e3 * estimate['seconds_without_overlap']:.2f} without any overlap")
        if estimate["mfu"] is not None:
            lines.append(f"  {'predicted MFU':<24}{estimate['mfu']:>12.1%}  to {estimate['mfu_without_overlap']:.1%}")
        unit = "tokens/s a device" if found["program"] == "generate/step" else "examples/s a device"
        lines.append(f"  {unit:<24}{estimate['examples_per_second_per_device']:>12,.1f}  to "
                     f"{estimate['examples_per_second_per_device_without_overlap']:,.1f}")
    return lines

"""Compiles every published config for its topology and writes what `python -m vlm_jax.compile` finds to CONFIG-TOPOLOGY/results.json.

    python -m experiments.topologies.run                                # all that have no result yet; minutes each
    python -m experiments.topologies.run --config configs/siglip/so400m14_webli.py --full   # one, with largest batch and growth verified
"""
import argparse
from collections.abc import Mapping, Sequence
import json
from pathlib import Path
from typing import Any

from experiments.results import write_results
from vlm_jax.analysis.report import analyse, table
from vlm_jax.training.config import load_config, shipped_configs

FOLDER = Path(__file__).parent
SMALL = "v5e-8"   # for the quickstart's configs, which name no topology
HEAD = ("| config | topology | mesh | batch | peak GiB (of) | step ms | binds | MFU | examples/s a chip | sent GB a chip | largest batch |", "|---" * 11 + "|")
DECODING_HEAD = ("| config | topology | program | rows | peak GiB (of) | parameters | cache | step ms | binds | tokens/s a chip | sent GB a chip |",
                 "|---" * 11 + "|")


def study(file: str, quick: bool = True) -> Path:
    """Compiles the programs of one config's last stage, writes its results.json after each kind and returns the path."""
    config = load_config(file)
    topology = config.get("topology") or SMALL
    findings: list[dict] = []
    for what in ("train", "generate") if generates(config) else ("train",):
        found = analyse(config, topology, what, stage=len(config.stages) - 1, quick=quick)
        print("\n\n".join(map(table, found)), flush=True)
        findings += found
        path = record(file, topology, findings, quick)
    return path


def generates(config: Mapping[str, Any]) -> bool:
    """Whether the last stage of a config trains a model that generates text."""
    return (config["stages"][-1].get("task") or config["task"])["name"] == "generation"


def record(file: str, topology: str, findings: Sequence[dict], quick: bool = True) -> Path:
    """Writes the results.json of one config from the findings of its programs, training first."""
    metrics = metrics_of(findings[0])
    for found in findings[1:]:
        which = found["program"].replace("/", "_")   # generate_prompt, generate_step
        values = metrics_of(found)
        rate = values.pop("examples_per_second_per_chip", None)
        metrics |= {f"{which}_{key}": value for key, value in values.items() if "mfu" not in key}
        if rate is not None and which == "generate_step":
            metrics["tokens_per_second_per_chip"] = rate
    command = f"python -m experiments.topologies.run --config {file}" + ("" if quick else " --full")
    name = f"{Path(file).parent.name}_{Path(file).stem}-{topology.replace(':', '_').replace('*', '_')}"
    decoding = {"decoding": list(findings[1:])} if len(findings) > 1 else {}
    return write_results(FOLDER / name, metrics, command=command, findings=findings[0], **decoding, config=file)


def metrics_of(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures of one program; those of time only where it fits."""
    estimate, memory = found.get("roofline") or {}, found["memory"]
    metrics = {"peak_gib": memory["peak"] / 2 ** 30, "memory_share": memory["share"], "fits": float(memory["fits"])}
    if estimate:
        metrics |= {"step_ms": 1e3 * estimate["seconds"], "predicted_mfu": estimate["mfu"], "predicted_mfu_without_overlap": estimate["mfu_without_overlap"],
                    "examples_per_second_per_chip": estimate["examples_per_second_per_device"], "collective_gb_per_chip": found["collective_bytes"] / 1e9,
                    "warnings": len(found["warnings"])}
    return metrics


def row(results: dict) -> str:
    """One line of the table of README.md."""
    found, metrics = results["details"]["findings"], results["metrics"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in found["mesh"].items() if size > 1)
    largest = found.get("largest_batch") or {}
    said = f"{largest['batch']:,}{'' if largest['verified'] else ' (estimated)'}" if largest else "-"
    limit = f"{metrics['peak_gib']:.2f} ({found['memory']['limit'] / 2 ** 30:.2f})"
    if "step_ms" not in metrics:
        return f"| {found['config']} | {found['topology']} | {mesh} | {sum(found['batch'].values()):,} | {limit} DOES NOT FIT | | | | | | {said} |"
    return (f"| {found['config']} | {found['topology']} | {mesh} | {sum(found['batch'].values()):,} | {limit} | {metrics['step_ms']:.1f} | "
            f"{found['roofline']['bound']} | {metrics['predicted_mfu_without_overlap']:.0%} to {metrics['predicted_mfu']:.0%} | "
            f"{metrics['examples_per_second_per_chip']:,.0f} | {metrics['collective_gb_per_chip']:.2f} | {said} |")


def decoding_rows(results: dict) -> list[str]:
    """The lines of a config's decoding programs in the second table of README.md."""
    lines = []
    for found in results["details"].get("decoding", ()):
        memory, metrics = found["memory"], metrics_of(found)
        sizes = [f"{memory['peak'] / 2 ** 30:.2f} ({memory['limit'] / 2 ** 30:.2f}){'' if memory['fits'] else ' DOES NOT FIT'}",
                 *(f"{memory[key] / 2 ** 30:.2f}" if key in memory else "" for key in ("parameters", "cache"))]
        rate = f"{metrics['examples_per_second_per_chip']:,.1f}" if found["program"] == "generate/step" and "step_ms" in metrics else ""
        work = [f"{metrics['step_ms']:.1f}", found["roofline"]["bound"], rate, f"{metrics['collective_gb_per_chip']:.2f}"] if "step_ms" in metrics else [""] * 4
        cells = [found["config"], found["topology"], found["program"], f"{sum(found['batch'].values()):,}", *sizes, *work]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_table() -> None:
    """Writes the tables of all results into README.md, below its mark."""
    known = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*/results.json"))]
    decoding = [line for results in known for line in decoding_rows(results)]
    tables = [*HEAD, *map(row, known), *(["", *DECODING_HEAD, *decoding] if decoding else [])]
    readme = FOLDER / "README.md"
    before = readme.read_text().split("<!-- table -->")[0]
    readme.write_text(before + "<!-- table -->\n" + "\n".join(tables) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles the configs named, or all without a result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", nargs="*", help="files; by default all shipped ones that have no result yet")
    parser.add_argument("--full", action="store_true", help="verify the largest batch and what grows by further programs")
    options = parser.parse_args(arguments)
    done = {json.loads(path.read_text())["details"]["config"] for path in FOLDER.glob("*/results.json")}
    for file in options.config or [file for file in shipped_configs() if file not in done]:
        print(study(file, quick=not options.full), flush=True)
        write_table()


if __name__ == "__main__":
    main()

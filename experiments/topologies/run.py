"""Compiles every published config for its topology and writes what `python -m vlm_jax.compile` finds to CONFIG-TOPOLOGY/results.json.

    python -m experiments.topologies.run                                # all that have no result yet; minutes each
    python -m experiments.topologies.run --config configs/siglip/so400m14_webli.py --full   # one, with largest batch and growth verified
"""
import argparse
from collections.abc import Sequence
import json
from pathlib import Path

from experiments.results import write_results
from vlm_jax.analysis.report import analyse, table
from vlm_jax.training.config import load_config, shipped_configs

FOLDER = Path(__file__).parent
SMALL = "v5e-8"   # for the quickstart's configs, which name no topology
HEAD = ("| config | topology | mesh | batch | peak GiB (of) | step ms | binds | MFU | examples/s a chip | sent GB a chip | largest batch |", "|---" * 11 + "|")


def study(file: str, quick: bool = True) -> Path:
    """Compiles one config's last stage, writes its results.json and returns the path."""
    config = load_config(file)
    topology = config.get("topology") or SMALL
    found = analyse(config, topology, stage=len(config.stages) - 1, quick=quick)[0]
    print(table(found), flush=True)
    estimate, memory = found.get("roofline") or {}, found["memory"]
    metrics = {"peak_gib": memory["peak"] / 2 ** 30, "memory_share": memory["share"], "fits": float(memory["fits"])}
    if estimate:
        metrics |= {"step_ms": 1e3 * estimate["seconds"], "predicted_mfu": estimate["mfu"], "predicted_mfu_without_overlap": estimate["mfu_without_overlap"],
                    "examples_per_second_per_chip": estimate["examples_per_second_per_device"], "collective_gb_per_chip": found["collective_bytes"] / 1e9,
                    "warnings": len(found["warnings"])}
    command = f"python -m experiments.topologies.run --config {file}" + ("" if quick else " --full")
    name = f"{Path(file).parent.name}_{Path(file).stem}-{topology.replace(':', '_').replace('*', '_')}"
    return write_results(FOLDER / name, metrics, command=command, findings=found, config=file)


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


def write_table() -> None:
    """Writes the table of all results into README.md, below its mark."""
    rows = [row(json.loads(path.read_text())) for path in sorted(FOLDER.glob("*/results.json"))]
    readme = FOLDER / "README.md"
    before = readme.read_text().split("<!-- table -->")[0]
    readme.write_text(before + "<!-- table -->\n" + "\n".join([*HEAD, *rows]) + "\n")


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

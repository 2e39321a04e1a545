"""Runs a config over a grid of values: `python -m vlm_jax.sweep --config FILE --workdir runs/sweep --grid seed=0,1,2 --grid stages.0.schedule.peak=1e-3,3e-3`.

Each point trains in `WORKDIR/NAME` by the ordinary command, in a process of its own, so that one failure does not end the sweep; the same command resumes.
`WORKDIR/sweep.json` and the printed table hold the final metrics.
"""
import argparse
from collections.abc import Sequence
import itertools
import json
from pathlib import Path
import subprocess
import sys

from vlm_jax import command_line
from vlm_jax.errors import ConfigError, VlmError


def parse_grid(grids: Sequence[str]) -> list[dict[str, str]]:
    """Returns the points of the grid, the product of every `key=v1,v2,...`; the first key varies slowest.

    Raises:
      ConfigError: for an entry without values, or a key given twice.
    """
    axes: dict[str, list[str]] = {}
    for grid in grids:
        key, _, values = grid.partition("=")
        if not key or not values:
            raise ConfigError(f"--grid {grid}: write KEY=VALUE,VALUE,...")
        if key in axes:
            raise ConfigError(f"--grid {key} is given twice; put all its values into one.")
        axes[key] = values.split(",")
    return [dict(zip(axes, point)) for point in itertools.product(*axes.values())]


def point_name(point: dict[str, str]) -> str:
    """Returns the folder name of a grid point: `seed=1,peak=1e-3`."""
    return ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in point.items()).replace("/", "_") or "point"


def final_metrics(workdir: Path) -> dict[str, float]:
    """Returns the last value of every evaluation metric in `workdir/metrics.jsonl`, named `evaluation/metric`."""
    metrics: dict[str, float] = {}
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        if row.get("kind") == "eval":
            metrics.update({f"{row['name']}/{key}": value for key, value in row.items() if isinstance(value, float) and key != "seconds"})
    return metrics


def run(arguments: Sequence[str] | None = None) -> list[dict]:
    """Parses the command line, trains every point, prints and returns the rows of the table.

    Raises:
      VlmError: after the last point, if some failed.
    """
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.sweep", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]")
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--grid", action="append", required=True, metavar="KEY=V1,V2", help="a config key and its values; repeat for a product")
    options, overrides = command_line.parse(parser, arguments)
    from vlm_jax.training.config import apply_overrides, load_config
    points = parse_grid(options.grid)
    config = load_config(options.config)
    for point in points:   # a misspelt key fails before anything is trained
        apply_overrides(config.copy_and_resolve_references(), overrides + [f"{key}={value}" for key, value in point.items()])

    rows, folder = [], Path(options.workdir)
    names = [point_name(point) for point in points]
    if len(set(names)) < len(names):
        raise ConfigError("--grid: two keys end in the same word, so their folders would be one; sweep them one after the other.")
    for name, point in zip(names, points):
        flags = [f"--config.{key}={value}" for key, value in point.items()] + [f"--config.{override}" for override in overrides]
        print(f"== {name}", flush=True)
        code = subprocess.run([sys.executable, "-m", "vlm_jax.train", "--config", options.config, "--workdir", str(folder / name), *flags]).returncode
        rows.append({"point": point, "exit_code": code, "metrics": final_metrics(folder / name)})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sweep.json").write_text(json.dumps(rows, indent=2) + "\n")
    print_table(names, rows)
    failed = [name for name, row in zip(names, rows) if row["exit_code"]]
    if failed:
        raise VlmError(f"{len(failed)} of {len(rows)} points failed: {', '.join(failed)}; the same command resumes them.")
    return rows


def print_table(names: Sequence[str], rows: Sequence[dict]) -> None:
    """Prints one line a point with its final metrics."""
    metrics = sorted({metric for row in rows for metric in row["metrics"]})
    width = max(map(len, names))
    for metric in metrics:
        print(metric)
        for name, row in zip(names, rows):
            value = row["metrics"].get(metric)
            print(f"  {name:<{width}}  {'-' if value is None else format(value, '.4g')}")


if __name__ == "__main__":
    command_line.main(run)

"""Trains one small SigLIP on meshes of 1, 2, 4 and 8 simulated devices and compares the losses of the first steps.

    python -m experiments.mesh_equality.run

Every mesh runs in a process of its own, through the same `vlm_jax.training.loop.train` as any run, in float32 at the highest matmul precision.
"""
import argparse
from importlib.metadata import version
import json
import math
import os
from pathlib import Path
import subprocess
import sys
import tempfile
from typing import Any

FOLDER = Path(__file__).parent
CONFIG = "configs/siglip/shapes.py:variant=test"
STEPS, BATCH = 50, 16
BAR = 1e-5                      # the promise of docs/architecture.md: relative, over the first 50 steps
ONE: dict[str, int] = {"data": 1, "fsdp": 1}
MESHES: list[dict[str, int]] = [ONE, *({"data": n, "fsdp": 1} for n in (2, 4, 8)), *({"data": 1, "fsdp": n} for n in (2, 4, 8)),
                                {"data": 2, "fsdp": 2}]


def config_of(mesh: dict[str, int], steps: int = STEPS, seed: int = 0) -> dict[str, Any]:
    """The test variant of the shapes config on `mesh`, with every loss written and no evaluation."""
    from vlm_jax.settings import plain
    from vlm_jax.training.config import load_config
    config = plain(load_config(CONFIG))
    config.update(mesh=mesh, seed=seed, log_every=1, evaluations={}, checkpoint={"every": steps, "keep": 1},
                  dtypes={"params": "float32", "compute": "float32", "softmax": "float32"})
    stage = config["stages"][0]
    stage["steps"] = steps
    stage["data"]["pairs"]["batch_size"] = BATCH
    return config


def losses(workdir: str | os.PathLike) -> list[float]:
    """The training losses in `workdir/metrics.jsonl`, by step."""
    rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    by_step = {row["step"]: row["loss"] for row in rows if "loss" in row}
    return [by_step[step] for step in sorted(by_step)]


def run_on(mesh: dict[str, int], workdir: str, steps: int, seed: int) -> list[float]:
    """The losses of a run on simulated devices, in a process of its own."""
    # More threads than devices (PJRT_NPROC): with one each, seven that wait in a collective can starve the product that the eighth is computing.
    environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_DEFAULT_MATMUL_PRECISION="highest", PJRT_NPROC="32",
                       XLA_FLAGS=f"--xla_force_host_platform_device_count={math.prod(mesh.values())}")
    child = subprocess.run([sys.executable, "-m", "experiments.mesh_equality.run", "--child", json.dumps([mesh, workdir, steps, seed])],
                           env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"the run on {mesh} failed:\n{child.stderr[-3000:]}")
    found = losses(workdir)
    if len(found) != steps:
        raise RuntimeError(f"the run on {mesh} wrote {len(found)} losses, not {steps}; see its metrics.jsonl.")
    return found


def largest_difference(one: list[float], other: list[float]) -> float:
    """The largest relative difference of two loss curves."""
    return max(abs(a - b) / abs(a) for a, b in zip(one, other, strict=True))


def main(steps: int = STEPS, seed: int = 0) -> dict[str, float]:
    """Trains on all meshes, compares with one device and writes results.json; returns its metrics."""
    from experiments.results import write_results
    rows, reference = [], []
    for mesh in MESHES:
        with tempfile.TemporaryDirectory() as workdir:
            found = run_on(mesh, os.path.join(workdir, "run"), steps, seed)
        reference = reference or found
        difference = largest_difference(reference, found)
        rows.append(dict(mesh=mesh, first_loss=found[0], last_loss=found[-1], largest_difference=difference))
        print(f"data={mesh['data']} fsdp={mesh['fsdp']}: loss {found[0]:.6f} -> {found[-1]:.6f}, largest difference {difference:.2e}", flush=True)
    largest = max(row["largest_difference"] for row in rows)
    metrics = {"max_loss_difference": largest}
    print(f"max_loss_difference {largest:.2e} ({'within' if largest <= BAR else 'ABOVE'} {BAR})")
    write_results(FOLDER, metrics, seeds=(seed,), hardware={"jax": version("jax"), "devices": "1 to 8 simulated CPU devices"},
                  config=CONFIG, steps=steps, batch_size=BATCH, meshes=rows)
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        from vlm_jax.training.loop import train
        mesh_, workdir_, steps_, seed_ = json.loads(options.child)
        train(config_of(mesh_, steps_, seed_), workdir_)
    else:
        main(seed=options.seed)

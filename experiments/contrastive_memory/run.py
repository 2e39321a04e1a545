"""Temporary memory of the contrastive losses and their gradients, chunked and dense, as the compiler plans it. Nothing is run.

    python -m experiments.contrastive_memory.run

Each number of devices is simulated in a process of its own; the figure is `compiled.memory_analysis().temp_size_in_bytes` of one device.
"""
import argparse
from importlib.metadata import version
import json
import os
from pathlib import Path
import subprocess
import sys
from typing import Any

FOLDER = Path(__file__).parent
LOSSES = ("sigmoid", "softmax")
WIDTHS = (64, 768)
LARGE, SMALL = 512, 128      # pairs on each device: against dense, and for the growth with the number of devices


def temporary_bytes(loss: str, devices: int, pairs: int, width: int, chunked: bool) -> int:
    """Bytes of temporaries on one of `devices` for the loss of `pairs` weighted pairs on each, and its gradients by features, scale and bias."""
    import jax
    import jax.numpy as jnp

    from vlm_jax.losses import sigmoid_loss, softmax_loss
    from vlm_jax.sharding import batch_sharding, make_mesh, replicated

    mesh = make_mesh(devices=jax.devices()[:devices])
    rows, whole = batch_sharding(mesh), replicated(mesh)

    def value(image, text, scale, bias, weight):
        if loss == "sigmoid":
            total, count = sigmoid_loss(image, text, scale, bias, weight=weight, mesh=mesh, chunked=chunked)
        else:
            total, count = softmax_loss(image, text, scale, weight=weight, mesh=mesh, chunked=chunked)
        return total / count

    features = jax.ShapeDtypeStruct((devices * pairs, width), jnp.float32, sharding=rows)
    weight = jax.ShapeDtypeStruct((devices * pairs,), jnp.float32, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    step = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2, 3)), out_shardings=(whole, (rows, rows, whole, whole)))
    return step.lower(features, features, scalar, scalar, weight).compile().memory_analysis().temp_size_in_bytes


def measure(devices: int, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`jobs` (arguments of `temporary_bytes` without devices) with their bytes, from a process that simulates `devices` CPU devices."""
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}")
    child = subprocess.run([sys.executable, "-m", "experiments.contrastive_memory.run", "--child", json.dumps([devices, jobs])],
                           env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(f"the measurement on {devices} devices failed:\n{child.stderr[-2000:]}")
    rows = json.loads(child.stdout.splitlines()[-1])
    for row in rows:
        kind = "chunked" if row["chunked"] else "dense"
        print(f"{row['loss']:8} {row['devices']:3} devices x {row['pairs']:3} pairs, width {row['width']:3}, {kind:7} {row['bytes']:12,} bytes",
              flush=True)
    return rows


def metrics_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of the study, each the worse of the two losses."""
    found = {(row["loss"], row["devices"], row["pairs"], row["width"], row["chunked"]): row["bytes"] for row in rows}
    def worst(width: int) -> float:
        return max(found[loss, 8, LARGE, width, True] / found[loss, 8, LARGE, width, False] for loss in LOSSES)

    growth = [found[loss, 64, SMALL, width, True] / found[loss, 8, SMALL, width, True] for loss in LOSSES for width in WIDTHS]
    return {**{f"chunked_over_dense_temp_bytes_width{width}": worst(width) for width in WIDTHS},
            "growth_8_to_64_devices": max(growth, key=lambda ratio: abs(ratio - 1))}


def main() -> None:
    """Measures all sizes and writes results.json."""
    from experiments.results import write_results
    jobs = [dict(loss=loss, width=width) for loss in LOSSES for width in WIDTHS]
    rows = measure(8, [dict(job, pairs=LARGE, chunked=chunked) for job in jobs for chunked in (True, False)])
    rows += [row for devices in (8, 64) for row in measure(devices, [dict(job, pairs=SMALL, chunked=True) for job in jobs])]
    metrics = metrics_of(rows)
    for name, value in metrics.items():
        print(f"{name} {value:.3f}")
    write_results(FOLDER, metrics, hardware={"jax": version("jax"), "devices": "8 and 64 simulated CPU devices"}, temporary_bytes_per_device=rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        count, wanted = json.loads(options.child)
        print(json.dumps([dict(job, devices=count, bytes=temporary_bytes(devices=count, **job)) for job in wanted]))
    else:
        main()

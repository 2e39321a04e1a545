"""The roofline's estimate against a measured training step on the devices at hand: by how much a real step is slower than the bound.

    python -m experiments.calibration.run --steps 10
"""
import argparse
from collections.abc import Sequence
from pathlib import Path
import statistics
import time

from experiments.results import write_results
from vlm_jax.analysis.report import analyse
from vlm_jax.training.config import load_config, resolve

CONFIGS = ("configs/siglip/shapes.py", "configs/siglip/emoji.py")
CHIP = "cpu-1"


def measured_step(file: str, steps: int) -> float:
    """Median seconds of a training step on random inputs, after two that are not counted."""
    import jax
    import jax.numpy as jnp

    from vlm_jax.training import setup
    from vlm_jax.training.dry_run import abstract_batch
    config = resolve(load_config(file))
    parts = setup.build(config, 0, setup.read(config), jax.devices()[:1], data=False)
    with jax.set_mesh(parts.mesh):
        state = parts.initial_state()
        batch = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype, device=leaf.sharding), abstract_batch(parts))
        seconds = []
        for number in range(steps + 2):
            start = time.perf_counter()
            state, metrics = parts.step(state, batch, jnp.int32(number))
            jax.block_until_ready(metrics["loss"])
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Estimates and measures each config and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--configs", nargs="*", default=list(CONFIGS))
    options = parser.parse_args(arguments)
    metrics, table = {}, {}
    for file in options.configs:
        name = Path(file).stem
        estimate = analyse(load_config(file), CHIP, quick=True)[0]["roofline"]
        seconds = measured_step(file, options.steps)
        table[name] = {"measured_seconds": seconds, "estimate": estimate}
        metrics |= {f"{name}_measured_over_compute": seconds / estimate["compute"], f"{name}_measured_over_estimate": seconds / estimate["seconds"],
                    f"{name}_measured_over_no_overlap": seconds / estimate["seconds_without_overlap"]}
        fastest, slowest = 1e3 * estimate["seconds"], 1e3 * estimate["seconds_without_overlap"]
        print(name, f"measured {1e3 * seconds:.0f} ms, estimate {fastest:.0f} to {slowest:.0f} ms", flush=True)
    write_results(Path(__file__).parent, metrics, table=table, steps=options.steps)


if __name__ == "__main__":
    main()

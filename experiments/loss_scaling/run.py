"""Peak memory of a chip for the SigLIP loss and its gradient at 8, 64 and 256 chips with a fixed batch a chip, compiled for TPU v5e.

    python -m experiments.loss_scaling.run
"""
import argparse
from collections.abc import Sequence
from pathlib import Path
import subprocess
import sys

from experiments.results import write_results
from vlm_jax.analysis.program import child_environment
from vlm_jax.sharding.topologies import parse_topology

TOPOLOGIES = ("v5e-8", "v5e-64", "v5e-256")
ROWS, WIDTH = (512, 128), 1152   # pairs a chip of So400m/14 at batch 32,768 on 64 and on 256 chips; the first one gives the figures


def peak(name: str, chunked: bool, rows: int, width: int = WIDTH) -> int:
    """Bytes a chip (arguments, results, temporaries) of value and gradient with respect to embeddings and scalars; runs in the child."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from vlm_jax.losses import sigmoid_loss
    from vlm_jax.sharding import batch_sharding, make_mesh
    mesh = make_mesh(devices=parse_topology(name).devices)
    batch = jax.ShapeDtypeStruct((rows * mesh.size, width), jnp.float32, sharding=batch_sharding(mesh))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def loss(image, text, scale, bias):
        total, weight = sigmoid_loss(image, text, scale, bias, mesh=mesh, chunked=chunked)
        return total / weight
    with jax.set_mesh(mesh):
        stats = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3))).lower(batch, batch, scalar, scalar).compile().memory_analysis()
    return stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes


def in_child(name: str, chunked: bool, rows: int, width: int = WIDTH) -> int:
    """`peak` in a process that can compile for an absent TPU."""
    code = f"from experiments.loss_scaling.run import peak; print('PEAK', peak({name!r}, {chunked}, {rows}, {width}))"
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(parse_topology(name)), capture_output=True, text=True, timeout=1800, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("PEAK ")]
    if not lines:
        raise RuntimeError(f"{name}: the child ended with {done.returncode}: {done.stderr[-500:]}")
    return int(lines[0].removeprefix("PEAK "))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures both forms of the loss and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="*", default=list(TOPOLOGIES))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="pairs a chip")
    options = parser.parse_args(arguments)
    table: dict[int, dict[int, dict[str, int]]] = {}
    for rows in options.rows:
        for name in options.topologies:
            chips = parse_topology(name).size
            table.setdefault(rows, {})[chips] = {"chunked": in_child(name, True, rows), "all_pairs": in_child(name, False, rows)}
            print(f"{rows} pairs a chip, {chips} chips: " + ", ".join(f"{form} {size:,} bytes" for form, size in table[rows][chips].items()), flush=True)
    metrics: dict[str, float] = {f"peak_bytes_{chips}_chips": row["chunked"] for chips, row in table[options.rows[0]].items()}
    for rows, by_chips in table.items():
        sizes = [row["chunked"] for row in by_chips.values()]
        suffix = "" if rows == options.rows[0] else f"_{rows}_pairs"
        metrics |= {f"largest_growth{suffix}": max(sizes) / sizes[0] - 1, f"largest_change{suffix}": max(abs(size / sizes[0] - 1) for size in sizes)}
    write_results(Path(__file__).parent, metrics, rows_a_chip=options.rows, width=WIDTH, table=table)


if __name__ == "__main__":
    main()

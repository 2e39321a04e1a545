"""Trains the shapes config over three seeds and records zero-shot accuracy on pairs of colour and shape never seen together.

    python -m experiments.siglip_shapes.run
"""
import argparse
from pathlib import Path

from experiments.results import matmul_gflops, write_results
from experiments.training_runs import mean, over_seeds

FOLDER = Path(__file__).parent
BAR = 0.90


def main(runs: Path, seeds: tuple[int, ...], output: Path, variant: str) -> dict[str, float]:
    """Runs the study and writes results.json into `output`; returns its metrics."""
    gflops = matmul_gflops()
    by_seed = over_seeds(f"configs/siglip/shapes.py:variant={variant}", runs, seeds)
    metrics = {"heldout_pairs_top1": mean(by_seed, "heldout_pairs/top1"), "heldout_pairs_top5": mean(by_seed, "heldout_pairs/top5"),
               "seen_pairs_top1": mean(by_seed, "seen_pairs/top1")}
    print(f"heldout_pairs_top1 {metrics['heldout_pairs_top1']:.3f} ({'meets' if metrics['heldout_pairs_top1'] > BAR else 'MISSES'} {BAR}); by seed: "
          + ", ".join(f"{run['heldout_pairs/top1']:.3f}" for run in by_seed.values()))
    write_results(output, metrics, seeds=seeds, by_seed={str(seed): values for seed, values in by_seed.items()}, matmul_gflops_before=gflops)
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/siglip_shapes"), help="where the runs are kept; the same command resumes them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--variant", default="full", choices=["full", "test"])
    options = parser.parse_args()
    main(options.runs, tuple(options.seeds), options.output, options.variant)

"""Trains the small PaLI on shapes over seeds, and once without pictures; records captions, answers and boxes on pairs never seen together.

    python -m experiments.pali_shapes.run
"""
import argparse
from pathlib import Path

from experiments.results import matmul_gflops, write_results
from experiments.training_runs import mean, over_seeds, trained

FOLDER = Path(__file__).parent
NAMES = {"vqa_heldout": "questions/exact_match", "caption_exact_heldout": "captions/exact_match", "refer_iou50_heldout": "boxes/iou@0.5"}
BARS = {"vqa_heldout": 0.90, "caption_exact_heldout": 0.90, "refer_iou50_heldout": 0.80}


def main(runs: Path, seeds: tuple[int, ...], output: Path, variant: str) -> dict[str, float]:
    """Runs the study and writes results.json into `output`; returns its metrics."""
    gflops = matmul_gflops()
    by_seed = over_seeds(f"configs/pali/shapes.py:variant={variant}", runs, seeds)
    blind = trained(f"configs/pali/shapes.py:variant={variant},images=false", runs / "text_only")
    metrics = {name: mean(by_seed, found) for name, found in NAMES.items()}
    metrics["text_only_baseline"] = blind[NAMES["vqa_heldout"]]
    metrics.update({f"text_only_{name}": blind[found] for name, found in NAMES.items() if name != "vqa_heldout"})
    for name, bar in BARS.items():
        print(f"{name} {metrics[name]:.3f} ({'meets' if metrics[name] > bar else 'MISSES'} {bar}; text alone {blind[NAMES[name]]:.3f}); by seed: "
              + ", ".join(f"{run[NAMES[name]]:.3f}" for run in by_seed.values()))
    write_results(output, metrics, seeds=seeds, by_seed={str(seed): values for seed, values in by_seed.items()}, text_only=blind, matmul_gflops_before=gflops)
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/pali_shapes"), help="where the runs are kept; the same command resumes them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--variant", default="full", choices=["full", "test"])
    options = parser.parse_args()
    main(options.runs, tuple(options.seeds), options.output, options.variant)

"""Trains one PaLI to caption emoji in fourteen languages; records CIDEr-D of each language on combinations never seen.

    python -m experiments.pali_emoji.run
"""
import argparse
from pathlib import Path

from experiments.results import matmul_gflops, write_results
from experiments.training_runs import trained

FOLDER = Path(__file__).parent


def main(runs: Path, output: Path, variant: str) -> dict[str, float]:
    """Runs the study and writes results.json into `output`; returns its metrics: `cider_d_LANGUAGE`, `cider_d_mean`, `exact_match`."""
    from vlm_jax.data.worlds.emoji_font import font_sha256
    gflops = matmul_gflops()
    found = trained(f"configs/pali/emoji.py:variant={variant}", runs / "seed_0", ("seed=0",))
    prefix = "heldout_attributes/cider_d/"
    languages = {name.removeprefix(prefix).split("/")[0]: value for name, value in found.items() if name.startswith(prefix)}
    average = languages.pop("mean_of_languages")
    metrics = {**{f"cider_d_{language}": value for language, value in sorted(languages.items())}, "cider_d_mean": average,
               "exact_match": found["heldout_attributes/exact_match"]}
    for name, value in metrics.items():
        print(f"{name:16} {value:.3f}")
    write_results(output, metrics, seeds=(0,), by_seed={"0": found}, font_sha256=font_sha256(), matmul_gflops_before=gflops)
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/pali_emoji"), help="where the runs are kept; the same command resumes them")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--variant", default="full", choices=["full", "test"])
    options = parser.parse_args()
    main(options.runs, options.output, options.variant)

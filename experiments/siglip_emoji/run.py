"""Trains the emoji quickstart over three seeds and the multilingual config once, and records retrieval on pictures never trained on.

    python -m experiments.siglip_emoji.run
"""
import argparse
import json
from pathlib import Path

from experiments.results import matmul_gflops, write_results
from experiments.training_runs import mean, over_seeds, trained

FOLDER = Path(__file__).parent
BAR = {"heldout_attributes_t2i_r1": 0.60, "heldout_attributes_t2i_r5": 0.92}


def main(runs: Path, seeds: tuple[int, ...], multilingual: bool, output: Path, variant: str) -> dict[str, float]:
    """Runs the study and writes results.json into `output`; returns its metrics."""
    from vlm_jax.data.worlds.emoji_font import font_sha256
    from vlm_jax.data.worlds.emoji_splits import HELDOUT_LANGUAGES, TRAIN_LANGUAGES
    gflops = matmul_gflops()
    by_seed = over_seeds(f"configs/siglip/emoji.py:variant={variant}", runs / "english", seeds)
    held_out = "heldout_attributes"
    metrics = {f"heldout_attributes_t2i_r{k}": mean(by_seed, f"{held_out}/text_to_image/r@{k}") for k in (1, 5, 10)}
    metrics.update({f"heldout_attributes_i2t_r{k}": mean(by_seed, f"{held_out}/image_to_text/r@{k}") for k in (1, 5, 10)})
    metrics.update({f"heldout_concepts_t2i_r{k}": mean(by_seed, f"heldout_concepts/text_to_image/r@{k}") for k in (1, 5)})
    table = {}
    if multilingual:
        found = trained(f"configs/siglip/emoji_multilingual.py:variant={variant}", runs / "multilingual")
        table = {language: {k: found[f"{held_out}/text_to_image/r@{k}/{language}"] for k in (1, 5)} for language in (*TRAIN_LANGUAGES, *HELDOUT_LANGUAGES)}
        metrics.update({f"multilingual_r1_{language}": values[1] for language, values in table.items()})
        print("language  R@1   R@5")
        for language, values in table.items():
            print(f"{language:8}  {values[1]:.3f} {values[5]:.3f}{'' if language in TRAIN_LANGUAGES else '  (never trained on)'}")
    for name, bar in BAR.items():
        print(f"{name} {metrics[name]:.3f} ({'meets' if metrics[name] >= bar else 'MISSES'} {bar}); by seed: "
              + ", ".join(f"{run[name_of(name)]:.3f}" for run in by_seed.values()))
    environment = json.loads((runs / "english" / f"seed_{seeds[0]}" / "environment.json").read_text())
    write_results(output, metrics, seeds=seeds, by_seed={str(seed): values for seed, values in by_seed.items()}, multilingual_recall=table,
                  font_sha256=font_sha256(), matmul_gflops_before=gflops, matmul_gflops_in_run=environment.get("matmul_gflops"))
    return metrics


def name_of(metric: str) -> str:
    """heldout_attributes_t2i_r1 -> heldout_attributes/text_to_image/r@1."""
    return "heldout_attributes/text_to_image/r@" + metric.rsplit("_r", 1)[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/siglip_emoji"), help="where the runs are kept; the same command resumes them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no_multilingual", action="store_true")
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--variant", default="full", choices=["full", "test"])
    options = parser.parse_args()
    main(options.runs, tuple(options.seeds), not options.no_multilingual, options.output, options.variant)

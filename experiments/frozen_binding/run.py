"""Trains Frozen on shapes (an encoder whose prefix a frozen language model reads) and records whether one picture of each binds two new words.

    python -m experiments.frozen_binding.run
"""
import argparse
from pathlib import Path

import numpy as np

from experiments.results import write_results
from experiments.training_runs import trained
from vlm_jax.evaluation import evaluate
from vlm_jax.restore import load

FOLDER = Path(__file__).parent
CONFIG = "configs/frozen/shapes.py"
WAYS, SHOTS = 2, (1, 3, 5)      # inner shots: examples of each word
COUNT = {"full": 1000, "test": 4}


def asked(workdir: Path, variant: str) -> dict[str, dict[str, float]]:
    """The metrics of a trained run with true and with shuffled pictures, whose files go to `workdir/few_shot`."""
    loaded = load(workdir)
    source = dict(name="shapes_episodes", split="heldout", size=loaded.processor.image_size[0], kinds=["binding"], ways=WAYS, shots=WAYS * max(SHOTS),
                  count=COUNT[variant], levels=["pair"], induction=True)
    settings = dict(evaluator="few_shot", source=source, shots=[WAYS * number for number in SHOTS])
    generator = loaded.generator(batch_size=4 if variant == "test" else 16)
    return {name: evaluate(name, {**settings, **control}, generator, workdir / "few_shot" / name)
            for name, control in (("real", {}), ("shuffled", {"shuffled": True}))}


def main(runs: Path, seeds: tuple[int, ...], output: Path, variant: str) -> dict[str, float]:
    """Runs the study and writes results.json into `output`; returns its metrics."""
    by_seed = {}
    for seed in seeds:
        workdir = runs / f"seed_{seed}"
        trained(f"{CONFIG}:variant={variant}", workdir, (f"seed={seed}",))
        by_seed[seed] = asked(workdir, variant)
    chance, questions = by_seed[seeds[0]]["real"]["chance"], len(seeds) * COUNT[variant]
    by_shots = {number: [run["real"][f"accuracy/{WAYS * number}_shots"] for run in by_seed.values()] for number in SHOTS}
    accuracy = float(np.mean(by_shots[1]))
    # The larger of the errors over seeds and over all questions, whose own is at least that of guessing.
    between = np.std(by_shots[1], ddof=1) / np.sqrt(len(seeds)) if len(seeds) > 1 else 0.0
    within = np.sqrt(max(accuracy * (1 - accuracy), chance * (1 - chance)) / questions)
    metrics = {"one_shot_accuracy": accuracy, "chance": chance, "standard_error": float(max(between, within)),
               **{f"accuracy_{number}_inner_shots": float(np.mean(values)) for number, values in by_shots.items()},
               "shuffled_one_shot_accuracy": float(np.mean([run["shuffled"][f"accuracy/{WAYS}_shots"] for run in by_seed.values()]))}
    bar = chance + 3 * metrics["standard_error"]
    print(f"one_shot_accuracy {accuracy:.3f} ({'meets' if accuracy >= bar else 'MISSES'} {bar:.3f}, three standard errors above chance)")
    write_results(output, metrics, seeds=seeds, name="frozen_binding", by_seed=by_seed, config=CONFIG)
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/frozen_binding"), help="where the runs are kept; the same command resumes them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--variant", default="full", choices=["full", "test"])
    options = parser.parse_args()
    main(options.runs, tuple(options.seeds), options.output, options.variant)

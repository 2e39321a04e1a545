"""Trains the small Flamingo on shapes over three seeds and records its accuracy on unseen words and concepts against the number of examples.

    python -m experiments.flamingo_fewshot.run
"""
import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.results import write_results
from experiments.training_runs import trained
from vlm_jax.evaluation import evaluate
from vlm_jax.restore import load

FOLDER = Path(__file__).parent
SHOTS = (0, 2, 4, 8, 16, 32)
COMPARED = 8                  # shots at which the controls are read
COUNT = {"full": 500, "test": 3}
Curve = dict[int, dict[str, float]]


def evaluations(variant: str, size: int, shots: Sequence[int]) -> dict[str, dict[str, Any]]:
    """{name: settings} of what every seed is asked, all of it on concepts and words that no stage of training has seen."""
    count = COUNT[variant]
    episodes = dict(name="shapes_episodes", split="heldout", size=size, count=count, shots=max(shots), ways=2, levels=["pair"])
    binding = dict(evaluator="few_shot", source=dict(episodes, kinds=["binding"]), shots=list(shots))
    words = dict(name="shapes_words", split="heldout", size=size, seed=1, count=count)
    pool = dict(words, seed=2, count=40 if variant == "test" else 400)
    lexicon = dict(evaluator="few_shot", source=words, support=pool, shots=[number for number in shots if number])
    settings = {"real": binding, "shuffled": dict(binding, shuffled=True), "blind": dict(binding, images=False, shots=[COMPARED]),
                "random": lexicon, "rices": dict(lexicon, choice="rices")}
    return {**settings, **{kind: dict(binding, source=dict(episodes, kinds=[kind]), shots=[0, COMPARED]) for kind in ("vqa", "caption")}}


def asked(workdir: Path, variant: str, shots: Sequence[int]) -> dict[str, dict[str, float]]:
    """The metrics of every evaluation of a trained run, whose files go to `workdir/few_shot`."""
    loaded = load(workdir)
    generator = loaded.generator(batch_size=4 if variant == "test" else 16)
    return {name: evaluate(name, settings, generator, workdir / "few_shot" / name)
            for name, settings in evaluations(variant, loaded.processor.image_size[0], shots).items()}


def over_seeds(values: Sequence[float], within: Sequence[float]) -> tuple[float, float]:
    """(mean, standard error) of one value a seed; of a single seed the error is that over its questions.

    Args:
      within: the standard error over the questions of each seed.
    """
    if len(values) > 1:
        return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    return float(values[0]), float(within[0])


def curve(runs: Sequence[Mapping[str, Mapping[str, float]]], name: str, shots: Sequence[int]) -> Curve:
    """{shots: {"mean", "standard_error"}} of an evaluation over the seeds."""
    made = {}
    for number in shots:
        found = [(run[name][f"accuracy/{number}_shots"], run[name][f"standard_error/{number}_shots"]) for run in runs
                 if f"accuracy/{number}_shots" in run[name]]
        if found:
            made[number] = dict(zip(("mean", "standard_error"), over_seeds(*zip(*found))))
    return made


def difference(runs: Sequence[Mapping[str, Mapping[str, float]]], first: str, second: str, number: int) -> tuple[float, float]:
    """(mean, standard error) of the accuracy of one evaluation less that of another; the larger error of that over seeds and that over all questions."""
    pairs = [[run[name][f"accuracy/{number}_shots"] for name in (first, second)] for run in runs]
    within = [np.hypot(*(run[name][f"standard_error/{number}_shots"] for name in (first, second))) for run in runs]
    mean, between = over_seeds([a - b for a, b in pairs], within)
    return mean, max(between, float(np.sqrt(np.sum(np.square(within))) / len(runs)))


def figure(path: Path, curves: Mapping[str, Curve], chance: float, seeds: int) -> None:
    """Accuracy against the number of shots: pictures and their controls, and how examples are chosen."""
    from matplotlib.figure import Figure
    made = Figure(figsize=(8.4, 3.4), dpi=110, layout="constrained")
    panels = made.subplots(1, 2)
    of = {"real": ("their own pictures", "#1a7f37"), "shuffled": ("pictures shuffled", "#9a6700"), "blind": ("no pictures", "#57606a"),
          "rices": ("most similar pictures", "#0969da"), "random": ("drawn", "#bf3989")}
    titles = ("episodes: two new words for two unseen concepts", "a lexicon of 20 new words: which examples?")
    for axes, names, title in zip(panels, (("real", "shuffled", "blind"), ("rices", "random")), titles):
        for name in names:
            points = curves[name]
            axes.errorbar(range(len(points)) if name != "blind" else [list(curves["real"]).index(number) for number in points],
                          [point["mean"] for point in points.values()], [point["standard_error"] for point in points.values()],
                          label=of[name][0], color=of[name][1], marker="o", markersize=4, capsize=3, linewidth=1.8)
        ticks = list(curves[names[0]])
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set(ylim=(0, 1.02), xlabel="shots", title=title)
        axes.title.set_fontsize(9)
        axes.grid(color="#d0d7de", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].axhline(chance, color="#57606a", linestyle=":", linewidth=1, label="chance")
    panels[0].set_ylabel(f"accuracy ({seeds} seed{'s' * (seeds > 1)})")
    for axes in panels:
        axes.legend(frameon=False, fontsize=8)
    made.savefig(path)


def main(runs: Path, seeds: tuple[int, ...], output: Path, variant: str) -> dict[str, float]:
    """Runs the study; writes results.json and figure.png into `output` and returns the metrics."""
    shots = (0, 2, COMPARED) if variant == "test" else SHOTS
    by_seed = {}
    for seed in seeds:
        workdir = runs / f"seed_{seed}"
        trained(f"configs/flamingo/shapes.py:variant={variant}", workdir, (f"seed={seed}",))
        by_seed[seed] = asked(workdir, variant, shots)
    every = list(by_seed.values())
    curves = {name: curve(every, name, shots) for name in every[0]}
    metrics: dict[str, float] = {}
    for number, point in curves["real"].items():
        metrics |= {f"accuracy_{number}_shots": point["mean"], f"standard_error_{number}_shots": point["standard_error"]}
    metrics["gain_8_minus_0"] = curves["real"][COMPARED]["mean"] - curves["real"][0]["mean"]
    metrics["real_minus_shuffled"] = curves["real"][COMPARED]["mean"] - curves["shuffled"][COMPARED]["mean"]
    metrics["rices_minus_random"], metrics["rices_standard_error"] = difference(every, "rices", "random", COMPARED)
    chance = every[0]["real"]["chance"]
    for name, value, bar in (("gain_8_minus_0", metrics["gain_8_minus_0"], 0.2), ("real_minus_shuffled", metrics["real_minus_shuffled"], 0.2),
                             ("rices_minus_random", metrics["rices_minus_random"], 2 * metrics["rices_standard_error"])):
        print(f"{name} {value:.3f} ({'meets' if value >= bar else 'MISSES'} {bar:.3f})")
    write_results(output, metrics, seeds=seeds, name="flamingo_fewshot", chance=chance, curves=curves, by_seed=by_seed)
    figure(output / "figure.png", curves, chance, len(seeds))
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/flamingo_fewshot"), help="where the runs are kept; the same command resumes them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--variant", default="full", choices=["full", "test"])
    options = parser.parse_args()
    main(options.runs, tuple(options.seeds), options.output, options.variant)

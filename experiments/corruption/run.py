"""Damages every file of a checkpoint of a real training run, in hundreds of ways, and restores it: never a silently different value.

    python -m experiments.corruption.run
"""
import argparse
from collections import Counter
import os
from pathlib import Path
import shutil
import sys
import tempfile

FOLDER = Path(__file__).parent
CONFIG = "configs/siglip/shapes.py:variant=test"


def main(flips: int = 12, seed: int = 0) -> dict[str, float]:
    """Trains four steps, damages copies of the checkpoints, restores, and writes results.json; returns its metrics."""
    import logging

    import jax
    import numpy as np

    from experiments.corruption.cases import CRASHED, FELL_BACK, HARMLESS, REFUSED, UNDETECTED, damages, outcome
    from experiments.results import write_results
    from vlm_jax.settings import plain
    from vlm_jax.training import setup
    from vlm_jax.training.checkpoints import Checkpoints
    from vlm_jax.training.config import load_config, resolve
    from vlm_jax.training.loop import train

    config = plain(load_config(CONFIG))
    config.update(seed=seed, evaluations={}, checkpoint={"every": 2, "keep": 2})
    config["stages"][0].update(steps=4, ema={"decay": 0.9})
    with tempfile.TemporaryDirectory() as base:
        workdir = Path(base) / "run"
        train(config, workdir)
        resolved = resolve(config)
        stages = setup.read(resolved)
        abstract = setup.build(resolved, 0, stages).abstract_state
        original = workdir / "checkpoints"
        sound = {step: jax.tree.map(np.asarray, Checkpoints(original).restore(abstract, step)[0]) for step in Checkpoints(original).steps()}
        logging.getLogger("vlm_jax").propagate = False
        found, bad = Counter(), []
        for number, (name, damage) in enumerate(damages(original, flips, seed)):
            folder = Path(base) / str(number)
            shutil.copytree(original, folder)
            damage(folder)
            result, said = outcome(folder, abstract, sound, lambda metadata: metadata["step"])
            found[result] += 1
            if result in (UNDETECTED, CRASHED):
                bad.append(f"{name}: {result}: {said}")
                print(bad[-1], file=sys.stderr, flush=True)
            shutil.rmtree(folder)
        size = sum(os.path.getsize(path) for path in original.rglob("*") if path.is_file())
    metrics = {"cases": sum(found.values()), "undetected": found[UNDETECTED], "crashed": found[CRASHED], "fell_back": found[FELL_BACK],
               "refused": found[REFUSED], "harmless": found[HARMLESS]}
    print(metrics)
    write_results(FOLDER, metrics, seeds=(seed,), config=CONFIG, flips_a_file=flips, arrays=len(jax.tree.leaves(abstract)), bytes_of_checkpoints=size, bad=bad)
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=12, help="single-bit flips in every file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    main(options.flips, options.seed)

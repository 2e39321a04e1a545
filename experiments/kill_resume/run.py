"""Kills the trainer at random moments and at every fault point, starts it again with the same command, and compares the end with an undisturbed run.

    python -m experiments.kill_resume.run
"""
import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
import json
from pathlib import Path
import random
import shutil
import tempfile
from typing import Any

from experiments.kill_resume.compare import differences, listed_steps, unreadable_checkpoints
from experiments.kill_resume.trainer import Moment, Outcome, start

FOLDER = Path(__file__).parent
KILLS = 50
QUOTAS = {"save": 10, "collection": 5, "restore": 5, "evaluation": 3}
# A fault point of several processes is passed by none here; tests/test_distributed.py kills there.
ELSEWHERE = ("distributed.connect",)
# After these points a random delay falls into what the quotas ask for, most of the time.
NEAR = {"save": ("checkpoint.save", "checkpoint.copied", "checkpoint.before_commit"), "collection": ("checkpoint.collect", "checkpoint.collecting"),
        "restore": ("checkpoint.restore", "checkpoint.restoring", "checkpoint.verify"), "evaluation": ("loop.evaluate", "evaluation.predict")}

SPANS = {"save": 0.02, "collection": 0.003, "restore": 0.05, "evaluation": 0.2}     # seconds

NEEDS_A_STEP = (*NEAR["restore"],)
TRIES = 4


def exact_moments(points: Sequence[str]) -> list[Moment]:
    """Every point once; those that a run passes often, the second time, so that the run gets on."""
    rare = ("loop.start", "loop.restored", "loop.end", "checkpoint.restore", "checkpoint.restoring", "checkpoint.verify")
    return [Moment(name, 1 if name in rare else 2) for name in points if name not in ELSEWHERE]


def random_moments(seed: int) -> Iterator[Moment]:
    """Endless random moments: half anywhere in a run, half near what is hard, a random time later."""
    draw = random.Random(seed)
    while True:
        if draw.random() < 0.5:
            yield Moment(draw.choice(["loop.start", "loop.restored", "loop.batch"]), 1, delay=draw.uniform(0.0, 6.0))
        else:
            yield near(draw.choice(list(NEAR)), draw)


def near(what: str, draw: random.Random) -> Moment:
    """A random moment that probably falls into a save, a collection, a restore or an evaluation."""
    point = draw.choice(NEAR[what])
    return Moment(point, 1 if what == "restore" else draw.randint(1, 2), delay=draw.uniform(0.0, SPANS[what]))


class Study:
    """Kills and restarts in workdir after workdir, each until its run has ended and was compared.

    Attributes:
      kills: one row a kill: where it fell, its moment, the steps that were listed after it.
      problems: whatever should not be: unreadable checkpoints, differences, leftovers, other exit codes.
    """

    def __init__(self, folder: Path, steps: int, overrides: Sequence[str] = ()):
        self.folder, self.last, self.overrides = folder, 2 * steps, list(overrides)
        self.config = f"experiments/kill_resume/config.py:steps={steps}"
        self.cache = folder / "cache"
        self.reference = folder / "reference"
        self.kills: list[dict[str, Any]] = []
        self.problems: dict[str, list[str]] = {"arrays": [], "metrics": [], "evaluations": [], "unreadable": [], "leftovers": [], "exit codes": []}
        self.finished = 0
        self._workdir: Path | None = None
        self._untouched = self.start(self.reference)
        if self._untouched.code:
            raise RuntimeError(f"the undisturbed run failed:\n{self._untouched.output[-3000:]}")

    def start(self, workdir: Path, moment: Moment | None = None, workers: int = 0) -> Outcome:
        """One start of the command; worker processes change neither the batches nor the run."""
        return start(workdir, self.cache, moment, self.config + f",workers={workers}", self.overrides)

    def kill(self, moment: Moment, workers: int = 0) -> str | None:
        """Starts the run once more and kills it at `moment`; returns where that was, or None if the run ended before."""
        if self._workdir is None:
            self._workdir = self.folder / f"run_{self.finished}"
        outcome = self.start(self._workdir, moment, workers)
        self.problems["leftovers"] += outcome.leftovers
        if outcome.where is None:
            self._compare(outcome, f"instead of a kill at {moment}")
            return None
        self.problems["unreadable"] += [f"after {moment}: {problem}" for problem in unreadable_checkpoints(self._workdir)]
        self.kills.append({"where": outcome.where, "moment": str(moment), "exact": moment.exact, "workers": workers, "run": self.finished,
                           "listed": listed_steps(self._workdir), "seconds": outcome.seconds})
        return outcome.where

    def listed(self) -> list[int]:
        """The steps that the next start may go on from."""
        return listed_steps(self._workdir) if self._workdir is not None else []

    def finish(self) -> None:
        """Lets the run that is under way end, and compares it."""
        if self._workdir is not None:
            self._compare(self.start(self._workdir), "at the end")

    def _compare(self, outcome: Outcome, when: str) -> None:
        workdir, self._workdir = self._workdir, None
        self.finished += 1
        if outcome.code:
            self.problems["exit codes"].append(f"{workdir.name} exited with {outcome.code} {when}: {outcome.output[-500:]}")
            return
        for kind, found in differences(workdir, self.reference, self.last).items():
            self.problems[kind] += [f"{workdir.name}: {item}" for item in found]
        shutil.rmtree(workdir)

    def metrics(self) -> dict[str, float]:
        """The figures of the study."""
        where = Counter(row["where"] for row in self.kills)
        return {"kills": len(self.kills), "kills_at_random_moments": sum(not row["exact"] for row in self.kills),
                "kills_in_save": where["save"], "kills_in_collection": where["collection"], "kills_in_restore": where["restore"],
                "kills_in_evaluation": where["evaluation"], "finished_runs": self.finished, "mismatched_parameters": len(self.problems["arrays"]),
                "mismatched_rows": len(self.problems["metrics"]), "mismatched_evaluations": len(self.problems["evaluations"]),
                "unreadable_checkpoints": len(self.problems["unreadable"]), "leftovers": len(self.problems["leftovers"]),
                "other_exits": len(self.problems["exit codes"])}


def main(kills: int = KILLS, seed: int = 0, steps: int = 6, out: Path = FOLDER, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Kills at every fault point, then at `kills` random moments and more until the quotas are met; writes results.json."""
    from experiments.results import write_results
    from vlm_jax.faults import POINTS
    draw = random.Random(seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        study = Study(Path(folder), steps, overrides)

        def kill(moment: Moment) -> None:
            if moment.point in NEEDS_A_STEP and not study.listed():
                moment = near("save", draw)
            where = study.kill(moment, workers=int(draw.random() < 0.15))
            print(f"{len(study.kills):3d}  {moment!s:40} {where or 'the run ended'}", flush=True)

        waiting, tries = draw.sample(exact := exact_moments(list(POINTS)), len(exact)), Counter()
        while waiting and max(tries.values(), default=0) < TRIES:
            # A restore needs something to restore; what a run that is nearly done no longer passes is tried again in the next one.
            moment = next((moment for moment in waiting if moment.point not in NEEDS_A_STEP or study.listed()), waiting[0])
            before = len(study.kills)
            kill(moment)
            tries[moment] += 1
            if len(study.kills) > before and moment in waiting:
                waiting.remove(moment)
        missed = [str(moment) for moment in waiting]
        number = sum(row["exact"] for row in study.kills)
        moments = random_moments(seed)
        while len(study.kills) - number < kills:
            kill(next(moments))
        for what, quota in QUOTAS.items():
            while sum(row["where"] == what for row in study.kills) < quota:
                kill(near(what, draw))
        study.finish()
    metrics = {**study.metrics(), "points_missed": len(missed)}
    print(json.dumps(metrics, indent=1))
    for kind, found in study.problems.items():
        for problem in found:
            print(f"{kind}: {problem}")
    write_results(out, metrics, seeds=(seed,), config=study.config, overrides=list(overrides), problems=study.problems, missed=missed, rows=study.kills)
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=KILLS, help="random moments; every fault point comes besides")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6, help="of each of the two stages")
    options = parser.parse_args()
    main(options.kills, options.seed, options.steps)

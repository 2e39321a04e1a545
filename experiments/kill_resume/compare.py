"""What a workdir holds, read from its files, and how two workdirs differ."""
from collections import Counter
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from experiments.kill_resume.event_files import curves
from vlm_jax.errors import CheckpointError
from vlm_jax.training.checkpoints import Checkpoints, restore_parameters
from vlm_jax.training.metrics import TIME_FIELDS, read_metrics
from vlm_jax.training.trees import flatten


def arrays(workdir: str | os.PathLike, step: int) -> dict[str, np.ndarray]:
    """{path: array} of everything in a checkpoint: parameters, optimiser, moving average, guard; verified against its digests.

    Raises:
      CheckpointError: if the step cannot be read or is not what was saved.
    """
    try:
        leaves = json.loads((Path(workdir) / "checkpoints" / str(step) / "meta" / "metadata").read_text())["leaves"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{workdir}: the metadata of step {step} cannot be read ({error}).") from error
    found: dict[str, np.ndarray] = {}
    for part in sorted({path.split("/")[0] for path in leaves}):
        found.update(flatten({part: restore_parameters(workdir, step, which=part)[0]}))
    return found


def listed_steps(workdir: str | os.PathLike) -> list[int]:
    """The steps that a trainer would consider, oldest first; none where nothing was saved yet."""
    return Checkpoints(os.path.join(workdir, "checkpoints")).steps()


def unreadable_checkpoints(workdir: str | os.PathLike) -> list[str]:
    """One line for each listed step that cannot be read, or whose arrays are not what was saved."""
    problems = []
    for step in listed_steps(workdir):
        try:
            arrays(workdir, step)
        except CheckpointError as error:
            problems.append(f"{step}: {error}")
    return problems


def mismatched_arrays(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """Paths whose arrays differ in any bit, in shape or dtype, or that only one side has."""
    def same(a: np.ndarray, b: np.ndarray) -> bool:
        return a.shape == b.shape and a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
    return sorted(path for path in one.keys() | other.keys() if path not in one or path not in other or not same(one[path], other[path]))


def rows(workdir: str | os.PathLike) -> dict[tuple, list[dict[str, Any]]]:
    """{(step, kind, evaluation)}: its rows in metrics.jsonl without the fields that are times."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in read_metrics(workdir):
        found.setdefault((row["step"], row["kind"], row.get("name")), []).append({key: value for key, value in row.items() if key not in TIME_FIELDS})
    return found


def differing_metrics(workdir: str | os.PathLike, reference: str | os.PathLike) -> list[str]:
    """How the logs of two runs differ: rows missing, twice or with other values, points of curves missing, twice or other than the rows."""
    ours, theirs = rows(workdir), rows(reference)
    problems = [f"metrics.jsonl: {key} is there {len(ours.get(key, []))} times" for key in ours.keys() | theirs.keys()
                if len(ours.get(key, [])) != len(theirs.get(key, []))]
    problems += [f"metrics.jsonl: {key} has the values {ours[key]}, not {theirs[key]}" for key in ours.keys() & theirs.keys() if ours[key] != theirs[key]]
    points = Counter((step, tag) for tag, curve in curves(Path(workdir) / "tensorboard").items() for step, _ in curve)
    problems += [f"TensorBoard: {tag} has {count} points at step {step}" for (step, tag), count in points.items() if count != 1]
    expected = {(step, f"{kind}/{name}/{field}" if name else f"{kind}/{field}") for (step, kind, name), found in theirs.items() for row in found
                for field, value in row.items() if field != "step" and isinstance(value, (int, float))}
    return problems + [f"TensorBoard: {tag} has no point at step {step}" for step, tag in sorted(expected - set(points))]


def differing_evaluations(workdir: str | os.PathLike, reference: str | os.PathLike) -> list[str]:
    """Files of answers and metrics below evaluations/ that only one run has or that differ in any byte (pictures are left out)."""
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in (folder / "evaluations").rglob("*.json*")}
    ours, theirs = contents(Path(workdir)), contents(Path(reference))
    return sorted(path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path))


def differences(workdir: str | os.PathLike, reference: str | os.PathLike, step: int) -> dict[str, list[str]]:
    """{"arrays", "metrics", "evaluations"}: how a finished run differs from the undisturbed one; empty lists where it does not."""
    return {"arrays": mismatched_arrays(arrays(workdir, step), arrays(reference, step)), "metrics": differing_metrics(workdir, reference),
            "evaluations": differing_evaluations(workdir, reference)}

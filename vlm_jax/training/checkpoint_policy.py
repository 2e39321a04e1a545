"""Which steps stay, and how the others go: deletion that may be killed at any moment, and the pointer to the last good step.

`LAST_GOOD-STEP.json` says that a step was committed, read back from the storage, and equal to its digests. A newer one is made before the older is
deleted, and a step loses its pointer, then its marker, then its files: whatever a kill leaves is no step, and the next trainer clears it away.
"""
from collections.abc import Iterable, Mapping
import json
import logging
import os
import re
from typing import Any

from vlm_jax import faults, storage
from vlm_jax.errors import CheckpointError
from vlm_jax.training.checkpoint_format import MARKER
from vlm_jax.training.checkpoint_writer import TEMPORARY_SUFFIX

_POINTER = re.compile(r"LAST_GOOD-(\d+)\.json")
_log = logging.getLogger(__name__)


def check_policy(keep: int, keep_every: int | None, keep_hours: float | None) -> None:
    """Raises a CheckpointError for settings that cannot work."""
    if keep < 1:
        raise CheckpointError(f"checkpoint.keep is {keep}: at least one checkpoint must stay; set it to 1 or more.")
    if keep_every is not None and keep_every < 1:
        raise CheckpointError(f"checkpoint.keep_every is {keep_every}: set it to a number of steps, 1 or more, or to None.")
    if keep_hours is not None and not keep_hours > 0:
        raise CheckpointError(f"checkpoint.keep_hours is {keep_hours}: set it to a number of hours above 0, or to None.")


def kept(saved_at: Mapping[int, float], keep: int, keep_every: int | None = None, keep_hours: float | None = None) -> set[int]:
    """The steps that stay: the newest `keep`, the multiples of `keep_every`, and from the oldest on one every `keep_hours`.

    Args:
      saved_at: {step: seconds since 1970}. Times need not be in order (clocks jump): what counts is their distance from the last kept one.
    """
    steps = sorted(saved_at)
    stay = set(steps[-keep:])
    if keep_every:
        stay.update(step for step in steps if step % keep_every == 0)
    if keep_hours and steps:
        last = steps[0]
        stay.add(last)
        for step in steps[1:]:
            if abs(saved_at[step] - saved_at[last]) >= keep_hours * 3600:
                stay.add(step)
                last = step
    return stay


def delete_step(folder: Any, step: int) -> None:
    """Deletes a step. From its first sub-step on the step is not listed; killed at any of them, the rest is a leftover for `clear_leftovers`."""
    faults.point("checkpoint.collect")
    storage.remove(folder / f"LAST_GOOD-{step}.json")
    storage.remove(folder / str(step) / MARKER)
    faults.point("checkpoint.collecting")
    storage.remove_tree(folder / str(step))
    faults.point("checkpoint.collected")


def clear_leftovers(folder: Any) -> None:
    """Deletes what a killed save or deletion left behind: unfinished folders, steps without a marker, pointers to no step. For the one trainer only."""
    present = storage.names(folder)
    finished = {name for name in present if name.isdecimal() and storage.exists(folder / name / MARKER)}
    for name in present:
        pointer = _POINTER.fullmatch(name)
        if name.endswith(TEMPORARY_SUFFIX) and name.removesuffix(TEMPORARY_SUFFIX).isdecimal() or (name.isdecimal() and name not in finished):
            _log.warning("Removing %s/%s: unfinished or half deleted.", folder, name)
            storage.remove_tree(folder / name)
        elif pointer and pointer[1] not in finished:
            storage.remove(folder / name)


def point_at(folder: Any, step: int, checksum: str) -> None:
    """Makes `step`, whose metadata have that checksum, the last good one."""
    content = json.dumps({"step": step, "checksum": checksum, "process": os.getpid()}).encode()
    path = folder / f"LAST_GOOD-{step}.json"
    if not storage.create_if_absent(path, content) and storage.read(path) != content:
        storage.remove(path)    # cut short by a kill, or of a step of that number that is gone
        storage.create_if_absent(path, content)
    faults.point("checkpoint.pointer")
    for older in _pointers(storage.names(folder)):
        if older != step:
            storage.remove(folder / f"LAST_GOOD-{older}.json")


def last_good(folder: Any, names: Iterable[str] | None = None) -> tuple[int, str] | None:
    """(step, checksum of its metadata) of the newest pointer that can be read, or None."""
    for step in sorted(_pointers(storage.names(folder) if names is None else names), reverse=True):
        try:
            content = json.loads(storage.read(folder / f"LAST_GOOD-{step}.json", limit=10_000) or b"")
            if content["step"] == step:
                return step, str(content["checksum"])
        except (ValueError, KeyError, TypeError):
            continue
    return None


def _pointers(names: Iterable[str]) -> list[int]:
    return [int(match[1]) for match in map(_POINTER.fullmatch, names) if match]

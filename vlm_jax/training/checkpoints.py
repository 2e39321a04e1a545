"""Checkpoints that can be trusted: asynchronous, atomic, verified, restorable on any mesh, on local disks and object stores.

A step is a folder `STEP/` (`checkpoint_format.py`). Orbax writes it and commits it at once or not at all (`checkpoint_writer.py`), but it does not checksum
arrays: a flipped bit on disk would restore silently. The digests (`digests.py`) see that, and resharding mistakes too, since they are the same on every
mesh; they are compared after every save, in the background (`checkpoint_keeper.py`), and at every restore.

Trees are stored by path (`params/image/blocks/attention/query/kernel`), so the containers around the arrays (dicts, optax's named
tuples) need not exist when a checkpoint is read.
"""
from collections.abc import Callable, Mapping
import logging
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax import faults, storage
from vlm_jax.errors import CheckpointError, VlmError
from vlm_jax.training import digests
from vlm_jax.training.checkpoint_arrays import read_on_host, read_onto_devices
from vlm_jax.training.checkpoint_format import Damaged, DamagedCheckpoint, check_metadata, compare, complete, one_line, read_meta
from vlm_jax.training.checkpoint_keeper import Keeper
from vlm_jax.training.checkpoint_policy import check_policy, clear_leftovers, delete_step, last_good
from vlm_jax.training.checkpoint_writer import Writer
from vlm_jax.training.trees import flatten, unflatten

__all__ = ["Checkpoints", "DamagedCheckpoint", "flatten", "restore_parameters"]
_PAUSE_SECONDS = 0.05
_RETRIES = 20               # how often a reader begins anew because the step it was reading was deleted
_POLL_SECONDS = 0.5
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, in `folder` (a local path or gs://...).

    Reading (`restore`, `latest`, `steps`) never writes; the folder is made by the first `save`. One process at a time may save: the trainer holds the
    lock of the workdir. On a pod all processes call `save` and `restore` together.

    Args:
      folder: where the steps are.
      keep, keep_every, keep_hours: the newest `keep` steps stay, those at multiples of `keep_every`, and one every `keep_hours`.
      allowed: called before a save; raises where this process may not write any more (`WorkdirLock.check`).
    Raises:
      CheckpointError: for settings that cannot work.
    """

    def __init__(self, folder: Any, keep: int = 2, keep_every: int | None = None, keep_hours: float | None = None, *,
                 allowed: Callable[[], None] | None = None):
        check_policy(keep, keep_every, keep_hours)
        self.folder = storage.path_of(folder)
        self._allowed = allowed
        self._distrusted: set[int] = set()
        self._warned: set[str] = set()
        self._keeper = Keeper(self.folder, keep, keep_every, keep_hours, self._distrusted.add)
        self._writer: Writer | None = None
        self._newest: int | None = None     # the newest step that this trainer knows to be there; None before its first save

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            _log.error("error: %s", failed)     # the first error is the one to report

    def steps(self) -> list[int]:
        """The committed steps, oldest first. What lacks the marker of a commit (a killed deletion, an empty folder) is not a step.

        Warns, once, where a folder newer than all of them is incomplete or the step that was last known to be good is gone.
        """
        try:
            names = storage.names(self.folder)
            numbers = sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))
            present = [step for step in numbers if complete(self.folder / str(step))]
            good = last_good(self.folder, names)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read ({one_line(error)}); check the path and its permissions.") from error
        newest = present[-1] if present else -1
        for step in numbers:
            if step > newest:
                self._warn(f"WARNING: {self.folder}/{step} is no checkpoint: it was not finished, was damaged, or is not one of ours; passed over.")
        # Read again: a trainer may have moved the pointer and deleted the step since.
        if good is not None and good[0] not in present and last_good(self.folder) == good and not complete(self.folder / str(good[0])):
            self._warn(f"WARNING: {self.folder}: the last good checkpoint, step {good[0]}, is gone or damaged; "
                       f"{f'going back to step {newest}' if present else 'there is no other'}.")
        return present

    def latest(self) -> int | None:
        """The newest committed step that has not proved to be damaged, or None."""
        return max((step for step in self.steps() if step not in self._distrusted), default=None)

    def last_good(self) -> int | None:
        """The newest step that was read back after its commit and equal to its digests, or None."""
        good = last_good(self.folder)
        return None if good is None else good[0]

    def metadata(self, step: int) -> dict[str, Any]:
        """The metadata given to `save` with that step; no array is read. Raises DamagedCheckpoint where they are damaged."""
        try:
            return read_meta(self.folder / str(step))["metadata"]
        except Damaged as damage:
            raise DamagedCheckpoint(f"{self.folder}/{step}: {damage}; use another step.") from damage

    def prepare(self, abstract_tree: Any) -> None:
        """Compiles the digests of the arrays to be saved, in a thread, so that the first `save` need not; every leaf has a sharding."""
        leaves = flatten(abstract_tree)
        threading.Thread(target=digests.prepare, args=(leaves,), name="vlm_jax.digests", daemon=True).start()

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Starts saving; returns once the arrays are copied, so that the caller may donate or change them. A save still running is waited for.

        Existing steps from `step` on belong to a history that the caller has left (it restored an older step): they are removed.

        Args:
          step: number of the step, 0 or more.
          tree: any pytree of arrays, e.g. {"params": ..., "optimizer": ..., "ema": ..., "state": ...}.
          metadata: anything JSON can hold; `restore` returns it.
        Raises:
          CheckpointError: if this save cannot begin, or if the one before it failed.
        """
        if self._allowed is not None:
            self._allowed()
        self.check(damage=False)     # a step that does not read back is replaced by this one
        metadata = check_metadata(step, metadata)
        leaves = {path: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for path, leaf in flatten(tree).items()}
        try:
            faults.point("checkpoint.save")
            if self._writer is None:
                self._writer = Writer(self.folder, self._keeper.add)
            if self._newest is None or step <= self._newest or self._distrusted:
                self._clear(step)
            self._newest = step
            self._writer.write(step, leaves, metadata)
            faults.point("checkpoint.copied")
        except VlmError:
            raise
        except Exception as error:
            self._newest = None
            raise _cannot_save(self.folder, step, error) from error

    def check(self, damage: bool = True) -> None:
        """Raises a CheckpointError where the last save has failed by now, or (`damage`) does not read back; does not wait."""
        if self._writer is not None:
            self._reporting(self._writer.raise_failed)
        if damage and self._newest in self._keeper.damaged:
            found = self._keeper.damaged.pop(self._newest)
            raise DamagedCheckpoint(f"{self.folder}/{self._newest}: does not read back as it was saved ({found}); check the disk, and start again: "
                                    f"the run goes on from step {self.last_good()}.")

    def wait(self) -> None:
        """Blocks until the running save is committed, verified, and old steps are deleted.

        Raises:
          CheckpointError: if it failed, or does not read back as it was saved.
        """
        if self._writer is not None:
            self._reporting(self._writer.wait)
        self._keeper.wait()
        self.check()

    def close(self) -> None:
        """Waits and releases the threads. Raises a CheckpointError if the last save failed."""
        try:
            self.wait()
        finally:
            self._keeper.close()
            writer, self._writer, self._newest = self._writer, None, None
            if writer is not None:
                try:
                    writer.close()
                except Exception as error:     # a failed save was reported by wait
                    _log.debug("closing the checkpoint writer: %s", error)

    def restore(self, abstract_tree: Any, step: int | None = None, *, run: Mapping[str, Any] | None = None,
                strict: bool = False) -> tuple[Any, dict[str, Any]]:
        """Reads a step into the structure and shardings of `abstract_tree` and verifies every array.

        Args:
          abstract_tree: a pytree of arrays or `jax.ShapeDtypeStruct`s; a leaf's sharding says where it goes (without: the first device).
          step: the step to read, and no other; None is the newest one that proves sound (a damaged one is passed over with a warning).
          run: `run_identity.describe(...)` of the run that asks; a checkpoint whose metadata holds another `run` is refused before an array is read.
          strict: stop at a damaged step instead of passing it over.
        Returns:
          The tree, and the metadata given to `save`.
        Raises:
          DamagedCheckpoint: the given step, or every step, is damaged.
          CheckpointError: there is no such step, or the arrays are those of another model; the +/- lines say how they differ.
        """
        from vlm_jax.training.run_identity import check
        self.wait()
        wanted = flatten(abstract_tree)
        faults.point("checkpoint.restore")

        def read(path: Any) -> tuple[Any, dict[str, Any]]:
            meta = read_meta(path)
            if run is not None:
                check(meta["metadata"].get("run"), run, str(path))
            compare(wanted, meta["leaves"], path)
            faults.point("checkpoint.restoring")
            restored = read_onto_devices(path, wanted, meta["leaves"])
            return jax.tree.unflatten(jax.tree.structure(abstract_tree), list(restored.values())), meta["metadata"]
        result, _ = self._newest_sound(read, step, strict)
        return result

    def _newest_sound(self, read: Callable[[Any], Any], step: int | None, strict: bool = False) -> tuple[Any, int]:
        """(`read(path)`, its step) of the newest step that does not prove damaged, or of `step`. What a trainer deletes meanwhile is not damaged."""
        damages: dict[int, str] = {}
        for _ in range(_RETRIES):
            for candidate in self.candidates(step):
                path = self.folder / str(candidate)
                if candidate in damages:
                    continue
                try:
                    result = read(path)
                except Damaged as damage:
                    if not complete(path):
                        self._warn(f"{path} was deleted while it was read; looking again.")
                        break
                    damages[candidate] = str(damage)
                    self._distrusted.add(candidate)
                    if strict or step is not None:
                        raise _nothing_sound(self.folder, damages) from damage
                    _log.warning("WARNING: checkpoint %s is damaged (%s); trying the one before it.", path, damage)
                    continue
                if damages:
                    _log.warning("WARNING: going on from checkpoint %s; later steps were damaged and will be trained again.", path)
                self._keeper.verified.add(candidate)
                return result, candidate
            else:
                break
        raise _nothing_sound(self.folder, damages)

    def candidates(self, step: int | None = None) -> list[int]:
        """The steps to try, newest first, or the given one. Raises a CheckpointError where there is none."""
        present = self.steps()
        for _ in range(_RETRIES):
            # A trainer may have deleted the only step of the listing before it was looked at; the one saved in its place is in the next listing.
            if present or last_good(self.folder) is None:
                break
            time.sleep(_PAUSE_SECONDS)
            present = self.steps()
        if step is not None and step not in present:
            raise CheckpointError(f"{self.folder}: there is no checkpoint of step {step}; there are: {', '.join(map(str, present)) or 'none'}.")
        if not present:
            raise CheckpointError(f"{self.folder}: there is no checkpoint; train first, or check the path.")
        return [step] if step is not None else present[::-1]

    def _clear(self, step: int) -> None:
        """Removes what a kill left behind, and what would be counted by `keep` or shadow the new step but is damaged or later than it."""
        assert self._writer is not None
        self._reporting(self._writer.wait)
        self._keeper.wait()
        gone = [present for present in self.steps() if present >= step or present in self._distrusted]
        if jax.process_index() == 0:    # the others meet it in Orbax's barrier before they write
            for present in gone:
                why = "damaged" if present in self._distrusted else f"training went back to before step {step}"
                _log.warning("Removing checkpoint %s/%d: %s.", self.folder, present, why)
                delete_step(self.folder, present)
            clear_leftovers(self.folder)
        for present in gone:
            self._keeper.forget(present)
        self._distrusted.clear()

    def _reporting(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            step, self._newest = self._newest, None      # so that the next save clears away what this one left
            raise _cannot_save(self.folder, step, error) from error

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            _log.warning(text)


def restore_parameters(workdir: Any, step: int | None = None, which: str | None = None, *, wait_seconds: float = 0.0) -> tuple[dict[str, Any], int]:
    """Reads one part of a checkpoint as numpy, without knowing the model: for evaluation, export and notebooks, also while a trainer saves.

    Args:
      workdir: the folder of the run (its `checkpoints/` is read) or the checkpoints folder itself.
      step: None is the newest sound step.
      which: "params", "ema" or another key of the saved tree; None is "ema" where the run keeps one, else "params".
      wait_seconds: how long to wait for the first checkpoint of a run that has none yet.
    Returns:
      A nested dict of numpy arrays, verified against their digests, and the step they are of.
    Raises:
      DamagedCheckpoint: the given step, or every step, is damaged.
      CheckpointError: there is no checkpoint, or it has no such part.
    """
    folder = steps_folder(workdir)
    checkpoints = Checkpoints(folder)
    deadline = time.monotonic() + wait_seconds
    while time.monotonic() < deadline and checkpoints.latest() is None:
        time.sleep(_POLL_SECONDS)
        checkpoints.folder = steps_folder(workdir)

    def read(path: Any) -> dict[str, Any]:
        stored = read_meta(path)["leaves"]
        parts = sorted({name.split("/")[0] for name in stored})
        part = which or ("ema" if "ema" in parts else "params")
        if part not in parts:
            raise CheckpointError(f'{path}: the checkpoint has no "{part}"; it has {", ".join(parts) or "nothing"}.')
        return unflatten(dict(read_on_host(path, {name: leaf for name, leaf in stored.items() if name.split("/")[0] == part})))[part]
    return checkpoints._newest_sound(read, step)


def steps_folder(workdir: Any) -> Any:
    """`workdir/checkpoints` where there is one, else `workdir` itself, as an `epath.Path`."""
    folder = storage.path_of(workdir)
    return folder / "checkpoints" if storage.exists(folder / "checkpoints") else folder


def _nothing_sound(folder: Any, damages: Mapping[int, str]) -> DamagedCheckpoint:
    found = "; ".join(f"{step}: {damage}" for step, damage in damages.items())
    return DamagedCheckpoint(f"{folder}: no sound checkpoint ({found}); give another step, or train in an empty workdir.")


def _cannot_save(folder: Any, step: int | None, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder}: checkpoint {'of the last step' if step is None else step} could not be saved ({one_line(error)}); "
                           "check free space and permissions, or choose another --workdir.")

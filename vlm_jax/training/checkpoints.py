"""Checkpoints that can be trusted: asynchronous, atomic, verified, restorable on any mesh. The only module that uses Orbax.

A step is a folder `STEP/` with two items: `state`, the arrays, and `meta`, JSON with the shape, dtype and digest of every array, the
caller's metadata, and a checksum over all that. Orbax commits a step at once or not at all, but it does not checksum arrays: a
flipped bit on disk would restore silently. The digests (`training/digests.py`) see that, and resharding mistakes too, since they are
the same on every mesh.

Trees are stored by path (`params/image/blocks/attention/query/kernel`), so the containers around the arrays (dicts, optax's named
tuples) need not exist when a checkpoint is read.
"""
from collections.abc import Mapping
import gc
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import CheckpointError, VlmError
from vlm_jax.settings import plain
from vlm_jax.training.digests import checksum, digests
from vlm_jax.training.trees import flatten, unflatten

SCHEMA_VERSION = 1
_SHOWN = 8      # lines of a difference that fit on a screen
_log = logging.getLogger(__name__)


class DamagedCheckpoint(CheckpointError):
    """The step that was asked for exists, but is not what was saved; an older one may be sound."""


class _Damaged(Exception):
    """A step whose files cannot be read or do not hold what was saved."""


class Checkpoints:
    """The checkpoints of one run, in `folder` (a local path or gs://...).

    Reading (`restore`, `latest`, `steps`) never writes; the folder is made by the first `save`. One process at a time may save:
    the trainer holds the lock of the workdir.

    Attributes:
      folder: where the steps are.
      keep: how many of the newest steps stay.
    """

    def __init__(self, folder: Any, keep: int = 2):
        if keep < 1:
            raise CheckpointError(f"checkpoint.keep is {keep}: at least one checkpoint must stay; set it to 1 or more.")
        self.folder = _path(folder)
        self.keep = keep
        self._manager = None
        self._pending: int | None = None
        self._distrusted: set[int] = set()

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
        """The committed steps, oldest first. Folders without their metadata (a killed deletion, an empty folder) are not steps."""
        return [step for step, complete in self._listing() if complete]

    def latest(self) -> int | None:
        """The newest committed step that has not proved to be damaged, or None."""
        return max((step for step in self.steps() if step not in self._distrusted), default=None)

    def save(self, step: int, tree: Any, metadata: Mapping[str, Any] | None = None) -> None:
        """Starts saving; returns once the arrays are copied, so that the caller may donate or change them.

        Existing steps from `step` on belong to a history that the caller has left (it restored an older step): they are removed.

        Args:
          step: number of the step, 0 or more.
          tree: any pytree of arrays, e.g. {"params": ..., "optimizer": ..., "ema": ..., "state": ...}.
          metadata: anything JSON can hold; `restore` returns it.
        Raises:
          CheckpointError: if this save cannot begin, or if the one before it failed.
        """
        self._raise_failed_save()
        leaves = {path: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for path, leaf in flatten(tree).items()}
        try:
            meta = _describe(step, leaves, metadata)
        except TypeError as error:
            raise CheckpointError(f"checkpoint {step}: the metadata must be JSON ({error}); pass plain numbers, strings, lists and dicts.") from error
        import orbax.checkpoint as ocp
        arguments = ocp.args.Composite(state=ocp.args.PyTreeSave(unflatten({path: leaf for path, leaf in leaves.items() if leaf.size})),
                                       meta=ocp.args.JsonSave(meta))
        try:
            manager = self._writer()
            self._remove_untrusted(manager, step)
            self._pending = step
            if not manager.save(step, args=arguments, force=True):
                raise OSError("Orbax declined to save it")
        except VlmError:
            raise
        except Exception as error:
            self._pending = None
            raise _cannot_save(self.folder, step, error) from error

    def wait(self) -> None:
        """Blocks until the running save is committed. Raises a CheckpointError if it failed."""
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                raise self._failed(error) from error
        self._pending = None

    def close(self) -> None:
        """Waits and releases Orbax's threads. Raises a CheckpointError if the last save failed."""
        try:
            self.wait()
        finally:
            manager, self._manager = self._manager, None
            if manager is not None:
                try:
                    manager.close()
                except Exception as error:     # a failed save was reported by wait
                    _log.debug("closing the checkpoint manager: %s", error)

    def restore(self, abstract_tree: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a step into the structure and shardings of `abstract_tree` and verifies every array.

        Args:
          abstract_tree: a pytree of arrays or `jax.ShapeDtypeStruct`s; a leaf's sharding says where it goes (without: the first device).
          step: the step to read, and no other; None is the newest one that proves sound (a damaged one is passed over with a warning).
        Returns:
          The tree, and the metadata given to `save`.
        Raises:
          DamagedCheckpoint: the given step, or every step, is damaged.
          CheckpointError: there is no such step, or the arrays are those of another model.
        """
        self.wait()
        wanted = flatten(abstract_tree)
        damages = []
        for candidate in self._candidates(step):
            try:
                meta = _read_meta(self.folder / str(candidate))
                _compare(wanted, meta["leaves"], f"{self.folder}/{candidate}")
                restored = _read_arrays(self.folder / str(candidate), wanted, meta["leaves"])
            except _Damaged as damage:
                damages.append(f"{candidate}: {damage}")
                self._distrusted.add(candidate)
                if step is None:
                    _log.warning("WARNING: checkpoint %s/%d is damaged (%s); trying the one before it.", self.folder, candidate, damage)
                continue
            if damages:
                _log.warning("WARNING: going on from checkpoint %s/%d; later steps were damaged and will be trained again.", self.folder, candidate)
            return jax.tree.unflatten(jax.tree.structure(abstract_tree), list(restored.values())), meta["metadata"]
        raise _nothing_sound(self.folder, damages)

    def _candidates(self, step: int | None) -> list[int]:
        present = self.steps()
        if step is not None and step not in present:
            raise CheckpointError(f"{self.folder}: there is no checkpoint of step {step}; there are: {', '.join(map(str, present)) or 'none'}.")
        if not present:
            raise CheckpointError(f"{self.folder}: there is no checkpoint; train first, or check the path.")
        return [step] if step is not None else present[::-1]

    def _listing(self) -> list[tuple[int, bool]]:
        try:
            if not self.folder.exists():
                return []
            found = sorted(int(entry.name) for entry in self.folder.iterdir() if entry.name.isdecimal())
            return [(step, _complete(self.folder / str(step))) for step in found]
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read ({_one_line(error)}); check the path and its permissions.") from error

    def _writer(self):
        import orbax.checkpoint as ocp
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=self.keep, create=True, cleanup_tmp_directories=True))
        return self._manager

    def _remove_untrusted(self, manager, step: int) -> None:
        """Removes what would be counted by `keep` or shadow the new step, but is incomplete, damaged, or later than it."""
        listing = self._listing()
        if jax.process_count() > 1:     # every process of a pod has to see the same steps before the first is deleted
            from jax.experimental import multihost_utils
            multihost_utils.sync_global_devices("vlm_jax.checkpoints.listing")
        for present, complete in listing:
            if complete and present < step and present not in self._distrusted:
                continue
            if self._pending is not None:
                self.wait()
            _log.warning("Removing checkpoint %s/%d: %s.", self.folder, present, "incomplete" if not complete else
                         "damaged" if present in self._distrusted else f"training went back to before step {step}")
            manager.delete(present)
            self._distrusted.discard(present)

    def _raise_failed_save(self) -> None:
        if self._manager is not None:
            try:
                self._manager.check_for_errors()
            except Exception as error:
                raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        step, self._pending = self._pending, None
        return _cannot_save(self.folder, step, error)


def restore_parameters(workdir: Any, step: int | None = None, which: str | None = None) -> tuple[dict[str, Any], int]:
    """Reads one part of a checkpoint as numpy, without knowing the model: for evaluation, export and notebooks.

    Args:
      workdir: the folder of the run (its `checkpoints/` is read) or the checkpoints folder itself.
      step: None is the newest sound step.
      which: "params", "ema" or another key of the saved tree; None is "ema" where the run keeps one, else "params".
    Returns:
      A nested dict of numpy arrays, verified against their digests, and the step they are of.
    Raises:
      DamagedCheckpoint: the given step, or every step, is damaged.
      CheckpointError: there is no checkpoint, or it has no such part.
    """
    folder = _path(workdir)
    if (folder / "checkpoints").exists():
        folder = folder / "checkpoints"
    damages = []
    for candidate in Checkpoints(folder)._candidates(step):
        path = folder / str(candidate)
        try:
            meta = _read_meta(path)
            parts = sorted({name.split("/")[0] for name in meta["leaves"]})
            part = which or ("ema" if "ema" in parts else "params")
            if part not in parts:
                raise CheckpointError(f'{path}: the checkpoint has no "{part}"; it has {", ".join(parts) or "nothing"}.')
            leaves = {name: leaf for name, leaf in meta["leaves"].items() if name.split("/")[0] == part}
            return unflatten(_read_arrays(path, dict.fromkeys(leaves), leaves))[part], candidate
        except _Damaged as damage:
            damages.append(f"{candidate}: {damage}")
            _log.warning("WARNING: checkpoint %s is damaged (%s).", path, damage)
    raise _nothing_sound(folder, damages)


def _describe(step: int, leaves: Mapping[str, jax.Array], metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    values = digests(leaves)
    body = {
        "schema_version": SCHEMA_VERSION, "step": int(step), "metadata": plain(metadata or {}),
        "leaves": {path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": values[path]} for path, leaf in leaves.items()},
    }
    return {**body, "checksum": checksum(body)}


def _read_meta(path: Any) -> dict[str, Any]:
    import orbax.checkpoint as ocp
    try:
        meta = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path / "meta")
        stated = meta.pop("checksum")
        version = meta["schema_version"]
    except PermissionError as error:
        raise CheckpointError(f"{path}: cannot be read ({_one_line(error)}); check the permissions.") from error
    except Exception as error:
        raise _Damaged(f"its metadata cannot be read: {_one_line(error)}") from error
    if stated != checksum(meta):
        raise _Damaged("its metadata does not match its checksum")
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{path}: has schema version {version}, this program reads {SCHEMA_VERSION}; use the version of vlm_jax that wrote it.")
    return meta


def _read_arrays(path: Any, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Reads and verifies the arrays named by `wanted`: onto the devices that a leaf says, or as numpy where it is None."""
    import orbax.checkpoint as ocp
    full = {name: stored[name] for name in wanted if all(stored[name]["shape"])}
    item = unflatten({name: 0 if wanted[name] is None else _abstract(wanted[name]) for name in full})
    arguments = unflatten({name: _restore_argument(wanted[name], stored[name]) for name in full})
    arrays, damage = {}, None
    if full:
        try:
            tree = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
                path / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True))
        except PermissionError as error:
            raise CheckpointError(f"{path}: cannot be read ({_one_line(error)}); check the permissions.") from error
        except Exception as error:
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise
            damage = _Damaged(f"its arrays cannot be read: {_one_line(error)}")
        if damage is not None:
            _drop_failed_reads()
            raise damage
        arrays = flatten(tree)
    found = digests(arrays)
    wrong = [name for name in full if found.get(name) != stored[name]["digest"]]
    if wrong:
        raise _Damaged(f"{len(wrong)} of {len(full)} arrays differ from their digest, first {wrong[0]}")
    return {name: arrays[name] if name in full else _empty(wanted[name], stored[name]) for name in wanted}


def _drop_failed_reads() -> None:
    """Frees the reads that failed beside the first one: asyncio would print a page for each when they are collected later."""
    logger = logging.getLogger("asyncio")
    disabled, logger.disabled = logger.disabled, True
    try:
        gc.collect()
    finally:
        logger.disabled = disabled


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), _dtype(leaf), sharding=sharding)


def _restore_argument(leaf: Any, stored: Mapping[str, Any]):
    import orbax.checkpoint as ocp
    if leaf is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    leaf = _abstract(leaf)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=tuple(stored["shape"]), dtype=leaf.dtype)


def _empty(leaf: Any, stored: Mapping[str, Any]) -> Any:
    zeros = np.zeros(stored["shape"], jnp.dtype(stored["dtype"]))
    return zeros if leaf is None else jax.device_put(zeros, _abstract(leaf).sharding)


def _compare(wanted: Mapping[str, Any], stored: Mapping[str, Any], where: str) -> None:
    """Raises a CheckpointError that lists how the wanted leaves differ from the stored ones in path, shape and dtype."""
    expected = {name: f"{_dtype(leaf)}{list(np.shape(leaf))}" for name, leaf in wanted.items()}
    present = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in stored.items()}
    lines = [f"{name}: {present[name]} in the checkpoint, {here} here" for name, here in expected.items() if present.get(name, here) != here]
    lines += [f"{name}: missing in the checkpoint" for name in expected if name not in present]
    lines += [f"{name}: only in the checkpoint" for name in present if name not in expected]
    if lines:
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        raise CheckpointError(f"{where}: checkpoint of another model or optimizer ({len(lines)} of {len(expected)} arrays differ: "
                              f"{'; '.join(lines[:_SHOWN])}{more}); use the config it was trained with, or another workdir.")


def _dtype(leaf: Any) -> jnp.dtype:
    return jax.dtypes.canonicalize_dtype(getattr(leaf, "dtype", None) or np.asarray(leaf).dtype)


def _complete(path: Any) -> bool:
    return all((path / name).exists() for name in ("_CHECKPOINT_METADATA", "meta", "state")) and any(
        (path / "state" / name).exists() for name in ("_METADATA", "manifest.ocdbt"))


def _path(folder: Any):
    from etils import epath
    path = epath.Path(folder)
    # Orbax wants absolute paths; remote ones are.
    return path if "://" in str(folder) else path.expanduser().absolute()


def _nothing_sound(folder: Any, damages: list[str]) -> DamagedCheckpoint:
    return DamagedCheckpoint(f"{folder}: no sound checkpoint ({'; '.join(damages)}); give another step, or train in an empty workdir.")


def _cannot_save(folder: Any, step: int | None, error: Exception) -> CheckpointError:
    return CheckpointError(f"{folder}: checkpoint {'of the last step' if step is None else step} could not be saved ({_one_line(error)}); "
                           "check free space and permissions, or choose another --workdir.")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."

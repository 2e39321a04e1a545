"""The asynchronous write of one step. The only module that uses Orbax.

Orbax copies the arrays to the host, writes them in a thread, and commits: on a local disk the step is written under another name and renamed, on an object
store, which cannot rename, it counts once a marker file is there. The metadata is written by us in between, when the digests are known.
"""
from collections.abc import Callable, Mapping
import logging
from typing import Any

import jax

from vlm_jax import faults, storage
from vlm_jax.training import digests
from vlm_jax.training.checkpoint_format import describe
from vlm_jax.training.trees import unflatten

TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"      # the folder of a local step before its commit: STEP + this


class Writer:
    """Writes steps below `folder`; one at a time, a second write waits for the first.

    Args:
      folder: an `epath.Path`.
      committed: called with the step, in Orbax's thread of process 0, as soon as the step is visible.
    """

    def __init__(self, folder: Any, committed: Callable[[int], None]):
        import orbax.checkpoint as ocp
        self.folder = folder
        self._committed = committed
        self._described: dict[str, Callable[[], bytes]] = {}
        # Folders made asynchronously would, where that fails, leave the other threads waiting for them for minutes.
        logging.getLogger("absl").addFilter(_said_by_us)
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(state=ocp.PyTreeCheckpointHandler()),
                                            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                                            temporary_path_class=self._commit_class(storage.is_remote(folder)))

    def write(self, step: int, leaves: Mapping[str, jax.Array], metadata: Mapping[str, Any]) -> None:
        """Starts writing; returns when the arrays are copied, so that they may be donated. There must be no folder of that step.

        The digests are dispatched to the devices here and read in the thread, so that the caller does not wait for them.
        """
        import orbax.checkpoint as ocp
        shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
        lanes = digests.start(leaves)
        self._described[str(step)] = lambda: describe(step, shapes, digests.finish(lanes), metadata)
        tree = unflatten({name: leaf for name, leaf in leaves.items() if leaf.size})
        self._orbax.save(self.folder / str(step), args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))

    def wait(self) -> None:
        """Blocks until the running write is committed; raises its error if it failed."""
        self._orbax.wait_until_finished()

    def raise_failed(self) -> None:
        """Raises the error of a write that failed since the last call; does not wait."""
        self._orbax.check_for_errors()

    def close(self) -> None:
        """Waits and ends the threads."""
        self._orbax.close()

    def _commit_class(self, remote: bool):
        """Orbax's way to commit, with our metadata and the fault points around it."""
        from orbax.checkpoint._src.path import atomicity
        writer = self

        class Commit(atomicity.CommitFileTemporaryPath if remote else atomicity.AtomicRenameTemporaryPath):
            async def finalize(self) -> None:
                step = self.get_final().name
                meta = self.get() / "meta"
                if not remote:
                    meta.mkdir()
                storage.write(meta / "metadata", writer._described.pop(step)())
                faults.point("checkpoint.before_commit")
                await super().finalize()
                faults.point("checkpoint.after_commit")
                writer._committed(int(step))

        return Commit


def _said_by_us(record: logging.LogRecord) -> bool:
    """Whether a log record of Orbax is to be shown: the page that it prints for a failed save is not, since `raise_failed` and `wait` raise the same error."""
    return not (record.levelno == logging.ERROR and "background save thread" in record.getMessage())

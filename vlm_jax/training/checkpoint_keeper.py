"""What happens to a step after its commit, in a thread of process 0: it is read back and verified, the last-good pointer moves to it, old steps go.

The cost is one read of the checkpoint and about two seconds of one core a GB (`digests.host_digest`), beside the training. Where saves come faster than
that, only the newest step is verified.
"""
from collections.abc import Callable
import logging
import queue
import threading
from typing import Any

from vlm_jax import storage
from vlm_jax.training.checkpoint_arrays import verify
from vlm_jax.training.checkpoint_format import Damaged, complete, one_line, read_meta
from vlm_jax.training.checkpoint_policy import delete_step, kept, point_at
from vlm_jax.training.digests import checksum

_log = logging.getLogger(__name__)


class Keeper:
    """Verifies committed steps and deletes those that `checkpoint_policy.kept` lets go.

    Attributes:
      verified: steps that were read and equal their digests.
      damaged: {step: what is wrong with it} of steps that do not.
    """

    def __init__(self, folder: Any, keep: int, keep_every: int | None, keep_hours: float | None, distrust: Callable[[int], None]):
        self.folder, self.verified, self.damaged = folder, set(), {}
        self._policy = (keep, keep_every, keep_hours)
        self._distrust = distrust
        self._saved_at: dict[int, float] = {}
        self._queue: queue.Queue[int | None] = queue.Queue()
        self._thread: threading.Thread | None = None

    def add(self, step: int) -> None:
        """Says that a step was committed."""
        self._queue.put(step)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="vlm_jax.checkpoints", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Blocks until all steps given are dealt with."""
        self._queue.join()

    def close(self) -> None:
        """Waits, and ends the thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None

    def forget(self, step: int) -> None:
        """Says that a step is being deleted, and may be saved anew."""
        self.verified.discard(step)
        self.damaged.pop(step, None)
        self._saved_at.pop(step, None)

    def _work(self) -> None:
        while True:
            step = self._queue.get()
            try:
                if step is None:
                    return
                if self._queue.empty():
                    self._keep(step)
            except Exception as error:      # the run itself is sound: it goes on, and the next save tries again
                _log.warning("WARNING: checkpoint %s/%s was saved, but could not be verified or old ones not deleted (%s).", self.folder, step, one_line(error))
            finally:
                self._queue.task_done()

    def _keep(self, step: int) -> None:
        path = self.folder / str(step)
        try:
            meta = read_meta(path)
            verify(path, meta["leaves"])
        except Damaged as damage:
            self.damaged[step] = str(damage)
            self._distrust(step)
            _log.error("WARNING: checkpoint %s does not read back as it was saved (%s); the older ones stay. Check the disk.", path, damage)
            return
        self.verified.add(step)
        self._saved_at[step] = meta["saved_at"]
        point_at(self.folder, step, checksum(meta))
        steps = [int(name) for name in storage.names(self.folder) if name.isdecimal() and complete(self.folder / name)]
        saved_at = {present: self._time_of(present) for present in steps if present not in self.damaged}
        for gone in sorted(set(steps) - kept(saved_at, *self._policy) - {step}):
            delete_step(self.folder, gone)
            self.forget(gone)

    def _time_of(self, step: int) -> float:
        if step not in self._saved_at:
            try:
                self._saved_at[step] = float(read_meta(self.folder / str(step))["saved_at"])
            except (Damaged, KeyError):
                self._saved_at[step] = 0.0
        return self._saved_at[step]

"""When a run saves, and what it does when saving fails: it warns, goes on, tries again at the next save, and stops where that does not help."""
from collections.abc import Mapping
import sys
import time
from typing import Any

import jax

from vlm_jax import distributed
from vlm_jax.errors import CheckpointError
from vlm_jax.training.checkpoints import Checkpoints

FAILURES_IN_A_ROW = 3


class Saver:
    """Saves every `every` steps and, where `minutes` is set, when so long has passed since the last save.

    A save that fails (a full disk, an object store that does not answer) leaves the last good checkpoint as it was and costs no step: it is noticed at the next
    step boundary, counted, and made again at the next save. `FAILURES_IN_A_ROW` of them end the run.

    Attributes:
      failures: how many saves failed so far.
      saved: the last step that was handed to the checkpoints.
    """

    def __init__(self, checkpoints: Checkpoints, every: int | None = None, minutes: float | None = None, clock=time.monotonic):
        self.checkpoints, self.every, self.minutes = checkpoints, every, minutes
        self.failures, self.saved = 0, None
        self._in_a_row = 0
        self._clock, self._saved_at = clock, clock()

    def due(self, step: int, logs: bool) -> bool:
        """Returns whether to save after `step`; the same on all processes. Several look at the clock only at steps that log, where they wait anyway."""
        if self.every and step % self.every == 0:
            return True
        if self.minutes is None or not (logs or jax.process_count() == 1):
            return False
        return distributed.agree(self._clock() - self._saved_at >= 60 * self.minutes)

    def check(self) -> None:
        """Notices a save that has failed in the background. Raises a CheckpointError after too many."""
        try:
            self.checkpoints.check()
        except CheckpointError as error:
            self._failed(error)

    def save(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Starts saving. Raises a CheckpointError after too many failures."""
        self.check()
        before, self._saved_at = self.saved, self._clock()
        try:
            self.checkpoints.save(step, state, metadata)     # waits for the one before
            self._in_a_row = 0 if before is not None else self._in_a_row
            self.saved = step
        except CheckpointError as error:
            self._failed(error)

    def finish(self, step: int, state: Any, metadata: Mapping[str, Any]) -> None:
        """Returns once `step` is committed, saving again where that failed. Raises a CheckpointError after too many failures."""
        while True:
            if self.saved != step:
                self.save(step, state, metadata)
            try:
                self.checkpoints.wait()
                if self.saved == step:
                    return
            except CheckpointError as error:
                self._failed(error)

    def _failed(self, error: CheckpointError) -> None:
        self.failures += 1
        self._in_a_row += 1
        self.saved = None
        if self._in_a_row >= FAILURES_IN_A_ROW:
            raise CheckpointError(f"{error} {self._in_a_row} saves in a row have failed.") from error
        print(f"warning: {error} Training goes on; the next save tries again.", file=sys.stderr, flush=True)

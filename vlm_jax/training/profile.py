"""Profiler traces of a few steps of a run."""
import os

import jax

from vlm_jax.errors import ConfigError


class Profile:
    """A profiler trace of some steps: `Profile("10-13", workdir)`; None traces nothing."""

    def __init__(self, steps: str | None, workdir: str):
        try:
            self.first, self.last = (int(part) for part in steps.split("-")) if steps else (None, None)
        except ValueError:
            raise ConfigError(f"--profile {steps}: write FROM-TO, for example 10-13.") from None
        self.folder = os.path.join(workdir, "profile")

    def before(self, step: int) -> None:
        """Starts the trace when `step`, counted from 0, is about to be taken and is the first one asked for."""
        if self.first is not None and step + 1 == self.first:
            jax.profiler.start_trace(self.folder)

    def after(self, step: int, metrics) -> None:
        """Ends the trace after the last step asked for."""
        if self.last is not None and step == self.last:
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            print(f"  profiler trace of steps {self.first}-{self.last}: {self.folder}", flush=True)


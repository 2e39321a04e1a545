"""Steps that would do harm: a loss or gradient that is not finite, a loss that jumps. They change nothing, are counted, and stop the run where they must.

Config section `guard`:

    guard = dict(nonfinite="stop" | "skip", spike=None | dict(window=128, sigmas=6.0, action="skip" | "stop"), in_a_row=10)

The verdict falls inside the compiled step, from the step's own numbers and `state["guard"]`, which is checkpointed with the rest: a resumed run judges as the
undisturbed one. What was rejected goes into `WORKDIR/diverged.json`, a list of events with the examples of the batch.
"""
from collections.abc import Mapping
import dataclasses
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from vlm_jax import storage
from vlm_jax.errors import ConfigError, DivergedError, did_you_mean
from vlm_jax.settings import call

ACTIONS = ("stop", "skip")
WINDOW = 128
SMALLEST_SIGMA = 0.01   # of the mean: a plateau of equal losses has no spread, and a change of a few per cent is no spike
EVENTS_KEPT = 200       # newest events of diverged.json


@dataclasses.dataclass(frozen=True)
class Spike:
    """A loss above mean + `sigmas` standard deviations of the last `window` losses that were taken. An eighth of the window (at least 8 losses) must be known
    before anything is called a spike; a loss that falls never is."""
    window: int = WINDOW
    sigmas: float = 6.0
    action: str = "skip"


@dataclasses.dataclass(frozen=True)
class Guard:
    """Judges steps; made by `read_guard` from the config section.

    Attributes:
      nonfinite: "stop" ends the run at a loss or gradient norm that is not finite, "skip" leaves the step out.
      spike: None does not look for jumps of the loss (their window is kept all the same, so that the policy can be switched on when resuming).
      in_a_row: so many steps left out one after the other end the run.
    """
    nonfinite: str = "stop"
    spike: Spike | None = None
    in_a_row: int = 10

    def init(self) -> dict[str, np.ndarray]:
        """Returns the guard's part of the training state: the last losses that were taken, how many were, how many steps were left out, and in a row."""
        window = self.spike.window if self.spike else WINDOW
        return {"losses": jnp.zeros(window, jnp.float32), "taken": jnp.zeros((), jnp.int32), "skipped": jnp.zeros((), jnp.int32),
                "in_a_row": jnp.zeros((), jnp.int32)}

    def judge(self, state: Mapping[str, Array], loss: Float[Array, ""], gradient_norm: Float[Array, ""]) -> tuple[Bool[Array, ""], dict, dict[str, Array]]:
        """Returns (whether the step is taken, the guard's next state, {"finite", "spike", "skipped", "in_a_row"}); pure, for use under jit."""
        finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
        spike = finite & self._jumps(state, loss)
        take = finite & ~spike
        losses, taken = state["losses"], state["taken"]
        new = {"losses": jnp.where(take, losses.at[taken % losses.shape[0]].set(loss.astype(jnp.float32)), losses),
               "taken": taken + take, "skipped": state["skipped"] + ~take, "in_a_row": jnp.where(take, 0, state["in_a_row"] + 1)}
        return take, new, {"finite": finite, "spike": spike, "skipped": new["skipped"], "in_a_row": new["in_a_row"]}

    def _jumps(self, state: Mapping[str, Array], loss: Float[Array, ""]) -> Bool[Array, ""]:
        if self.spike is None:
            return jnp.zeros((), bool)
        losses, window = state["losses"], self.spike.window
        known = jnp.arange(window) < state["taken"]
        count = jnp.maximum(1, jnp.minimum(state["taken"], window)).astype(jnp.float32)
        mean = jnp.where(known, losses, 0).sum() / count
        deviation = jnp.sqrt(jnp.where(known, (losses - mean) ** 2, 0).sum() / count)
        sigma = jnp.maximum(deviation, SMALLEST_SIGMA * jnp.abs(mean))
        return (state["taken"] >= min(window, max(8, window // 8))) & (loss > mean + self.spike.sigmas * sigma)


def read_guard(section: Mapping[str, Any] | None, where: str = "guard") -> Guard:
    """Returns the guard of a config section.

    Raises:
      ConfigError: for an unknown key or a value that cannot work.
    """
    section = dict(section or {})
    if section.get("spike") is not None:
        if not isinstance(section["spike"], Mapping):
            raise ConfigError(f"{where}.spike is {section['spike']!r}; it must be a mapping such as {{\"sigmas\": 6.0, \"action\": \"skip\"}}, or None.")
        section["spike"] = call(Spike, section["spike"], f"{where}.spike")
    guard = call(Guard, section, where)
    actions = [(f"{where}.nonfinite", guard.nonfinite)] + ([(f"{where}.spike.action", guard.spike.action)] if guard.spike else [])
    for name, action in actions:
        if action not in ACTIONS:
            raise ConfigError(f"{name} is {action!r}; choose \"stop\" or \"skip\".{did_you_mean(action, ACTIONS)}")
    counts = [(f"{where}.in_a_row", guard.in_a_row, 1)] + ([(f"{where}.spike.window", guard.spike.window, 2)] if guard.spike else [])
    for name, value, least in counts:
        if type(value) is not int or value < least:
            raise ConfigError(f"{name} is {value!r}; it must be an integer of at least {least}.")
    if guard.spike and (isinstance(guard.spike.sigmas, bool) or not isinstance(guard.spike.sigmas, (int, float)) or not guard.spike.sigmas > 0):
        raise ConfigError(f"{where}.spike.sigmas is {guard.spike.sigmas!r}; it must be a positive number, for example 6.0.")
    return guard


class Evidence:
    """Looks at finished steps on the host, writes down those that were left out, and stops the run as the guard says.

    Args:
      workdir: where `diverged.json` goes; process 0 writes it.
    """

    def __init__(self, guard: Guard, workdir: str | os.PathLike):
        self.guard = guard
        self.path = os.path.join(os.fspath(workdir), "diverged.json")

    def examine(self, step: int, metrics: Mapping[str, Any], batch: Mapping[str, Mapping[str, Any]]) -> None:
        """Looks at the step that ended as number `step`; `batch` is {stream: batch} of this process's rows.

        Raises:
          DivergedError: naming the step, where the guard says stop or too many steps in a row were left out. The state is the one before the step.
        """
        finite, spike = bool(metrics["finite"]), bool(metrics["spike"])
        if finite and not spike:
            return
        loss, norm, in_a_row = float(metrics["loss"]), float(metrics["gradient_norm"]), int(metrics["in_a_row"])
        kind, action = ("spike", self.guard.spike.action) if finite else ("nonfinite", self.guard.nonfinite)
        stops = action == "stop" or in_a_row >= self.guard.in_a_row
        self._append({"step": step, "kind": kind, "action": "stop" if stops else "skip", "loss": repr(loss), "gradient_norm": repr(norm), "in_a_row": in_a_row,
                      "example_id": {name: _example_ids(stream["example_id"]) for name, stream in batch.items()}})
        what = f"step {step}: loss {loss:g} is a spike" if finite else f"step {step}: loss {loss}, gradient norm {norm}"
        if not stops:
            print(f"warning: {what}; the step is left out ({int(metrics['skipped'])} so far), its examples are in {self.path}.", flush=True)
            return
        cause = f", the {in_a_row}th step in a row that is left out" if action != "stop" else ""
        raise DivergedError(f"{what}{cause}; the examples of the batch are in {self.path}, the checkpoints are sound. "
                            "Lower the learning rate, set clip, or look at those examples.")

    def _append(self, event: dict[str, Any]) -> None:
        """Adds an event, once: a step that a resumed run takes again is the same event."""
        if jax.process_index() != 0:
            return
        try:
            events = read_events(os.path.dirname(self.path))
            if event not in events:
                _replace(self.path, json.dumps((events + [event])[-EVENTS_KEPT:], indent=1) + "\n")
        except OSError as error:
            print(f"warning: {self.path} cannot be written ({error.strerror or error}); the event: {json.dumps(event)[:2000]}", flush=True)


def read_events(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the events of `workdir/diverged.json`, oldest first: {"step", "kind", "action", "loss", "gradient_norm", "in_a_row", "example_id"}."""
    from etils import epath
    path = epath.Path(os.path.join(os.fspath(workdir), "diverged.json"))
    try:
        events = json.loads(path.read_text()) if path.exists() else []
    except ValueError:
        events = []
    return events if isinstance(events, list) else []


def _example_ids(local: np.ndarray) -> list[int]:
    """The examples of the global batch; every process calls it for the same step. Padding is left out."""
    ids = np.asarray(local)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        ids = np.asarray(multihost_utils.process_allgather(ids)).ravel()
    return list(dict.fromkeys(int(i) for i in ids if i >= 0))    # processes that hold replicas read the same rows


def _replace(path: str, text: str) -> None:
    storage.write_whole(path, text.encode())

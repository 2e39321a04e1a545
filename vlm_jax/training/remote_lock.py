"""One owner of a path on a store that has no locks: numbered files made by create-if-absent, renewed by their owner.

`PATH.N` belongs to whoever made it, and the highest N holds the lock. A lock that was released, or not renewed for a while, is taken over by making
`PATH.N+1`: of several only one can. Who has made a number looks once more whether there is a higher one (it may have slept since it looked); the highest
is never deleted, so no two can both believe to hold it. An owner that could not renew for long, or finds a higher number, has lost it: `check` raises.

Clocks of different machines are not compared: a lock counts as abandoned when the one who waits has seen it unchanged for `STALE_SECONDS`, or when its
owner ran on this machine and has ended.
"""
from collections.abc import Callable
import json
import logging
import os
import threading
import time
from typing import Any
import uuid

from vlm_jax import storage
from vlm_jax.errors import CheckpointError

BEAT_SECONDS, STALE_SECONDS, POLL_SECONDS = 10.0, 120.0, 1.0
_log = logging.getLogger(__name__)


class RemoteLock:
    """The lock `path`, e.g. gs://bucket/run/train.lock.

    Args:
      me: what others are told of the owner, plain JSON.
      gone: whether the owner so described is known to have ended.
      refusal: the error for one who meets a living owner.
    """

    def __init__(self, path: str, me: dict[str, Any], gone: Callable[[dict[str, Any]], bool], refusal: Callable[[dict[str, Any]], CheckpointError]):
        self.folder, self.name = os.path.split(path)
        self.number: int | None = None
        self._me = {**me, "token": uuid.uuid4().hex}
        self._gone, self._refusal = gone, refusal
        self._beats = 0
        self._renewed_at = 0.0
        self._lost: str | None = None
        self._stop = threading.Event()
        self._renewing = threading.Lock()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lock, waiting while an owner shows no sign of life and is not yet stale. Raises what `refusal` makes for a living one."""
        seen: bytes | None = None
        seen_at = time.monotonic()
        while True:
            top = max(self._numbers(), default=0)
            content = storage.read(self._path(top)) if top else None
            if top and content is None:
                continue        # a newer owner has just tidied up
            holder = _parse(content)
            if top and not holder.get("released") and not self._gone(holder):
                if content != seen:
                    if seen is not None or holder.get("host") == self._me["host"]:
                        raise self._refusal(holder)     # renewed, or made, while we looked; or a process of this machine that lives
                    seen, seen_at = content, time.monotonic()
                    _log.warning("%s: held by process %s on %s; if it is not renewed for %.0f s, it is taken over.", self._path(top), holder.get("pid", "?"),
                                 holder.get("host", "?"), STALE_SECONDS)
                if time.monotonic() - seen_at < STALE_SECONDS:
                    time.sleep(POLL_SECONDS)
                    continue
            if self._take(top + 1):
                return
            seen = b""      # somebody else did: whoever holds it now lives

    def check(self) -> None:
        """Raises a CheckpointError where the lock is lost, asking the store if the last renewal is long ago."""
        if self._lost is None and time.monotonic() - self._renewed_at > 2 * BEAT_SECONDS:
            try:
                self._renew()
            except OSError as error:
                if time.monotonic() - self._renewed_at > STALE_SECONDS:
                    self._lost = f"it could not be renewed for {STALE_SECONDS:.0f} s ({error})"
        if self._lost is not None:
            raise CheckpointError(f"{self._path(self.number)}: this trainer lost the workdir: {self._lost}; stop the other one, or choose another --workdir.")

    def release(self) -> None:
        """Gives the lock up. The file stays, marked: its number must not be used again."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.number is not None and self._lost is None:
            storage.write(self._path(self.number), self._content(released=True))
        self.number = None

    def _take(self, number: int) -> bool:
        if not storage.create_if_absent(self._path(number), self._content()):
            return False
        numbers = self._numbers()
        if max(numbers, default=number) > number:
            storage.remove(self._path(number))
            return False
        self.number, self._renewed_at = number, time.monotonic()
        for older in numbers:
            if older < number:
                storage.remove(self._path(older))
        self._thread = threading.Thread(target=self._beat, name="vlm_jax.lock", daemon=True)
        self._thread.start()
        return True

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS) and self._lost is None:
            try:
                self._renew()
            except Exception as error:      # the next beat may succeed; `check` knows how long it did not
                _log.warning("WARNING: %s: could not be renewed (%s).", self._path(self.number), error)

    def _renew(self) -> None:
        with self._renewing:
            if max(self._numbers(), default=0) > self.number:
                self._lost = "another trainer took it over"
                _log.error("WARNING: %s: another trainer took the workdir over, as this one was not heard of for long.", self._path(self.number))
                return
            self._beats += 1
            storage.write(self._path(self.number), self._content())
            self._renewed_at = time.monotonic()

    def _content(self, released: bool = False) -> bytes:
        return json.dumps({**self._me, "beat": self._beats, "released": released}).encode()

    def _numbers(self) -> list[int]:
        ends = (name.removeprefix(self.name + ".") for name in storage.names(self.folder) if name.startswith(self.name + "."))
        return [int(end) for end in ends if end.isdecimal()]

    def _path(self, number: int | None) -> str:
        return os.path.join(self.folder, f"{self.name}.{number}")


def _parse(content: bytes | None) -> dict[str, Any]:
    try:
        holder = json.loads(content or b"{}")
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}

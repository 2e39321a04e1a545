"""Asked to stop: SIGTERM of a scheduler, Ctrl-C of a person. The run finishes its step, saves, and goes on by the same command."""
import os
import signal
import socket
import threading
import time
from types import FrameType

import jax

from vlm_jax import distributed
from vlm_jax.errors import Preempted

GRACE_SECONDS = 5.0    # for the main thread to leave a start-up by itself, before the process is ended where it is


class Terminated(KeyboardInterrupt):
    """Raised in the main thread by a SIGTERM while there is nothing to save; not an `Exception`, so that nobody takes it for a fault of a file or a network."""


class Abandoned(Exception):
    """An evaluation was left because the run is asked to stop."""


class Preemption:
    """Notes requests to stop while the `with` block runs; the loop asks `should_stop()` between steps, and says `work()` with its first one.

    What a signal does depends on what is being done:

        start-up, restoring, compiling   there is nothing to save: SIGTERM ends the process with exit code 75, inside a compilation too (within `GRACE_SECONDS`)
        steps                            the step is finished, saved, reported; then `Preempted` (SIGTERM, exit code 75) or KeyboardInterrupt (Ctrl-C, 130)
        saving                           the save is finished; a second SIGTERM changes nothing, a second Ctrl-C leaves at once (the last committed save counts)
        evaluation                       it is abandoned before its next batch, and done again by the resumed run

    Of several processes one that is asked is enough, and all stop at the same step (`distributed.stops_at`); a request that comes before the first step
    is acted upon after it. Ctrl-C is then as ever: an exception at once. Outside the main thread signals stay as they are.

    Raises:
      Preempted: at the end of the block, where a start-up was left.
    """

    def __init__(self):
        self._idle = True
        self._asked, self._stopping = 0, False
        self._signal: int | None = None
        self._handlers: dict[int, object] = {}
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._wakeup = -1

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is not threading.main_thread():
            return self
        if jax.process_count() > 1:
            self._handlers[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda number, frame: distributed.request_stop())
            return self
        # A handler in Python runs when the main thread comes back from C++; the thread behind this socket hears of the signal at once.
        self._sockets = socket.socketpair()
        self._sockets[1].setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._sockets[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(self._sockets[0],), name="vlm_jax preemption", daemon=True).start()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._handlers.clear()
        if self._sockets is not None:
            signal.set_wakeup_fd(self._wakeup)
            self._sockets[1].close()    # ends the listening thread
            self._sockets = None
        if isinstance(error, (Terminated, Abandoned)):
            raise Preempted("asked to stop before a step was taken, nothing is to be saved; the same command goes on.") from None

    def work(self) -> None:
        """Says that steps are taken: from now on there is something to save."""
        self._idle = False

    def rest(self) -> None:
        """Says that all is saved and no step is taken for a while. Raises where one process alone was asked to stop."""
        self._idle = True
        if self._signal is not None:
            raise Terminated if self._signal == signal.SIGTERM else KeyboardInterrupt

    def should_stop(self) -> bool:
        """Returns whether to stop here: the same on all processes, which must ask equally often (after each step, before each batch of an evaluation)."""
        self._asked += 1
        requested = self._signal is not None if jax.process_count() == 1 else distributed.stops_at(self._asked)
        self._stopping = self._stopping or requested
        return self._stopping

    def stop(self, workdir: str, step: int) -> Exception | KeyboardInterrupt:
        """Returns what to raise once the state after `step` is saved."""
        if self._signal == signal.SIGINT:
            return KeyboardInterrupt(f"{workdir}: saved after step {step}; the same command goes on.")
        return Preempted(f"{workdir}: asked to stop, saved after step {step}; the same command goes on.")

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self._signal = self._signal is not None, self._signal or number
        if number == signal.SIGINT and (again or self._idle):
            raise KeyboardInterrupt
        if number == signal.SIGTERM and self._idle:
            raise Terminated
        if not again:
            os.write(2, f"{signal.Signals(number).name}: finishing this step, then saving ...\n".encode())     # print may be what was interrupted

    def _listen(self, reader: socket.socket) -> None:
        while data := reader.recv(64):
            if signal.SIGTERM in data and self._idle:
                time.sleep(GRACE_SECONDS)
                if self._idle and self._sockets is not None:
                    os.write(2, b"error: asked to stop during start-up, where nothing is to be saved; the same command goes on.\n")
                    os._exit(Preempted.exit_code)
        reader.close()


"""The processes of one run, known to each other: who has come, who still lives, what all of them say, at which step all of them stop.

Process 0 listens at the coordinator's address, every other process keeps one connection to it, and lines of JSON go to and fro. Once all have come the
listener is closed and JAX's coordination service takes over the same port; the connections stay. JAX alone would name no one: a process that is missing or
dies ends the others by a C++ stack trace, and a stopped one after minutes. Nothing here touches a device.
"""
from collections.abc import Callable
import os
import select
import socket
import threading
import time
from typing import Any

from vlm_jax.connections import Connection, connect, listen
from vlm_jax.errors import ConfigError, PeerError, VlmError

PROTOCOL = "vlm_jax peers 1"
_SAY_SECONDS = 10.0
_HELLO_SECONDS = 10.0
_PATIENCE_SECONDS = 10.0    # process 0 knows better who is missing, and tells the others
_FINAL = {65: "data", 70: "divergence", 73: "checkpoint", 78: "configuration"}   # exit codes after which no restart helps


class PeerEnded(PeerError):
    """A process that ended; where it ended by an error that a restart meets again, the others end with the same exit code.

    Attributes:
      by_error: whether it said goodbye with an error, instead of being lost.
    """

    def __init__(self, line: str, code: int = PeerError.exit_code, by_error: bool = False):
        super().__init__(line)
        self.exit_code, self.by_error = code, by_error


class Peers:
    """This process among the processes of its run.

    Args:
      process, processes: which one this is, of how many.
      address: (host, port) at which process 0 is reached.
      bind: the host that process 0 listens on.
      facts: what must be the same in all processes before anything begins, e.g. versions; {name: value}.
      timeout: seconds to wait for all.
      heartbeat: seconds without a sign of life after which a process counts as lost.
      on_end: called with a VlmError, in a thread of its own, when another process has died, hangs or ended with an error.
      say: prints a line.
    Attributes:
      members: {process: "process 1 (host h, pid 123)"}.
    """

    def __init__(self, process: int, processes: int, address: tuple[str, int], *, bind: str, facts: dict[str, str], timeout: float, heartbeat: float,
                 on_end: Callable[[VlmError], None], say: Callable[[str], None] = print):
        self.process, self.processes, self.address, self.bind = process, processes, address, bind
        self.facts, self.timeout, self.heartbeat, self._on_end, self._say = facts, timeout, heartbeat, on_end, say
        self.members: dict[int, str] = {}
        self._connections: dict[int, Connection] = {}      # by process; on process 0 all others, elsewhere only process 0
        self._strangers: list[Connection] = []
        self._listener: socket.socket | None = None
        self._changed = threading.Condition(threading.RLock())    # entered again by a signal handler of the main thread
        self._began = time.monotonic()
        self._missing: list[int] = []
        self._joined = self._leaving = self._ending = False
        self._failure: VlmError | None = None
        self._left: set[int] = set()
        self._number = 0
        self._given: dict[int, dict[int, tuple[str, Any]]] = {}    # on process 0: {exchange: {process: (what, value)}}
        self._results: dict[int, Any] = {}
        self._stop_wanted = self._stopping = False
        self._last_step, self._stop_at = -1, None
        self._steps: dict[int, int] = {}
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    # Coming together

    def join(self) -> None:
        """Waits until all processes have come and found that they belong together; says every ten seconds for whom.

        Raises:
          ConfigError: an address that cannot be listened on, a process that came twice, another number of processes, other facts.
          PeerError: not all came in time.
        """
        me = {"protocol": PROTOCOL, "process": self.process, "processes": self.processes, "facts": self.facts,
              "host": socket.gethostname(), "pid": os.getpid()}
        self.members[self.process] = _name(me)
        if self.process == 0:
            self._listener = listen(self.bind, self.address)
        else:
            connection = connect(self.address, self.process, self.timeout, self._say)
            connection.send({"kind": "hello", **me})
            self._connections[0] = connection
        threading.Thread(target=self._run, name="vlm_jax.peers", daemon=True).start()
        said = self._began
        with self._changed:
            while not self._joined and self._failure is None:
                self._changed.wait(0.2)
                now = time.monotonic()
                if self._joined or self._failure:
                    break
                if now - said >= _SAY_SECONDS:
                    said = now
                    self._say(f"process {self.process} waits for {_list(self._missing)} of {self.processes} at {self._where()} "
                              f"({now - self._began:.0f} of {self.timeout:g} s)")
                if now - self._began > self.timeout + (0 if self.process == 0 else _PATIENCE_SECONDS):
                    self._refuse(PeerError(f"{_list(self._missing)} of {self.processes} did not come to {self._where()} within {self.timeout:g} s; "
                                           "look at their logs, and start all of them again."))
            failure = self._failure
        if failure is not None:
            self.close()
            raise failure

    def _where(self) -> str:
        return f"{self.address[0]}:{self.address[1]}"

    def _hello(self, connection: Connection, message: dict[str, Any]) -> None:
        """Process 0 looks at who has come."""
        error = self._misfit(message)
        if error is not None:
            self._refuse(error, connection)
            return
        process = connection.process = message["process"]
        self._connections[process] = connection
        self._strangers.remove(connection)
        self.members[process] = _name(message)
        self._missing = [other for other in range(self.processes) if other not in self.members]
        if self._missing:
            self._send_all({"kind": "waiting", "missing": self._missing})
            return
        self._listener.close()      # JAX's coordination service takes the port over
        self._listener = None
        for stranger in self._strangers:
            stranger.close()
        self._strangers = []
        self._send_all({"kind": "go", "members": self.members})
        self._joined = True

    def _misfit(self, message: dict[str, Any]) -> ConfigError | None:
        """Why a process that said hello does not belong to this run, if so."""
        process, theirs = message["process"], message["facts"]
        if message["processes"] != self.processes:
            return ConfigError(f"{_name(message)} was started with --processes {message['processes']}, process 0 with {self.processes}; "
                               "start all with the same number.")
        if process in self.members:
            return ConfigError(f"process id {process} came twice: {self.members[process]} and {_name(message)}; give each process its own --process_id.")
        for name in sorted(self.facts.keys() | theirs.keys()):
            if self.facts.get(name) != theirs.get(name):
                return ConfigError(f"{name} is {theirs.get(name)} in {_name(message)}, {self.facts.get(name)} in {self.members[0]}; "
                                   "make it the same everywhere.")
        return None

    def _refuse(self, error: VlmError, connection: Connection | None = None) -> None:
        """This run cannot begin: all who have come are told."""
        message = {"kind": "refused", "code": error.exit_code, "line": str(error)}
        if connection is not None:
            connection.send(message)
        if self.process == 0:
            self._send_all(message)
        self._failure = self._failure or error

    # The thread that listens

    def _run(self) -> None:
        interval = max(0.05, min(5.0, self.heartbeat / 5))
        if self.process == 0:
            self._missing = list(range(1, self.processes))
        beaten = ticked = time.monotonic()
        while not self._ending:
            with self._changed:
                if self._ending:
                    return
                sources: dict[int, Any] = {each.socket.fileno(): each for each in [*self._connections.values(), *self._strangers]}
                if self._listener is not None:
                    sources[self._listener.fileno()] = self._listener
            poll = select.poll()        # select() knows no descriptors above 1,023
            for descriptor in [*sources, self._wake_read]:
                poll.register(descriptor, select.POLLIN)
            ready = [descriptor for descriptor, _ in poll.poll(interval * 1000)]
            now = time.monotonic()
            with self._changed:
                if self._ending:
                    return
                if now - ticked > max(2 * interval, self.heartbeat / 2):     # this process itself was stopped: it has heard nobody
                    for connection in self._connections.values():
                        connection.heard = now
                ticked = now
                for source in map(sources.get, ready):
                    if source is None:
                        os.read(self._wake_read, 4096)
                    elif isinstance(source, Connection):
                        self._read(source)
                    elif source is self._listener:
                        self._strangers.append(Connection(source.accept()[0]))
                self._strangers = [stranger for stranger in self._strangers if not self._too_long(stranger, now)]
                if now - beaten >= interval:
                    beaten = now
                    self._send_all({"kind": "beat"})
                self._look(now)
                if self._stop_wanted and self._joined:
                    self._stop_wanted = False
                    self._begin_stop() if self.process == 0 else self._send_all({"kind": "stop"})
                self._changed.notify_all()

    def _too_long(self, stranger: Connection, now: float) -> bool:
        if now - stranger.began > _HELLO_SECONDS:
            stranger.close()
            return True
        return False

    def _read(self, connection: Connection) -> None:
        try:
            messages, closed = connection.receive()
            for message in messages:
                self._handle(connection, message)
        except (ValueError, KeyError, TypeError, AttributeError):
            messages, closed = [], True      # not one of us
        if closed and connection in self._strangers:
            connection.close()
            self._strangers.remove(connection)
        elif closed:
            self._closed(connection)

    def _closed(self, connection: Connection) -> None:
        process = connection.process
        if self._connections.pop(process, None) is None:
            return
        connection.close()
        if process in self._left or self._leaving:
            return
        if self._joined:
            self._end(PeerEnded(f"{self.members[process]} died: its connection is closed"), process)
        elif self.process == 0:
            self._refuse(PeerError(f"{self.members[process]} ended before all had come; look at its log, and start all of them again."))
        else:
            self._refuse(PeerError(f"{self._where()} closed the connection of process {self.process}: process 0 ended, or something else listens there, "
                                   "perhaps a run that has begun already; check --coordinator."))

    def _look(self, now: float) -> None:
        for process, connection in list(self._connections.items()):
            if self._joined and now - connection.heard > self.heartbeat and process not in self._left:
                self._end(PeerEnded(f"{self.members[process]} has given no sign of life for {now - connection.heard:.0f} s: it hangs, or its machine "
                                    "is lost"), process)

    def _end(self, error: PeerEnded, process: int) -> None:
        """The end of `process` is the end of all."""
        if self._failure is not None or self._leaving:
            return
        self._failure = error
        if self.process == 0:
            self._send_all({"kind": "ended", "process": process, "code": error.exit_code, "line": str(error), "by_error": error.by_error})
        threading.Thread(target=self._on_end, args=(error,), daemon=True).start()

    def _send_all(self, message: dict[str, Any]) -> None:
        for connection in list(self._connections.values()):
            connection.send(message)

    def _handle(self, connection: Connection, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "hello" and connection in self._strangers and message["protocol"] == PROTOCOL:
            self._hello(connection, message)
        elif connection in self._strangers:
            raise ValueError("no hello")
        elif kind == "waiting":
            self._missing = message["missing"]
        elif kind == "refused":
            known = ConfigError if message["code"] == ConfigError.exit_code else PeerError
            self._failure = self._failure or known(message["line"])
        elif kind == "go":
            self.members = {int(process): name for process, name in message["members"].items()}
            self._joined = True
        elif kind == "value":
            self._give(connection.process, message["number"], message["what"], message["value"])
        elif kind == "values":
            self._results[message["number"]] = message
        elif kind == "stop":
            self._begin_stop()
        elif kind == "at":
            self._answer(connection.process, message["step"])
        elif kind == "stop_at":
            self._stop_at = message["step"]
        elif kind == "bye":
            self._left.add(connection.process)
            if message["code"] not in (0, 75):
                code = message["code"] if message["code"] in _FINAL else PeerError.exit_code
                self._end(PeerEnded(f"{self.members[connection.process]} stopped: {message['line']}", code, True), connection.process)
        elif kind == "ended":
            self._end(PeerEnded(message["line"], message["code"], message["by_error"]), message["process"])

    # What all say

    def exchange(self, what: str, value: Any, timeout: float | None = None) -> list[Any]:
        """Gives `value` (anything JSON can hold) to all processes; returns the values of all, by process. All must call it in the same order.

        Args:
          what: names the place in the program; where the processes differ in it, they have gone different ways.
          timeout: seconds; None waits for as long as all give signs of life.
        Raises:
          PeerError: a process does not come in time, has ended, or came to another place.
        """
        began = time.monotonic()
        with self._changed:
            self._number += 1
            number = self._number
            if self.process == 0:
                self._give(0, number, what, value)
            else:
                self._send_all({"kind": "value", "number": number, "what": what, "value": value})
            while number not in self._results:
                if self._failure is not None:
                    raise self._failure
                gone = sorted(self._left)
                if gone:
                    raise PeerError(f"process {gone[0]} has left, process {self.process} waits for it at {what}; this is a bug unless their programs differ.")
                if timeout is not None and time.monotonic() - began > timeout:
                    absent = _list([p for p in range(self.processes) if p not in self._given.get(number, {})]) if self.process == 0 else "not all processes"
                    raise PeerError(f"{absent} did not come to {what} within {timeout:g} s, process {self.process} did; start all again.")
                self._changed.wait(0.2)
            result = self._results.pop(number)
        if "error" in result:
            raise PeerError(result["error"])
        return result["values"]

    def _give(self, process: int, number: int, what: str, value: Any) -> None:
        given = self._given.setdefault(number, {})
        given[process] = (what, value)
        if len(given) < self.processes:
            return
        del self._given[number]
        places = {p: place for p, (place, _) in given.items()}
        odd = next((p for p in sorted(places) if places[p] != places[0]), None)
        message = {"kind": "values", "number": number}
        if odd is not None:
            message["error"] = f"process {odd} is at {places[odd]}, process 0 at {places[0]}: their programs or data differ; start all with the same command."
        else:
            message["values"] = [given[p][1] for p in range(self.processes)]
        self._results[number] = message
        self._send_all(message)
        self._changed.notify_all()

    # Where all stop

    def request_stop(self) -> None:
        """Asks that all processes stop at the same step. May be called from a signal handler."""
        self._stop_wanted = True
        try:
            os.write(self._wake_write, b"x")
        except OSError:
            pass

    def stops_at(self, step: int) -> bool:
        """Whether all processes stop at `step`. To be asked once a step, in ascending order; costs a lock unless a stop has been requested.

        While the processes agree, none goes on: each one's thread answers with the last step that it was asked about, and all stop at the one after the latest.
        """
        with self._changed:
            while self._stopping and self._stop_at is None and self._failure is None and not self._left:
                self._changed.wait(0.2)
            self._last_step = step
            return self._stop_at is not None and step >= self._stop_at

    def _begin_stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        if self.process == 0:
            self._send_all({"kind": "stop"})
            self._answer(0, self._last_step)
        else:
            self._send_all({"kind": "at", "step": self._last_step})

    def _answer(self, process: int, step: int) -> None:
        self._steps[process] = step
        if len(self._steps) == self.processes:
            self._stop_at = max(self._steps.values()) + 1
            self._send_all({"kind": "stop_at", "step": self._stop_at})

    # The end

    def failure(self, wait: float = 0.0) -> VlmError | None:
        """The end of another process, if there is one or comes to be known within `wait` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, timeout=wait)
            return self._failure

    def leave(self, code: int = 0, line: str = "") -> None:
        """Says goodbye: with a code other than 0 and 75 the others end too, with `line` as the reason."""
        with self._changed:
            if self.process == 0 and code not in (0, 75):
                self._send_all({"kind": "ended", "process": 0, "code": code if code in _FINAL else PeerError.exit_code, "by_error": True,
                                "line": f"{self.members.get(0, 'process 0')} stopped: {line}"})
            else:
                self._send_all({"kind": "bye", "code": code, "line": line})
            self._leaving = True

    def close(self) -> None:
        """Ends the thread and closes the sockets; what was sent still arrives."""
        with self._changed:
            self._leaving = self._ending = True
            for connection in [*self._connections.values(), *self._strangers]:
                connection.close()
            if self._listener is not None:
                self._listener.close()
        os.write(self._wake_write, b"x")


def _name(message: dict[str, Any]) -> str:
    return f"process {message['process']} (host {message['host']}, pid {message['pid']})"


def _list(processes: list[int]) -> str:
    if len(processes) == 1:
        return f"process {processes[0]}"
    shown = ", ".join(map(str, processes[:8])) + (f" and {len(processes) - 8} more" if len(processes) > 8 else "")
    return f"processes {shown}" if processes else "the others"

"""Lines of JSON over a socket: what the processes of one run say to each other (`peers.py`)."""
from collections.abc import Callable
import contextlib
import errno
import json
import socket
import threading
import time
from typing import Any

from vlm_jax.errors import ConfigError, PeerError

_LONGEST_LINE = 2 ** 22     # bytes; who sends more is no process of this run
_SAY_SECONDS = 10.0
_BIND_SECONDS = 5.0         # a run that was ended a moment ago may still hold the port


class Connection:
    """One socket with its unread bytes; `process` is None until it has said hello."""

    def __init__(self, connected: socket.socket, process: int | None = None):
        self.socket, self.process = connected, process
        self.unread = b""
        self.heard = self.began = time.monotonic()
        self._sending = threading.Lock()
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.settimeout(5.0)       # to send; what is read has come already

    def send(self, message: dict[str, Any]) -> None:
        """Sends one line; a connection that is closed is the reader's to notice."""
        try:
            with self._sending:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """Returns (messages, whether the other side has closed); raises ValueError for what is not a line of JSON."""
        try:
            data = self.socket.recv(65536)
        except (BlockingIOError, InterruptedError, TimeoutError):
            return [], False
        except OSError:
            data = b""
        *lines, self.unread = (self.unread + data).split(b"\n")
        if len(self.unread) > _LONGEST_LINE:
            raise ValueError("a line without end")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message")
        self.heard = time.monotonic()
        return messages, not data

    def close(self) -> None:
        """Closes it; what was sent still arrives."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        self.socket.close()


def listen(bind: str, address: tuple[str, int]) -> socket.socket:
    """Returns a socket that listens on the port of `address` (host, port), at the host `bind`.

    Raises:
      ConfigError: the port is in use, or `bind` is not of this machine.
    """
    began, where = time.monotonic(), f"coordinator {address[0]}:{address[1]}"
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(bind, address[1], type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"{where}: {bind} is no address of a machine ({error.strerror}); correct --coordinator.") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    while True:
        try:
            listener.bind(target)
            listener.listen(128)
            return listener
        except OSError as error:
            foreign = error.errno == errno.EADDRNOTAVAIL
            if error.errno == errno.EADDRINUSE and time.monotonic() - began < _BIND_SECONDS:
                time.sleep(0.2)
                continue
            listener.close()
            remedy = ("process 0 must run on the machine that the address names, or be told --bind ADDRESS" if foreign
                      else "choose another port in --coordinator, for all processes")
            raise ConfigError(f"{where}: cannot listen on {bind}:{address[1]} ({error.strerror}); {remedy}.") from None


def connect(address: tuple[str, int], process: int, timeout: float, say: Callable[[str], None]) -> Connection:
    """Returns the connection of `process` to process 0 at `address`, tried again for `timeout` seconds; a line every ten seconds says so.

    Raises:
      PeerError: nobody listens there.
    """
    began = said = time.monotonic()
    where = f"{address[0]}:{address[1]}"
    while True:
        reason = "nobody listens there"
        try:
            connected = socket.create_connection(address, timeout=5.0)
            if connected.getsockname() != connected.getpeername():      # the kernel may connect a socket to itself where nobody listens
                return Connection(connected, process=0)
            connected.close()
        except OSError as error:
            reason = error.strerror or str(error)
        now = time.monotonic()
        if now - began > timeout:
            raise PeerError(f"process {process} cannot reach process 0 at {where} since {timeout:g} s ({reason}); check --coordinator "
                            "(the same on all), that process 0 runs, and that no firewall closes the port.")
        if now - said >= _SAY_SECONDS:
            said = now
            say(f"process {process} waits for process 0 at {where}: {reason} ({now - began:.0f} of {timeout:g} s)")
        time.sleep(0.2)

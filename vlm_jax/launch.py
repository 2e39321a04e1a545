"""Runs a command in several processes here, and again when it was interrupted: `python -m vlm_jax.launch --processes 2 -- python -m vlm_jax.train ...`

When one process ends by an error all end, after exit codes 75, 76, 77 and signals all are started again (`--restarts`), after 65, 70, 73 and 78 never: the same
command would meet the same error. SIGTERM and SIGINT go to all. If the launcher is killed, so are its processes. With one process, the default, it is
only the one that starts again: on every host of a pod, say, whose processes find each other as they would without it.
"""
import argparse
from collections import deque
from collections.abc import Sequence
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO

from vlm_jax import command_line
from vlm_jax.errors import ConfigError, HangError, PeerError, Preempted

AGAIN = (Preempted.exit_code, PeerError.exit_code, HangError.exit_code)
# Of the exit codes of all processes the launcher ends with the one that says most: the last of these, others (bugs) between them.
_SEVERITY = {0: 0, 75: 1, 76: 2, 77: 3, 70: 5, 65: 6, 73: 7, 78: 8}
_OTHER = 4
_GRACE_SECONDS = 8.0        # for the others to see that one has ended, and to say so themselves
_LONGEST_PAUSE = 60.0
_LONG_RUN = 600.0           # seconds after which the pauses begin anew
# Run by a small interpreter that becomes the command: the kernel kills it when the launcher dies (prctl PR_SET_PDEATHSIG = 1).
_DIE_WITH_LAUNCHER = ("import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, int(signal.SIGKILL)); "
                      "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execvp(sys.argv[2], sys.argv[2:])")
# What Gloo and JAX's coordination service print in C++ when a process connects or is lost; shown only where a process aborts with nothing else to say.
_NOISE = re.compile(r"\[Gloo\] Rank \d+ is connected|[EFWI]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ (coordination_service\w*\.cc|client\.h|preemption_\w+\.cc):|\s+@ +0x|"
                    r"\*\*\* Check failure stack trace|Additional GRPC error information|:UNKNOWN:|:\{|RPC: /xla\.coordination|"
                    r"Fatal Python error: Aborted|jax/_src/distributed\.py.*proxy")

class Group:
    """The processes of one attempt.

    Args:
      command: what each of them runs.
      environments: the environment of each.
      quiet: whether lines come without the prefix `[1] ` (there is only one process).
    """

    def __init__(self, command: Sequence[str], environments: Sequence[dict[str, str]], quiet: bool):
        self.children: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []
        self._noise: list[deque[str]] = []
        if shutil.which(command[0]) is None:
            raise ConfigError(f"{command[0]}: no such program; give the whole command after --: -- python -m vlm_jax.train ...")
        for number, environment in enumerate(environments):
            # Each in its own group: a key pressed in the terminal reaches it once, through the launcher.
            child = subprocess.Popen([sys.executable, "-S", "-c", _DIE_WITH_LAUNCHER, str(os.getpid()), *command], env=environment, stdin=subprocess.DEVNULL,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
            self.children.append(child)
            noise: deque[str] = deque(maxlen=100)
            self._noise.append(noise)
            prefix = "" if quiet else f"[{number}] "
            for source, sink in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                reader = threading.Thread(target=_copy, args=(source, sink, prefix, noise), daemon=True)
                reader.start()
                self._readers.append(reader)

    def send(self, number: int) -> None:
        """Sends a signal to all that still run."""
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)

    def kill(self) -> None:
        """Ends all at once, with what they have started."""
        for child in self.children:
            if child.poll() is None:
                try:
                    os.killpg(child.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                child.wait()

    def wait(self) -> list[int]:
        """Returns the exit codes of all, a signal as its negative number; those that had to be ended after another's error count as 76."""
        deadline, asked = None, False
        ended: list[int] = []
        while True:
            codes = [child.poll() for child in self.children]
            for number, code in enumerate(codes):
                if code is not None and number not in ended:
                    ended.append(number)
                    if code not in (0, Preempted.exit_code) and deadline is None:
                        deadline = time.monotonic() + _GRACE_SECONDS
            if None not in codes:
                break
            if deadline is not None and time.monotonic() > deadline:
                if asked:
                    break
                self.send(signal.SIGTERM)
                deadline, asked = time.monotonic() + 2.0, True
            time.sleep(0.05)
        codes = [PeerError.exit_code if child.poll() is None else child.returncode for child in self.children]
        if asked:
            codes = [code if number in ended and code != -signal.SIGTERM else PeerError.exit_code for number, code in enumerate(codes)]
        self.kill()
        for reader in self._readers:
            reader.join(timeout=2.0)
        for number, code in enumerate(codes):
            if code == -signal.SIGABRT:
                print("\n".join(self._noise[number]), file=sys.stderr, flush=True)
        return codes


def _copy(source: IO[bytes], sink: IO[str], prefix: str, noise: deque[str]) -> None:
    """Copies lines with a prefix, whole lines at a time, without the noise."""
    with source:
        for line in source:
            text = line.decode(errors="replace").rstrip("\n")
            if _NOISE.match(text):
                noise.append(text)
                continue
            try:
                sink.write(f"{prefix}{text}\n")
                sink.flush()
            except (OSError, ValueError):       # nobody reads any more; the processes go on
                pass


def environments(processes: int, devices_per_process: int | None, heartbeat: float | None = None, command: str = "") -> list[dict[str, str]]:
    """Returns the environment of each process: who it is, where process 0 is on loopback, how many CPU devices it simulates, how the run is started again."""
    common = dict(os.environ, PYTHONUNBUFFERED="1", VLM_JAX_COMMAND=command)
    if devices_per_process is not None:
        others = [flag for flag in common.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_force_host_platform_device_count")]
        # XLA's pool has one thread a device, which a collective that waits may take up; more let it go on.
        common.update(JAX_PLATFORMS="cpu", XLA_FLAGS=" ".join([*others, f"--xla_force_host_platform_device_count={devices_per_process}"]),
                      PJRT_NPROC=common.get("PJRT_NPROC", str(max(32, 4 * devices_per_process))))
    if heartbeat is not None:
        common["VLM_JAX_HEARTBEAT"] = f"{heartbeat:g}"
    if processes == 1:
        return [common]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [dict(common, VLM_JAX_COORDINATOR=f"127.0.0.1:{port}", VLM_JAX_PROCESSES=str(processes), VLM_JAX_PROCESS_ID=str(number))
            for number in range(processes)]


def worst(codes: Sequence[int]) -> int:
    """The exit code that says most about why the processes ended. A signal counts as 76 where there are several processes, else as 128 + its number."""
    if len(codes) == 1:
        return 128 - codes[0] if codes[0] < 0 else codes[0]
    return max((PeerError.exit_code if code < 0 else code for code in codes), key=lambda code: _SEVERITY.get(code, _OTHER))


def starts_again(codes: Sequence[int]) -> bool:
    """Whether the same command may do better: interrupted, a lost process, a hang, a signal, and nothing worse."""
    return any(codes) and all(code == 0 or code in AGAIN or code < 0 for code in codes)


def launch(command: Sequence[str], processes: int = 1, devices_per_process: int | None = None, restarts: int = 0, heartbeat: float | None = None,
           resume: str = "") -> int:
    """Runs `command` in `processes` processes until they have ended well, or badly `restarts` times; returns the exit code.

    Raises:
      ConfigError: a number below one (restarts: below zero), or a command that cannot be run.
    """
    for name, value, least in (("processes", processes, 1), ("devices_per_process", devices_per_process, 1), ("restarts", restarts, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: it must be at least {least}.")
    command = [sys.executable, *command[1:]] if command[0] in ("python", "python3") else list(command)
    asked: list[int] = []
    group: Group | None = None

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        if group is not None:
            group.send(number if asked.count(signal.SIGINT) < 3 else signal.SIGKILL)

    handled = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.signal(number, forward) for number in handled}
    pause, restarted = 1.0, 0
    try:
        while True:
            began = time.monotonic()
            group = Group(command, environments(processes, devices_per_process, heartbeat, resume), quiet=processes == 1)
            if asked:       # the signal came while the processes were being started
                group.send(asked[-1])
            codes = group.wait()
            for number, code in enumerate(codes):
                if code < 0 and not asked:
                    _say(f"process {number} was ended by {signal.Signals(-code).name}")
            if not starts_again(codes) or asked or restarted >= restarts:
                return worst(codes)
            if time.monotonic() - began > _LONG_RUN:
                pause = 1.0
            restarted += 1
            _say(f"exit code {worst(codes)}: restart {restarted} of {restarts} in {pause:.0f} s")
            until = time.monotonic() + pause
            while time.monotonic() < until:
                if asked:
                    return worst(codes)
                time.sleep(0.05)
            pause = min(_LONGEST_PAUSE, 2 * pause)
    finally:
        if group is not None:
            group.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)


def run(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs it; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.launch", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="how many processes; default: 1")
    parser.add_argument("--devices_per_process", type=int, metavar="K", help="simulate K CPU devices in each process")
    parser.add_argument("--restarts", type=int, default=0, metavar="R", help="how often to start again after an interruption; default: 0")
    parser.add_argument("--heartbeat", type=float, metavar="SECONDS", help="silence after which a process counts as lost; default: 100")
    parser.add_argument("--", dest="command", nargs="+", metavar="COMMAND", help="what each process runs")
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options, unknown = parser.parse_known_args(arguments[:cut])
    command = arguments[cut + 1:]
    if unknown or not command:
        raise ConfigError(f"{unknown[0] if unknown else 'nothing to run'}: launch needs its command after --, for example: "
                          "python -m vlm_jax.launch --processes 2 -- python -m vlm_jax.train --config FILE --workdir DIR.")
    resume = shlex.join(["python", "-m", "vlm_jax.launch", *arguments])
    return launch(command, options.processes, options.devices_per_process, options.restarts, options.heartbeat, resume)


if __name__ == "__main__":
    command_line.main(lambda: sys.exit(run()))

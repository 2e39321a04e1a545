"""What the command lines share: arguments with `--config.a.b=v` overrides, several processes, and errors printed in one line with their exit code."""
import argparse
from collections.abc import Callable, Sequence
import os
import sys

from vlm_jax import distributed
from vlm_jax.absent_tpu import quiet_libtpu
from vlm_jax.errors import ConfigError, VlmError, did_you_mean


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Returns the parsed arguments and the overrides (`a.b=v`, from `--config.a.b=v` or `--config.a.b v`).

    Raises:
      ConfigError: for an argument that is neither.
    """
    known, rest = parser.parse_known_args(arguments)
    overrides, words = [], list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--config."):
            flags = [flag for action in parser._actions for flag in action.option_strings]
            raise ConfigError(f"{word}: no such argument.{did_you_mean(word, flags)}")
        if "=" not in word:
            if not words:
                raise ConfigError(f"{word} needs a value: write {word}=VALUE.")
            word = f"{word}={words.pop(0)}"
        overrides.append(word.removeprefix("--config."))
    return known, overrides


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of runs in several processes; `start_processes` reads them."""
    group = parser.add_argument_group("several processes", "on TPU pods and under SLURM's srun nothing is needed; python -m vlm_jax.launch starts several here")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is reached, the same in all processes")
    group.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process_id", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument("--bind", metavar="ADDRESS", help="the address that process 0 listens on; default: the coordinator's")
    group.add_argument("--start_timeout", type=float, metavar="SECONDS", help="how long to wait for all processes; default: 300")
    group.add_argument("--heartbeat", type=float, metavar="SECONDS", help="silence after which a process counts as lost; default: 100")


def start_processes(options: argparse.Namespace) -> None:
    """Joins the other processes; those other than process 0 print errors and warnings only. Raises what `distributed.start` raises."""
    processes = distributed.start(options.coordinator, options.processes, options.process_id, timeout=options.start_timeout, heartbeat=options.heartbeat,
                                  bind=options.bind)
    if processes > 1 and distributed.process_id() != 0:
        sys.stdout = open(os.devnull, "w")


def main(run: Callable[[], object]) -> None:
    """Runs a command line: a VlmError is printed as `error: ...` and exits with its code, Ctrl-C exits with 130; several: `distributed.guarded`."""
    quiet_libtpu()
    try:
        with distributed.guarded():
            run()
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped by the keyboard; the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)

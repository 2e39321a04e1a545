"""Errors that a user can cause: one line each, naming the item, the cause and the remedy.

The command lines print them without a traceback and exit with `exit_code`; every other exception is a bug and keeps its traceback.
"""
from collections.abc import Iterable
import difflib


class VlmError(Exception):
    """Base of all errors that a user can cause and mend."""
    exit_code = 1


class ConfigError(VlmError, ValueError):
    """A config, a preset or an argument that cannot work; exit code 78."""
    exit_code = 78


class DataError(VlmError, ValueError):
    """A record, a file or a data set that cannot be used, or too many of them; exit code 65."""
    exit_code = 65


class CheckpointError(VlmError, RuntimeError):
    """A checkpoint or a workdir that cannot be read, written or trusted; exit code 73."""
    exit_code = 73


class DivergedError(VlmError, FloatingPointError):
    """Training that met a loss or gradient which is not finite; exit code 70."""
    exit_code = 70


class PeerError(VlmError, RuntimeError):
    """Another process of the same run that died, hangs or never came; exit code 76: start all of them again."""
    exit_code = 76


class HangError(VlmError, RuntimeError):
    """A step, a save or a batch that did not end in time; exit code 77."""
    exit_code = 77


class Preempted(VlmError):
    """The run was asked to stop (SIGTERM), has saved, and goes on by the same command; exit code 75."""
    exit_code = 75


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean "x"?` for the known name closest to `name`, else the list of what is known."""
    known = sorted(str(k) for k in known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    if close:
        return f' Did you mean "{close[0]}"?'
    return f" Known: {', '.join(known) if known else 'none'}."

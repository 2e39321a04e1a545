"""What the command lines share: arguments with `--config.a.b=v` overrides, and errors printed in one line with their exit code."""
import argparse
from collections.abc import Callable, Sequence
import sys

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


def main(run: Callable[[], object]) -> None:
    """Runs a command line: a VlmError is printed as `error: ...` and exits with its code, Ctrl-C exits with 130."""
    try:
        run()
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped by the keyboard; the same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)

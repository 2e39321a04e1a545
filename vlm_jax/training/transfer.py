"""Starting from other parameters: those of another run, or of the stage before, laid over freshly initialised ones."""
from collections.abc import Sequence
import math
import os
import re
from typing import Any

import numpy as np

from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.nn.positions import resample_positions
from vlm_jax.training.adapters import merge as merge_adapters
from vlm_jax.training.trees import flatten, unflatten

SHOWN = 20   # lines of a table of differences


def init_from(params: Any, *, workdir: str | os.PathLike | None = None, previous: Any = None, step: int | None = None, which: str | None = None,
              mapping: Sequence[Sequence[str | None]] | None = None, missing: str | None = None, unexpected: str = "error") -> dict:
    """Returns `params` with the values of another tree where their paths meet, in the dtypes of `params`, as numpy arrays.

    Adapters of theirs are merged first.
    Tables of image positions are resampled (bilinearly) where the two grids differ; every other difference of shape is an error.

    Args:
      params: freshly initialised parameters.
      workdir: a run, or weights of others: a directory in the Hugging Face layout, or an .npz of big_vision.
      step, which: of a run the step (None: the newest) and the part of its checkpoint ("params" or "ema"; None: "ema" where the run keeps one).
      previous: a tree to take instead of a checkpoint.
      mapping: ordered pairs (regex of their path, our path with \\1 ...); the first that matches a whole path wins, and what none matches is left
        behind. A target of None leaves it behind too. Without a mapping the paths are the same.
      missing: "error" or "keep" for parameters of ours that nothing fills; by default "keep" with a mapping and "error" without.
      unexpected: "error" or "ignore" for parameters of theirs that we do not have.
    Raises:
      ConfigError: for wrong settings, a pair of the mapping that matches nothing, or two of theirs for one of ours.
      CheckpointError: if the trees do not fit, with a table of the differences.
    """
    if (workdir is None) == (previous is None):
        raise ConfigError("init_from needs either a workdir or the stage before (previous=True); set one of them.")
    missing = missing or ("keep" if mapping else "error")
    for name, value, choices in (("missing", missing, ("error", "keep")), ("unexpected", unexpected, ("error", "ignore"))):
        if value not in choices:
            raise ConfigError(f'init_from.{name} is "{value}"; choose {" or ".join(choices)}.')
    source = str(workdir) if previous is None else "the stage before"
    if previous is None:
        previous, source = _read(os.path.expanduser(os.fspath(workdir)), step, which)
    previous = merge_adapters(previous)
    theirs, ours = rename(flatten(previous), mapping), flatten(params)

    differences, filled = [], {}
    for path, value in theirs.items():
        if path not in ours:
            if unexpected == "error":
                differences.append(f"- {path} {_describe(value)}: not in this model")
            continue
        fitted = fit(path, np.asarray(value), tuple(ours[path].shape))
        if fitted is None:
            differences.append(f"! {path} {_describe(value)}: this model has {_describe(ours[path])}")
        else:
            filled[path] = fitted.astype(ours[path].dtype)
    if missing == "error":
        differences += [f"+ {path} {_describe(leaf)}: not in {source}" for path, leaf in ours.items() if path not in theirs]
    if differences:
        more = [f"  ... and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
        raise CheckpointError("\n".join([
            f"init_from {source}: {len(differences)} parameters do not fit; "
            "set mapping, missing=\"keep\" or unexpected=\"ignore\", or choose another run.",
            *(f"  {line}" for line in sorted(differences)[:SHOWN]), *more]))
    if not filled:
        raise CheckpointError(f"init_from {source}: no parameter of it is in this model; correct init_from.mapping.")
    print(f"init_from {source}: {len(filled)} parameters taken; {_listed([path for path in ours if path not in filled], 'left as initialised')}; "
          f"{_listed([path for path in theirs if path not in filled], 'of theirs unused')}", flush=True)
    return unflatten({path: filled.get(path, leaf) for path, leaf in ours.items()})


def _read(path: str, step: int | None, which: str | None) -> tuple[Any, str]:
    """Returns the parameters of a run or of a directory, and what messages call them."""
    from vlm_jax.interop.config_reader import is_directory
    if path.endswith(".npz") or is_directory(path):
        from vlm_jax.interop.directory import read_parameters
        for name, value in (("step", step), ("which", which)):
            if value is not None:
                raise ConfigError(f"init_from.{name}: {path} is no run and has neither steps nor a moving average; leave {name} out.")
        return read_parameters(path), path
    from vlm_jax.training.checkpoints import restore_parameters
    previous, step = restore_parameters(path, step, which)
    return previous, f"{path} (step {step})"


def rename(theirs: dict[str, Any], mapping: Sequence[Sequence[str | None]] | None) -> dict[str, Any]:
    """Returns a {path: value} table with the paths that `mapping` gives them; see `init_from`."""
    if not mapping:
        return dict(theirs)
    renamed, used = {}, set()
    try:
        pairs = [(re.compile(pattern), target) for pattern, target in mapping]
    except (TypeError, ValueError, re.error) as error:
        raise ConfigError(f"init_from.mapping: {error}; write pairs of a regex of their path and our path, "
                          "such as (\"(image/.*)\", r\"\\1\").") from None
    for path, value in theirs.items():
        for number, (pattern, target) in enumerate(pairs):
            match = pattern.fullmatch(path)
            if match is None:
                continue
            used.add(number)
            if target is not None:
                try:
                    name = match.expand(target)
                except (re.error, IndexError) as error:
                    raise ConfigError(f'init_from.mapping[{number}]: "{target}" cannot be filled in from "{pattern.pattern}" '
                                      f"({error}); correct it.") from None
                if name in renamed:
                    raise ConfigError(f"init_from.mapping: two parameters become {name}, the second is {path}; make the mapping one to one.")
                renamed[name] = value
            break
    for number, (pattern, _) in enumerate(pairs):
        if number not in used:
            roots = ", ".join(sorted({path.split("/")[0] for path in theirs}))
            raise ConfigError(f'init_from.mapping[{number}]: "{pattern.pattern}" matches none of their parameters that an earlier '
                              f"pair leaves; their paths begin with {roots}.")
    return renamed


def fit(path: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns `value` in `shape`: itself, or resampled if it is a table of image positions on another square grid; None if it cannot be."""
    if value.shape == shape:
        return value
    parts = path.split("/")
    if not any("position" in part for part in parts) or "text" in parts or value.ndim != len(shape) or value.ndim < 2 or value.shape[-1] != shape[-1]:
        return None
    if any(size != 1 for size in (*value.shape[:-2], *shape[:-2])):
        return None
    for keep_first in (0, 1):   # with and without the row of a class token
        old, new = (math.isqrt(rows - keep_first) for rows in (value.shape[-2], shape[-2]))
        if old and new and old * old + keep_first == value.shape[-2] and new * new + keep_first == shape[-2]:
            table = resample_positions(value.reshape(value.shape[-2:]), (old, old), (new, new), keep_first)
            return np.asarray(table).reshape(shape)
    return None


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"


def _listed(paths: list[str], what: str) -> str:
    """`2 left as initialised (head, scale)`, three names at most."""
    names = ", ".join(paths[:3]) + (", ..." if len(paths) > 3 else "")
    return f"{len(paths)} {what}{f' ({names})' if paths else ''}"

"""What a step of a checkpoint consists of: `STEP/state` (the arrays), `STEP/meta/metadata` (JSON), and the marker that makes it visible.

The JSON holds the shape, dtype and digest of every array, the caller's metadata, and a checksum over all that. A folder without the marker is no step:
it is being written, half deleted, or nothing of ours.
"""
from collections.abc import Mapping
import json
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import storage
from vlm_jax.errors import CheckpointError
from vlm_jax.settings import plain
from vlm_jax.training.digests import checksum

SCHEMA_VERSION = 1
MARKER = "commit_success.txt"       # the last file that a save writes, the first that a deletion removes
LARGEST_METADATA = 64 << 20         # bytes; a model of 100,000 arrays has 10 MB
SHOWN = 20                          # lines of a difference that fit on a screen


class DamagedCheckpoint(CheckpointError):
    """The step that was asked for exists, but is not what was saved; an older one may be sound."""


class Damaged(Exception):
    """A step whose files cannot be read or do not hold what was saved; the text says which file or array."""


def complete(path: Any) -> bool:
    """Whether a step's folder carries the marker of a finished save."""
    return storage.exists(path / MARKER)


def describe(step: int, leaves: Mapping[str, Any], digests: Mapping[str, str], metadata: Mapping[str, Any]) -> bytes:
    """The content of `meta/metadata`.

    Args:
      leaves: {path: anything with a shape and a dtype}.
      digests: {path: digest}.
      metadata: the caller's, already plain JSON values.
    """
    body = {
        "schema_version": SCHEMA_VERSION, "step": int(step), "saved_at": round(time.time(), 3), "metadata": metadata,
        "leaves": {path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "digest": digests[path]} for path, leaf in leaves.items()},
    }
    return json.dumps({**body, "checksum": checksum(body)}).encode()


def check_metadata(step: int, metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the caller's metadata as plain JSON values. Raises a CheckpointError for anything else."""
    try:
        value = plain(metadata or {})
        checksum(value)
        return value
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {step}: the metadata must be JSON ({error}); pass plain numbers, strings, lists and dicts.") from error


def read_meta(path: Any) -> dict[str, Any]:
    """Reads and checks the metadata of the step in the folder `path`.

    Raises:
      Damaged: it is missing, is not what was written, or belongs to another step.
      CheckpointError: another version of the program wrote it, or it may not be read.
    """
    try:
        content = storage.read(path / "meta" / "metadata", limit=LARGEST_METADATA)
        if content is None:
            raise Damaged("meta/metadata is missing")
        meta = json.loads(content)
        stated = meta.pop("checksum")
        version = meta["schema_version"]
    except Damaged:
        raise
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)}); check the path, its permissions and the connection.") from error
    except Exception as error:
        raise Damaged(f"meta/metadata cannot be read: {one_line(error)}") from error
    if stated != checksum(meta):
        raise Damaged("meta/metadata does not match its checksum")
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{path}: has schema version {version}, this program reads {SCHEMA_VERSION}; use the version of vlm_jax that wrote it.")
    if not _well_formed(meta):
        raise Damaged("meta/metadata does not describe a checkpoint")
    if str(meta["step"]) != path.name:
        raise Damaged(f"it is a copy of step {meta['step']}")
    return meta


def _well_formed(meta: dict[str, Any]) -> bool:
    """Whether the metadata have the fields and types that `describe` writes, so that reading on need not fear a KeyError or a shape of NaN."""
    try:
        return isinstance(meta["step"], int) and isinstance(meta["saved_at"], (int, float)) and isinstance(meta["metadata"], dict) and all(
            isinstance(leaf["digest"], str) and isinstance(leaf["shape"], list) and all(isinstance(size, int) and size >= 0 for size in leaf["shape"])
            and jnp.dtype(leaf["dtype"]) is not None for leaf in meta["leaves"].values())
    except (KeyError, TypeError, AttributeError):
        return False


def compare(wanted: Mapping[str, Any], stored: Mapping[str, Any], where: Any) -> None:
    """Raises a CheckpointError with the +/- lines by which the wanted leaves differ from the stored ones in path, shape and dtype."""
    here = {name: f"{dtype_of(leaf)}{list(np.shape(leaf))}" for name, leaf in wanted.items()}
    there = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in stored.items()}
    lines = difference(there, here, " ")
    if lines:
        count = len({line.split(" ")[1] for line in lines})
        raise CheckpointError(f"{where}: checkpoint of another model or optimizer, {count} arrays differ (- in the checkpoint, + here); "
                              f"use the config it was trained with, or another workdir.{shown(lines)}")


def difference(there: Mapping[str, Any], here: Mapping[str, Any], separator: str = ": ") -> list[str]:
    """The +/- lines between two tables {name: value}: `- name value` is only there, `+ name value` only here."""
    lines = []
    for name in sorted(there.keys() | here.keys()):
        if name in there and name in here and there[name] == here[name]:
            continue
        lines += [f"- {name}{separator}{there[name]}"] if name in there else []
        lines += [f"+ {name}{separator}{here[name]}"] if name in here else []
    return lines


def shown(lines: list[str]) -> str:
    """The lines below an error's first line, at most `SHOWN` of them."""
    more = [f"... and {len(lines) - SHOWN} lines more"] if len(lines) > SHOWN else []
    return "".join(f"\n  {line if len(line) <= 200 else line[:197] + '...'}" for line in [*lines[:SHOWN], *more])


def num_bytes(leaf: Mapping[str, Any]) -> int:
    """Bytes of an array as the metadata describes it."""
    return math.prod(leaf["shape"]) * jnp.dtype(leaf["dtype"]).itemsize


def dtype_of(leaf: Any) -> jnp.dtype:
    """The dtype that a leaf has, or would have, as a JAX array."""
    return jax.dtypes.canonicalize_dtype(getattr(leaf, "dtype", None) or np.asarray(leaf).dtype)


def one_line(error: BaseException) -> str:
    """An error's text in one line of at most 300 characters, without TensorStore's specification of the array."""
    text = " ".join(str(error).split()).split(" [tensorstore_spec=")[0].split(" [source locations=")[0] or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."

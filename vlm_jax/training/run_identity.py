"""What makes two runs the same run: the part of a config that may not change between a checkpoint and the steps after it.

The model is described by its resolved settings, not by the name of its preset, so that a preset that changed after the run was trained is noticed. Lengths,
learning rates, evaluations, intervals and the mesh may change.
"""
from collections.abc import Mapping
import json
import os
from typing import Any

from vlm_jax.errors import CheckpointError
from vlm_jax.settings import plain
from vlm_jax.training.checkpoint_format import difference, shown
from vlm_jax.training.digests import checksum

_DATA = ("source", "batch_size", "processor")       # of a stream: what decides which examples a step sees


def describe(config: Mapping[str, Any], stage: int = 0, processor_digest: str | None = None) -> dict[str, Any]:
    """The identity of a run in one of its stages, for the metadata of its checkpoints (`metadata["run"]`) and for `check`.

    Args:
      config: a resolved config.
      stage: the stage's number; its own model, processor and task count where it overrides those of the config.
      processor_digest: `Processor.digest`, which also sees a tokenizer that was trained anew.
    Returns:
      plain JSON: {"seed", "dtypes", "model" (resolved settings), "task", "processor", "data", "digests": {section: SHA-256}}.
    """
    from vlm_jax import registry
    from vlm_jax.training.stages import stage_sections
    config = plain(config)
    sections = stage_sections(config, stage)
    model = dict(sections["model"])
    streams = config["stages"][stage]["data"]
    found: dict[str, Any] = {
        "seed": config["seed"], "dtypes": plain(sections["dtypes"]),
        "model": {"name": model["name"], **plain(registry.settings(**model))}, "task": plain(sections["task"]),
        "processor": {**plain(sections["processor"]), **({} if processor_digest is None else {"digest": processor_digest})},
        "data": {name: {key: stream[key] for key in _DATA if stream.get(key) is not None} for name, stream in streams.items()},
    }
    return {**found, "digests": {section: checksum(found[section])[:16] for section in ("model", "processor", "task", "data")}}


def check(there: Mapping[str, Any] | None, here: Mapping[str, Any], where: str) -> None:
    """Raises one CheckpointError with the +/- lines where the identity `there`, in a checkpoint, is not the one `here`. None (not stored) passes."""
    if there is None:
        return
    lines = lines_between(there, here)
    if lines:
        sections = sorted({line[2:].split(".")[0].split(":")[0] for line in lines})
        raise CheckpointError(f"{where}: checkpoint of another run: {', '.join(sections)} differ (- there, + here); use the config it was trained with, "
                              f"choose another --workdir, or start a new run with init_from.{shown(lines)}")


def lines_between(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The +/- lines between two identities; a processor's digest counts where both have one."""
    stored, current = _flat(there), _flat(here)
    if "processor.digest" not in current or "processor.digest" not in stored:
        for table in (stored, current):
            table.pop("processor.digest", None)
    return difference(stored, current)


def check_same_run(config: Mapping[str, Any], workdir: str | os.PathLike) -> None:
    """Raises where the workdir's config.json is of another model, preprocessing, task, seed or data, with the +/- lines; before anything is built."""
    from vlm_jax import storage
    from vlm_jax.training.config import load_saved
    if not storage.exists(os.path.join(os.fspath(workdir), "config.json")):
        return
    old = load_saved(workdir)
    check(describe(old), describe(config), f"{os.fspath(workdir)}/config.json")     # of later stages, the checkpoints know


def _flat(identity: Mapping[str, Any]) -> dict[str, str]:
    """{"model.image.width": "64", ...} without the digests, which say the same."""
    table: dict[str, str] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), item)
        elif isinstance(value, (list, tuple)) and any(isinstance(item, (list, tuple, Mapping)) for item in value):
            for number, item in enumerate(value):
                visit(f"{prefix}[{number}]", item)
        else:
            table[prefix] = json.dumps(value, sort_keys=True)
    visit("", {key: value for key, value in plain(identity).items() if key != "digests"})
    return table

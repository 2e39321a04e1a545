"""What a report reads: the files of a workdir, local or on an object store, where whatever is missing or cut short reads as empty."""
from collections.abc import Mapping, Sequence
import json
import os
from pathlib import Path
from typing import Any

from vlm_jax.storage import is_remote


def read_evaluations(folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Returns {evaluation: {step: metrics}}: from the log, completed by the metrics.json files (evaluations run by hand)."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if row.get("kind") == "eval" and isinstance(row.get("name"), str):
            found.setdefault(row["name"], {})[row["step"]] = {key: value for key, value in row.items() if key not in ("step", "kind", "name")}
    for place in children(folder / "evaluations"):
        for step in children(place):
            if step.name.isdigit() and int(step.name) not in found.get(place.name, {}):
                metrics = read_json(step / "metrics.json")
                if metrics or any(path.name.endswith(".png") for path in children(step)):
                    found.setdefault(place.name, {})[int(step.name)] = metrics
    return found


def open_folder(workdir: str | os.PathLike) -> Path:
    """Returns a workdir as a path: a pathlib one, or its like for gs://..."""
    if is_remote(workdir):
        from etils import epath
        return epath.Path(workdir)
    return Path(workdir)


def children(folder: Path) -> list[Path]:
    """Returns what is in a folder, by name; nothing where it is not one."""
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError:
        return []


def read_bytes(path: Path) -> bytes:
    """Returns a file's bytes; none where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def read_text(path: Path) -> str:
    """Returns a file's text; "" where it cannot be read."""
    return read_bytes(path).decode("utf-8", errors="replace")


def read_json(path: Path) -> dict[str, Any]:
    """Returns a file's JSON object; {} where it is none."""
    try:
        return as_dict(json.loads(read_text(path)))
    except ValueError:
        return {}


def as_dict(value: Any) -> dict:
    """Returns `value` if it is a dict, else {}."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list:
    """Returns `value` if it is a list, else []."""
    return value if isinstance(value, list) else []


def parameter_total(parameters: str) -> str:
    """Returns the last line of a parameter table: `1,529,858 parameters, 6.1 MB; 1,529,858 trained`; "" without one."""
    lines = parameters.strip().splitlines()
    return lines[-1].removeprefix("total: ") if lines and lines[-1].startswith("total: ") else ""


def parameter_count(parameters: str) -> int | None:
    """Returns the number of parameters of a parameter table."""
    digits = parameter_total(parameters).split(" ")[0].replace(",", "")
    return int(digits) if digits.isdigit() else None


def parameter_bytes(parameters: str) -> str:
    """Returns the size of the parameters, `6.1 MB`."""
    return ", ".join(parameter_total(parameters).replace(";", ", ").split(", ")[1:2])

"""Ways to damage a checkpoint on disk, and what became of reading it."""
from collections.abc import Callable, Iterator, Mapping
import json
import logging
import os
from pathlib import Path
import random
import shutil
from typing import Any

import jax
import numpy as np

from vlm_jax.errors import VlmError
from vlm_jax.training.checkpoints import Checkpoints
from vlm_jax.training.digests import checksum

Damage = Callable[[Path], Any]
HARMLESS, FELL_BACK, REFUSED, UNDETECTED, CRASHED = "harmless", "fell back", "refused", "undetected", "crashed"


def damages(checkpoints: Path, flips: int, seed: int = 0) -> Iterator[tuple[str, Damage]]:
    """(name, function that damages a copy of the folder) for every file of the newest step, for its folders, its JSON and the pointer.

    Args:
      checkpoints: a folder with two sound steps.
      flips: single bits to flip in every file, at random places.
    """
    draw = random.Random(seed)
    older, newest = sorted((path.name for path in checkpoints.iterdir() if path.name.isdecimal()), key=int)[-2:]
    files = sorted(path.relative_to(checkpoints) for path in [*(checkpoints / newest).rglob("*"), *checkpoints.glob("LAST_GOOD*")] if path.is_file())
    for file in files:
        size = (checkpoints / file).stat().st_size
        for length in sorted({0, size // 2, size - 1} if size else set()):
            yield f"truncate {file} to {length} of {size}", lambda folder, file=file, length=length: os.truncate(folder / file, length)
        yield f"delete {file}", lambda folder, file=file: (folder / file).unlink()
        yield f"append to {file}", lambda folder, file=file: (folder / file).write_bytes((folder / file).read_bytes() + bytes(range(16)))
        yield f"zeros for {file}", lambda folder, file=file, size=size: (folder / file).write_bytes(bytes(size))
        for _ in range(flips if size else 0):
            place, bit = draw.randrange(size), draw.randrange(8)
            yield f"flip bit {bit} of byte {place} of {file}", lambda folder, file=file, place=place, bit=bit: flip(folder / file, place, bit)
    for one, other in [draw.sample(files, 2) for _ in range(max(flips, 4))]:
        yield f"swap {one} and {other}", lambda folder, one=one, other=other: swap(folder / one, folder / other)
    for part in ("state", "meta", "state/d", "meta/metadata"):
        yield f"swap {part} of two steps", lambda folder, part=part: swap(folder / older / part, folder / newest / part)
        yield f"copy {part} from the older step", lambda folder, part=part: replace(folder / older / part, folder / newest / part)
    for part in ("", "state", "meta", "state/d"):
        yield f"empty the folder {part or 'of the step'}", lambda folder, part=part: [remove(entry) for entry in (folder / newest / part).iterdir()]
        yield f"delete the folder {part or 'of the step'}", lambda folder, part=part: shutil.rmtree(folder / newest / part)
    beyond = str(int(newest) + 3)
    yield "an empty folder named like a step", lambda folder: (folder / beyond).mkdir()
    yield "a file named like a step", lambda folder: (folder / beyond).write_text("mine")
    yield "a copy of the older step named like a step", lambda folder: shutil.copytree(folder / older, folder / beyond)
    yield "a copy of the newest step named 0N", lambda folder: shutil.copytree(folder / newest, folder / f"0{newest}")
    yield "a foreign folder with a marker", lambda folder: [(folder / beyond).mkdir(), (folder / beyond / "commit_success.txt").write_text("")]
    yield "an unfinished save", lambda folder: shutil.copytree(folder / older, folder / f"{beyond}.orbax-checkpoint-tmp")
    for name, edit in _edits(beyond).items():
        for sign in (False, True):
            yield (f"metadata: {name}{', checksum made to fit' if sign else ''}",
                   lambda folder, edit=edit, sign=sign: rewrite(folder / newest / "meta" / "metadata", edit, sign))
    for name, text in {"no object": "[1, 2]", "not JSON": "{", "deep": "[" * 100_000, "binary": "\udcff\x00", "a number": "NaN"}.items():
        yield f"metadata: {name}", lambda folder, text=text: (folder / newest / "meta" / "metadata").write_bytes(text.encode(errors="surrogateescape"))


def flip(path: Path, place: int, bit: int) -> None:
    """Flips one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def swap(one: Path, other: Path) -> None:
    """Exchanges two files or folders."""
    aside = one.parent / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def replace(source: Path, target: Path) -> None:
    """Puts a copy of a file or folder in the place of another."""
    remove(target)
    shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def remove(path: Path) -> None:
    """Deletes a file or folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def rewrite(path: Path, edit: Callable[[dict], Any], sign: bool) -> None:
    """Edits the metadata of a step; `sign` makes the checksum fit again."""
    meta = json.loads(path.read_text())
    edit(meta)
    if sign:
        meta.pop("checksum", None)
        meta["checksum"] = checksum(meta)
    path.write_text(json.dumps(meta))


def _edits(beyond: str) -> dict[str, Callable[[dict], Any]]:
    def leaf(meta: dict) -> dict:
        return next(value for value in meta["leaves"].values() if value["shape"])
    return {
        "a shape of 10^18": lambda meta: leaf(meta).update(shape=[10**18]),
        "a shape of NaN": lambda meta: leaf(meta).update(shape=[float("nan")]),
        "a negative shape": lambda meta: leaf(meta).update(shape=[-1]),
        "another shape of that size": lambda meta: leaf(meta).update(shape=leaf(meta)["shape"][::-1] + [1]),
        "another dtype": lambda meta: leaf(meta).update(dtype="int32"),
        "no dtype": lambda meta: leaf(meta).update(dtype="no such dtype"),
        "another digest": lambda meta: leaf(meta).update(digest="0" * 16),
        "no digest": lambda meta: leaf(meta).pop("digest"),
        "an array less": lambda meta: meta["leaves"].pop(next(iter(meta["leaves"]))),
        "an array more": lambda meta: meta["leaves"].update({"params/more": {"shape": [2], "dtype": "float32", "digest": "0" * 16}}),
        "no arrays": lambda meta: meta.pop("leaves"),
        "arrays of another kind": lambda meta: meta.update(leaves=[1]),
        "another step": lambda meta: meta.update(step=int(beyond)),
        "another schema": lambda meta: meta.update(schema_version=99),
        "no schema": lambda meta: meta.pop("schema_version"),
    }


def outcome(folder: Path, abstract_state: Any, sound: Mapping[int, Any], step_of: Callable[[dict], int]) -> tuple[str, str]:
    """Restores the newest sound step of a damaged folder; (what became of it, what was said).

    Undetected is a value that is not the one saved at the step that the metadata name, and an older step without a warning.

    Args:
      sound: {step: the tree that was saved}.
      step_of: gives the step from the caller's metadata.
    """
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("vlm_jax")
    logger.addHandler(handler)
    try:
        tree, metadata = Checkpoints(folder).restore(abstract_state)
    except VlmError as error:
        return (REFUSED if str(error).count("\n") <= 22 else CRASHED), str(error)
    except Exception as error:
        return CRASHED, repr(error)
    finally:
        logger.removeHandler(handler)
    step = step_of(metadata)
    same = all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(sound[step]), strict=True))
    text = "; ".join(said)
    if not same or (step != max(sound) and "WARNING" not in text):
        return UNDETECTED, text
    return (HARMLESS if step == max(sound) else FELL_BACK), text

"""What all evaluators share: reading a source's records, and writing metrics and predictions."""
from collections.abc import Iterable, Iterator, Mapping
import contextlib
import json
import os
from typing import Any

from vlm_jax import faults, storage
from vlm_jax.data.decode import decode_image
from vlm_jax.data.sources import build_source
from vlm_jax.errors import DataError

THUMBNAIL = 96   # pixels of the pictures that an evaluator keeps to draw


def read(settings: Mapping[str, Any], predictor: Any = None) -> tuple[Any, list[dict[str, Any]], int]:
    """Returns (source, its records, how many were left out because they cannot be read).

    A record gets `index`, its place in the source. Pictures, where there are some, are decoded once, so that every later pass sees the same pixels. The
    predictor's `on_progress` is called before each record.

    Raises:
      DataError: if not one record can be read.
    """
    source = build_source(settings)
    records, problems = [], []
    for index in range(len(source)):
        progress(predictor)
        try:
            record = dict(source[index])
            if record.get("image") is not None:
                record["image"] = decode_image(record["image"], source.describe(index))
        except DataError as error:
            problems.append(str(error))
            continue
        records.append({**record, "index": index})
    if not records:
        raise DataError(f"{source.name}: none of its {len(source)} records can be evaluated; first: {problems[0] if problems else 'it is empty'}.")
    if problems:
        print(f"  {source.name}: {len(problems)} of {len(source)} records cannot be read and are left out; first: {problems[0]}", flush=True)
    return source, records, len(problems)


def progress(predictor: Any) -> None:
    """Calls the predictor's `on_progress`, where it has one: before whatever takes long."""
    getattr(predictor, "on_progress", lambda: None)()


def before_batch(predictor: Any) -> None:
    """What every predictor does before it computes a batch: `on_progress`, and the fault point."""
    progress(predictor)
    faults.point("evaluation.predict")


def thumbnail(image: Any):
    """Returns a picture of at most THUMBNAIL pixels a side, as PIL; a white one of a record without picture."""
    from PIL import Image
    small = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "white") if image is None else Image.fromarray(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small


def write(folder: str | os.PathLike, metrics: Mapping[str, float], predictions: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Writes metrics.json and predictions.jsonl into `folder`; returns the metrics as plain floats. On a pod, process 0 writes."""
    metrics = {name: float(value) for name, value in metrics.items()}
    with writing(folder) as writes:
        if writes:
            faults.point("evaluation.write")
            lines = (json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions)
            storage.write_whole(os.path.join(folder, "predictions.jsonl"), "".join(lines).encode())
            storage.write_whole(os.path.join(folder, "metrics.json"), json.dumps(metrics, indent=1).encode())
    return metrics


@contextlib.contextmanager
def writing(folder: str | os.PathLike) -> Iterator[bool]:
    """Whether this process writes an evaluation's files (process 0 does). Where the disk refuses inside, a warning is printed: the metrics are still good."""
    import jax
    if jax.process_index() != 0:
        yield False
        return
    try:
        yield True
    except OSError as error:
        print(f"warning: {folder}: files of the evaluation cannot be written ({error.strerror or error}); its metrics are logged all the same.", flush=True)


def read_predictions(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a predictions.jsonl."""
    content = storage.read(path)
    if content is None:
        raise FileNotFoundError(path)
    return [json.loads(line) for line in content.decode().split("\n") if line]

"""What all evaluators share: reading a source's records, and writing metrics and predictions."""
from collections.abc import Iterable, Mapping
import json
import os
from typing import Any

from vlm_jax.data.decode import decode_image
from vlm_jax.data.sources import build_source
from vlm_jax.errors import DataError

THUMBNAIL = 96   # pixels of the pictures that an evaluator keeps to draw


def read(settings: Mapping[str, Any]) -> tuple[Any, list[dict[str, Any]], int]:
    """Returns (source, its records, how many were left out because they cannot be read).

    A record gets `index`, its place in the source. Pictures are decoded once, so that every later pass sees the same pixels.

    Raises:
      DataError: if not one record can be read.
    """
    source = build_source(settings)
    records, problems = [], []
    for index in range(len(source)):
        try:
            record = dict(source[index])
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


def thumbnail(image: Any):
    """Returns a picture of at most THUMBNAIL pixels a side, as PIL."""
    from PIL import Image
    small = Image.fromarray(image)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return small


def write(folder: str | os.PathLike, metrics: Mapping[str, float], predictions: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Writes metrics.json and predictions.jsonl into `folder`; returns the metrics as plain floats."""
    os.makedirs(folder, exist_ok=True)
    metrics = {name: float(value) for name, value in metrics.items()}
    with open(os.path.join(folder, "predictions.jsonl"), "w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(prediction, ensure_ascii=False) + "\n")
    with open(os.path.join(folder, "metrics.json"), "w", encoding="utf-8") as file:
        json.dump(metrics, file, indent=1)
    return metrics


def read_predictions(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the lines of a predictions.jsonl."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]

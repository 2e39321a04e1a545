"""TFDS data sets in array_record or parquet format, read without TensorFlow.

A prepared folder names Python classes in its features.json, which TFDS would import: a folder is read only if all of them are TFDS's or ours.
"""
from collections.abc import Mapping, Sequence
import json
import os
from pathlib import Path
import re
from typing import Any

import numpy as np

from vlm_jax.data.files import short
from vlm_jax.data.problems import problem
from vlm_jax.data.sources import TEXT_NAMES, check_index, check_texts, class_text
from vlm_jax.errors import DataError, did_you_mean

ALLOWED_MODULES = ("tensorflow_datasets.", "vlm_jax.")
READABLE_FORMATS = ("array_record", "parquet")
RECORD_EXTRAS = ("attributes", "boxes", "concept", "group")
_VERSION = re.compile(r"^\d+\.\d+\.\d+$")
_MAX_JSON_BYTES = 16 * 2**20


class TfdsSource:
    """Records of one split of a prepared TFDS folder.

    Args:
      folder: the folder that holds features.json and dataset_info.json.
      split: a split of the set, slices included: `train`, `train[:20%]`.
      image: feature of the image; it is kept encoded.
      texts: feature of the captions: a string, a list, or a path such as `captions/text`; by default the first of texts, captions, caption, text.
      label: feature of the class; by default `label` if there is one. Without captions the texts are the class name.
      class_names: names of the class numbers; by default those of the ClassLabel feature.
      extras: further features to keep, {key of the record: feature}, or a list of names; by default those of attributes, boxes, concept and group
        that there are. Attributes written as JSON become a dict.
    Raises:
      DataError: at once for a folder that cannot be read or trusted, an unknown split or feature; on access, with a `reason`, for a bad record.
    """

    def __init__(self, folder: str | os.PathLike, split: str = "train", *, image: str = "image", texts: str | None = None, label: str | None = None,
                 class_names: Sequence[str] | None = None, extras: Mapping[str, str] | Sequence[str] | None = None):
        self._folder = os.path.abspath(os.path.expanduser(os.fspath(folder)))
        check_folder(self._folder)
        import tensorflow_datasets as tfds
        try:
            builder = tfds.builder_from_directory(self._folder)
        except Exception as error:
            raise DataError(f"tfds {self._folder}: TFDS cannot read it ({short(error)}); prepare it again.") from error
        self.name = f"{builder.info.name}:{split}"
        features, splits = builder.info.features, builder.info.splits
        if re.split(r"[\[+]", split)[0] not in splits:
            raise DataError(f'tfds {builder.info.name}: there is no split "{split}".{did_you_mean(split, splits)} Correct the split.')
        self._image = self._known(features, image)
        self._texts = self._known(features, texts) if texts else next((name for name in TEXT_NAMES if name in features), None)
        self._label = self._known(features, label) if label else ("label" if "label" in features else None)
        if self._texts is None and self._label is None:
            raise DataError(f"tfds {builder.info.name}: no {', '.join(TEXT_NAMES)} or label; set texts (there are {', '.join(features)}).")
        if class_names is None and self._label is not None:
            class_names = getattr(features[self._label], "names", None) if "/" not in self._label else None
        self._class_names = list(class_names) if class_names else None
        if not hasattr(extras, "items"):
            extras = {name: name for name in (extras if extras is not None else [name for name in RECORD_EXTRAS if name in features])}
        self._extras = {key: self._known(features, name) for key, name in extras.items()}
        root = self._image.split("/")[0]
        decoders = {root: tfds.decode.SkipDecoding()} if "/" not in self._image else None
        try:
            self._data = builder.as_data_source(split=split, decoders=decoders)
        except Exception as error:
            raise DataError(f"tfds {self.name}: it cannot be opened ({short(error)}); correct the split or prepare the set again.") from error
        if not len(self._data):
            raise DataError(f"tfds {self.name}: the split has no records; choose another.")

    def _known(self, features: Mapping[str, Any], name: str) -> str:
        if name.split("/")[0] not in features:
            raise DataError(f'tfds {self.name}: there is no feature "{name}".{did_you_mean(name, features)} Correct the name.')
        return name

    @property
    def class_names(self) -> list[str] | None:
        """The names of the class numbers, if the set has any."""
        return self._class_names

    def __len__(self) -> int:
        return len(self._data)

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def texts_at(self, index: int) -> list[str]:
        return self._words(self._data[check_index(index, len(self), self.name)], self.describe(index))["texts"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, len(self), self.name)
        item = self.describe(index)
        try:
            row = self._data[index]
        except Exception as error:                                 # a damaged record of array_record or an undecodable feature, whatever its type
            raise problem("file_unreadable", f"{item}: TFDS cannot read it ({short(error)}); prepare the set again.") from error
        image = _follow(row, self._image)
        if image is None or (isinstance(image, bytes) and not image):
            raise problem("image_missing", f"{item}: the image is empty; prepare the set again or remove the record.")
        return {"image": image, **self._words(row, item), **{key: _extra(key, _follow(row, name)) for key, name in self._extras.items()}}

    def _words(self, row: Mapping[str, Any], item: str) -> dict[str, Any]:
        words: dict[str, Any] = {}
        if self._label is not None:
            label, text = class_text(_plain_text(_follow(row, self._label)), self._class_names, item)
            words["texts"] = [text]
            if label is not None:
                words["label"] = label
        if self._texts is not None:
            words["texts"] = check_texts(_captions(_follow(row, self._texts)), item)
        return words


def tfds_source(dataset: str, split: str = "train", data_dir: str | None = None, **settings: Any) -> TfdsSource:
    """Reads a TFDS set by name.

    Args:
      dataset: `coco_captions`, `coco_captions/2014` (a config) or `coco_captions/2014:1.1.0` (a version); without them the newest prepared.
      split: see `TfdsSource`, as the further settings.
      data_dir: the folder of the sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
    Raises:
      DataError: if it is not prepared, or cannot be read.
    """
    return _build(find_folder(dataset, data_dir), split, settings, f"tfds {dataset}")


def folder_source(path: str | os.PathLike, split: str = "train", **settings: Any) -> TfdsSource:
    """Reads a prepared folder by its path; the settings are those of `TfdsSource`."""
    return _build(path, split, settings, "array_record")


def _build(folder: str | os.PathLike, split: str, settings: Mapping[str, Any], where: str) -> TfdsSource:
    from vlm_jax.settings import call
    return call(TfdsSource, settings, where, folder=folder, split=split)


def data_folder(data_dir: str | None = None) -> Path:
    """Returns the folder of prepared sets: `data_dir`, else TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def find_folder(dataset: str, data_dir: str | None = None) -> Path:
    """Returns the prepared folder of `name`, `name/config`, `name:version` or `name/config:version`.

    Raises:
      DataError: naming the command that prepares the set.
    """
    name, _, version = dataset.partition(":")
    root = data_folder(data_dir)
    parts = name.split("/")
    found = []
    if name and ".." not in parts and not os.path.isabs(name):
        folder = root.joinpath(*parts)
        folders = [folder, *(child for child in sorted(folder.glob("*")) if len(parts) == 1 and child.is_dir())]
        found = [child for parent in folders for child in parent.glob("*") if _VERSION.match(child.name) and (child / "features.json").is_file()]
    if version:
        found = [folder for folder in found if folder.name == version]
    if not found:
        option = f" --data_dir {data_dir}" if data_dir else ""
        raise DataError(f"tfds {dataset} is not prepared in {root}; run: python -m vlm_jax.data.prepare {name}{option}")
    return max(found, key=lambda folder: ([int(number) for number in folder.name.split(".")], str(folder)))


def check_folder(folder: str | os.PathLike) -> None:
    """Checks, before TFDS sees it, that a prepared folder is complete, readable without TensorFlow, and names no foreign Python module.

    Raises:
      DataError: otherwise.
    """
    folder = Path(folder)
    features, information = _read_json(folder / "features.json"), _read_json(folder / "dataset_info.json")
    for name in [*_class_names(features), *_class_names(information)]:
        if not name.startswith(ALLOWED_MODULES) or ".." in name:
            raise DataError(f'tfds {folder}: features.json names the Python class "{name[:100]}", only tensorflow_datasets and vlm_jax '
                            "classes are imported; use the set only if you trust it, and prepare it yourself.")
    file_format = information.get("fileFormat", information.get("file_format", "tfrecord")) if isinstance(information, dict) else "unknown"
    if file_format not in READABLE_FORMATS:
        raise DataError(f"tfds {folder}: it is stored as {file_format}, which needs TensorFlow; run: python -m vlm_jax.data.prepare NAME "
                        f"to write it as {READABLE_FORMATS[0]}.")


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise DataError(f"tfds {path}: it is larger than {_MAX_JSON_BYTES} bytes; prepare the set again.")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"tfds {path.parent}: there is no {path.name}, so no prepared set; run: python -m vlm_jax.data.prepare NAME") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"tfds {path}: it cannot be read ({short(error)}); prepare the set again.") from None


def _class_names(value: Any) -> list[str]:
    """Returns every string under a key that TFDS takes for a class (`pythonClassName`, in older files `type`, `proto_cls`), at any depth."""
    if isinstance(value, list):
        return [name for item in value for name in _class_names(item)]
    if not isinstance(value, dict):
        return []
    names = [item for key, item in value.items() if key in ("pythonClassName", "python_class_name", "proto_cls") and isinstance(item, str) and item]
    if isinstance(value.get("type"), str):
        names.append(value["type"])
    return names + [name for item in value.values() for name in _class_names(item)]


def _follow(row: Any, path: str) -> Any:
    """Returns the field at `a/b` of nested dicts; of a list of dicts, the list of their fields."""
    for key in path.split("/"):
        if isinstance(row, (list, tuple)):
            row = [item.get(key) for item in row]
        elif hasattr(row, "get"):
            row = row.get(key)
        else:
            return None
    return row


def _captions(value: Any) -> Any:
    """Returns str or list of str of whatever form captions have: bytes, arrays of bytes, {"text": ...}, a list of {"text": ...}."""
    if hasattr(value, "keys"):
        value = value.get("text")
    if isinstance(value, (list, tuple)) and value and hasattr(value[0], "keys"):
        value = [item.get("text") for item in value]
    return _plain_text(value)


def _plain_text(value: Any) -> Any:
    """Returns `value` with bytes as str and string arrays as lists; invalid UTF-8 stays bytes, which later checks refuse."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if hasattr(value, "tolist") and getattr(value, "dtype", None) is not None and value.dtype.kind in "OSU":
        value = value.tolist()
        return _plain_text(value)
    if isinstance(value, (list, tuple)):
        return [_plain_text(item) for item in value]
    return value


def _extra(key: str, value: Any) -> Any:
    """Returns a further field of a record: numbers as Python numbers, texts as str, attributes as a dict."""
    value = _plain_text(value)
    if key == "attributes" and isinstance(value, str):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value.item() if isinstance(value, np.generic) else value

"""The worlds as TFDS data sets: array_record shards of encoded PNG, built and read without network and without TensorFlow.

    folder = prepare("shapes", "~/tensorflow_datasets", size=48)
    build_source({"name": "array_record", "path": folder, "split": "heldout_pairs"})

    python -m vlm_jax.data.prepare shapes --settings '{"size": 48}'                      the same as a command

TFDS itself would encode pixel arrays with TensorFlow, so the builders give it the bytes of PNG files.
"""
from collections.abc import Iterator
import hashlib
import io
import json
import os
from typing import Any

import numpy as np

from vlm_jax.data.worlds import digits, emoji, emoji_splits, shapes
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.settings import call, choose

VERSION = "1.0.0"
WORLDS = {
    "emoji": (emoji.emoji_source, emoji_splits.SPLITS),
    "shapes": (shapes.shapes_source, shapes.SPLITS),
    "digits": (digits.digits_source, digits.SPLITS),
}
_ABOUT = {
    "emoji": "Emoji drawn from a colour emoji font, with Unicode CLDR names and held-out combinations and concepts.",
    "shapes": "Drawn scenes of coloured shapes with captions, boxes and held-out pairs of colour and shape.",
    "digits": "Handwritten digits of scikit-learn with captions in words.",
}


def world_builder(name: str, data_dir: str, **settings: Any):
    """Returns the TFDS builder of a world.

    Args:
      name: "emoji", "shapes" or "digits".
      data_dir: the folder of TFDS data sets; this one lies in data_dir/NAME/CONFIG/VERSION, where CONFIG names the settings.
      settings: of the world's source function, without `split`: every split is built.
    Raises:
      ConfigError: for an unknown world or setting.
      DataError: if tensorflow_datasets is not installed.
    """
    if "split" in settings:
        raise ConfigError(f"{name}.split: a TFDS data set holds every split; remove it.")
    source, splits = choose(WORLDS, name, "name")
    # Finds wrong settings and missing fonts before any file is written.
    call(source, settings, name, split=splits[-1])
    return _builder_class(name)(data_dir=str(data_dir), file_format="array_record", config=_config(name, settings))


def prepare(name: str, data_dir: str, **settings: Any) -> str:
    """Builds a world under `data_dir`, unless it is there already, and returns the folder that `builder_from_directory` reads."""
    builder = world_builder(name, os.path.expanduser(str(data_dir)), **settings)
    builder.download_and_prepare(download_config=_tfds().download.DownloadConfig(try_download_gcs=False))
    return str(builder.data_dir)


def example(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record as TFDS features: the picture as the bytes of a PNG file, attributes as JSON, the rest as it is."""
    features = {
        "image": io.BytesIO(encode_png(record["image"])), "texts": list(record["texts"]), "group": int(record["group"]),
        "concept": record["concept"], "attributes": json.dumps(record["attributes"], sort_keys=True, ensure_ascii=False),
    }
    if "texts_by_language" in record:
        features["languages"] = list(record["texts_by_language"])
    return features | {key: record[key] for key in ("label", "boxes") if key in record}


def encode_png(image) -> bytes:
    """Returns a uint8 [H, W, 3] array as the bytes of a PNG file."""
    from PIL import Image
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _tfds():
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError("tensorflow_datasets is not installed; run `pip install tensorflow-datasets array_record`.") from error
    return tensorflow_datasets


def _config(name: str, settings: dict[str, Any]):
    tfds = _tfds()
    text = json.dumps(settings, sort_keys=True)
    # The folder's name must tell settings apart, and be a folder's name.
    label = "default" if not settings else "settings_" + hashlib.sha256(text.encode()).hexdigest()[:12]
    config = tfds.core.BuilderConfig(name=label, description=f"{name} with {text}")
    config.settings = dict(settings)
    return config


_classes: dict[str, type] = {}


def _builder_class(name: str) -> type:
    """Makes the TFDS class of a world at its first use, so that importing this module does not import TFDS."""
    if name in _classes:
        return _classes[name]
    tfds = _tfds()
    source, splits = WORLDS[name]

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """A world of vlm_jax."""
        VERSION = tfds.core.Version(globals()["VERSION"])
        RELEASE_NOTES = {globals()["VERSION"]: "First release."}

        def _info(self):
            features = tfds.features
            records = source(split=splits[-1], **self.builder_config.settings)
            first = records[0]
            columns = {
                "image": features.Image(shape=(None, None, 3), encoding_format="png"), "texts": features.Sequence(features.Text()),
                "group": features.Scalar(np.int64), "concept": features.Text(), "attributes": features.Text(),
            }
            if "texts_by_language" in first:
                columns["languages"] = features.Sequence(features.Text())
            if "label" in first:
                columns["label"] = features.ClassLabel(names=records.class_names)
            if "boxes" in first:
                columns["boxes"] = features.Tensor(shape=(None, 4), dtype=np.float32)
            return tfds.core.DatasetInfo(builder=self, description=_ABOUT[name], features=features.FeaturesDict(columns))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            records = source(split=split, **self.builder_config.settings)
            for index in range(len(records)):
                yield index, example(records[index])

    Builder.name = name
    _classes[name] = Builder
    return Builder

"""Writes a TFDS data set to disk once, in a format that is read without TensorFlow.

    python -m vlm_jax.data.prepare shapes --settings '{"size": 48}'        our own worlds need nothing
    python -m vlm_jax.data.prepare coco_captions --data_dir /data/tfds     public sets need a network and, most of them, TensorFlow (extra `tf`)

Afterwards `{"name": "tfds", "dataset": NAME}` is a source.
"""
import argparse
import contextlib
import importlib
import json
import os
from pathlib import Path
import sys
from typing import Any

from vlm_jax.data.tfds_source import READABLE_FORMATS, data_folder
from vlm_jax.errors import ConfigError, DataError, VlmError, did_you_mean

WORLDS = ("emoji", "shapes", "digits")


def prepare(name: str, data_dir: str | None = None, file_format: str = "array_record", **settings: Any) -> str:
    """Prepares a data set, unless it is there already, and returns its folder.

    Args:
      name: emoji, shapes, digits, or a TFDS set: `coco_captions`, `coco_captions/2014`.
      data_dir: the folder of the sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      file_format: array_record or parquet.
      settings: of the world's source, for our own sets.
    Raises:
      ConfigError: for a format that needs TensorFlow to be read, or settings of a public set.
      DataError: if the set is unknown, TensorFlow is needed and missing, or the download fails.
    """
    if file_format not in READABLE_FORMATS:
        raise ConfigError(f'prepare --file_format: "{file_format}" cannot be read without TensorFlow.{did_you_mean(file_format, READABLE_FORMATS)}')
    folder = data_folder(data_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"prepare {name}: {folder} cannot be written ({error.strerror}); choose another --data_dir.") from error
    if not os.access(folder, os.W_OK):
        raise DataError(f"prepare {name}: {folder} cannot be written; choose another --data_dir.")
    if name in WORLDS:
        if file_format != "array_record":
            raise ConfigError(f"prepare {name}: our own sets are written as array_record; leave --file_format out.")
        builders = importlib.import_module("vlm_jax.data.worlds.builders")
        return str(builders.prepare(name, str(folder), **settings))
    if settings:
        raise ConfigError(f"prepare {name}: --settings are for {', '.join(WORLDS)}; name the config of a TFDS set as NAME/CONFIG.")
    return _prepare_public(name, folder, file_format)


def _prepare_public(name: str, folder: Path, file_format: str) -> str:
    try:
        importlib.import_module("tensorflow")
    except ImportError:
        raise DataError(f"prepare {name}: building public TFDS sets needs TensorFlow, which is not installed; run: pip install 'vlm_jax[tf]', "
                        "in an environment of its own if you like: reading the result needs none.") from None
    import tensorflow_datasets as tfds
    try:
        builder = tfds.builder(name, data_dir=str(folder))
        builder.download_and_prepare(file_format=file_format)
    except tfds.core.DatasetNotFoundError as error:
        near = did_you_mean(name.split("/")[0], _known_sets(tfds)).removesuffix(".")
        raise DataError(f"prepare {name}: TFDS knows no such set.{near if 'mean' in near else ''} Correct the name.") from error
    except Exception as error:                                      # what a download script can fail with is without bound
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"prepare {name}: {lines[0]}; some sets want files fetched by hand, see the set's page in the TFDS catalogue.") from error
    return str(builder.data_dir)


def _known_sets(tfds: Any) -> list[str]:
    try:
        return tfds.list_builders(with_community_datasets=False)
    except Exception:
        return []


def main(arguments: list[str] | None = None) -> None:
    """The command line; errors of the user end it with one line and their exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.data.prepare", description="Writes a TFDS set that is read without TensorFlow.")
    parser.add_argument("name", help=f"one of {', '.join(WORLDS)}, or the name of a TFDS set, NAME or NAME/CONFIG")
    parser.add_argument("--data_dir", help="folder of the sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--file_format", default="array_record", help="array_record (default) or parquet")
    parser.add_argument("--settings", default="{}", help="""settings of our own sets as JSON, for example '{"size": 48}'""")
    options = parser.parse_args(arguments)
    try:
        try:
            settings = json.loads(options.settings)
        except ValueError as error:
            raise ConfigError(f"--settings is not JSON ({error}); write it like '{{\"size\": 48}}'.") from error
        if not isinstance(settings, dict):
            raise ConfigError(f"--settings {options.settings} is no JSON object; write it like '{{\"size\": 48}}'.")
        with contextlib.redirect_stdout(sys.stderr):               # TFDS prints its progress; standard output is for the result
            folder = prepare(options.name, options.data_dir, options.file_format, **settings)
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    print(f'{folder}\nSource: {{"name": "array_record", "path": "{folder}", "split": ...}}')


if __name__ == "__main__":
    main()

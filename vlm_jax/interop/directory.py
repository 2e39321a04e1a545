"""Directories in the Hugging Face layout: config.json, safetensors, tokenizer and preprocessor files, read and written without torch."""
from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import os
from typing import Any

import jax
import numpy as np

from vlm_jax import registry, storage
from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.interop import families, processors, table
from vlm_jax.interop.abstract import abstract_params
from vlm_jax.interop.config_reader import read_config
from vlm_jax.interop.families import big_vision
from vlm_jax.interop.npz import NpzFile
from vlm_jax.interop.safetensors import inside, open_folder, write_folder
from vlm_jax.sharding.rules import parameter_shardings

MAX_FILE_BYTES = 256 * 2 ** 20   # of a tokenizer's file


@dataclasses.dataclass(frozen=True)
class Imported:
    """A model with its parameters.

    Attributes:
      model, params: `model.apply({"params": params}, ...)`.
      processor: the preprocessing, None where the directory has none.
      config: {"model": {"name", settings}, "hf": config.json as it was, "bare": whether names lack the family's prefix}.
      files: further files that `save_directory` writes again, {name: bytes}.
    """
    model: Any
    params: Any
    processor: Any
    config: dict[str, Any]
    files: Mapping[str, bytes]


def load_directory(path: str | os.PathLike, dtype: str | None = None, mesh: Any = None, sharding: Sequence[tuple[str, str]] | None = None,
                   compute: str | None = None) -> Imported:
    """Loads a directory in the Hugging Face layout.

    Every tensor goes straight to its place on the mesh; beside the parameters the host holds one tensor at a time.

    Args:
      path: the folder.
      dtype: of the parameters; None keeps what the files have.
      mesh, sharding: where parameters go, and the rules of `vlm_jax.sharding`; None is the default device.
      compute: dtype of the computation; None is `dtype`, or float32.
    Raises:
      ConfigError: if config.json is missing, damaged, or describes what this library does not have.
      CheckpointError: if weights are missing, damaged, in a pickled format, or not those that config.json describes.
    """
    path = os.path.expanduser(os.fspath(path))
    model, family, settings, config, source = open_directory(path, dtype, compute)
    shapes = abstract_params(model)
    shardings = parameter_shardings(mesh, shapes, sharding) if mesh is not None else None
    prefix = prefix_of(family, model)
    params = table.read(family.rows(model), source, shapes, shardings, dtype, prefix=prefix, renames=family.renames)
    bare = bool(prefix) and not any(name.startswith(prefix) for name in source.names())
    return Imported(model, params, processors.read_processor(path, model, config), {"model": settings, "hf": config, "bare": bare}, read_files(path))


def read_parameters(path: str | os.PathLike) -> Any:
    """The parameters alone of a directory (in the memory of the host, where it can be), or of an .npz of big_vision, in the dtypes of the files.

    Raises:
      ConfigError, CheckpointError: those of `load_directory` and `load_npz`.
    """
    path = os.path.expanduser(os.fspath(path))
    if path.endswith(".npz"):
        return load_npz(path).params
    model, family, _, _, source = open_directory(path)
    try:
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    except RuntimeError:    # JAX was told to have accelerators only
        host = None
    return table.read(family.rows(model), source, abstract_params(model), host, prefix=prefix_of(family, model), renames=family.renames)


def open_directory(path: str, dtype: str | None = None, compute: str | None = None) -> tuple[Any, families.Family, dict[str, Any], dict[str, Any], Any]:
    """Everything of a directory but its tensors: (model, family, settings, config, source). Raises what `load_directory` raises."""
    config = read_config(path)
    if "model_type" not in config:
        raise ConfigError(f"{path}/config.json: model_type is missing, so this is neither a run of vlm_jax nor a model of a known family; check the path.")
    family = families.family(config["model_type"])
    settings = family.to_settings(config)
    source = open_folder(path)
    if family.by_tensors is not None:
        settings = family.by_tensors(settings, source.names())
    model = build(settings, dtype, compute)
    return model, family, settings, config, source


def build(settings: Mapping[str, Any], dtype: str | None = None, compute: str | None = None) -> Any:
    """The model of {"name", settings}, unrolled on CPUs, where a scan would copy its parameters."""
    settings = {key: value for key, value in settings.items() if value is not None or key == "projection"}
    if "scan" not in settings and jax.default_backend() == "cpu":
        settings["scan"] = False
    return registry.build(**settings, dtypes={"params": dtype, "compute": compute or dtype})


def prefix_of(family: families.Family, model: Any) -> str:
    """The prefix of a family for one model."""
    return family.prefix(model) if callable(family.prefix) else family.prefix


def load_npz(path: str | os.PathLike, dtype: str | None = None, mesh: Any = None, sharding: Sequence[tuple[str, str]] | None = None,
             compute: str | None = None) -> Imported:
    """Loads a checkpoint of big_vision (.npz): SigLIP's two towers, its image tower, or PaliGemma 1 or 2; sizes are read from the arrays. There is no
    processor in it. The arguments are those of `load_directory`.

    Raises:
      CheckpointError: if the file is damaged or is another model's.
    """
    path = os.path.expanduser(os.fspath(path))
    source = NpzFile(path)
    settings = big_vision.to_settings(source)
    model = build(settings, dtype, compute)
    shapes = abstract_params(model)
    shardings = parameter_shardings(mesh, shapes, sharding) if mesh is not None else None
    rows = big_vision.rows(model, big_vision.is_stacked(source), big_vision.is_stacked_language(source))
    params = table.read(rows, source, shapes, shardings, dtype, prefix=big_vision.PREFIX, renames=big_vision.RENAMES)
    return Imported(model, params, None, {"model": settings}, {})


def save_directory(loaded: Any, path: str | os.PathLike, shard_bytes: int = 5_000_000_000) -> None:
    """Writes a model (of `load_directory`, or of `vlm_jax.load` of a run) as a directory that transformers loads.

    Weights first, config.json last: a folder with a config.json is complete.

    Raises:
      ConfigError: if transformers has no class for the model.
      CheckpointError: if the folder cannot be written, or the parameters are not those of the model.
    """
    path = os.path.expanduser(os.fspath(path))
    if os.path.isfile(os.path.join(path, "checkpoints")) or os.path.isdir(os.path.join(path, "checkpoints")):
        raise CheckpointError(f"{path}: this is the workdir of a run; write the directory somewhere else.")
    original = loaded.config.get("hf") or {}
    family = families.family(original["model_type"]) if original else families.writer(loaded.config["model"]["name"], loaded.model)
    config = _of_its_type(original, _merged(original, family.to_config(loaded.model)), family)
    tokenizer = None if loaded.processor is None else loaded.processor.tokenizer
    if "image_token_index" in config and "image_token_index" not in original and tokenizer is not None and tokenizer.token_id("<image>") is not None:
        config["image_token_index"] = tokenizer.token_id("<image>")
    tensors = table.write(family.rows(loaded.model), loaded.params)
    if loaded.config.get("bare"):   # the class without a head, whose names have no prefix
        prefix = prefix_of(family, loaded.model)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        sizes[str(tensor.dtype)] = sizes.get(str(tensor.dtype), 0) + math.prod(tensor.shape)
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = max(sizes, key=sizes.get)
    files = dict(getattr(loaded, "files", None) or {})
    if not files and loaded.processor is not None:
        files = processors.tokenizer_files(loaded.processor)
        if loaded.processor.to_dict()["image"]:
            files["preprocessor_config.json"] = _json(processors.processor_config(loaded.processor))
        files[processors.OWN_FILE] = _json(loaded.processor.to_dict())
    try:
        os.makedirs(path, exist_ok=True)
        storage.remove(os.path.join(path, "config.json"))
        write_folder(path, tensors, shard_bytes)
        for name, content in files.items():
            storage.write_whole(os.path.join(path, name), content)
        storage.write_whole(os.path.join(path, "config.json"), _json(config))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror or error}); choose a folder with room that you may write.") from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _merged(original: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`original` with the values of `new`; a value of None removes the key, `families.NULL` makes it null."""
    result = dict(original)
    for key, value in new.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping) and key not in ("id2label", "label2id"):
            result[key] = _merged(result[key], value)
        elif value is None:
            result.pop(key, None)
        elif value is families.NULL:
            result[key] = None
        elif key == "image_token_index" and key in original:
            continue   # the tokenizer's to know
        elif key in ("id2label", "label2id") and key in original and len(original[key]) == len(value):
            continue   # the names of classes are not the model's to know
        else:
            result[key] = value
    return result


def _of_its_type(original: Mapping[str, Any], config: dict[str, Any], family: families.Family) -> dict[str, Any]:
    """The config under the model_type that the weights came with, where it says the same model (Mistral without a window is a Llama)."""
    if not original or original["model_type"] == config["model_type"]:
        return config
    kept = config | {key: original[key] for key in ("model_type", "architectures") if key in original}
    try:
        return kept if family.to_settings(kept) == family.to_settings(config) else config
    except ConfigError:
        return config


def read_files(path: str) -> dict[str, bytes]:
    """The tokenizer, processor and generation files of a directory, {name: bytes}."""
    files = {}
    for name in (*processors.TOKENIZER_FILES, *processors.IMAGE_FILES, *processors.OTHER_FILES):
        if os.path.lexists(os.path.join(path, name)):
            where = inside(path, name)
            if os.path.getsize(where) > MAX_FILE_BYTES:
                raise CheckpointError(f"{where}: {os.path.getsize(where):,} bytes are too many for such a file; fetch it again.")
            with open(where, "rb") as file:
                files[name] = file.read()
    return files


def parameter_bytes(params: Any) -> int:
    """The size of a parameter tree."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))

"""`vlm_jax.load(path)`: a trained run, a directory in the Hugging Face layout or big_vision's .npz, as model, parameters, preprocessing and config;
`vlm_jax.save`."""
from collections.abc import Mapping, Sequence
import dataclasses
import os
from typing import Any

from vlm_jax.errors import CheckpointError, ConfigError


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained run, or a model read from a directory in the Hugging Face layout.

    Attributes:
      model: the Linen module; `model.apply({"params": params}, image, tokens)`.
      params: nested dict of arrays (the moving average where the run keeps one).
      processor: the preprocessing that the weights were trained with.
      config: the resolved config, plain dicts and lists; of a directory {"model": settings, "hf": config.json as it was}.
      step: the training step of the weights; 0 of a directory.
      files: what `save` writes again beside the weights of a directory, {name: bytes}.
    """
    model: Any
    params: Any
    processor: Any
    config: dict[str, Any]
    step: int
    files: Mapping[str, bytes] = dataclasses.field(default_factory=dict, repr=False)

    def predictor(self, batch_size: int = 64, mesh=None):
        """Returns a `vlm_jax.evaluation.predictor.Predictor`: embeddings of lists of images and texts, on one device or on those of `mesh`."""
        from vlm_jax.evaluation.predictor import Predictor
        return Predictor(self.model, self.params, self.processor, mesh=mesh, batch_size=batch_size)

    def generator(self, batch_size: int = 16, mesh=None, **options: Any):
        """Returns a `vlm_jax.evaluation.generator.Generator`: answers to pictures and prompts."""
        from vlm_jax.evaluation.generator import Generator
        return Generator(self.model, self.params, self.processor, mesh, batch_size, **options)


def load(path: str | os.PathLike, step: int | None = None, *, dtype: str | None = None, mesh: Any = None,
         sharding: Sequence[tuple[str, str]] | None = None, language: str | os.PathLike | None = None, vision: str | os.PathLike | None = None) -> Loaded:
    """Loads a run, a directory in the Hugging Face layout (config.json with a model_type, safetensors, tokenizer and processor files), an .npz of
    big_vision (SigLIP, PaliGemma), which has no processor, or OpenFlamingo's state dict as .safetensors with the directories of its language model and CLIP.

    Args:
      path: the workdir, directory or file.
      step: of a run; None is the newest checkpoint that verifies.
      dtype, mesh, sharding: of a directory or file, see `interop.load_directory`: what its parameters become and where they go.
      language, vision: of OpenFlamingo, see `interop.open_flamingo.load_open_flamingo`.
    Raises:
      CheckpointError: if there is nothing to load, or its data is damaged or does not fit.
      ConfigError: for a directory whose config.json cannot be used, or an argument that is for the other kind of folder.
    """
    from vlm_jax.interop.config_reader import is_directory
    path = os.path.expanduser(os.fspath(path))
    if language is not None or vision is not None or path.endswith(".safetensors"):
        from vlm_jax.interop.open_flamingo import load_open_flamingo
        if language is None or vision is None or step is not None:
            raise ConfigError(f"{path}: a state dict of OpenFlamingo is loaded with language=DIR and vision=DIR, and has no steps; a directory with "
                              "config.json is loaded by its own path.")
        imported = load_open_flamingo(path, language, vision, dtype, mesh, sharding)
        return Loaded(imported.model, imported.params, imported.processor, imported.config, 0, imported.files)
    if is_directory(path) or path.endswith(".npz"):
        from vlm_jax.interop.directory import load_directory, load_npz
        if step is not None:
            raise ConfigError(f"{path}: step {step}: this is no run and has no steps; leave step out.")
        imported = (load_npz if path.endswith(".npz") else load_directory)(path, dtype, mesh, sharding)
        return Loaded(imported.model, imported.params, imported.processor, imported.config, 0, imported.files)
    if dtype is not None or mesh is not None or sharding is not None:
        raise ConfigError(f"{path}: dtype, mesh and sharding are for directories in the Hugging Face layout; a run keeps its own.")
    return _load_run(path, step)


def save(loaded: Loaded, path: str | os.PathLike, format: str = "hf", shard_bytes: int = 5_000_000_000) -> None:
    """Writes a loaded model as a directory that transformers reads: config.json, safetensors, tokenizer and processor files; or its adapters alone for PEFT.

    Of a whole model adapters are merged, and int8 kernels are written as float32.

    Args:
      loaded: of `load`, or one with other parameters: `dataclasses.replace(loaded, params=...)`.
      path: the folder; it is made.
      format: "hf", or "peft" (`interop/peft.py`).
      shard_bytes: above this size the weights are written as several files and an index.
    Raises:
      ConfigError: for another format, or a model that transformers has no class for.
      CheckpointError: if the folder cannot be written.
    """
    from vlm_jax.interop.directory import save_directory
    from vlm_jax.settings import choose
    from vlm_jax.training import adapters
    if choose({"hf": False, "peft": True}, format, "format"):
        from vlm_jax.interop.peft import save_adapters
        save_adapters(loaded, path)
        return
    if adapters.adapted(loaded.params) or adapters.quantized(loaded.params):
        loaded = dataclasses.replace(loaded, params=adapters.plain(loaded.params))
    save_directory(loaded, path, shard_bytes)


def _load_run(workdir: str, step: int | None) -> Loaded:
    from vlm_jax import registry
    from vlm_jax.data.processor import Processor
    from vlm_jax.tasks import build_task
    from vlm_jax.training.checkpoints import restore_parameters
    from vlm_jax.training.config import load_saved
    from vlm_jax.training.stages import stage_sections

    if not os.path.exists(os.path.join(workdir, "config.json")) and "://" not in workdir:
        raise CheckpointError(f"{workdir}: no config.json, so this is neither a run nor a directory of weights; "
                              f"train one with python -m vlm_jax.train --config FILE --workdir {workdir}.")
    config = load_saved(workdir)
    sections = stage_sections(config, -1)
    params, step = restore_parameters(workdir, step)
    model = registry.build(**sections["model"], dtypes=sections["dtypes"])
    check_parameters(build_task(sections["task"], model), params, workdir)
    return Loaded(model, params, Processor.load(os.path.join(workdir, "processor.json")), config, step)


def check_parameters(task: Any, params: Any, workdir: str) -> None:
    """Raises a CheckpointError where the parameters are not those of the task's model, as when a preset changed after the run was trained; adapters and
    the scales of int8 kernels come on top."""
    import jax

    from vlm_jax.training import adapters
    from vlm_jax.training.trees import flatten
    wanted = {path: tuple(leaf.shape) for path, leaf in flatten(jax.eval_shape(task.init, jax.random.key(0))).items()}
    found = {path: tuple(leaf.shape) for path, leaf in flatten(jax.eval_shape(adapters.plain, params)).items()}
    differing = sorted(path for path in wanted.keys() | found.keys() if wanted.get(path) != found.get(path))
    if differing:
        path = differing[0]
        raise CheckpointError(f"{workdir}: {len(differing)} parameters are not those of its model, first {path}: {found.get(path, 'missing')} in the "
                              f"checkpoint, {wanted.get(path, 'missing')} in the model; its preset has changed: use the vlm_jax that trained it.")

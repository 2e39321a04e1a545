"""`vlm_jax.load(workdir)`: a trained run as a model, its parameters, its preprocessing and its config."""
import dataclasses
import os
from typing import Any

from vlm_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained run.

    Attributes:
      model: the Linen module; `model.apply({"params": params}, image, tokens)`.
      params: nested dict of arrays (the moving average where the run keeps one).
      processor: the preprocessing that the weights were trained with.
      config: the resolved config, plain dicts and lists.
      step: the training step of the weights.
    """
    model: Any
    params: Any
    processor: Any
    config: dict[str, Any]
    step: int

    def predictor(self, batch_size: int = 64, mesh=None):
        """Returns a `vlm_jax.evaluation.predictor.Predictor`: embeddings of lists of images and texts, on one device or on those of `mesh`."""
        from vlm_jax.evaluation.predictor import Predictor
        return Predictor(self.model, self.params, self.processor, mesh=mesh, batch_size=batch_size)


def load(workdir: str | os.PathLike, step: int | None = None) -> Loaded:
    """Loads the run in `workdir` at `step` (default: the newest checkpoint that verifies).

    Raises:
      CheckpointError: if there is no run, no such step, or its data does not match its digests.
    """
    from vlm_jax import registry
    from vlm_jax.data.processor import Processor
    from vlm_jax.tasks import build_task
    from vlm_jax.training.checkpoints import restore_parameters
    from vlm_jax.training.config import load_saved
    from vlm_jax.training.stages import stage_sections

    workdir = os.fspath(workdir)
    if not os.path.exists(os.path.join(workdir, "config.json")) and "://" not in workdir:
        raise CheckpointError(f"{workdir}: no config.json, so this is not a run; "
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

"""A task turns a model into pure functions (docs/architecture.md, "Tasks"); the config's `task.name` chooses one from the table below."""
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.settings import call, choose

TASKS: dict[str, str] = {
    "contrastive": "vlm_jax.tasks.contrastive:contrastive_task",
    "generation": "vlm_jax.tasks.generation:generation_task",
}


def build_task(settings: Mapping[str, Any], model: Any, mesh: Any = None) -> Any:
    """Builds the task `settings["name"]` for a model.

    Args:
      settings: the config's `task` section: the name, and the settings of that task.
      mesh: the device mesh of the run; None is one device, or the mesh entered by `jax.set_mesh`.
    Raises:
      ConfigError: for an unknown name or setting, or a task that does not fit the model.
    """
    settings = dict(settings)
    if "name" not in settings:
        raise ConfigError(f"task.name is missing; choose one of {', '.join(TASKS)}.")
    module, function = choose(TASKS, settings.pop("name"), "task.name").split(":")
    return call(getattr(import_module(module), function), settings, "task", model=model, mesh=mesh)

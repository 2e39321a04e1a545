"""Schedule, prediction, plan and sampler as settings: a config's section, or what a published scheduler's config.json says."""
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
import inspect
from typing import Any

from jaxtyping import Array

from vlm_jax.diffusion.guidance import dynamic_threshold, static_threshold
from vlm_jax.diffusion.inpainting import repaint
from vlm_jax.diffusion.plans import Plan, SigmaPlan, discrete_plan, edm_plan, sigma_plan, solver_plan
from vlm_jax.diffusion.process import check_prediction
from vlm_jax.diffusion.samplers import Denoise, Samples, ancestral, ddim, ddim_invert, dpm_solver
from vlm_jax.diffusion.schedules import Tables, build_tables
from vlm_jax.diffusion.sigma_samplers import euler, heun
from vlm_jax.errors import ConfigError, did_you_mean
from vlm_jax.settings import call, choose

SAMPLERS: dict[str, tuple[Callable[..., Samples], Callable[..., Plan | SigmaPlan]]] = {
    "ancestral": (ancestral, discrete_plan), "ddim": (ddim, discrete_plan), "ddim_invert": (ddim_invert, discrete_plan), "repaint": (repaint, discrete_plan),
    "dpm_solver": (dpm_solver, solver_plan), "euler": (euler, sigma_plan), "heun": (heun, sigma_plan)}
THRESHOLDS = {"static": static_threshold, "dynamic": dynamic_threshold}


@dataclass(frozen=True)
class Recipe:
    """How a model's process is defined and sampled from, as plain settings (JSON can hold them).

    Attributes:
      schedule: `name` and settings of `schedules.build_tables`; or `{"name": "edm", ...}`, the settings of `plans.edm_plan` without the count.
      prediction: of `process.PREDICTIONS`; "edm" and the edm schedule belong together.
      sampler: `name` (of `SAMPLERS`) and settings of that function that are numbers or names.
      plan: settings of the sampler's plan (`plans.discrete_plan`, `solver_plan`, `sigma_plan`) without the count.
      threshold: None, or `name` ("static", "dynamic") and settings of `guidance`'s functions.
    Raises:
      ConfigError: for names and settings that are unknown or do not go together.
    """
    schedule: Mapping[str, Any] = field(default_factory=lambda: {"name": "linear", "steps": 1000})
    prediction: str = "eps"
    sampler: Mapping[str, Any] = field(default_factory=lambda: {"name": "ancestral"})
    plan: Mapping[str, Any] = field(default_factory=dict)
    threshold: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        function, _ = choose(SAMPLERS, self.sampler.get("name", ""), "sampler.name")
        known = [name for name, parameter in inspect.signature(function).parameters.items() if type(parameter.default) in (str, int, float, bool)]
        for key in self.sampler:
            if key != "name" and (key not in known or key in ("prediction", "frames")):
                raise ConfigError(f"sampler.{key}: {self.sampler['name']} takes no such setting.{did_you_mean(key, set(known) - {'prediction', 'frames'})}")
        if (self.prediction == "edm") != self.is_edm or (self.is_edm and self.sampler["name"] not in ("euler", "heun")):
            raise ConfigError(f'schedule "{self.schedule.get("name")}", prediction "{self.prediction}" and sampler "{self.sampler["name"]}" do not fit: '
                              'the edm schedule needs prediction "edm" and euler or heun, and only it.')
        if not self.is_edm:
            self.tables.check_prediction(self.prediction if self.sampler["name"] in ("ancestral", "ddim", "ddim_invert", "repaint") else "v")
        if self.threshold is not None:
            self._threshold()

    @property
    def is_edm(self) -> bool:
        """Whether noise levels are EDM's, without a discrete process."""
        return self.schedule.get("name") == "edm"

    @cached_property
    def tables(self) -> Tables:
        """The tables of the discrete process; ConfigError for EDM, which has none."""
        if self.is_edm:
            raise ConfigError("the edm schedule has no tables of discrete steps; use its plan.")
        return call(build_tables, self.schedule, "schedule")

    def plan_of(self, count: int) -> Plan | SigmaPlan:
        """The plan of `count` steps."""
        if self.is_edm:
            return call(edm_plan, {key: value for key, value in self.schedule.items() if key != "name"}, "schedule", count=count)
        return call(SAMPLERS[self.sampler["name"]][1], self.plan, "plan", tables=self.tables, count=count)

    def sample(self, denoise: Denoise, x: Array, count: int, **arguments: Any) -> Samples:
        """Runs the sampler for `count` steps from x; `arguments` are the sampler's others (noise, frames, eta as an array, RePaint's image and mask)."""
        function, _ = SAMPLERS[self.sampler["name"]]
        settings = {key: value for key, value in self.sampler.items() if key != "name"} | arguments
        return function(denoise, x, plan=self.plan_of(count), prediction=self.prediction, threshold=self._threshold(), **settings)

    def _threshold(self) -> Callable[[Array], Array] | None:
        if self.threshold is None:
            return None
        function = choose(THRESHOLDS, self.threshold.get("name", ""), "threshold.name")
        settings = {key: value for key, value in self.threshold.items() if key != "name"}
        unknown = set(settings) - set(list(inspect.signature(function).parameters)[1:])
        if unknown:
            raise ConfigError(f"threshold.{min(unknown)}: {self.threshold['name']} takes no such setting.")
        return partial(function, **settings)

"""Schedulers' config.json (scheduler_config.json) in the layout of diffusers <-> our `diffusion.Recipe`.

One table a class: what its keys are called here, and which value a key must have because no other is computed. A class's own defaults count where a file is
silent. Differs from theirs: DDPM's "learned" variance (used as a deviation there), "fixed_large_log" and Euler's churn as they compute it are refused or not
settings.
"""
from collections.abc import Mapping
from dataclasses import dataclass, field
import math
from typing import Any

from vlm_jax.diffusion.recipe import Recipe
from vlm_jax.errors import ConfigError, did_you_mean
from vlm_jax.interop.config_reader import Section
from vlm_jax.interop.safetensors import show

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large", "learned_range": "learned_range"}
FINALS = {"zero": "zero", "sigma_min": "smallest"}
SPACINGS = {name: name for name in ("leading", "trailing", "linspace")}
SOLVERS = {"midpoint": "midpoint", "heun": "heun"}
ENDS = {True: "data", False: "first"}
EDM_SCHEDULES = {"karras": False, "exponential": True}
_ANY = None   # no translation
MAX_STEPS = 10 ** 6


@dataclass(frozen=True)
class Scheduler:
    """A class of schedulers: `sampler` of ours, its `rows` (their key, section of the recipe, our key, translation or None), their `defaults`, `only`: {key:
    the one value that is computed}, and `plan`: settings that the class implies."""
    sampler: str
    rows: tuple[tuple[str, str, str, Mapping[Any, Any] | None], ...]
    defaults: Mapping[str, Any]
    only: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    thresholds: tuple[str, ...] = ()


_BETAS = dict(num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02, beta_schedule="linear", trained_betas=None, prediction_type="epsilon")
_CLIP = dict(clip_sample=True, clip_sample_range=1.0)
_DYNAMIC = dict(thresholding=False, dynamic_thresholding_ratio=0.995, sample_max_value=1.0)
_SPACING = (("timestep_spacing", "plan", "spacing", SPACINGS), ("steps_offset", "plan", "offset", _ANY))
_ZERO_SNR = ("rescale_betas_zero_snr", "schedule", "zero_snr", _ANY)
_KARRAS = ("use_karras_sigmas", "plan", "karras", _ANY)
_FINAL = ("final_sigmas_type", "plan", "final", FINALS)
_END = ("set_alpha_to_one", "plan", "final", ENDS)
_OTHER_SIGMAS = dict(use_exponential_sigmas=False, use_beta_sigmas=False)

CLASSES: dict[str, Scheduler] = {
    "DDPMScheduler": Scheduler(
        "ancestral", (*_SPACING, _ZERO_SNR, ("variance_type", "sampler", "variance", VARIANCES)),
        _BETAS | _CLIP | _DYNAMIC | dict(timestep_spacing="leading", steps_offset=0, rescale_betas_zero_snr=False, variance_type="fixed_small"),
        thresholds=("clip", "dynamic")),
    "DDIMScheduler": Scheduler(
        "ddim", (*_SPACING, _ZERO_SNR, _END),
        _BETAS | _CLIP | _DYNAMIC | dict(timestep_spacing="leading", steps_offset=0, rescale_betas_zero_snr=False, set_alpha_to_one=True),
        plan={"stride": True}, thresholds=("clip", "dynamic")),
    "DDIMInverseScheduler": Scheduler(
        "ddim_invert", (*_SPACING, _ZERO_SNR, _END),
        _BETAS | _CLIP | dict(timestep_spacing="leading", steps_offset=0, rescale_betas_zero_snr=False, set_alpha_to_one=True),
        plan={"stride": True}, thresholds=("clip",)),
    "DPMSolverMultistepScheduler": Scheduler(
        "dpm_solver", (*_SPACING, _ZERO_SNR, _KARRAS, _FINAL, ("solver_order", "sampler", "order", _ANY), ("solver_type", "sampler", "solver", SOLVERS),
                       ("lower_order_final", "sampler", "lower_order_final", _ANY), ("euler_at_final", "sampler", "euler_at_final", _ANY)),
        _BETAS | _DYNAMIC | dict(timestep_spacing="linspace", steps_offset=0, rescale_betas_zero_snr=False, use_karras_sigmas=False, final_sigmas_type="zero",
                                 solver_order=2, solver_type="midpoint", lower_order_final=True, euler_at_final=False),
        only=_OTHER_SIGMAS | dict(algorithm_type="dpmsolver++", use_lu_lambdas=False, use_flow_sigmas=False, lambda_min_clipped=-math.inf, variance_type=None,
                                  use_dynamic_shifting=False),
        thresholds=("dynamic",)),
    "EulerDiscreteScheduler": Scheduler(
        "euler", (*_SPACING, _ZERO_SNR, _KARRAS, _FINAL),
        _BETAS | dict(timestep_spacing="linspace", steps_offset=0, rescale_betas_zero_snr=False, use_karras_sigmas=False, final_sigmas_type="zero"),
        only=_OTHER_SIGMAS | dict(interpolation_type="linear", timestep_type="discrete", sigma_min=None, sigma_max=None)),
    "HeunDiscreteScheduler": Scheduler(
        "heun", (*_SPACING, _KARRAS),
        _BETAS | dict(beta_start=0.00085, beta_end=0.012, timestep_spacing="linspace", steps_offset=0, use_karras_sigmas=False, clip_sample=False,
                      clip_sample_range=1.0), only=_OTHER_SIGMAS, thresholds=("clip",)),
    "EDMEulerScheduler": Scheduler(
        "euler", (("sigma_min", "schedule", "smallest", _ANY), ("sigma_max", "schedule", "largest", _ANY), ("sigma_data", "schedule", "sigma_data", _ANY),
                  ("rho", "schedule", "rho", _ANY), ("sigma_schedule", "schedule", "exponential", EDM_SCHEDULES),
                  ("final_sigmas_type", "schedule", "final", FINALS)),
        dict(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0, sigma_schedule="karras", final_sigmas_type="zero", prediction_type="epsilon",
             num_train_timesteps=1000), only=dict(prediction_type="epsilon")),
    "RePaintScheduler": Scheduler(
        "repaint", (("eta", "sampler", "eta", _ANY),), {key: value for key, value in _BETAS.items() if key != "prediction_type"} |
        dict(eta=0.0, clip_sample=True), thresholds=("clip",)),
}


def to_recipe(config: Mapping[str, Any], where: str = "scheduler_config.json") -> Recipe:
    """The recipe that a scheduler's config describes.

    Raises:
      ConfigError: for a class, a key's value or a combination that is unknown or not computed here.
    """
    section = Section(config, where)
    name = section.text("_class_name")
    if name not in CLASSES:
        raise ConfigError(f"{where}._class_name: {show(name)} is not supported.{did_you_mean(name, CLASSES)}")
    scheduler = CLASSES[name]
    for key, value in scheduler.only.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{where}.{key}: {show(config[key])} is not computed here, only {value}; sample with another scheduler.")
    sections: dict[str, dict[str, Any]] = {"schedule": {}, "sampler": {"name": scheduler.sampler}, "plan": dict(scheduler.plan)}
    for key, part, ours, values in scheduler.rows:
        found = _value(section, key, scheduler.defaults[key])
        if values is not None and found not in values:
            raise ConfigError(f"{where}.{key}: {show(found)} is not computed here; known: {', '.join(map(str, values))}.")
        sections[part][ours] = found if values is None else values[found]
    if name == "EDMEulerScheduler":
        return Recipe({"name": "edm"} | sections["schedule"], "edm", sections["sampler"])
    prediction = section.text("prediction_type", "epsilon", among=PREDICTIONS)
    return Recipe(_schedule(section, scheduler.defaults) | sections["schedule"], PREDICTIONS[prediction], sections["sampler"],
                  _rounded(scheduler, section, sections["plan"]), _threshold(section, scheduler))


def to_config(recipe: Recipe, name: str | None = None) -> dict[str, Any]:
    """The config of a recipe, complete, under the class `name` or the one of the recipe's sampler.

    Raises:
      ConfigError: for what that class cannot express.
    """
    name = name or next(key for key, scheduler in CLASSES.items() if scheduler.sampler == recipe.sampler["name"] and recipe.is_edm == key.startswith("EDM"))
    if name not in CLASSES or CLASSES[name].sampler != recipe.sampler["name"]:
        raise ConfigError(f'{name} does not sample as "{recipe.sampler["name"]}"; choose another class.{did_you_mean(name, CLASSES)}')
    scheduler = CLASSES[name]
    config: dict[str, Any] = {"_class_name": name, **scheduler.defaults, **scheduler.only}
    parts = {"schedule": recipe.schedule, "sampler": recipe.sampler, "plan": recipe.plan}
    for key, part, ours, values in scheduler.rows:
        if ours in parts[part]:
            value = parts[part][ours]
            config[key] = value if values is None else next(theirs for theirs, own in values.items() if own == value)
    if not recipe.is_edm:
        if "prediction_type" in config:
            config["prediction_type"] = next(theirs for theirs, own in PREDICTIONS.items() if own == recipe.prediction)
        schedule = recipe.schedule
        config["num_train_timesteps"] = schedule.get("steps", 1000)
        if schedule["name"] == "given":
            config["trained_betas"] = list(schedule["betas"])
        else:
            config["beta_schedule"] = next(theirs for theirs, own in SCHEDULES.items() if own == schedule["name"])
            if schedule["name"] != "cosine":
                defaults = (0.00085, 0.012) if schedule["name"] == "scaled_linear" else (0.0001, 0.02)
                config |= {"beta_start": schedule.get("start", defaults[0]), "beta_end": schedule.get("end", defaults[1])}
    return config | _threshold_config(recipe, scheduler, name)


def _value(section: Section, key: str, default: Any) -> Any:
    if isinstance(default, bool):
        return section.flag(key, default)
    if isinstance(default, int):
        return section.integer(key, default, least=0, most=MAX_STEPS)
    return section.number(key, default) if isinstance(default, float) else section.text(key, default)


def _schedule(section: Section, defaults: Mapping[str, Any]) -> dict[str, Any]:
    steps = section.integer("num_train_timesteps", defaults["num_train_timesteps"], most=MAX_STEPS)
    betas = section.numbers("trained_betas", None, longest=MAX_STEPS)
    if betas is not None:
        return {"name": "given", "steps": len(betas), "betas": betas}
    name = SCHEDULES[section.text("beta_schedule", defaults["beta_schedule"], among=SCHEDULES)]
    ends = {"start": section.number("beta_start", defaults["beta_start"]), "end": section.number("beta_end", defaults["beta_end"])}
    return {"name": name, "steps": steps, **({} if name == "cosine" else ends)}


def _rounded(scheduler: Scheduler, section: Section, plan: dict[str, Any]) -> dict[str, Any]:
    cosine = section.text("beta_schedule", "linear") == "squaredcos_cap_v2"
    return plan | ({"rounded": False} if scheduler.sampler == "dpm_solver" and plan["karras"] and cosine else {})


def _threshold(section: Section, scheduler: Scheduler) -> dict[str, Any] | None:
    if "dynamic" in scheduler.thresholds and section.flag("thresholding", False):
        return {"name": "dynamic", "quantile": section.number("dynamic_thresholding_ratio", 0.995, 0, 1),
                "largest": section.number("sample_max_value", 1.0, 1)}
    if "clip" in scheduler.thresholds and section.flag("clip_sample", scheduler.defaults["clip_sample"]):
        return {"name": "static", "limit": section.number("clip_sample_range", 1.0, 0)}
    return None


def _threshold_config(recipe: Recipe, scheduler: Scheduler, name: str) -> dict[str, Any]:
    kind = None if recipe.threshold is None else {"static": "clip", "dynamic": "dynamic"}[recipe.threshold["name"]]
    config: dict[str, Any] = {}
    if kind is not None and kind not in scheduler.thresholds:
        raise ConfigError(f'{name} has no "{recipe.threshold["name"]}" threshold; choose another class or none.')
    if "clip" in scheduler.thresholds:
        config["clip_sample"] = kind == "clip"
        limit = recipe.threshold.get("limit", 1.0) if kind == "clip" else 1.0
        if "clip_sample_range" in scheduler.defaults:
            config["clip_sample_range"] = limit
        elif limit != 1.0:
            raise ConfigError(f"{name} clips to [-1, 1], not to {limit}; choose another class.")
    if "dynamic" in scheduler.thresholds:
        config["thresholding"] = kind == "dynamic"
    if kind == "dynamic":
        largest = recipe.threshold.get("largest", math.inf)
        if math.isinf(largest):
            raise ConfigError(f"{name} needs a largest threshold; set threshold.largest.")
        config |= {"dynamic_thresholding_ratio": recipe.threshold.get("quantile", 0.995), "sample_max_value": largest}
    return config

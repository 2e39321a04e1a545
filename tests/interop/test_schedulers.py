"""diffusers' scheduler configs <-> recipes: both ways, and refused where they say what is not computed here."""
import json

import numpy as np
import pytest

from vlm_jax.diffusion import Recipe
from vlm_jax.errors import ConfigError
from vlm_jax.interop.schedulers import CLASSES, to_config, to_recipe

SETTINGS = {
    "DDPMScheduler": dict(variance_type="fixed_large", beta_schedule="squaredcos_cap_v2", num_train_timesteps=50, clip_sample_range=2.0),
    "DDIMScheduler": dict(set_alpha_to_one=False, steps_offset=1, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
    "DDIMInverseScheduler": dict(timestep_spacing="trailing", prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "DPMSolverMultistepScheduler": dict(solver_order=3, solver_type="heun", use_karras_sigmas=True, thresholding=True, sample_max_value=1.5),
    "EulerDiscreteScheduler": dict(final_sigmas_type="sigma_min", timestep_spacing="leading", trained_betas=[0.1, 0.2, 0.3]),
    "HeunDiscreteScheduler": dict(prediction_type="sample", clip_sample=True),
    "EDMEulerScheduler": dict(sigma_data=1.0, rho=5.0, sigma_schedule="exponential"),
    "RePaintScheduler": dict(eta=0.3, clip_sample=False),
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("changed", [False, True])
def test_their_config_goes_round(name, changed):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(**(SETTINGS[name] if changed else {}))
    theirs = json.loads(scheduler.to_json_string())
    recipe = to_recipe(theirs)
    written = json.loads(json.dumps(to_config(recipe, name)))
    again = getattr(diffusers, name).from_config(written)
    if changed and "trained_betas" in SETTINGS[name]:
        assert written.pop("num_train_timesteps") == 3
    for key, value in written.items():
        assert key == "_class_name" or again.config[key] == scheduler.config[key] or (value is None and scheduler.config.get(key) is None), key
    assert to_recipe(to_config(recipe, name)) == recipe
    if not recipe.is_edm:
        np.testing.assert_allclose(recipe.tables.alpha_bar, scheduler.alphas_cumprod, rtol=3e-4, atol=1e-7)


@pytest.mark.parametrize("config, message", [
    ({}, "_class_name is missing"), ({"_class_name": "DDIMSchedule"}, 'Did you mean "DDIMScheduler"'),
    ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"}, "variance_type.*fixed_large_log"),
    ({"_class_name": "DDPMScheduler", "beta_schedule": "laplace"}, "beta_schedule.*laplace"),
    ({"_class_name": "DDPMScheduler", "num_train_timesteps": 0}, "num_train_timesteps"),
    ({"_class_name": "DDPMScheduler", "beta_end": 1.5}, r"outside \(0, 1\)"),
    ({"_class_name": "DDPMScheduler", "beta_end": "0.02"}, "beta_end"),
    ({"_class_name": "DDPMScheduler", "rescale_betas_zero_snr": True}, "terminal SNR"),
    ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
    ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "prediction_type"),
])
def test_configs_that_are_not_computed_here_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        to_recipe(config)


@pytest.mark.parametrize("make, message", [
    (lambda: Recipe(sampler={"name": "ddmi"}), 'Did you mean "ddim"'),
    (lambda: Recipe(sampler={"name": "ddim", "ete": 0.1}), 'Did you mean "eta"'),
    (lambda: Recipe(prediction="edm"), "do not fit"),
    (lambda: Recipe(schedule={"name": "edm"}), "do not fit"),
    (lambda: Recipe(threshold={"name": "static", "limits": 1.0}), "limits"),
    (lambda: Recipe(schedule={"name": "linear", "steps": 0}), "0 steps"),
    (lambda: Recipe(plan={"spacing": "leading", "ofset": 1}).plan_of(10), 'Did you mean "offset"'),
    (lambda: to_config(Recipe(threshold={"name": "dynamic"})), "largest"),
    (lambda: to_config(Recipe(sampler={"name": "euler"}, threshold={"name": "static"})), "threshold"),
    (lambda: to_config(Recipe(), "DDIMScheduler"), 'does not sample as "ancestral"'),
])
def test_recipes_that_cannot_work_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()

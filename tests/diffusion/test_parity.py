"""Every scheduler against diffusers', step by step and over whole trajectories, through the config that diffusers writes."""
import json

import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.stand_in import apart, denoise, give_tables, start
from vlm_jax.interop.schedulers import to_recipe

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STEP, SOLVER, LONG = 1e-5, 1e-5, 2e-4


def make(name, **settings):
    scheduler = getattr(diffusers, name)(**settings)
    return scheduler, to_recipe(json.loads(scheduler.to_json_string()))


def walk(scheduler, x, count, noise=None, **step_settings):
    """Their trajectory [S, ...] of samples from x, with the noise that a generator of seed 0 draws."""
    network, generator = denoise(torch), torch.Generator().manual_seed(0)
    if count is not None:
        scheduler.set_timesteps(count)
    x, seen = torch.from_numpy(x), []
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scaled, t), t, x, **({"generator": generator} if noise else {}), **step_settings).prev_sample
        seen.append(x.numpy().copy())
    return np.stack(seen)


def check_steps(ours, theirs):
    assert ours.frames_x.shape == theirs.shape
    for number, (mine, other) in enumerate(zip(np.asarray(ours.frames_x), theirs, strict=True)):
        assert apart(mine, other) < STEP, number
    np.testing.assert_array_equal(ours.x, ours.frames_x[-1])


def drawn(count, shape):
    """noise(step) of the numbers that a torch generator of seed 0 draws."""
    generator = torch.Generator().manual_seed(0)
    table = jnp.asarray(np.stack([torch.randn(shape, generator=generator).numpy() for _ in range(count)]))
    return lambda step: table[step]


DDPM = [
    dict(variance_type="fixed_small", clip_sample=False, beta_schedule="squaredcos_cap_v2"),
    dict(variance_type="fixed_large", timestep_spacing="trailing"),
    dict(variance_type="fixed_small_log", prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    dict(prediction_type="sample", thresholding=True, sample_max_value=1.7, dynamic_thresholding_ratio=0.8, beta_schedule="sigmoid"),
    dict(timestep_spacing="linspace", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample_range=1.3),
    dict(timestep_spacing="leading", steps_offset=1, variance_type="fixed_large"),
]


@pytest.mark.parametrize("settings", DDPM, ids=str)
def test_ancestral_matches_ddpm(settings, count=31):
    scheduler, recipe = make("DDPMScheduler", **settings)
    x = start()
    theirs = walk(give_tables(scheduler, recipe.tables), x, count, noise=True)
    check_steps(recipe.sample(denoise(jnp), x, count, noise=drawn(count, x.shape), frames=count), theirs)


def test_a_thousand_ancestral_steps_with_their_own_tables():
    scheduler, recipe = make("DDPMScheduler", variance_type="fixed_large")
    x = start((1, 4, 3, 2))
    theirs = walk(scheduler, x, None, noise=True)[-1]
    assert apart(recipe.sample(denoise(jnp), x, 1000, noise=drawn(1000, x.shape)).x, theirs) < LONG


def test_learned_range_matches_ddpm():
    scheduler, recipe = make("DDPMScheduler", variance_type="learned_range", clip_sample=False)
    give_tables(scheduler, recipe.tables)
    x = start((2, 4, 3, 3))     # channels last for us
    count = 11
    scheduler.set_timesteps(count)
    generator, theirs = torch.Generator().manual_seed(0), torch.from_numpy(np.moveaxis(x, -1, 1).copy())
    draws = []
    for t in scheduler.timesteps:
        output = torch.cat([denoise(torch)(theirs, t), torch.sin(3 * theirs)], dim=1)
        state = generator.get_state()
        theirs = scheduler.step(output, t, theirs, generator=generator).prev_sample
        generator.set_state(state)
        draws.append(np.moveaxis(torch.randn(output.shape[0], 3, 4, 3, generator=generator).numpy(), 1, -1))
    table = jnp.asarray(np.stack(draws))
    ours = recipe.sample(lambda x, t: jnp.concatenate([denoise(jnp)(x, t), jnp.sin(3 * x)], -1), x, count, noise=lambda i: table[i]).x
    assert apart(ours, np.moveaxis(theirs.numpy(), 1, -1)) < SOLVER


DDIM = [
    dict(clip_sample=False), dict(clip_sample=True, timestep_spacing="trailing", set_alpha_to_one=False), dict(steps_offset=1, prediction_type="v_prediction"),
    dict(timestep_spacing="linspace", prediction_type="sample", beta_schedule="scaled_linear", clip_sample=False),
    dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample_range=0.7),
    dict(thresholding=True, sample_max_value=1.5, dynamic_thresholding_ratio=0.9, beta_schedule="squaredcos_cap_v2"),
]


@pytest.mark.parametrize("settings, count, eta", [(settings, *((50, 0.0), (7, 0.6))[number % 2]) for number, settings in enumerate(DDIM)], ids=str)
def test_ddim_matches(settings, count, eta):
    scheduler, recipe = make("DDIMScheduler", **settings)
    x = start()
    theirs = walk(give_tables(scheduler, recipe.tables), x, count, noise=eta > 0, eta=eta)
    ours = recipe.sample(denoise(jnp), x, count, eta=eta, noise=drawn(count, x.shape), frames=count)
    check_steps(ours, theirs)


def test_ddim_rederives_the_noise_of_a_clipped_image():
    scheduler, recipe = make("DDIMScheduler")
    x = start()
    theirs = walk(give_tables(scheduler, recipe.tables), x, 10, use_clipped_model_output=True)[-1]
    ours = [recipe.sample(denoise(jnp), x, 10, rederive=flag).x for flag in (True, False)]
    assert apart(ours[0], theirs) < SOLVER < apart(ours[1], theirs)


@pytest.mark.parametrize("settings", [dict(clip_sample=False), dict(timestep_spacing="trailing", prediction_type="v_prediction"),
                                      dict(set_alpha_to_one=False, prediction_type="sample", steps_offset=1)], ids=str)
def test_ddim_inversion_matches(settings):
    scheduler, recipe = make("DDIMInverseScheduler", **settings)
    x = 0.5 * start()
    theirs = walk(give_tables(scheduler, recipe.tables), x, 20)
    ours = recipe.sample(denoise(jnp), x, 20, frames=20)
    check_steps(ours, theirs)


DPM = [
    dict(solver_order=1), dict(solver_order=2), dict(solver_order=3), dict(solver_order=2, solver_type="heun", timestep_spacing="trailing"),
    dict(solver_order=3, use_karras_sigmas=True, final_sigmas_type="sigma_min"), dict(use_karras_sigmas=True, beta_schedule="squaredcos_cap_v2"),
    dict(solver_order=3, lower_order_final=False, prediction_type="v_prediction", timestep_spacing="leading", steps_offset=1),
    dict(euler_at_final=True, prediction_type="sample", final_sigmas_type="sigma_min", thresholding=True, sample_max_value=2.0),
    dict(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"),
]


@pytest.mark.parametrize("settings, count", [(settings, (6, 25)[number % 2]) for number, settings in enumerate([*DPM, DPM[2]])], ids=str)
def test_dpm_solver_matches(settings, count):
    scheduler, recipe = make("DPMSolverMultistepScheduler", **settings)
    x = start()
    tables = recipe.tables
    if settings.get("rescale_betas_zero_snr"):
        tables = type(tables)(np.maximum(tables.alpha_bar, 2.0 ** -24))
    theirs = walk(give_tables(scheduler, tables), x, count)
    ours = recipe.sample(denoise(jnp), x, count, frames=count)
    check_steps(ours, theirs)


SIGMAS = [dict(), dict(timestep_spacing="leading", steps_offset=1, prediction_type="v_prediction"), dict(use_karras_sigmas=True, timestep_spacing="trailing"),
          dict(prediction_type="sample", beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)]


@pytest.mark.parametrize("settings, count", [(settings, (50, 5)[number % 2]) for number, settings in enumerate(SIGMAS)], ids=str)
@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_sigma_samplers_match(name, settings, count):
    scheduler, recipe = make(name, **settings)
    give_tables(scheduler, recipe.tables).set_timesteps(count)
    plan = recipe.plan_of(count)
    assert plan.scale == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    x = plan.scale * start().astype(np.float32)
    theirs = walk(scheduler, x, count)
    ours = recipe.sample(denoise(jnp), x, count, frames=count)
    finished = np.minimum(np.arange(count) * 2 + 1, len(theirs) - 1) if name.startswith("Heun") else np.arange(count)
    check_steps(ours, theirs[finished])


@pytest.mark.parametrize("settings", [dict(), dict(sigma_data=1.0, sigma_max=20.0, rho=5.0), dict(sigma_schedule="exponential", final_sigmas_type="sigma_min")],
                         ids=str)
def test_edm_euler_matches(settings):
    scheduler, recipe = make("EDMEulerScheduler", **settings)
    x = recipe.plan_of(18).scale * start()
    theirs = walk(scheduler, x.astype(np.float32), 18)
    ours = recipe.sample(denoise(jnp), x, 18, frames=18)
    check_steps(ours, theirs)


@pytest.mark.parametrize("eta, clip, count, jump, resamples", [(0.7, False, 20, 4, 3), (0.0, True, 10, 10, 1)])
def test_repaint_matches(eta, clip, count, jump, resamples):
    scheduler, recipe = make("RePaintScheduler", num_train_timesteps=20, beta_start=0.001, beta_end=0.3, eta=eta, clip_sample=clip)
    give_tables(scheduler, recipe.tables).set_timesteps(count, jump, resamples)
    x, known = start(), np.clip(start(seed=1), -1, 1)
    mask = (start((1, 1, 3, 3), seed=2) > 0).astype(np.float32)
    network, generator, theirs = denoise(torch), torch.Generator().manual_seed(0), torch.from_numpy(x)
    last, moves = scheduler.timesteps[0] + 1, 0
    for t in scheduler.timesteps:
        if t < last:
            theirs = scheduler.step(network(theirs, t), t, theirs, torch.from_numpy(known), torch.from_numpy(mask), generator).prev_sample
        else:
            theirs = scheduler.undo_step(theirs, last, generator)
        last, moves = t, moves + 1
    ours = recipe.sample(denoise(jnp), x, count, known=jnp.asarray(known), mask=jnp.asarray(mask), noise=drawn(moves, x.shape), jump_length=jump,
                         resamples=resamples)
    assert apart(ours.x, theirs) < SOLVER


def test_the_trajectories_that_are_compared_differ_from_each_other():
    x = start()
    ends = [make("DPMSolverMultistepScheduler", solver_order=order)[1].sample(denoise(jnp), x, 8).x for order in (1, 2, 3)]
    assert apart(ends[0], ends[1]) > 1e-3 and apart(ends[1], ends[2]) > 1e-4

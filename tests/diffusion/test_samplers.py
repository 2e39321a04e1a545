"""What samplers must do whatever the network: agree where theory says so, draw by row and step, compile once, refuse what cannot work."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.stand_in import apart, denoise, start
from vlm_jax.diffusion import (
    ancestral,
    build_tables,
    classifier_free,
    ddim,
    ddim_invert,
    discrete_plan,
    dpm_solver,
    dynamic_threshold,
    edm_plan,
    euler,
    heun,
    in_batches,
    initial_noise,
    renoised,
    repaint,
    row_keys,
    row_noise,
    sigma_plan,
    slerp,
    solver_plan,
)
from vlm_jax.diffusion.inpainting import repaint_moves
from vlm_jax.diffusion.schedules import Tables
from vlm_jax.errors import ConfigError

TABLES = build_tables("linear", 20, start=0.01, end=0.4)
NETWORK = denoise(jnp)
SHAPE = (3, 2, 2)


def noise_of(batch=2, seed=0):
    return row_noise(row_keys(jnp.int32(seed), jnp.arange(batch)), SHAPE)


def gaussian(tables, deviation):
    """The exact eps of data N(0, deviation^2)."""
    alpha_bar = jnp.asarray(tables.alpha_bar, jnp.float32)

    def network(x, t):
        level = alpha_bar[t].reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.sqrt(1 - level) / (1 - level + level * deviation ** 2) * x
    return network


def test_ddim_with_eta_one_is_ddpm_with_beta_tilde():
    x, plan, noise = start((2, *SHAPE)), discrete_plan(TABLES), noise_of()
    assert apart(ddim(NETWORK, x, plan, eta=1.0, noise=noise).x, ancestral(NETWORK, x, plan, noise).x) < 1e-5
    traced = jax.jit(lambda eta: ddim(NETWORK, x, plan, eta=eta, noise=noise).x)
    assert apart(traced(1.0), ancestral(NETWORK, x, plan, noise).x) < 1e-5
    assert apart(traced(0.0), ddim(NETWORK, x, plan).x) < 1e-5


def test_first_order_dpm_solver_is_ddim():
    x, plan = start((2, *SHAPE)), solver_plan(TABLES, 8)
    assert apart(dpm_solver(NETWORK, x, plan, order=1).x, ddim(NETWORK, x, plan).x) < 1e-5


def test_higher_orders_come_closer_to_the_flow_of_a_gaussian():
    """From x_T = signal_T x_0 + noise_T eps the flow of N(0, s^2) data ends at x_T s / sqrt(noise_T^2 + signal_T^2 s^2)."""
    tables = build_tables("linear", 1000)
    x, network = start((2, *SHAPE)), gaussian(tables, 0.5)
    last = tables.alpha_bar[-1]
    exact = x * 0.5 / np.sqrt(1 - last + last * 0.25)
    errors = [apart(dpm_solver(network, x, solver_plan(tables, 20, "trailing"), order=order).x, exact) for order in (1, 2)]
    assert errors[1] < 0.4 * errors[0] < 0.1
    table = jnp.asarray(np.log(tables.sigmas), jnp.float32)

    def by_time(x, t):
        sigma = jnp.exp(jnp.interp(t, jnp.arange(1000.0), table)).reshape(-1, 1, 1, 1)
        return sigma * jnp.sqrt(1 + sigma ** 2) / (sigma ** 2 + 0.25) * x
    plan = sigma_plan(tables, 20, karras=True)
    noisy = plan.sigmas[0] * x
    flown = noisy * 0.5 / np.sqrt(plan.sigmas[0] ** 2 + 0.25)
    first, second = (apart(solver(by_time, noisy, plan, prediction="eps").x, flown) for solver in (euler, heun))
    assert second < 0.4 * first < 0.2


def test_inversion_finds_the_noise_that_ddim_maps_to_the_image():
    # a network that turns slowly enough for the fixed point to be reached, as section 6.8's contraction asks
    def network(x, t):
        return 0.3 * jnp.tanh(x)
    plan, image = discrete_plan(TABLES, 10), 0.5 * start((2, *SHAPE))
    errors = []
    for iterations in (1, 12):
        latent = ddim_invert(network, image, plan, iterations=iterations).x
        errors.append(apart(ddim(network, latent, plan).x, image))
    assert errors[1] < 1e-4 < 0.05 * errors[0]


def test_rows_do_not_depend_on_their_batch_and_seeds_matter():
    plan = discrete_plan(TABLES, 5)
    sample = jax.jit(lambda seed, rows: ancestral(NETWORK, initial_noise(row_keys(seed, rows), SHAPE), plan, row_noise(row_keys(seed, rows), SHAPE)).x)
    both, other = sample(0, jnp.array([4, 9])), sample(0, jnp.array([9, 5]))
    np.testing.assert_allclose(both[1], other[0], rtol=1e-6, atol=1e-6)
    assert apart(both[0], both[1]) > 0.1 and apart(sample(1, jnp.array([4, 9])), both) > 0.1
    noise = noise_of(400)
    first, second, initial = noise(0), noise(1), initial_noise(row_keys(jnp.int32(0), jnp.arange(400)), SHAPE)
    for a, b in ((first, second), (first, initial)):
        assert abs(float(jnp.mean(a * b))) < 0.05
    assert float(jnp.std(first)) == pytest.approx(1, abs=0.05)


def test_one_program_for_any_number_of_images_and_any_guidance_weight():
    traces = []

    def network(x, t, condition):
        traces.append(x.shape)
        return jnp.tanh(x) * condition["scale"][:, None, None, None]
    plan = discrete_plan(TABLES, 4)

    @jax.jit
    def sample(rows, inputs):
        keys = row_keys(jnp.int32(3), rows)
        guided = classifier_free(network, {"scale": inputs["scale"]}, {"scale": jnp.zeros_like(inputs["scale"])}, inputs["weight"])
        return ddim(guided, initial_noise(keys, SHAPE), plan).x
    results = {}
    for count in (1, 5, 8):
        for weight in (0.0, 1.5, 7.5):
            inputs = {"scale": np.linspace(0.1, 1, 8, dtype=np.float32)[:count], "weight": np.full(count, weight, np.float32)}
            results[count, weight] = np.concatenate(list(in_batches(sample, count, 3, inputs)))
            assert results[count, weight].shape == (count, *SHAPE)
    assert len(traces) == 1 and traces[0] == (6, *SHAPE)
    np.testing.assert_allclose(results[5, 1.5], results[8, 1.5][:5], rtol=1e-5, atol=1e-6)
    assert apart(results[8, 0.0], results[8, 7.5]) > 1e-2


def test_guidance_has_the_papers_weights_rescale_and_learned_variance():
    x, t = jnp.asarray(start((2, *SHAPE))), jnp.zeros(2, jnp.int32)

    def network(x, t, scale):
        return jnp.concatenate([x * scale[:, None, None, None] + 0.3, jnp.broadcast_to(scale[:, None, None, None], x.shape)], -1)
    condition, null = jnp.array([2.0, 3.0]), jnp.array([-1.0, 0.5])
    wanted, free = network(x, t, condition), network(x, t, null)
    for weight in (0.0, -1.0, 2.5):
        guided = classifier_free(network, condition, null, weight)(x, t)
        np.testing.assert_allclose(guided[..., :2], ((1 + weight) * wanted - weight * free)[..., :2], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(guided[..., 2:], wanted[..., 2:])
    plain, full, half = (classifier_free(network, condition, null, 4.0, rescale=r)(x, t)[..., :2] for r in (0.0, 1.0, 0.5))
    np.testing.assert_allclose(jnp.std(full, (1, 2, 3)), jnp.std(wanted[..., :2], (1, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(half, 0.5 * (plain + full), rtol=1e-4, atol=1e-5)
    bare, own = np.asarray(plain), np.asarray(wanted[..., :2])
    ratio = own.std(axis=(1, 2, 3), ddof=1, keepdims=True) / bare.std(axis=(1, 2, 3), ddof=1, keepdims=True)
    assert apart(classifier_free(network, condition, null, 4.0, rescale=0.7)(x, t)[..., :2], 0.7 * bare * ratio + 0.3 * bare) < 1e-5


def test_inpainting_keeps_what_is_known():
    known, mask = jnp.clip(start((2, *SHAPE)), -1, 1), jnp.zeros((1, 3, 2, 1)).at[:, :2].set(1.0)
    plan = discrete_plan(TABLES, 10)
    filled = repaint(NETWORK, start((2, *SHAPE), 1), known, mask, plan, noise_of(), jump_length=2, resamples=3)
    np.testing.assert_allclose(filled.x[:, :2], known[:, :2], atol=1e-6)
    assert apart(filled.x[:, 2], known[:, 2]) > 0.05
    moves = repaint_moves(10, 2, 3)
    assert sum(not up for up, _ in moves) - sum(up for up, _ in moves) == 10 and moves[-1] == (False, 9)
    assert repaint_moves(3, 5, 9) == [(False, 0), (False, 1), (False, 2)]


def test_image_to_image_starts_where_its_plan_does():
    image, eps = start((2, *SHAPE)), start((2, *SHAPE), 1)
    plan = discrete_plan(TABLES, 10).tail(0.3)
    assert len(plan) == 3 and plan.times[0] == 4
    alpha_bar = TABLES.alpha_bar[4]
    np.testing.assert_allclose(renoised(image, plan, eps), np.sqrt(alpha_bar) * image + np.sqrt(1 - alpha_bar) * eps, rtol=1e-5)
    sigmas = edm_plan(10).tail(0.5)
    assert len(sigmas) == 5 and len(sigmas.sigmas) == 6
    np.testing.assert_allclose(renoised(image, sigmas, eps), image + sigmas.sigmas[0] * eps, rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 3, 10])
def test_frames_are_evenly_spaced_and_end_at_the_end(frames):
    every = ddim(NETWORK, start((2, *SHAPE)), discrete_plan(TABLES, 10), frames=10)
    some = ddim(NETWORK, start((2, *SHAPE)), discrete_plan(TABLES, 10), frames=frames)
    places = {1: [9], 3: [0, 4, 9], 10: list(range(10))}[frames]
    np.testing.assert_array_equal(some.frames_x, every.frames_x[np.array(places)])
    np.testing.assert_array_equal(some.frames_x0, every.frames_x0[np.array(places)])
    np.testing.assert_allclose(every.frames_x0[-1], every.x, rtol=1e-5, atol=1e-6)       # the last step goes to its x_0
    ends = heun(NETWORK, start((2, *SHAPE)), edm_plan(10), frames=frames)
    assert ends.frames_x.shape == (frames, 2, *SHAPE)


def test_churn_adds_the_variance_that_it_takes_away_again():
    """Exact denoiser of a Gaussian: churned or not, samples have its deviation."""
    def network(x, t):      # F of D(x) = x 0.25 / (sigma^2 + 0.25), which is what c_skip alone says
        return jnp.zeros_like(x)
    plan = edm_plan(40).churned(30, 0.01, 10)
    assert np.all(plan.raised >= plan.sigmas[:-1]) and plan.raised[0] == plan.sigmas[0] and plan.raised[20] > plan.sigmas[20]
    keys = row_keys(jnp.int32(0), jnp.arange(300))
    x = plan.scale * initial_noise(keys, SHAPE)

    def deviation(plan):
        """Of Heun's method on this linear field, by its variance from step to step."""
        variance = plan.scale ** 2
        for before, raised, after in zip(plan.sigmas[:-1], plan.raised, plan.sigmas[1:], strict=True):
            here, there = raised / (raised ** 2 + 0.25), after / (after ** 2 + 0.25)
            factor = 1 + (after - raised) * here
            factor = 1 + (after - raised) / 2 * (here + there * factor) if after else factor
            variance = (variance + raised ** 2 - before ** 2) * factor ** 2
        return np.sqrt(variance)
    assert deviation(edm_plan(40)) == pytest.approx(0.5, abs=5e-3) and deviation(plan) == pytest.approx(0.5, abs=0.05)
    for made, expected in ((heun(network, x, plan, noise=row_noise(keys, SHAPE)), deviation(plan)), (heun(network, x, edm_plan(40)), deviation(edm_plan(40)))):
        assert float(jnp.std(made.x)) == pytest.approx(expected, abs=0.02)


def test_thresholds_and_interpolation():
    x0 = jnp.array([[0.5, -0.2, 4.0, 1.0], [0.1, 0.2, 0.3, 0.4]])
    limited = dynamic_threshold(x0, 0.75)
    assert float(jnp.max(jnp.abs(limited))) <= 1 and np.allclose(limited[1], x0[1])
    a, b = start((3, 50)), start((3, 50), 1)
    middle = slerp(a, b, 0.5)
    assert np.all(np.abs(np.linalg.norm(middle, axis=1) / np.linalg.norm(a, axis=1) - 1) < 0.25)
    np.testing.assert_allclose(slerp(a, b, jnp.array([0.0, 1.0, 0.0])), np.stack([a[0], b[1], a[2]]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(slerp(a, 2 * a, 0.5), 1.5 * a, rtol=1e-4)


ZERO = Tables(np.array([0.9, 0.5, 0.0]))


@pytest.mark.parametrize("call, message", [
    (lambda x: ddim(NETWORK, x, discrete_plan(TABLES, 5), eta=0.5), "noise=row_noise"),
    (lambda x: ddim(NETWORK, x, discrete_plan(TABLES, 5), eta=-0.5), "negative"),
    (lambda x: ddim(NETWORK, x, discrete_plan(TABLES, 5), prediction="noise"), "prediction"),
    (lambda x: ddim(NETWORK, x, discrete_plan(ZERO)), "terminal SNR"),
    (lambda x: ddim(NETWORK, x, discrete_plan(TABLES, 5), frames=6), "6 frames of 5"),
    (lambda x: ancestral(NETWORK, x, discrete_plan(TABLES, 5), noise_of(), variance="learned_range"), r"\(2, 3, 2, 4\)"),
    (lambda x: ancestral(lambda x, t: x[..., :1], x, discrete_plan(TABLES, 5), noise_of()), r"\(2, 3, 2, 1\)"),
    (lambda x: ddim_invert(NETWORK, x, discrete_plan(TABLES, 5), prediction="x0"), 'final="first"'),
    (lambda x: ddim_invert(NETWORK, x, discrete_plan(TABLES, 5), iterations=0), "at least 1"),
    (lambda x: dpm_solver(NETWORK, x, solver_plan(TABLES, 5), order=4), "order 4"),
    (lambda x: dpm_solver(NETWORK, x, discrete_plan(ZERO), prediction="v"), "solver_plan"),
    (lambda x: euler(NETWORK, x, edm_plan(5).churned(10)), "noise=row_noise"),
    (lambda x: euler(NETWORK, x, edm_plan(5), prediction="eps"), "sigma_plan"),
    (lambda x: repaint(NETWORK, x, x[:1], x, discrete_plan(TABLES, 5), noise_of()), "must be equal"),
    (lambda x: repaint(NETWORK, x, x, x, discrete_plan(TABLES, 5), noise_of(), resamples=0), "at least 1"),
    (lambda x: classifier_free(lambda x, t, c: x, None, None, 1.0), "conditional model"),
    (lambda x: classifier_free(lambda x, t, c: x, x, x[:1], 1.0), "structure or shape"),
    (lambda x: classifier_free(lambda x, t, c: x, x[:1], x[:1], 1.0)(x, jnp.zeros(2)), "one row an image"),
    (lambda x: list(in_batches(lambda r, i: r, 0, 4)), "at least 1"),
    (lambda x: list(in_batches(lambda r, i: r, 3, 4, {"a": np.zeros(2)})), "one row an image"),
])
def test_what_cannot_work_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call(jnp.asarray(start((2, *SHAPE))))


def test_a_threshold_reaches_every_sampler():
    x, limit = 3 * start((2, *SHAPE)), partial(jnp.clip, min=-0.1, max=0.1)
    plans = (discrete_plan(TABLES, 5), solver_plan(TABLES, 5), edm_plan(5))
    ends = [ancestral(NETWORK, x, plans[0], noise_of(), threshold=limit).x, ddim(NETWORK, x, plans[0], threshold=limit).x,
            dpm_solver(NETWORK, x, plans[1], threshold=limit).x, euler(NETWORK, x, plans[2], threshold=limit).x, heun(NETWORK, x, plans[2], threshold=limit).x]
    for end in ends:
        assert float(jnp.max(jnp.abs(end))) <= 0.1 + 1e-4

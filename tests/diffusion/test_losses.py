"""Losses against closed forms: weightings agree across parameterisations, the decoder sums to 1, the hybrid loss stops the mean."""
from functools import partial

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.stand_in import apart, start
from vlm_jax.diffusion import losses, process, schedules, step_sampling
from vlm_jax.errors import ConfigError

TABLES = schedules.build_tables("linear", 20, start=0.01, end=0.3)


@pytest.fixture(scope="module")
def decoder():
    return jax.jit(losses.discretised_gaussian, static_argnums=3)


@settings(max_examples=20, deadline=None)
@given(mean=st.floats(-1.5, 1.5), log_deviation=st.floats(-6, 1))
def test_the_discretised_gaussian_sums_to_one(decoder, mean, log_deviation):
    values = np.linspace(-1, 1, 256, dtype=np.float32)
    for approximate in (True, False):
        total = np.exp(np.float64(decoder(values, mean, log_deviation, approximate))).sum()
        assert total == pytest.approx(1, abs=2e-5)


def test_the_discretised_gaussian_is_the_bin_of_the_normal(decoder):
    from scipy.stats import norm
    values = np.array([-1, -0.5, 0.5 * 2 / 255, 1], np.float32)
    exact = [norm.cdf(-1 + 1 / 255, 0.1, 0.3), *(norm.cdf(v + 1 / 255, 0.1, 0.3) - norm.cdf(v - 1 / 255, 0.1, 0.3) for v in values[1:3]),
             norm.sf(1 - 1 / 255, 0.1, 0.3)]
    np.testing.assert_allclose(decoder(values, 0.1, np.log(0.3), False), np.log(exact), rtol=1e-4)
    np.testing.assert_allclose(decoder(values, 0.1, np.log(0.3), True), np.log(exact), rtol=0.05)
    assert float(decoder(np.float32(0.5), -1.0, -8.0, True)) == pytest.approx(np.log(1e-12))


@pytest.mark.parametrize("weighting", ["min_snr", "edm"])
def test_a_weighting_is_the_same_loss_in_every_parameterisation(weighting):
    x0, eps, wrong = start((4, 3, 2)), start((4, 3, 2), 1), start((4, 3, 2), 2)
    signal, noise = process.levels(TABLES, jnp.array([0, 4, 9, 19]))
    x = process.diffuse(x0, eps, signal, noise)
    found = [losses.prediction_loss(process.from_x0(wrong, x, signal, noise, kind), x0, eps, signal, noise, prediction=kind, weighting=weighting)
             for kind in process.PREDICTIONS]
    for value in found:
        assert apart(value, found[1]) < 1e-3
    snr, error = (signal / noise) ** 2, losses.mean_flat((wrong - x0) ** 2)
    sigma = noise / signal
    factor = jnp.minimum(snr, 5.0) if weighting == "min_snr" else (sigma ** 2 + 0.25) / (0.5 * sigma) ** 2
    assert apart(found[1], factor * error) < 1e-4


def test_simple_loss_of_a_network_that_says_zero_is_one_per_dimension():
    x0, eps = start((64, 8, 8, 1)), start((64, 8, 8, 1), 1)
    value = losses.prediction_loss(jnp.zeros_like(x0), x0, eps, *process.levels(TABLES, jnp.arange(64) % 20))
    total, weight = losses.weighted(value)
    assert float(total / weight) == pytest.approx(1, abs=0.05) and float(weight) == 64
    assert np.isfinite(losses.loss_weight(jnp.float32(0), jnp.float32(1), "eps", "min_snr")) and losses.loss_weight(0.0, 1.0, "eps", "min_snr") == 1


def test_rows_of_weight_zero_count_for_nothing_even_if_they_are_not_finite():
    total, weight = losses.weighted(jnp.array([1.0, jnp.nan, 3.0]), jnp.array([1.0, 0.0, 2.0]))
    assert float(total) == 7 and float(weight) == 3
    gradient = jax.grad(lambda v: losses.weighted(jnp.log(v), jnp.array([1.0, 0.0]))[0])(jnp.array([2.0, 1.0]))
    np.testing.assert_allclose(gradient, [0.5, 0])


def test_terms_of_the_bound_are_weighted_errors_of_eps():
    """With sigma^2 = beta, L_{t-1} = KL of the variances + beta^2 / (2 sigma^2 alpha (1 - alpha_bar)) |eps - eps_theta|^2 (DDPM, equation 12)."""
    x0, eps, said = start((3, 5)), start((3, 5), 1), start((3, 5), 2)
    t = jnp.array([1, 7, 19])
    x = process.q_sample(x0, t, eps, TABLES)
    bits = losses.bound_term(said, x0, x, t, TABLES, variance="large").bits
    beta, small = TABLES.betas[np.array(t)], TABLES.posterior_variance[np.array(t)]
    variances = 0.5 * (np.log(beta / small) + small / beta - 1)
    weight = beta / (2 * (1 - beta) * (1 - TABLES.alpha_bar[np.array(t)]))
    np.testing.assert_allclose(bits * np.log(2), variances + weight * np.mean((eps - said) ** 2, axis=1), rtol=1e-4)
    scaled = losses.bound_loss(said, x0, x, t, TABLES, variance="large")
    np.testing.assert_allclose(scaled, 20 * bits, rtol=1e-6)


def test_the_perfect_prediction_costs_no_rate():
    x0, eps = start((2, 4)), start((2, 4), 1)
    t = jnp.array([3, 12])
    bits = losses.bound_term(eps, x0, process.q_sample(x0, t, eps, TABLES), t, TABLES, variance="small").bits
    np.testing.assert_allclose(bits, 0, atol=1e-5)
    last = TABLES.alpha_bar[-1]
    kl = 0.5 * np.mean((1 - last) + last * x0 ** 2 - 1 - np.log1p(-last), axis=1) / np.log(2)
    np.testing.assert_allclose(losses.prior_term(x0, TABLES), kl, rtol=1e-3, atol=1e-6)


def test_the_hybrid_loss_trains_the_mean_by_its_simple_part_only():
    x0, eps, output = start((2, 3, 4)), start((2, 3, 4), 1), start((2, 3, 8), 2)
    t = jnp.array([0, 9])

    def hybrid(output):
        return losses.hybrid_loss(output, x0, eps, t, TABLES).sum()

    def simple(output):
        return losses.prediction_loss(output[..., :4], x0, eps, *process.levels(TABLES, t)).sum()

    def bound(output):
        return losses.bound_loss(output, x0, process.q_sample(x0, t, eps, TABLES), t, TABLES, variance="learned_range").sum()
    both, only, rest = jax.jit(lambda o: (jax.grad(hybrid)(o), jax.grad(simple)(o), jax.grad(bound)(o)))(output)
    np.testing.assert_allclose(both[..., :4], only[..., :4], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(both[..., 4:], 0.001 * rest[..., 4:], rtol=1e-4, atol=1e-7)
    assert np.abs(both[..., 4:]).min() > 0 and np.isfinite(both).all()


def test_edm_loss_is_the_plain_error_of_f():
    x0, eps, sigma = start((3, 4, 4, 1)), start((3, 4, 4, 1), 1), jnp.array([0.01, 0.7, 30.0])
    seen = []

    def network(x, t):
        seen.append((x, t))
        return jnp.tanh(x)
    loss = losses.edm_loss(network, x0, eps, sigma)
    x, t = seen[0]
    np.testing.assert_allclose(t, np.log(sigma) / 4, rtol=1e-5)
    c = process.preconditioning(jnp.ones(3), sigma)
    noisy = process.diffuse(x0, eps, 1.0, sigma)
    wide = tuple(part.reshape(3, 1, 1, 1) for part in c)
    denoised = wide[0] * noisy + wide[1] * jnp.tanh(wide[2] * noisy)
    weight = (sigma ** 2 + 0.25) / (0.5 * sigma) ** 2
    np.testing.assert_allclose(loss, weight * losses.mean_flat((denoised - x0) ** 2), rtol=2e-3)


def test_steps_are_drawn_in_proportion_to_their_losses_once_all_are_known():
    history = step_sampling.step_history(4, 2)
    np.testing.assert_allclose(step_sampling.step_probabilities(history), 0.25)
    update = jax.jit(step_sampling.update_history)
    for losses_of in ([1.0, 2.0, 3.0, 4.0, 9.0], [3.0, 2.0, 1.0, 4.0, jnp.nan]):
        history = update(history, jnp.array([0, 1, 2, 3, 0]), jnp.array(losses_of), jnp.array([1.0, 1, 1, 1, 1]))
    np.testing.assert_array_equal(history.losses[0], [9, 3])        # the third value of step 0 pushed the first out
    np.testing.assert_array_equal(history.counts, [2, 2, 2, 2])
    size = np.sqrt([(81 + 9) / 2, 4, (9 + 1) / 2, 16])
    probabilities = step_sampling.step_probabilities(history)
    np.testing.assert_allclose(probabilities, 0.999 * size / size.sum() + 0.001 / 4, rtol=1e-5)
    t, weights = step_sampling.sample_steps(jax.random.key(0), 4000, history)
    np.testing.assert_allclose(np.bincount(t, minlength=4) / 4000, probabilities, atol=0.03)
    assert float(jnp.mean(weights * t)) == pytest.approx(1.5, abs=0.1)      # the uniform mean of t
    unchanged = update(history, jnp.array([2]), jnp.array([50.0]), jnp.array([0.0]))
    np.testing.assert_array_equal(unchanged.losses, history.losses)
    t, weights = step_sampling.sample_steps(jax.random.key(1), 100, 7)
    assert set(np.unique(t)) <= set(range(7)) and np.all(weights == 1)


@pytest.mark.parametrize("make", [
    partial(losses.loss_weight, 0.5, 0.5, "eps", "minsnr"), partial(step_sampling.step_history, 0), partial(step_sampling.step_history, 5, 0)])
def test_unknown_names_and_empty_histories_are_refused(make):
    with pytest.raises(ConfigError):
        make()

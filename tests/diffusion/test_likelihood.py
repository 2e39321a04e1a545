"""Bits/dim on Gaussian data, whose likelihood and score are known."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.ddpm_gaussian.run import DEVIATION, MEAN, chain_deviation, data, edm_denoiser, exact_bits, exact_denoiser
from vlm_jax.diffusion import ancestral, build_tables, discrete_plan, edm_plan, flow_likelihood, initial_noise, row_keys, row_noise, sigma_plan
from vlm_jax.diffusion.likelihood import variational_bound
from vlm_jax.errors import ConfigError

ROWS, SHAPE = 256, (4, 4, 1)
TABLES = build_tables("linear", 100, start=1e-4, end=0.15)
NOISE = row_noise(row_keys(jnp.int32(0), jnp.arange(ROWS)), SHAPE)


def density(x):
    """log N(x; MEAN, DEVIATION^2) of each row."""
    return -0.5 * np.sum(((x - MEAN) / DEVIATION) ** 2 + np.log(2 * np.pi * DEVIATION ** 2), axis=(1, 2, 3))


@pytest.fixture(scope="module")
def bound():
    return jax.jit(lambda x: variational_bound(exact_denoiser(TABLES), x, TABLES, NOISE, variance="learned_range"))(data(ROWS, 1))


def test_the_bound_of_the_true_reverse_process_is_the_entropy(bound):
    assert float(jnp.mean(bound.total)) == pytest.approx(exact_bits(), rel=0.015)
    np.testing.assert_allclose(bound.total, bound.prior + bound.terms.sum(0), rtol=1e-5)
    assert bound.terms.shape == (100, ROWS) and float(jnp.mean(bound.prior)) < 1e-3
    assert float(jnp.min(jnp.mean(bound.terms, axis=1))) > 0


def test_progressive_coding_sends_more_bits_for_smaller_errors(bound):
    sent, error = (np.mean(np.asarray(curve), axis=1) for curve in bound.progressive())
    assert sent.shape == error.shape == (100,)
    assert np.all(np.diff(sent) > -1e-5) and sent[-1] == pytest.approx(float(jnp.mean(bound.rate)), rel=1e-4)
    assert error[0] == pytest.approx(127.5 * DEVIATION, rel=0.1) and error[-1] < 3


def test_fixed_variances_cost_bits(bound):
    network = exact_denoiser(TABLES)
    fixed = jax.jit(lambda x: variational_bound(lambda x, t: network(x, t)[..., :1], x, TABLES, NOISE))(data(ROWS, 1))
    assert float(jnp.mean(fixed.total)) > float(jnp.mean(bound.total)) + 0.05


def test_ancestral_samples_have_the_chains_moments():
    network, plan = exact_denoiser(TABLES), discrete_plan(TABLES)
    keys = row_keys(jnp.int32(0), jnp.arange(ROWS))
    for variance in ("small", "learned_range"):
        made = jax.jit(lambda x, variance=variance: ancestral(
            network if variance == "learned_range" else lambda x, t: network(x, t)[..., :1], x, plan, NOISE, variance=variance).x)(initial_noise(keys, SHAPE))
        goal, count = chain_deviation(plan, variance), made.size
        assert abs(float(jnp.mean(made)) - MEAN) < 4 * goal / np.sqrt(count)
        assert abs(float(jnp.var(made)) / goal ** 2 - 1) < 4 * np.sqrt(2 / count)


@pytest.mark.parametrize("method, steps", [("heun", 120), ("rk4", 20)])
def test_the_flow_gives_the_density(method, steps):
    x = np.asarray(MEAN + DEVIATION * np.random.default_rng(0).standard_normal((3, *SHAPE)), np.float32)
    found = jax.jit(lambda x: flow_likelihood(edm_denoiser(), x, edm_plan(steps), method=method, divergence="exact"))(x)
    np.testing.assert_allclose(found.log_density, density(x), atol=0.2)
    np.testing.assert_allclose(found.bits, -density(x) / 16 / np.log(2) + np.log2(127.5), atol=0.02)
    assert np.abs(found.latent).max() > 20


def test_hutchinson_is_exact_for_a_diagonal_jacobian_and_discrete_networks_agree():
    x = np.asarray(MEAN + DEVIATION * np.random.default_rng(0).standard_normal((2, *SHAPE)), np.float32)
    tables = build_tables("linear", 1000)
    table = jnp.asarray(np.log(tables.sigmas), jnp.float32)

    def by_time(x, t):      # eps at fractional steps
        sigma = jnp.exp(jnp.interp(t, jnp.arange(1000.0), table)).reshape(-1, 1, 1, 1)
        return sigma * (x * jnp.sqrt(1 + sigma ** 2) - MEAN) / (sigma ** 2 + DEVIATION ** 2)
    probes = jax.random.rademacher(jax.random.key(0), (1, *x.shape)).astype(jnp.float32)
    found = jax.jit(lambda x: flow_likelihood(by_time, x, sigma_plan(tables, 40, karras=True), prediction="eps", method="rk4", probes=probes))(x)
    sigma = tables.sigmas[0]        # the density at the lowest noise level, where the integral begins
    expected = -0.5 * np.sum((x - MEAN) ** 2 / (DEVIATION ** 2 + sigma ** 2) + np.log(2 * np.pi * (DEVIATION ** 2 + sigma ** 2)), axis=(1, 2, 3))
    np.testing.assert_allclose(found.log_density, expected, atol=0.2)


@pytest.mark.parametrize("arguments, message", [
    (dict(), "probes"), (dict(method="euler"), "euler"), (dict(divergence="trace"), "trace"), (dict(prediction="eps"), "sigma_plan"),
    (dict(plan=edm_plan(1)), "two noise levels")])
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        flow_likelihood(edm_denoiser(), jnp.zeros((1, *SHAPE)), **{"plan": edm_plan(5)} | arguments)

"""Schedules, the process's closed forms, conversions, and what is refused."""
import re

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.diffusion.stand_in import apart, start
from vlm_jax.diffusion import process, schedules
from vlm_jax.diffusion.plans import discrete_plan, edm_plan, sigma_plan, solver_plan, timesteps
from vlm_jax.errors import ConfigError

LINEAR = schedules.build_tables("linear", 1000)


def test_the_published_schedule():
    """Values of alpha_bar of DDPM's schedule (steps counted from 1), and of the bound's weights relative to L_simple."""
    for step, value in {1: 0.9999, 100: 0.897, 250: 0.524, 500: 0.0786, 750: 0.00335, 1000: 4.036e-5}.items():
        assert LINEAR.alpha_bar[step - 1] == pytest.approx(value, rel=2e-3)
    weights = LINEAR.betas / (2 * (1 - LINEAR.betas) * (1 - LINEAR.alpha_bar))      # beta^2 / (2 beta alpha (1 - alpha_bar))
    for step, value in {1: 0.500, 2: 0.273, 10: 0.074, 100: 0.0101, 500: 0.0055, 1000: 0.0102}.items():
        assert weights[step - 1] == pytest.approx(value, rel=0.02)


def test_cosine_and_zero_terminal_snr_end_where_they_should():
    cosine = schedules.build_tables("cosine", 50)
    assert cosine.betas.max() == pytest.approx(0.999) and 0 < cosine.alpha_bar[-1] < 1e-5
    f = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(cosine.alpha_bar[:-1], (f[1:] / f[0])[:-1], rtol=1e-9)
    rescaled = schedules.build_tables("scaled_linear", 50, zero_snr=True)
    assert rescaled.alpha_bar[-1] == 0 and rescaled.alpha_bar[0] == pytest.approx(schedules.build_tables("scaled_linear", 50).alpha_bar[0])
    sigmoid = schedules.sigmoid(11, 0.1, 0.3)
    assert sigmoid[5] == pytest.approx(0.2) and 0.1 < sigmoid[0] < 0.101 and 0.299 < sigmoid[-1] < 0.3


def test_edm_sigmas_are_the_published_ones():
    sigmas = schedules.edm_sigmas(18)
    assert sigmas[0] == pytest.approx(80) and sigmas[-1] == pytest.approx(0.002) and np.all(np.diff(sigmas) < 0)
    assert sigmas[1] == pytest.approx((80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17) ** 7)
    drawn = np.log(schedules.training_sigmas(jax.random.key(0), 4000))
    assert abs(drawn.mean() + 1.2) < 0.06 and abs(drawn.std() - 1.2) < 0.05


@pytest.mark.parametrize("make, message", [
    (lambda: schedules.build_tables("linear", 0), "0 steps; a whole number T from 1"),
    (lambda: schedules.build_tables("linear", -3), "-3 steps"),
    (lambda: schedules.build_tables("linear", 2.5), "2.5 steps"),
    (lambda: schedules.build_tables("linear", 10, end=1.0), r"beta 1 of step 1 lies outside \(0, 1\)"),
    (lambda: schedules.build_tables("scaled_linear", 10, start=0.0), r"beta 0 of step 0 lies outside \(0, 1\)"),
    (lambda: schedules.build_tables("sigmoid", 10, start=-1e-3), "outside"),
    (lambda: schedules.tables([0.1, float("nan")]), "beta nan of step 1"),
    (lambda: schedules.tables([]), "0 steps"),
    (lambda: schedules.tables([[0.1]]), "shape"),
    (lambda: schedules.build_tables("given", 3, betas=[0.1, 0.2]), "2 betas are given for 3 steps"),
    (lambda: schedules.build_tables("cosin", 10), 'Did you mean "cosine"'),
    (lambda: schedules.build_tables("cosine", 10, offst=1), 'Did you mean "offset"'),
    (lambda: schedules.build_tables("cosine", 10, cap=1.0), "cap 1.0"),
    (lambda: schedules.tables_of_alpha_bar([0.5, 0.6]), "fall"),
    (lambda: schedules.zero_terminal_snr(schedules.tables([0.1])), "2 steps"),
    (lambda: schedules.respaced(LINEAR, [5, 3]), "ascend"),
    (lambda: schedules.edm_sigmas(5, 1.0, 0.5), "smallest < largest"),
    (lambda: schedules.edm_sigmas(5, rho=0), "rho"),
    (lambda: timesteps(10, 11), "11 sampling steps of a process of 10"),
    (lambda: timesteps(10, 5, "leeding"), 'Did you mean "leading"'),
    (lambda: timesteps(10, 5, offset=2), "lower the offset"),
    (lambda: discrete_plan(LINEAR, 10, final="end"), "final"),
    (lambda: discrete_plan(LINEAR, 10).tail(0.05), "leaves no step of 10"),
    (lambda: discrete_plan(LINEAR, 10).tail(1.5), "strength 1.5"),
    (lambda: edm_plan(10).tail(0), "strength 0"),
    (lambda: edm_plan(10).churned(-1), "churn"),
    (lambda: edm_plan(10).check("eps"), '"edm"'),
    (lambda: sigma_plan(LINEAR, 10).check("edm"), "sigma_plan"),
    (lambda: process.check_prediction("epsilon"), "Did you mean|Known"),
    (lambda: process.check_variance("smal"), 'Did you mean "small"'),
    (lambda: process.split_output(jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 4, 4, 3)), "learned_range"), r"\(2, 4, 4, 6\)"),
    (lambda: process.split_output(jnp.zeros((2, 4, 4, 1)), jnp.zeros((2, 4, 4, 3)), "small"), r"\(2, 4, 4, 1\)"),
])
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert re.search(message, str(caught.value)) and "\n" not in str(caught.value)


def test_posterior_agrees_with_bayes_on_a_grid():
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised numerically."""
    tables = schedules.tables([0.1, 0.3, 0.2])
    grid = np.linspace(-8, 8, 20001)
    for t, x0, x in ((1, 0.7, -0.4), (2, -1.2, 1.5)):
        before = tables.alpha_bar[t - 1]
        log = -(x - np.sqrt(1 - tables.betas[t]) * grid) ** 2 / (2 * tables.betas[t]) - (grid - np.sqrt(before) * x0) ** 2 / (2 * (1 - before))
        density = np.exp(log - log.max())
        density /= density.sum()
        mean = np.sum(density * grid)
        ours = process.posterior_mean(jnp.full((1, 1), x0), jnp.full((1, 1), x), jnp.array([t]), tables)
        assert float(ours[0, 0]) == pytest.approx(mean, abs=1e-5)
        assert tables.posterior_variance[t] == pytest.approx(np.sum(density * (grid - mean) ** 2), rel=1e-5)
    assert tables.posterior_variance[0] == 0 and tables.posterior_x0[0] == pytest.approx(1)


def test_forward_process_composes():
    """A step of q after x_{t-1} has the closed form's mean and variance."""
    tables = schedules.build_tables("cosine", 20)
    signal, variance = 1.0, 0.0
    for t, beta in enumerate(tables.betas):
        signal, variance = signal * np.sqrt(1 - beta), variance * (1 - beta) + beta
        assert signal == pytest.approx(tables.signal[t]) and variance == pytest.approx(tables.noise[t] ** 2)
    small = schedules.respaced(LINEAR, [0, 10, 500, 999])
    np.testing.assert_allclose(small.alpha_bar, LINEAR.alpha_bar[[0, 10, 500, 999]])
    np.testing.assert_allclose(np.cumprod(1 - small.betas), small.alpha_bar)


@pytest.fixture(scope="module")
def convert():
    return jax.jit(process.convert, static_argnums=(4, 5))


@settings(max_examples=12, deadline=None)
@given(angle=st.floats(0.05, 1.5), scale=st.sampled_from([1.0, 3.0]), seed=st.integers(0, 9))
def test_conversions_go_round(convert, angle, scale, seed):
    rng = np.random.default_rng(seed)
    x0, eps = (rng.standard_normal((3, 2, 4)).astype(np.float32) for _ in range(2))
    signal, noise = (np.full(3, scale * f(angle), np.float32) for f in (np.cos, np.sin))
    x = process.diffuse(x0, eps, signal, noise)
    for source in process.PREDICTIONS:
        said = process.training_target(x0, eps, signal, noise, source)
        for target in process.PREDICTIONS:
            there = convert(said, x, signal, noise, source, target)
            wanted = process.training_target(x0, eps, signal, noise, target)
            assert apart(there, wanted) < 1e-4, (source, target)


def test_v_and_edm_have_their_published_forms_and_limits():
    x, value = start((2, 3)), start((2, 3), 1)
    np.testing.assert_allclose(process.to_x0(value, x, 0.6, 0.8, "v"), 0.6 * x - 0.8 * value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(process.to_eps(value, x, 0.6, 0.8, "v"), 0.8 * x + 0.6 * value, rtol=1e-5, atol=1e-6)
    sigma, data = 2.0, 0.5
    c = process.preconditioning(1.0, sigma)
    assert float(c.skip) == pytest.approx(data ** 2 / (sigma ** 2 + data ** 2)) and float(c.input) == pytest.approx((sigma ** 2 + data ** 2) ** -0.5)
    assert float(c.out) == pytest.approx(sigma * data / np.sqrt(sigma ** 2 + data ** 2))
    np.testing.assert_allclose(process.to_x0(value, x, 1.0, 1e-5, "edm"), x, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(process.to_x0(value, x, 1.0, 1e5, "edm"), data * value, rtol=1e-3, atol=1e-4)
    assert np.all(np.isfinite(process.to_x0(value, x, 0.0, 1.0, "v")))      # a terminal SNR of 0


def test_learned_variance_spans_from_beta_tilde_to_beta():
    x = start((2, 3))
    for raw, wanted in ((-1.0, -4.0), (1.0, -2.0), (0.0, -3.0)):
        np.testing.assert_allclose(process.log_variance(jnp.full((2, 3), raw), x, jnp.float32(-4), jnp.float32(-2), "learned_range"), wanted)
    np.testing.assert_array_equal(process.log_variance(jnp.asarray(x), x, None, None, "learned"), x)


def test_spacings():
    assert timesteps(1000, 50)[[0, 1, -1]].tolist() == [980, 960, 0]
    assert timesteps(1000, 50, "trailing")[[0, -1]].tolist() == [999, 19]
    assert timesteps(1000, 3, "linspace").tolist() == [999, 500, 0] and timesteps(1000, 3, "linspace", rounded=False)[1] == 499.5
    assert timesteps(1000, 4, "linspace", open_end=True).tolist() == [999, 749, 500, 250]
    plan = solver_plan(LINEAR, 6)
    assert plan.connected and plan.after[-1] == 1 and len(plan.tail(0.5)) == 3
    assert discrete_plan(LINEAR).times.tolist() == list(range(999, -1, -1))
    assert not discrete_plan(LINEAR, 7, "linspace", stride=True).connected
    assert discrete_plan(LINEAR, 5, final="first").after[-1] == LINEAR.alpha_bar[0]
    assert edm_plan(1).sigmas.tolist() == pytest.approx([80.0, 0.0])

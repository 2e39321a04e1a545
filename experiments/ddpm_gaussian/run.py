"""Diffusion of Gaussian data, whose score is known: samples, posteriors and bits/dim against closed forms.

    python -m experiments.ddpm_gaussian.run
"""
import argparse
from collections.abc import Sequence
from functools import partial
import math
from pathlib import Path

import numpy as np

from experiments.results import write_results

MEAN, DEVIATION, SHAPE = 0.1, 0.25, (4, 4, 1)


def exact_denoiser(tables, mean: float = MEAN, deviation: float = DEVIATION):
    """`denoise(x, t)` of N(mean, deviation^2) data: eps = E[eps | x_t], then the raw variance for which "learned_range" is the true reverse variance."""
    import jax.numpy as jnp
    alpha_bar, before = tables.alpha_bar, tables.alpha_bar_before
    total = alpha_bar * deviation ** 2 + 1 - alpha_bar
    beta = tables.betas
    # x_{t-1} given x_t is a product of Gaussians: q(x_t | x_{t-1}) times the marginal of x_{t-1}
    marginal = before * deviation ** 2 + 1 - before
    log_reverse = np.log(marginal * beta / (marginal * (1 - beta) + beta))
    log_small, log_large = tables.log_small, np.log(beta)
    # at step 0 any variance between the ends is a decoder; beta's is the wide one, whose Gaussian is p(x_0 | x_1) to first order
    share = np.clip((log_reverse - log_small) / (log_large - log_small), 0, 1)
    factor = [jnp.asarray(table, jnp.float32) for table in (np.sqrt(1 - alpha_bar) / total, np.sqrt(alpha_bar) * mean, 2 * share - 1)]

    def denoise(x, t):
        scale, centre, raw = (table[t].reshape(-1, *(1,) * (x.ndim - 1)) for table in factor)
        return jnp.concatenate([scale * (x - centre), jnp.broadcast_to(raw, x.shape)], axis=-1)
    return denoise


def edm_denoiser(mean: float = MEAN, deviation: float = DEVIATION, sigma_data: float = 0.5):
    """F(input, log(sigma) / 4) of the same data."""
    import jax.numpy as jnp

    def denoise(x, t):
        sigma = jnp.exp(4 * t).reshape(-1, *(1,) * (x.ndim - 1))
        total = sigma ** 2 + sigma_data ** 2
        noisy = x * jnp.sqrt(total)
        image = (deviation ** 2 * noisy + sigma ** 2 * mean) / (sigma ** 2 + deviation ** 2)
        return (image - sigma_data ** 2 / total * noisy) * jnp.sqrt(total) / (sigma * sigma_data)
    return denoise


def chain_deviation(plan, variance: str | None, deviation: float = DEVIATION) -> float:
    """The deviation that a chain of linear steps ends with, exactly: of DDIM (variance None) or of ancestral sampling."""
    total = 1.0
    for before, after in zip(plan.alpha_bar, plan.after, strict=True):
        marginal = before * deviation ** 2 + 1 - before
        image = np.sqrt(before) * deviation ** 2 / marginal           # of x in E[x_0 | x]
        beta, last = 1 - before / after, after == 1
        if variance is None:
            total *= (np.sqrt(after) * image + np.sqrt(1 - after) * np.sqrt(1 - before) / marginal) ** 2
            continue
        factor = np.sqrt(after) * beta / (1 - before) * image + np.sqrt(1 - beta) * (1 - after) / (1 - before)
        goal = after * deviation ** 2 + 1 - after
        added = {"small": beta * (1 - after) / (1 - before), "large": beta, "learned_range": goal * beta / (goal * (1 - beta) + beta)}[variance]
        total = total * factor ** 2 + (0 if last else added)
    return math.sqrt(total)


def exact_bits(mean: float = MEAN, deviation: float = DEVIATION) -> float:
    """Bits/dim of the 256 values' true distribution (a discretised Gaussian), which no code undercuts."""
    edges = np.linspace(-1 - 1 / 255, 1 + 1 / 255, 257)
    cumulative = np.array([0.5 * (1 + math.erf((edge - mean) / deviation / math.sqrt(2))) for edge in edges])
    cumulative[[0, -1]] = 0, 1
    p = np.diff(cumulative)
    return float(-np.sum(p[p > 0] * np.log2(p[p > 0])))


def data(count: int, seed: int) -> np.ndarray:
    """[count, *SHAPE] draws, rounded to the 256 values of 8 bits."""
    draws = MEAN + DEVIATION * np.random.default_rng(seed).standard_normal((count, *SHAPE))
    return (np.round((np.clip(draws, -1, 1) + 1) * 127.5) / 127.5 - 1).astype(np.float32)


def measure(steps: int, rows: int, seed: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """(figures, {sampler: mean, deviation, what theory says and the differences in Monte-Carlo standard errors})."""
    import jax
    import jax.numpy as jnp

    from vlm_jax import diffusion
    from vlm_jax.diffusion import process
    tables = diffusion.build_tables("linear", steps)
    network = exact_denoiser(tables)

    def plain(x, t):
        return network(x, t)[..., :x.shape[-1]]
    keys = diffusion.row_keys(jnp.uint32(seed), jnp.arange(rows))
    noise, start = diffusion.row_noise(keys, SHAPE), diffusion.initial_noise(keys, SHAPE)
    full, short, edm = diffusion.discrete_plan(tables), diffusion.discrete_plan(tables, 100, "trailing"), diffusion.edm_plan(40)
    runs = {
        "ancestral_small": partial(diffusion.ancestral, plain, start, full, noise), "ancestral_large": partial(
            diffusion.ancestral, plain, start, full, noise, variance="large"),
        "ancestral_learned": partial(diffusion.ancestral, network, start, full, noise, variance="learned_range"),
        "ddim_100": partial(diffusion.ddim, plain, start, short), "dpm_solver_50": partial(
            diffusion.dpm_solver, plain, start, diffusion.solver_plan(tables, 50, "trailing", karras=True), order=2),
        "heun_edm_40": partial(diffusion.heun, edm_denoiser(), edm.scale * start, edm)}
    expected = {"ancestral_small": chain_deviation(full, "small"), "ancestral_large": chain_deviation(full, "large"),
                "ancestral_learned": chain_deviation(full, "learned_range"), "ddim_100": chain_deviation(short, None)}
    table = {}
    for name, sample in runs.items():
        drawn = np.asarray(jax.jit(lambda sample=sample: sample().x)(), np.float64)
        mean, deviation, count = drawn.mean(), drawn.std(ddof=1), drawn.size
        goal = expected.get(name, DEVIATION)
        table[name] = {"mean": mean, "deviation": deviation, "closed_form_deviation": goal,
                       "mean_in_standard_errors": (mean - MEAN) / (goal / math.sqrt(count)),
                       "variance_in_standard_errors": (deviation ** 2 / goal ** 2 - 1) / math.sqrt(2 / (count - 1))}
        print(name, {key: round(float(value), 4) for key, value in table[name].items()}, flush=True)

    # the posterior, from joint draws of (x_{t-1}, x_t) at a known x_0, by regression on x_t
    t, x0, count = steps // 3, 0.6, 400_000
    rng = np.random.default_rng(seed)
    before = np.sqrt(tables.alpha_bar[t - 1]) * x0 + np.sqrt(1 - tables.alpha_bar[t - 1]) * rng.standard_normal(count)
    after = np.sqrt(1 - tables.betas[t]) * before + np.sqrt(tables.betas[t]) * rng.standard_normal(count)
    slope = np.cov(before, after)[0, 1] / after.var()
    residual = before - before.mean() - slope * (after - after.mean())
    at = float(after.mean())
    formula = float(process.posterior_mean(jnp.full((1, 1), x0), jnp.full((1, 1), at), jnp.array([t]), tables)[0, 0])

    images = jnp.asarray(data(rows, seed + 1))
    truth = exact_bits()
    bound = jax.jit(lambda x: diffusion.variational_bound(network, x, tables, noise, variance="learned_range"))(images)
    fixed = jax.jit(lambda x: diffusion.variational_bound(plain, x, tables, noise, variance="small"))(images)
    spread = np.random.default_rng(seed + 2).uniform(-1 / 255, 1 / 255, images.shape).astype(np.float32)
    flow = jax.jit(lambda x: diffusion.flow_likelihood(edm_denoiser(), x, diffusion.edm_plan(64), method="rk4", probes=jax.random.rademacher(
        jax.random.key(seed), (1, *x.shape)).astype(jnp.float32)))(images + spread)
    # the draws' own code length, so that a sample's luck is no error of the bound
    continuous = math.log2(DEVIATION * math.sqrt(2 * math.pi) * 127.5) + np.mean(((np.asarray(images) - MEAN) / DEVIATION) ** 2) / 2 / math.log(2)
    bits = {"bound": float(jnp.mean(bound.total)), "bound_fixed_small": float(jnp.mean(fixed.total)), "flow": float(jnp.mean(flow.bits))}
    print("bits/dim", bits, "exact", truth, "of these draws", continuous, flush=True)
    metrics = {
        "mean_error_standard_errors": max(abs(row["mean_in_standard_errors"]) for row in table.values()),
        "variance_error_standard_errors": max(abs(row["variance_in_standard_errors"]) for row in table.values()),
        "posterior_mean_error": abs(float(before.mean()) - formula),
        "posterior_variance_relative_error": abs(residual.var() / tables.posterior_variance[t] - 1),
        "bits_per_dim_exact": truth, "bits_per_dim_of_the_draws": float(continuous), "rate": float(jnp.mean(bound.rate)),
        "distortion": float(jnp.mean(bound.distortion)), "bits_per_dim_bound_standard_error": float(jnp.std(bound.total)) / math.sqrt(rows)}
    for name, value in bits.items():
        metrics |= {f"bits_per_dim_{name}": value, f"bits_per_dim_{name}_relative_error": abs(value / truth - 1)}
    return metrics, table


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Measures and writes results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(Path(__file__).parent))
    options = parser.parse_args(arguments)
    metrics, table = measure(options.steps, options.rows, options.seed)
    write_results(options.out, metrics, (options.seed,), samplers=table, steps=options.steps, rows=options.rows, dimensions=math.prod(SHAPE),
                  name="ddpm_gaussian")
    return metrics


if __name__ == "__main__":
    main()

"""Bits/dim of images: the variational bound with its terms, and exactly by the probability-flow ODE.

    the bound   Ho et al. (2020), section 3.2 and appendix D: rate (what is sent before the last step) and distortion (the decoder)
    the ODE     Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations" (2021), section 4.3 and appendix D.2;
                in EDM's coordinates dx / dsigma = (x - D(x; sigma)) / sigma (Karras et al. 2022, equation 1)
"""
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from vlm_jax.diffusion.losses import PIXEL_LEVELS, bound_term, prior_term
from vlm_jax.diffusion.noise import Noise
from vlm_jax.diffusion.plans import SigmaPlan
from vlm_jax.diffusion.process import q_sample, to_x0
from vlm_jax.diffusion.samplers import Denoise, Threshold
from vlm_jax.diffusion.schedules import Tables
from vlm_jax.diffusion.sigma_samplers import input_scale
from vlm_jax.errors import ConfigError

METHODS = ("heun", "rk4")
DIVERGENCES = ("hutchinson", "exact")


class Bound(NamedTuple):
    """The bound of each example in bits/dim: `prior` L_T [B], `terms` [T, B] (row 0 is the decoder, L_0), `x0_errors` [T, B], the mean squared error of x_0."""
    prior: Array
    terms: Array
    x0_errors: Array

    @property
    def rate(self) -> Array:
        """L_T + sum of the KL terms, [B]."""
        return self.prior + jnp.sum(self.terms[1:], axis=0)

    @property
    def distortion(self) -> Array:
        """The decoder's bits/dim, [B]."""
        return self.terms[0]

    @property
    def total(self) -> Array:
        """rate + distortion: an upper bound of the negative log-likelihood, [B]."""
        return self.rate + self.distortion

    def progressive(self) -> tuple[Array, Array]:
        """The curve of progressive coding (section 4.3): bits/dim sent when the steps down to T-1, .., 0 are known, and the RMSE (0 to 255) of x_0 then."""
        sent = self.prior + jnp.cumsum(jnp.concatenate([jnp.zeros_like(self.terms[:1]), self.terms[:0:-1]]), axis=0)
        return sent, (PIXEL_LEVELS - 1) / 2 * jnp.sqrt(self.x0_errors[::-1])


def variational_bound(denoise: Denoise, x0: Float[Array, "B ... C"], tables: Tables, noise: Noise, *, prediction: str = "eps", variance: str = "small",
                      threshold: Threshold = None) -> Bound:
    """Every term of the bound, by one draw of x_t for each of the T steps (T network calls under one scan).

    Args:
      x0: images in [-1, 1], on the 256 values of 8 bits (the decoder is the probability of a bin).
      noise: `noise(t)` -> [B, ...]. Others as in `losses.bound_term`.
    """
    def body(_, t):
        rows = jnp.full(len(x0), t)
        x = q_sample(x0, rows, noise(t), tables)
        return None, bound_term(denoise(x, rows), x0, x, rows, tables, prediction=prediction, variance=variance, threshold=threshold)
    _, terms = jax.lax.scan(body, None, jnp.arange(len(tables)))
    return Bound(prior_term(x0, tables), terms.bits, terms.x0_error)


class Likelihood(NamedTuple):
    """`bits` per dimension of 8-bit images [B], the `log_density` in nats of x as it was given [B], and the noise `latent` that x flows to, x's shape."""
    bits: Array
    log_density: Array
    latent: Array


def flow_likelihood(denoise: Denoise, x0: Float[Array, "B ... C"], plan: SigmaPlan, *, prediction: str = "edm", method: str = "heun",
                    divergence: str = "hutchinson", probes: Array | None = None, latent_deviation: float | None = None) -> Likelihood:
    """The likelihood under the probability-flow ODE, integrated from the plan's lowest sigma above 0 to its highest in equal steps of log sigma.

    Args:
      x0: images in [-1, 1]. For bits that bound those of the 8-bit images from above on average, add uniform noise of one bin's width (2 / 255).
      plan: of `plans.edm_plan` or `plans.sigma_plan`; its ends, its number of steps and its network's times are used.
      method: "heun" (2 calls a step) or "rk4" (4).
      divergence: "hutchinson", unbiased from `probes` [P, B, ...] (independent entries of mean 0 and variance 1; signs are best), or "exact", with as
        many derivatives as dimensions.
      latent_deviation: the deviation of the normal prior at the highest sigma; by default sqrt(sigma^2 + 1) for a discrete process and sigma for EDM.
    Raises:
      ConfigError: for unknown names, a plan of fewer than two levels, and Hutchinson's estimate without probes.
    """
    plan.check(prediction)
    if method not in METHODS or divergence not in DIVERGENCES:
        raise ConfigError(f'flow_likelihood: method "{method}" with divergence "{divergence}"; they are {METHODS} and {DIVERGENCES}.')
    levels = plan.sigmas[plan.sigmas > 0]
    low, high = levels.min(), levels.max()
    if low == high:
        raise ConfigError("flow_likelihood needs a plan of at least two noise levels; raise its count.")
    if divergence == "hutchinson" and probes is None:
        raise ConfigError('divergence "hutchinson" needs probes; give probes=jax.random.rademacher(key, (1, *x0.shape)), or take "exact".')
    if latent_deviation is None:
        latent_deviation = float(high) if prediction == "edm" else math.sqrt(high ** 2 + 1)
    count = len(plan)
    stride = math.log(high / low) / count
    offsets = np.array([0.0, 1.0]) if method == "heun" else np.array([0.0, 0.5, 0.5, 1.0])
    shares = np.array([0.5, 0.5]) if method == "heun" else np.array([1, 2, 2, 1]) / 6
    sigmas = low * np.exp(stride * (np.arange(count)[:, None] + offsets))
    stages = jnp.asarray(sigmas, jnp.float32), jnp.asarray(plan.time_of(sigmas), jnp.float32), jnp.asarray(
        input_scale(sigmas, prediction, plan.sigma_data), jnp.float32)
    x0 = jnp.asarray(x0, jnp.float32)
    size = math.prod(x0.shape[1:])
    axes = tuple(range(1, x0.ndim))

    def slope(x: Array, level: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        """(dx / dlog sigma, its divergence [B])."""
        sigma, time, scale = level

        def field(x: Array) -> Array:
            return x - to_x0(denoise(scale * x, jnp.broadcast_to(time, (len(x),))), x, 1.0, sigma, prediction, plan.sigma_data)
        value, pull = jax.vjp(field, x)
        if divergence == "exact":
            def entry(number):
                basis = jnp.zeros(size).at[number].set(1.0).reshape(x.shape[1:])
                return jnp.sum(pull(jnp.broadcast_to(basis, x.shape))[0] * basis, axes)
            return value, jnp.sum(jax.lax.map(entry, jnp.arange(size)), axis=0)
        return value, jnp.mean(jax.lax.map(lambda probe: jnp.sum(pull(probe)[0] * probe, axes), jnp.asarray(probes, jnp.float32)), axis=0)

    def body(carry, levels):
        x, total = carry
        moved, gathered, tangent = jnp.zeros_like(x), jnp.zeros_like(total), jnp.zeros_like(x)
        for stage, (offset, share) in enumerate(zip(offsets, shares, strict=True)):
            tangent, spread = slope(x + stride * offset * tangent, tuple(column[stage] for column in levels))
            moved, gathered = moved + share * tangent, gathered + share * spread
        return (x + stride * moved, total + stride * gathered), None
    (latent, total), _ = jax.lax.scan(body, (x0, jnp.zeros(len(x0))), stages)
    prior = -0.5 * jnp.sum((latent / latent_deviation) ** 2, axes) - size * (math.log(latent_deviation) + 0.5 * math.log(2 * math.pi))
    log_density = prior + total
    return Likelihood(-log_density / (size * math.log(2)) + math.log2((PIXEL_LEVELS - 1) / 2), log_density, latent)

"""What diffusion models are trained with, a value per example: errors and their weightings, the variational bound's terms, the hybrid loss.

    simple, the bound   Ho et al. (2020), sections 3.2 to 3.4; the decoder is a discretised Gaussian (equation 13)
    hybrid              Nichol and Dhariwal (2021), section 3.1
    min-SNR             Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (2023), section 3.3
    EDM                 Karras et al. (2022), equation 8 and table 1

Functions give [B] float32 values; `weighted` makes the (sum, weight) of the library's losses of them. Images are in [-1, 1].
"""
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from vlm_jax.diffusion.process import (
    SIGMA_DATA,
    check_prediction,
    convert,
    diffuse,
    levels,
    lookup,
    preconditioning,
    q_sample,
    reverse_statistics,
    split_output,
    training_target,
)
from vlm_jax.diffusion.samplers import Denoise, Threshold
from vlm_jax.diffusion.schedules import Tables
from vlm_jax.errors import ConfigError, did_you_mean

WEIGHTINGS = ("simple", "min_snr", "edm")
HYBRID_SHARE = 0.001
PIXEL_LEVELS = 256
_TINY = 1e-12


def weighted(values: Float[Array, "B"], weight: Float[Array, "B"] | None = None) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(weighted sum of the examples' values, sum of the weights); an example of weight 0 counts for nothing, even where its value is not finite."""
    weight = jnp.ones_like(values) if weight is None else jax.lax.stop_gradient(jnp.asarray(weight, jnp.float32))
    return jnp.sum(jnp.where(weight > 0, weight * jnp.where(weight > 0, values, 0), 0)), jnp.sum(weight)


def mean_flat(x: Float[Array, "B ..."]) -> Float[Array, "B"]:
    """The mean over everything but the rows."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def loss_weight(signal: Array, noise: Array, prediction: str, weighting: str = "simple", gamma: float = 5.0,
                sigma_data: float = SIGMA_DATA) -> Float[Array, "B"]:
    """The factor of the squared error of what the network predicts, at levels [B].

    "simple" is 1 whatever is predicted: L_simple for "eps". "min_snr" weighs the image's error by min(SNR, gamma), "edm" by (sigma^2 + sigma_data^2) / (sigma
    sigma_data)^2 with sigma = noise / signal, both in terms of what is predicted; the latter is 1 for "edm".
    Raises:
      ConfigError: for an unknown weighting or prediction.
    """
    check_prediction(prediction)
    if weighting not in WEIGHTINGS:
        raise ConfigError(f'weighting "{weighting}" is unknown.{did_you_mean(weighting, WEIGHTINGS)}')
    signal, noise = jnp.asarray(signal, jnp.float32), jnp.asarray(noise, jnp.float32)
    if weighting == "simple":
        return jnp.ones_like(signal)
    a, b = signal ** 2, noise ** 2
    # what a unit of the prediction's squared error is in the image's, times signal^2 for "eps": neither end of a process may divide by 0
    image_error = {"eps": lambda: b, "x0": lambda: jnp.ones_like(a), "v": lambda: b / (a + b),
                   "edm": lambda: preconditioning(signal, noise, sigma_data).out ** 2}[prediction]()
    if weighting == "edm":
        factor = (b + sigma_data ** 2 * a) / (b * sigma_data ** 2)
        return factor * image_error / (jnp.maximum(a, _TINY) if prediction == "eps" else 1.0)
    if prediction == "eps":
        return jnp.where(a <= gamma * b, 1.0, gamma * b / jnp.maximum(a, _TINY))
    return jnp.minimum(a / b, gamma) * image_error


def prediction_loss(value: Float[Array, "B ..."], x0: Float[Array, "B ..."], eps: Float[Array, "B ..."], signal: Array, noise: Array, *,
                    prediction: str = "eps", weighting: str = "simple", target: str | None = None, gamma: float = 5.0,
                    sigma_data: float = SIGMA_DATA) -> Float[Array, "B"]:
    """The weighted mean squared error of a prediction about `diffuse(x0, eps, signal, noise)`, a value per example.

    Args:
      value: what the network said, without a learned variance's channels.
      target: in which terms the error is taken (one of `process.PREDICTIONS`); by default what is predicted.
    Raises:
      ConfigError: for unknown names.
    """
    target = prediction if target is None else target
    value = convert(value, diffuse(x0, eps, signal, noise), signal, noise, prediction, target, sigma_data)
    error = mean_flat((value - training_target(x0, eps, signal, noise, target, sigma_data)) ** 2)
    return loss_weight(signal, noise, target, weighting, gamma, sigma_data) * error


def gaussian_kl(mean: Array, log_var: Array, other_mean: Array, other_log_var: Array) -> Array:
    """KL(N(mean, exp log_var) || N(other_mean, exp other_log_var)), element by element, in nats."""
    return 0.5 * (other_log_var - log_var + jnp.exp(log_var - other_log_var) - 1 + (mean - other_mean) ** 2 * jnp.exp(-other_log_var))


def discretised_gaussian(x: Array, mean: Array, log_deviation: Array, approximate: bool = True) -> Array:
    """log probability of the 256 values -1, -1 + 2/255, .., 1 under a Gaussian with its tails in the outermost bins, element by element, in nats.

    `approximate` takes the published code's tanh for the distribution function, else it is exact; probabilities are at least 1e-12.
    """
    half = 1.0 / (PIXEL_LEVELS - 1)

    def cumulative(z: Array) -> Array:
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z ** 3))) if approximate else jax.scipy.stats.norm.cdf(z)
    z, width = (x - mean) * jnp.exp(-log_deviation), half * jnp.exp(-log_deviation)
    flip = jnp.where(z > 0, -1.0, 1.0)          # in the lower half, where a difference of two values near 1 loses no digits
    low, high = cumulative(flip * z - width), cumulative(flip * z + width)
    inner = jnp.log(jnp.maximum(high - low, _TINY))
    lowest, highest = jnp.log(jnp.maximum(cumulative(z + width), _TINY)), jnp.log(jnp.maximum(cumulative(-(z - width)), _TINY))
    return jnp.where(x < -0.999, lowest, jnp.where(x > 0.999, highest, inner))


class BoundTerm(NamedTuple):
    """[B] each: the term of the bound in bits/dim (the decoder's at step 0), and the mean squared error of the x_0 it was computed with."""
    bits: Array
    x0_error: Array


def bound_term(output: Float[Array, "B ... C"], x0: Float[Array, "B ... c"], x: Float[Array, "B ... c"], t: Int[Array, "B"], tables: Tables, *,
               prediction: str = "eps", variance: str = "small", threshold: Threshold = None) -> BoundTerm:
    """L_{t-1} of the variational bound: the KL of the reverse step from the posterior, and at step 0 the decoder's negative log-likelihood.

    Args:
      output: the network's, of x = q_sample(x0, t, eps), with a learned variance's channels if `variance` is learned.
      threshold: applied to the predicted image; the published evaluation clips to [-1, 1], training does not.
    Raises:
      ConfigError: for unknown names, an output of another shape, "eps" with a terminal SNR of 0.
    """
    mean, log_var, predicted = reverse_statistics(output, x, t, tables, prediction, variance, threshold)
    true_mean = lookup(tables.posterior_x0, t), lookup(tables.posterior_x, t)
    true_mean = diffuse(x0, x, *true_mean)
    true_log_var = lookup(tables.log_small, t).reshape((-1,) + (1,) * (x.ndim - 1))
    kl = mean_flat(gaussian_kl(true_mean, true_log_var, mean, log_var))
    decoder = -mean_flat(discretised_gaussian(x0, mean, jnp.broadcast_to(0.5 * log_var, x.shape)))
    return BoundTerm(jnp.where(t == 0, decoder, kl) / math.log(2), mean_flat((predicted - x0) ** 2))


def prior_term(x0: Float[Array, "B ..."], tables: Tables) -> Float[Array, "B"]:
    """L_T in bits/dim: the KL of q(x_T | x_0) from the standard normal; it has no parameters."""
    last = tables.alpha_bar[-1]
    return mean_flat(gaussian_kl(math.sqrt(last) * x0, jnp.float32(np.log1p(-last)), 0.0, 0.0)) / math.log(2)


def bound_loss(output: Float[Array, "B ... C"], x0: Float[Array, "B ... c"], x: Float[Array, "B ... c"], t: Int[Array, "B"], tables: Tables, *,
               prediction: str = "eps", variance: str = "small") -> Float[Array, "B"]:
    """T times the bound's term at t, in bits/dim: with t uniform (or weighted, `step_sampling`) its mean is the bound without its constant L_T."""
    return len(tables) * bound_term(output, x0, x, t, tables, prediction=prediction, variance=variance).bits


def hybrid_loss(output: Float[Array, "B ... C"], x0: Float[Array, "B ... c"], eps: Float[Array, "B ... c"], t: Int[Array, "B"], tables: Tables, *,
                prediction: str = "eps", variance: str = "learned_range", share: float = HYBRID_SHARE, weighting: str = "simple",
                gamma: float = 5.0) -> Float[Array, "B"]:
    """L_simple + share L_vlb, whose gradient reaches the variance alone: the mean is a constant of the second term.

    Arguments as in `bound_term` and `prediction_loss`; x is q_sample(x0, t, eps), of which `output` is what the network says.
    """
    x = q_sample(x0, t, eps, tables)
    value, raw = split_output(output, x, variance)
    simple = prediction_loss(value, x0, eps, *levels(tables, t), prediction=prediction, weighting=weighting, gamma=gamma)
    stopped = jax.lax.stop_gradient(value) if raw is None else jnp.concatenate([jax.lax.stop_gradient(value), raw], axis=-1)
    return simple + share * bound_loss(stopped, x0, x, t, tables, prediction=prediction, variance=variance)


def edm_loss(denoise: Denoise, x0: Float[Array, "B ..."], eps: Float[Array, "B ..."], sigma: Float[Array, "B"],
             sigma_data: float = SIGMA_DATA) -> Float[Array, "B"]:
    """EDM's training loss: lambda(sigma) |D(x_0 + sigma eps; sigma) - x_0|^2, which is the plain squared error of F; `denoise` is F, called with c_in x and
    log(sigma) / 4, at sigmas of `schedules.training_sigmas`."""
    x = diffuse(x0, eps, 1.0, sigma)
    scaled = preconditioning(jnp.ones_like(sigma), sigma, sigma_data).input
    value = denoise(scaled.reshape((-1,) + (1,) * (x.ndim - 1)) * x, jnp.log(sigma) / 4)
    return prediction_loss(value, x0, eps, jnp.ones_like(sigma), sigma, prediction="edm", weighting="edm", sigma_data=sigma_data)

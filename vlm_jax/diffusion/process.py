"""The forward process in closed form, its posterior, and what a network may predict of it.

Ho et al. (2020), section 2 (q, posterior); Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022), section 4 and
appendix D (v); Karras et al. (2022), section 5 (F, the preconditioned network); Nichol and Dhariwal (2021), section 3.1 (learned variances).

A noisy x = signal x_0 + noise eps. The discrete processes keep signal^2 + noise^2 = 1; EDM's has signal 1 and noise sigma. Four things say the same about x:

    eps   the noise
    x0    the image
    v     cos eps - sin x_0, where (cos, sin) is (signal, noise) scaled to length 1
    edm   F of x_0 = c_skip x / signal + c_out F, with the c of the data's deviation `sigma_data` (0.5)

`convert` goes from each to each. Levels (`signal`, `noise`) are one number a row, [B] or scalar; they are broadcast over the axes of an image.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from vlm_jax.diffusion.schedules import Tables
from vlm_jax.errors import ConfigError, did_you_mean

PREDICTIONS = ("eps", "x0", "v", "edm")
VARIANCES = ("small", "large", "learned_range", "learned")
LEARNED = ("learned_range", "learned")
SIGMA_DATA = 0.5


def check_prediction(prediction: str) -> None:
    """Raises a ConfigError unless `prediction` is one of `PREDICTIONS`."""
    if prediction not in PREDICTIONS:
        raise ConfigError(f'prediction "{prediction}" is unknown.{did_you_mean(prediction, PREDICTIONS)}')


def check_variance(variance: str) -> None:
    """Raises a ConfigError unless `variance` is one of `VARIANCES`."""
    if variance not in VARIANCES:
        raise ConfigError(f'variance "{variance}" is unknown.{did_you_mean(variance, VARIANCES)}')


def broadcast(level: Array, x: Array) -> Array:
    """`level` [B] or scalar, float32, with axes of length 1 added so that it multiplies rows of x [B, ...]."""
    level = jnp.asarray(level, jnp.float32)
    return level.reshape(level.shape + (1,) * (x.ndim - level.ndim)) if level.ndim else level


def lookup(table: np.ndarray, t: Int[Array, "B"]) -> Float[Array, "B"]:
    """Float32 entries of a float64 table of the host at the steps t, which may be traced."""
    return jnp.asarray(table, jnp.float32)[t]


def levels(tables: Tables, t: Int[Array, "B"]) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """(signal, noise) at the steps t."""
    return lookup(tables.signal, t), lookup(tables.noise, t)


def diffuse(x0: Float[Array, "B ..."], eps: Float[Array, "B ..."], signal: Array, noise: Array) -> Float[Array, "B ..."]:
    """x = signal x_0 + noise eps (DDPM, equation 4)."""
    return broadcast(signal, x0) * x0 + broadcast(noise, x0) * eps


def q_sample(x0: Float[Array, "B ..."], t: Int[Array, "B"], eps: Float[Array, "B ..."], tables: Tables) -> Float[Array, "B ..."]:
    """x_t of the images x_0 at the steps t, with the noise eps."""
    return diffuse(x0, eps, *levels(tables, t))


def posterior_mean(x0: Float[Array, "B ..."], x: Float[Array, "B ..."], t: Int[Array, "B"], tables: Tables) -> Float[Array, "B ..."]:
    """The mean of q(x_{t-1} | x_t, x_0) (DDPM, equation 7)."""
    return broadcast(lookup(tables.posterior_x0, t), x) * x0 + broadcast(lookup(tables.posterior_x, t), x) * x


class Preconditioning(NamedTuple):
    """EDM's scalings of table 1, for x = signal x_0 + noise eps: x_0 = skip x + out F(input x; log(noise / signal) / 4)."""
    skip: Array
    out: Array
    input: Array


def preconditioning(signal: Array, noise: Array, sigma_data: float = SIGMA_DATA) -> Preconditioning:
    """The scalings at a level; with signal 1 they are the published c_skip, c_out and c_in."""
    signal, noise = jnp.asarray(signal, jnp.float32), jnp.asarray(noise, jnp.float32)
    total = noise ** 2 + (sigma_data * signal) ** 2
    return Preconditioning(sigma_data ** 2 * signal / total, noise * sigma_data / jnp.sqrt(total), 1 / jnp.sqrt(total))


def to_x0(value: Float[Array, "B ..."], x: Float[Array, "B ..."], signal: Array, noise: Array, prediction: str,
          sigma_data: float = SIGMA_DATA) -> Float[Array, "B ..."]:
    """The image that a prediction `value` about x stands for; from "eps" the signal must not be 0."""
    check_prediction(prediction)
    if prediction == "x0":
        return value
    signal, noise = broadcast(signal, x), broadcast(noise, x)
    if prediction == "eps":
        return (x - noise * value) / signal
    if prediction == "v":
        square = signal ** 2 + noise ** 2
        return signal * x / square - noise * value / jnp.sqrt(square)
    c = preconditioning(signal, noise, sigma_data)
    return c.skip * x + c.out * value


def from_x0(x0: Float[Array, "B ..."], x: Float[Array, "B ..."], signal: Array, noise: Array, prediction: str,
            sigma_data: float = SIGMA_DATA) -> Float[Array, "B ..."]:
    """What a network that predicts `prediction` would have to say about x for its image to be x_0; but for "x0" the noise must not be 0."""
    check_prediction(prediction)
    if prediction == "x0":
        return x0
    signal, noise = broadcast(signal, x), broadcast(noise, x)
    if prediction == "eps":
        return (x - signal * x0) / noise
    if prediction == "v":
        square = signal ** 2 + noise ** 2
        return (signal * x - square * x0) / (noise * jnp.sqrt(square))
    c = preconditioning(signal, noise, sigma_data)
    return (x0 - c.skip * x) / c.out


def to_eps(value: Float[Array, "B ..."], x: Float[Array, "B ..."], signal: Array, noise: Array, prediction: str,
           sigma_data: float = SIGMA_DATA) -> Float[Array, "B ..."]:
    """The noise that a prediction `value` about x stands for; from "x0" and "edm" the noise must not be 0."""
    check_prediction(prediction)
    if prediction == "eps":
        return value
    if prediction == "v":
        signal, noise = broadcast(signal, x), broadcast(noise, x)
        square = signal ** 2 + noise ** 2
        return noise * x / square + signal * value / jnp.sqrt(square)
    x0 = to_x0(value, x, signal, noise, prediction, sigma_data)
    return (x - broadcast(signal, x) * x0) / broadcast(noise, x)


def convert(value: Float[Array, "B ..."], x: Float[Array, "B ..."], signal: Array, noise: Array, source: str, target: str,
            sigma_data: float = SIGMA_DATA) -> Float[Array, "B ..."]:
    """A prediction about x in other words: `source` and `target` are of `PREDICTIONS`; ConfigError for others."""
    check_prediction(target)
    if source == target:
        check_prediction(source)
        return value
    if target == "eps":
        return to_eps(value, x, signal, noise, source, sigma_data)
    return from_x0(to_x0(value, x, signal, noise, source, sigma_data), x, signal, noise, target, sigma_data)


def training_target(x0: Float[Array, "B ..."], eps: Float[Array, "B ..."], signal: Array, noise: Array, prediction: str,
                    sigma_data: float = SIGMA_DATA) -> Float[Array, "B ..."]:
    """What a network should predict about `diffuse(x0, eps, signal, noise)`; from both of its parts, hence exact at every level but noise 0 of "edm"."""
    check_prediction(prediction)
    if prediction == "eps":
        return eps
    if prediction == "x0":
        return x0
    if prediction == "v":
        signal, noise = broadcast(signal, x0), broadcast(noise, x0)
        return (signal * eps - noise * x0) / jnp.sqrt(signal ** 2 + noise ** 2)
    return from_x0(x0, diffuse(x0, eps, signal, noise), signal, noise, prediction, sigma_data)


def split_output(output: Float[Array, "B ... C"], x: Float[Array, "B ... c"], variance: str) -> tuple[Array, Array | None]:
    """(prediction, raw variance or None) of a network's output; a learned variance is the second half of the last axis.

    Raises:
      ConfigError: where the output's shape is not that of x, with twice the channels for learned variances.
    """
    check_variance(variance)
    factor = 2 if variance in LEARNED else 1
    expected = (*x.shape[:-1], factor * x.shape[-1])
    if output.shape != expected:
        raise ConfigError(f'the network gave {output.shape} where variance "{variance}" of images {x.shape} needs {expected}; '
                          "change its output channels or the variance.")
    if factor == 1:
        return output, None
    prediction, raw = jnp.split(output, 2, axis=-1)
    return prediction, raw


def log_variance(raw: Array | None, x: Array, log_small: Array, log_large: Array, variance: str) -> Float[Array, "B ..."]:
    """The log variance of a reverse step, broadcastable to x, from the logs of beta-tilde and beta at its rows ([B] or scalar).

    "small" is beta-tilde, "large" beta (DDPM, section 3.2); "learned_range" puts `raw` = -1 at beta-tilde and 1 at beta and interpolates logs (improved
    DDPM, equation 15); "learned" is the log variance itself.
    """
    check_variance(variance)
    if variance == "learned":
        return raw
    low, high = broadcast(log_small, x), broadcast(log_large, x)
    if variance == "small":
        return low
    if variance == "large":
        return high
    share = (raw + 1) / 2
    return share * high + (1 - share) * low


def reverse_statistics(output: Float[Array, "B ... C"], x: Float[Array, "B ... c"], t: Int[Array, "B"], tables: Tables, prediction: str = "eps",
                       variance: str = "small", threshold: Callable[[Array], Array] | None = None) -> tuple[Array, Array, Array]:
    """(mean, log variance, x_0) of p(x_{t-1} | x_t) that a network's output stands for; `threshold` is applied to x_0 (as when sampling)."""
    tables.check_prediction(prediction)
    value, raw = split_output(output, x, variance)
    x0 = to_x0(value, x, *levels(tables, t), prediction)
    if threshold is not None:
        x0 = threshold(x0)
    # "learned_range" spans from beta-tilde to beta; the fixed "large" one alone has a narrower decoder at step 0.
    large = np.log(tables.betas) if variance == "learned_range" else tables.log_large
    return posterior_mean(x0, x, t, tables), log_variance(raw, x, lookup(tables.log_small, t), lookup(large, t), variance), x0

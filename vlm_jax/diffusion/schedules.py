"""Noise schedules and the tables made of them, in float64 on the host.

    linear, the tables   Ho et al., "Denoising Diffusion Probabilistic Models" (2020), sections 2 and 4
    scaled_linear        Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022): linear in the square root of beta
    cosine, respacing    Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021), sections 3.2 and 4
    sigmoid              Xu et al., "GeoDiff" (2022): beta rises along a logistic curve
    zero terminal SNR    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), algorithm 1
    EDM sigmas           Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), equation 5 and table 1

Steps are counted from 0, as networks get them: step t of the code is t + 1 of the papers, and the step before 0 is the data (alpha_bar 1).
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
import math
from typing import Any

import jax
from jaxtyping import Array, Float
import numpy as np

from vlm_jax.errors import ConfigError
from vlm_jax.settings import call, choose

MAX_STEPS = 10 ** 6


def linear(steps: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Betas that rise evenly from `start` to `end` (DDPM). [T] float64; errors as in `checked_betas`."""
    return _between(steps, start, end, lambda low, high: np.linspace(low, high, steps))


def scaled_linear(steps: int, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """Betas whose square root rises evenly (latent diffusion). [T] float64; errors as in `checked_betas`."""
    return _between(steps, start, end, lambda low, high: np.linspace(math.sqrt(low), math.sqrt(high), steps) ** 2)


def sigmoid(steps: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """Betas from `start` to `end` along the logistic function on [-6, 6] (GeoDiff). [T] float64; errors as in `checked_betas`."""
    return _between(steps, start, end, lambda low, high: low + (high - low) / (1 + np.exp(-np.linspace(-6, 6, steps))))


def cosine(steps: int, offset: float = 0.008, cap: float = 0.999) -> np.ndarray:
    """Betas of alpha_bar(t) = cos^2((t / T + offset) / (1 + offset) pi / 2), none above `cap` (improved DDPM). [T] float64; errors as in `checked_betas`."""
    _check_steps(steps)
    if not 0 <= offset < math.inf or not 0 < cap < 1:
        raise ConfigError(f"cosine schedule: offset {offset} and cap {cap} are outside [0, inf) and (0, 1); the published ones are 0.008 and 0.999.")
    alpha_bar = np.cos((np.arange(steps + 1) / steps + offset) / (1 + offset) * np.pi / 2) ** 2
    return checked_betas(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], cap))


def given(steps: int, betas: Sequence[float]) -> np.ndarray:
    """Betas as somebody lists them, T of them. [T] float64; errors as in `checked_betas`, and where there are not `steps`."""
    betas = checked_betas(betas)
    if len(betas) != steps:
        raise ConfigError(f"schedule: {len(betas)} betas are given for {steps} steps; give one a step.")
    return betas


SCHEDULES: dict[str, Callable[..., np.ndarray]] = {"linear": linear, "scaled_linear": scaled_linear, "cosine": cosine, "sigmoid": sigmoid, "given": given}


def checked_betas(betas: Any) -> np.ndarray:
    """`betas` as float64 [T].

    Raises:
      ConfigError: for fewer than one step, and for a beta outside (0, 1).
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1:
        raise ConfigError(f"schedule: betas of shape {betas.shape}; a list of one number a step is needed.")
    _check_steps(len(betas))
    outside = ~((betas > 0) & (betas < 1))
    if outside.any():
        first = int(np.argmax(outside))
        raise ConfigError(f"schedule: beta {betas[first]:g} of step {first} lies outside (0, 1); a step adds some noise and keeps some signal.")
    return betas


@dataclass(frozen=True, eq=False)
class Tables:
    """Everything that a discrete process of T steps is, made of alpha_bar; each table is float64 [T], indexed by the 0-based step.

    `signal` and `noise` are the factors of x_t = signal x_0 + noise eps; `betas` the share of variance that a step renews; `posterior_*` of q(x_{t-1} |
    x_t, x_0) = N(posterior_x0 x_0 + posterior_x x_t, posterior_variance), which is 0 at step 0 (DDPM, equations 6 and 7).
    """
    alpha_bar: np.ndarray

    def __len__(self) -> int:
        return len(self.alpha_bar)

    @cached_property
    def alpha_bar_before(self) -> np.ndarray:
        """alpha_bar of the step before; 1, the data, before step 0."""
        return np.concatenate([[1.0], self.alpha_bar[:-1]])

    @cached_property
    def betas(self) -> np.ndarray:
        """1 - alpha_bar_t / alpha_bar_{t-1}."""
        return 1 - self.alpha_bar / self.alpha_bar_before

    @cached_property
    def signal(self) -> np.ndarray:
        """sqrt(alpha_bar)."""
        return np.sqrt(self.alpha_bar)

    @cached_property
    def noise(self) -> np.ndarray:
        """sqrt(1 - alpha_bar)."""
        return np.sqrt(1 - self.alpha_bar)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """noise / signal, EDM's sigma; infinite where no signal is left."""
        with np.errstate(divide="ignore"):
            return self.noise / self.signal

    @cached_property
    def snr(self) -> np.ndarray:
        """The signal-to-noise ratio alpha_bar / (1 - alpha_bar)."""
        return self.alpha_bar / (1 - self.alpha_bar)

    @cached_property
    def posterior_x0(self) -> np.ndarray:
        """The factor of x_0 in the posterior's mean: sqrt(alpha_bar_{t-1}) beta_t / (1 - alpha_bar_t)."""
        return np.sqrt(self.alpha_bar_before) * self.betas / (1 - self.alpha_bar)

    @cached_property
    def posterior_x(self) -> np.ndarray:
        """The factor of x_t in the posterior's mean: sqrt(alpha_t) (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)."""
        return np.sqrt(1 - self.betas) * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """beta-tilde: beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t); 0 at step 0."""
        return self.betas * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)

    @cached_property
    def log_small(self) -> np.ndarray:
        """log beta-tilde, with that of step 1 at step 0, where it would be -inf."""
        return np.log(np.concatenate([self._first, self.posterior_variance[1:]]))

    @cached_property
    def log_large(self) -> np.ndarray:
        """log beta, with log beta-tilde of step 1 at step 0: the decoder is as narrow as with the other choice (the published code)."""
        return np.log(np.concatenate([self._first, self.betas[1:]]))

    @property
    def _first(self) -> np.ndarray:
        return self.posterior_variance[1:2] if len(self) > 1 else self.betas

    def check_prediction(self, prediction: str) -> None:
        """Raises a ConfigError where `prediction` is "eps" and the last step has no signal: nothing about x_0 can be said from noise."""
        if prediction == "eps" and self.alpha_bar[-1] == 0:
            raise ConfigError('prediction "eps" says nothing about the image at a terminal SNR of 0; train with "v" or "x0", or keep the schedule as it was.')


def tables(betas: Any) -> Tables:
    """The tables of betas in (0, 1); errors as in `checked_betas`."""
    return Tables(np.cumprod(1 - checked_betas(betas)))


def tables_of_alpha_bar(alpha_bar: Any) -> Tables:
    """The tables of given values of alpha_bar.

    Raises:
      ConfigError: unless they fall from step to step, inside (0, 1); the last alone may be 0.
    """
    alpha_bar = np.asarray(alpha_bar, np.float64)
    if alpha_bar.ndim != 1 or not len(alpha_bar):
        raise ConfigError(f"schedule: alpha_bar of shape {alpha_bar.shape}; a list of one number a step is needed, T >= 1.")
    if not (alpha_bar[0] < 1 and alpha_bar[-1] >= 0 and np.all(np.diff(alpha_bar) < 0)):
        raise ConfigError("schedule: alpha_bar must fall from step to step, from below 1 to 0 or above; every step adds noise.")
    return Tables(alpha_bar)


def zero_terminal_snr(old: Tables) -> Tables:
    """The tables with sqrt(alpha_bar) shifted and scaled so that the last is 0 and the first is kept; needs two steps."""
    if len(old) < 2:
        raise ConfigError("schedule: zero terminal SNR needs at least 2 steps, since the first keeps its noise; raise steps.")
    root = old.signal
    return tables_of_alpha_bar(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)


def respaced(old: Tables, steps: Sequence[int]) -> Tables:
    """The process that visits only `steps` (ascending): alpha_bar is kept there, betas and variances follow (improved DDPM, section 4).

    The network gets `steps[i]` where the new process says i.
    """
    steps = np.asarray(steps)
    if steps.ndim != 1 or not len(steps) or steps[0] < 0 or steps[-1] >= len(old) or np.any(np.diff(steps) <= 0):
        raise ConfigError(f"steps of a respaced process must ascend within 0 .. {len(old) - 1}; got {steps.tolist()[:8]}.")
    return tables_of_alpha_bar(old.alpha_bar[steps])


def build_tables(name: str = "linear", steps: int = 1000, zero_snr: bool = False, **settings: Any) -> Tables:
    """The tables of a named schedule (`SCHEDULES`), with its settings; `zero_snr` rescales them to end without signal.

    Raises:
      ConfigError: for an unknown schedule or setting, T < 1, a beta outside (0, 1).
    """
    _check_steps(steps)
    made = tables(call(choose(SCHEDULES, name, "schedule.name"), settings, "schedule", steps=steps))
    return zero_terminal_snr(made) if zero_snr else made


def edm_sigmas(count: int, smallest: float = 0.002, largest: float = 80.0, rho: float = 7.0) -> np.ndarray:
    """`count` noise levels from `largest` down to `smallest`, evenly spaced in sigma^(1 / rho). [count] float64; the 0 at the end is the plan's.

    Raises:
      ConfigError: for count < 1, sigmas that are not 0 < smallest < largest, rho <= 0.
    """
    _check_sigmas(count, smallest, largest)
    if not rho > 0:
        raise ConfigError(f"EDM schedule: rho {rho} must be positive; the published one is 7.")
    ramp = np.linspace(0, 1, count)
    return (largest ** (1 / rho) + ramp * (smallest ** (1 / rho) - largest ** (1 / rho))) ** rho


def exponential_sigmas(count: int, smallest: float = 0.002, largest: float = 80.0) -> np.ndarray:
    """`count` noise levels from `largest` down to `smallest`, evenly spaced in log sigma. [count] float64; errors as in `edm_sigmas`."""
    _check_sigmas(count, smallest, largest)
    return np.exp(np.linspace(math.log(largest), math.log(smallest), count))


def training_sigmas(rng: Array, batch: int, mean: float = -1.2, deviation: float = 1.2) -> Float[Array, "B"]:
    """Noise levels to train EDM at: log sigma ~ N(mean, deviation^2) (table 1)."""
    return jax.numpy.exp(mean + deviation * jax.random.normal(rng, (batch,)))


def _check_steps(steps: Any) -> None:
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"schedule: {steps} steps; a whole number T from 1 to {MAX_STEPS} is needed (DDPM: 1000).")


def _between(steps: int, start: float, end: float, make: Callable[[float, float], np.ndarray]) -> np.ndarray:
    _check_steps(steps)
    checked_betas([start, end])
    return checked_betas(make(start, end))


def _check_sigmas(count: int, smallest: float, largest: float) -> None:
    _check_steps(count)
    if not 0 < smallest < largest < math.inf:
        raise ConfigError(f"EDM schedule: sigmas from {smallest} to {largest}; 0 < smallest < largest is needed (published: 0.002 and 80).")

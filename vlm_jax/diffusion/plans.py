"""Which noise levels a sampler visits, computed on the host in float64.

Spacings are named as diffusers' `timestep_spacing`: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), table 2.
"""
from dataclasses import dataclass, replace
import math

import numpy as np

from vlm_jax.diffusion.process import PREDICTIONS, SIGMA_DATA, check_prediction
from vlm_jax.diffusion.schedules import Tables, edm_sigmas, exponential_sigmas
from vlm_jax.errors import ConfigError, did_you_mean

SPACINGS = ("leading", "trailing", "linspace")
SMALLEST_ALPHA_BAR = 2.0 ** -24   # stands for a terminal SNR of 0 where a finite sigma is needed


def timesteps(total: int, count: int, spacing: str = "leading", offset: int = 0, open_end: bool = False, rounded: bool = True) -> np.ndarray:
    """`count` of the steps 0 .. total - 1, descending.

    leading: multiples of total // count, plus `offset` (0, 20, .., 980 for 50 of 1000); trailing: from total - 1 down by total / count; linspace: evenly,
    both ends included. With `open_end` one more step is placed and the last, nearest to the data, left out (multistep solvers; trailing has no such
    point). Whole numbers unless `rounded` is False, which only linspace knows.
    Raises:
      ConfigError: for an unknown spacing, a count outside 1 .. total, an offset that leads beyond the last step.
    """
    if spacing not in SPACINGS:
        raise ConfigError(f'spacing "{spacing}" is unknown.{did_you_mean(spacing, SPACINGS)}')
    if not 1 <= count <= total:
        raise ConfigError(f"{count} sampling steps of a process of {total}; take from 1 to {total}.")
    extra = int(open_end)
    if spacing == "trailing":
        found = np.round(np.arange(total, 0, -total / count)) - 1
    elif spacing == "linspace":
        found = np.linspace(0, total - 1, count + extra)
        found = (np.round(found) if rounded else found)[::-1][:count]
    else:
        found = (np.arange(count + extra) * (total // (count + extra)))[::-1][:count] + offset
    if found.max() > total - 1 or found.min() < 0:
        raise ConfigError(f"offset {offset} leads to step {int(found.max())} of a process of {total}; the last is {total - 1}: lower the offset.")
    return np.asarray(found, np.float64)


@dataclass(frozen=True, eq=False)
class Plan:
    """S steps of a discrete process, from noise to data: the network gets `times[i]`, and x goes from `alpha_bar[i]` to `after[i]`. All float64 [S]."""
    times: np.ndarray
    alpha_bar: np.ndarray
    after: np.ndarray

    def __len__(self) -> int:
        return len(self.times)

    def tail(self, strength: float) -> "Plan":
        """The last int(S strength) steps: image-to-image starts from `diffuse(x0, eps, *plan.start)`, a strength of 1 from nearly pure noise.

        Raises:
          ConfigError: for a strength outside (0, 1] or one so small that no step is left.
        """
        count = int(len(self) * strength) if 0 < strength <= 1 else 0
        if not count:
            raise ConfigError(f"strength {strength} leaves no step of {len(self)}; take one in (0, 1], at least {1 / len(self):g}.")
        return Plan(self.times[-count:], self.alpha_bar[-count:], self.after[-count:])

    @property
    def start(self) -> tuple[float, float]:
        """(signal, noise) at which the plan begins."""
        return math.sqrt(self.alpha_bar[0]), math.sqrt(1 - self.alpha_bar[0])

    def check(self, prediction: str) -> None:
        """Raises a ConfigError for an unknown prediction, and for "eps" at a level without signal."""
        check_prediction(prediction)
        if prediction == "eps" and np.any(self.alpha_bar == 0):
            raise ConfigError('prediction "eps" says nothing about the image at a terminal SNR of 0; use a "v" or "x0" network, or another schedule.')

    @property
    def connected(self) -> bool:
        """Whether every step begins where the one before ended."""
        return bool(np.array_equal(self.after[:-1], self.alpha_bar[1:]))


def plan_of(tables: Tables, times: np.ndarray, final_alpha_bar: float = 1.0) -> Plan:
    """The plan that visits the whole steps `times` (descending) and ends at `final_alpha_bar`.

    Raises:
      ConfigError: for steps that do not descend within the process.
    """
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or not len(times) or np.any(np.diff(times) >= 0) or times[-1] < 0 or times[0] > len(tables) - 1 or np.any(times != np.round(times)):
        raise ConfigError(f"sampling steps must be whole numbers that descend within {len(tables) - 1} .. 0; got {times.tolist()[:8]}.")
    alpha_bar = tables.alpha_bar[times.astype(int)]
    return Plan(times, alpha_bar, np.append(alpha_bar[1:], final_alpha_bar))


def discrete_plan(tables: Tables, count: int | None = None, spacing: str = "leading", offset: int = 0, final: str = "data",
                  stride: bool = False) -> Plan:
    """The plan of `ancestral`, `ddim` and `ddim_invert`.

    Args:
      count: the number of steps; all of the process by default.
      final: where the last step leads: "data" (alpha_bar 1) or "first" (step 0; diffusers' `set_alpha_to_one=False`).
      stride: a step at t leads to t - T // count, whatever step is listed next, as in diffusers' DDIM schedulers; the two agree for "leading".
    Raises:
      ConfigError: as `timesteps`, and for another `final`.
    """
    if final not in ("data", "first"):
        raise ConfigError(f'final "{final}" is unknown; it is "data" (alpha_bar 1) or "first" (that of step 0).')
    end = 1.0 if final == "data" else float(tables.alpha_bar[0])
    count = len(tables) if count is None else count
    plan = plan_of(tables, timesteps(len(tables), count, spacing, offset), end)
    if not stride:
        return plan
    before = plan.times.astype(int) - len(tables) // count
    return replace(plan, after=np.where(before >= 0, tables.alpha_bar[np.maximum(before, 0)], end))


def solver_plan(tables: Tables, count: int, spacing: str = "linspace", offset: int = 0, final: str = "zero", karras: bool = False,
                rounded: bool = True) -> Plan:
    """The plan of `dpm_solver`.

    Args:
      final: the last noise level, "zero" or "smallest" (that of step 0).
      karras: levels evenly spaced in sigma^(1/7) between those of the process's ends; `rounded` then rounds the steps that the network gets (diffusers
        does, but for the cosine schedule).
    """
    sigmas = _finite_sigmas(tables)
    if karras:
        levels = edm_sigmas(count, sigmas[0], sigmas[-1])
        times = sigma_to_time(sigmas, levels)
        times = np.round(times) if rounded else np.floor(times + 1e-6)   # sigma of a step may round to just below it
    else:
        times = timesteps(len(tables), count, spacing, offset, open_end=True)
        levels = np.interp(times, np.arange(len(sigmas)), sigmas)
    levels = np.append(levels, _final_sigma(final, sigmas[0]))
    alpha_bar = 1 / (1 + levels ** 2)
    return Plan(times, alpha_bar[:-1], alpha_bar[1:])


@dataclass(frozen=True, eq=False)
class SigmaPlan:
    """S steps in EDM's coordinates, x = x_0 + sigma eps, from noise to data.

    The step i raises the noise from `sigmas[i]` to `raised[i]` (equal without churn), calls the network with `raised_times[i]` and goes to `sigmas[i + 1]`,
    where a second call of Heun's method gets `times[i + 1]`. `scale` is what a standard normal is multiplied by to begin with.
    """
    sigmas: np.ndarray          # [S + 1]
    times: np.ndarray           # [S]
    raised: np.ndarray          # [S]
    raised_times: np.ndarray    # [S]
    scale: float
    table: np.ndarray | None    # sigmas of the discrete process whose network is called; None for one that gets log(sigma) / 4
    sigma_data: float = SIGMA_DATA

    def __len__(self) -> int:
        return len(self.times)

    @property
    def start(self) -> tuple[float, float]:
        """(signal, noise) at which the plan begins."""
        return 1.0, float(self.sigmas[0])

    def time_of(self, sigmas: np.ndarray) -> np.ndarray:
        """What the network gets at noise levels that are not in the plan."""
        return np.log(sigmas) / 4 if self.table is None else sigma_to_time(self.table, sigmas)

    def churned(self, churn: float, smallest: float = 0.0, largest: float = math.inf) -> "SigmaPlan":
        """The plan with Karras et al.'s churn: steps within [smallest, largest] first raise sigma by the factor 1 + min(churn / S, sqrt(2) - 1)."""
        if not churn >= 0:
            raise ConfigError(f"churn {churn} must not be negative; 0 is the deterministic sampler.")
        before = self.sigmas[:-1]
        gamma = np.where((before >= smallest) & (before <= largest), min(churn / len(self), math.sqrt(2) - 1), 0.0)
        raised = before * (1 + gamma)
        return replace(self, raised=raised, raised_times=np.where(gamma > 0, self.time_of(raised), self.times))

    def tail(self, strength: float) -> "SigmaPlan":
        """The last int(S strength) steps, as `Plan.tail`; image-to-image starts from x_0 + sigmas[0] eps."""
        count = int(len(self) * strength) if 0 < strength <= 1 else 0
        if not count:
            raise ConfigError(f"strength {strength} leaves no step of {len(self)}; take one in (0, 1], at least {1 / len(self):g}.")
        return replace(self, sigmas=self.sigmas[-count - 1:], times=self.times[-count:], raised=self.raised[-count:],
                       raised_times=self.raised_times[-count:], scale=float(self.sigmas[-count - 1]))

    def check(self, prediction: str) -> None:
        """Raises a ConfigError for an unknown prediction, or one that does not go with the network's noise conditioning."""
        check_prediction(prediction)
        if (prediction == "edm") != (self.table is None):
            wanted = '"edm"' if self.table is None else ", ".join(f'"{name}"' for name in PREDICTIONS[:-1])
            raise ConfigError(f'prediction "{prediction}" does not go with this plan, whose network predicts {wanted}; '
                              "edm_plan is for EDM's networks, sigma_plan for those of a discrete process.")


def edm_plan(count: int, smallest: float = 0.002, largest: float = 80.0, rho: float = 7.0, exponential: bool = False, final: str = "zero",
             sigma_data: float = SIGMA_DATA) -> SigmaPlan:
    """The plan of `euler` and `heun` for a network with EDM's preconditioning; errors as in `edm_sigmas`."""
    levels = exponential_sigmas(count, smallest, largest) if exponential else edm_sigmas(count, smallest, largest, rho)
    times = np.log(levels) / 4
    end = _final_sigma(final, levels[-1])
    return SigmaPlan(np.append(levels, end), times, levels, times, float(levels[0]), None, sigma_data)


def sigma_plan(tables: Tables, count: int, spacing: str = "linspace", offset: int = 0, karras: bool = False, final: str = "zero") -> SigmaPlan:
    """The plan of `euler` and `heun` for a network of a discrete process, which gets perhaps fractional steps (linspace, karras)."""
    sigmas = _finite_sigmas(tables)
    times = timesteps(len(tables), count, spacing, offset, rounded=False)
    levels = np.interp(times, np.arange(len(sigmas)), sigmas)
    if karras:
        levels = edm_sigmas(count, levels[-1], levels[0]) if count > 1 else levels
        times = sigma_to_time(sigmas, levels)
    scale = float(levels[0]) if spacing != "leading" else math.sqrt(levels[0] ** 2 + 1)
    return SigmaPlan(np.append(levels, _final_sigma(final, sigmas[0])), times, levels, times, scale, sigmas)


def sigma_to_time(table: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """The fractional steps at which a process with the sigmas `table` [T] (ascending) has `sigmas`, linear in log sigma and kept within it."""
    return np.interp(np.log(sigmas), np.log(table), np.arange(len(table)))


def _finite_sigmas(tables: Tables) -> np.ndarray:
    alpha_bar = np.where(tables.alpha_bar == 0, SMALLEST_ALPHA_BAR, tables.alpha_bar)
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def _final_sigma(final: str, smallest: float) -> float:
    if final not in ("zero", "smallest"):
        raise ConfigError(f'final "{final}" is unknown; it is "zero" or "smallest" (the lowest noise level of the process).')
    return 0.0 if final == "zero" else float(smallest)

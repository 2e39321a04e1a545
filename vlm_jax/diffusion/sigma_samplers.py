"""Euler's and Heun's method in EDM's coordinates, x = x_0 + sigma eps: Karras et al. (2022), algorithms 1 and 2, with churn.

Networks with EDM's preconditioning (`plans.edm_plan`, prediction "edm") and those of discrete processes (`plans.sigma_plan`, any other prediction) alike:
`denoise(input, t)` gets x scaled to the deviation that it was trained at. Other arguments as in `samplers`.
"""
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from vlm_jax.diffusion.noise import Noise
from vlm_jax.diffusion.plans import SigmaPlan
from vlm_jax.diffusion.process import to_x0
from vlm_jax.diffusion.samplers import Denoise, Samples, Threshold, run_steps
from vlm_jax.errors import ConfigError


def input_scale(sigma: np.ndarray, prediction: str, sigma_data: float) -> np.ndarray:
    """What x is multiplied by before the network sees it: EDM's c_in, or the signal of a variance-preserving process."""
    return 1 / np.sqrt(sigma ** 2 + (sigma_data ** 2 if prediction == "edm" else 1.0))


def euler(denoise: Denoise, x: Float[Array, "B ... C"], plan: SigmaPlan, *, prediction: str = "edm", noise: Noise | None = None, noise_scale: float = 1.0,
          threshold: Threshold = None, frames: int = 0) -> Samples:
    """One network call a step, along the tangent.

    Args:
      x: standard normal times `plan.scale`, to begin with.
      noise: needed where the plan churns; `noise_scale` is the paper's S_noise.
    Raises:
      ConfigError: for a prediction that does not go with the plan, churn without noise, more frames than steps.
    """
    return _solve(denoise, x, plan, prediction, noise, noise_scale, threshold, frames, corrected=False)


def heun(denoise: Denoise, x: Float[Array, "B ... C"], plan: SigmaPlan, *, prediction: str = "edm", noise: Noise | None = None, noise_scale: float = 1.0,
         threshold: Threshold = None, frames: int = 0) -> Samples:
    """Two network calls a step but the one to sigma 0: the mean of the tangents at both ends (second order). Arguments as in `euler`."""
    return _solve(denoise, x, plan, prediction, noise, noise_scale, threshold, frames, corrected=True)


def _solve(denoise: Denoise, x: Array, plan: SigmaPlan, prediction: str, noise: Noise | None, noise_scale: float, threshold: Threshold, frames: int,
           corrected: bool) -> Samples:
    plan.check(prediction)
    random = bool(np.any(plan.raised > plan.sigmas[:-1]))
    if random and noise is None:
        raise ConfigError("a churned plan draws noise in every step; give noise=row_noise(keys, shape).")
    rows = []   # one a network call, so that the program holds the network once
    for i, (before, raised, after) in enumerate(zip(plan.sigmas[:-1], plan.raised, plan.sigmas[1:], strict=True)):
        second = corrected and after > 0
        rows.append(dict(index=i, time=plan.raised_times[i], sigma=raised, move=after - raised, added=noise_scale * np.sqrt(raised ** 2 - before ** 2),
                         correct=False, ends=not second))
        if second:
            time = plan.times[i + 1] if i + 1 < len(plan) else plan.time_of(after)
            rows.append(dict(index=i, time=time, sigma=after, move=after - raised, added=0.0, correct=True, ends=True))
    table = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
    ends = table.pop("ends")
    table["input"] = input_scale(table["sigma"], prediction, plan.sigma_data)

    def step(x, memory, c):
        origin, tangent = memory
        if random:
            x = x + c["added"] * noise(c["index"])
        x0 = to_x0(denoise(c["input"] * x, jnp.broadcast_to(c["time"], (len(x),))), x, 1.0, c["sigma"], prediction, plan.sigma_data)
        x0 = x0 if threshold is None else threshold(x0)
        here = (x - x0) / c["sigma"]
        origin = jnp.where(c["correct"], origin, x)
        moved = origin + c["move"] * jnp.where(c["correct"], 0.5 * (tangent + here), here)
        return moved, (origin, here), x0
    zero = jnp.zeros_like(x, dtype=jnp.float32)
    return run_steps(step, x, (zero, zero), table, frames, ends)

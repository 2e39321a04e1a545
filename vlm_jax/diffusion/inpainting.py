"""Inpainting by an unconditional model: Lugmayr et al., "RePaint: Inpainting using Denoising Diffusion Probabilistic Models" (2022), algorithm 1."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from vlm_jax.diffusion.noise import Noise
from vlm_jax.diffusion.plans import Plan
from vlm_jax.diffusion.process import to_eps, to_x0
from vlm_jax.diffusion.samplers import Denoise, Samples, Threshold, run_steps
from vlm_jax.errors import ConfigError


def repaint_moves(count: int, jump_length: int = 10, resamples: int = 10) -> list[tuple[bool, int]]:
    """The walk through a plan of `count` steps: (up, i) leads along step i of it, down to less noise or up to more.

    After every `jump_length` steps down the walk jumps up by as many and comes down again, `resamples` times in all (1: no jumps), but for the last stretch.
    Raises:
      ConfigError: for lengths or numbers below 1.
    """
    if jump_length < 1 or resamples < 1:
        raise ConfigError(f"RePaint: jump_length {jump_length} and resamples {resamples} must be at least 1 (published: 10 and 10).")
    left = dict.fromkeys(range(0, count - jump_length, jump_length), resamples - 1)
    moves, position = [], count   # position p: steps with indices below count - p are done
    while position > 0:
        position -= 1
        moves.append((False, count - 1 - position))
        if left.get(position, 0) > 0:
            left[position] -= 1
            moves.extend((True, count - 1 - position - back) for back in range(jump_length))
            position += jump_length
    return moves


def repaint(denoise: Denoise, x: Float[Array, "B ... C"], known: Float[Array, "B ... C"], mask: Float[Array, "#B ... #C"], plan: Plan, noise: Noise, *,
            prediction: str = "eps", eta: float = 1.0, jump_length: int = 10, resamples: int = 10, threshold: Threshold = None, frames: int = 0) -> Samples:
    """Fills in images where `mask` is 0, keeping `known` where it is 1.

    Args:
      x: standard normal, to begin with.
      plan: of `plans.discrete_plan`, whose steps follow each other; `noise(step)` counts the moves of the walk (`repaint_moves`).
      eta: as in `ddim`; 1 is the ancestral step of the paper.
      Others as in `ddim`. The known part and the rest of a step share their noise, so that a mask between 0 and 1 keeps its variance.
    Raises:
      ConfigError: as `ddim` and `repaint_moves`, for shapes that do not fit, and for a plan with gaps.
    """
    plan.check(prediction)
    if known.shape != x.shape or np.broadcast_shapes(mask.shape, x.shape) != x.shape:
        raise ConfigError(f"RePaint: noise {x.shape}, known {known.shape}, mask {mask.shape}; the first two must be equal, the mask broadcast to them.")
    if not plan.connected:
        raise ConfigError("RePaint needs a plan whose steps follow each other; make it without stride.")
    moves = repaint_moves(len(plan), jump_length, resamples)
    up, steps = (np.array(column) for column in zip(*moves, strict=True))
    before, after = plan.alpha_bar[steps], plan.after[steps]
    small = eta ** 2 * (1 - before / after) * (1 - after) / (1 - before)
    table = {"time": plan.times[steps], "index": np.arange(len(moves)), "up": up, "signal": np.sqrt(before), "noise": np.sqrt(1 - before),
             "signal_after": np.sqrt(after), "noise_after": np.sqrt(1 - after), "direction": np.sqrt(np.maximum(1 - after - small, 0)),
             "deviation": np.sqrt(small) * (plan.times[steps] > 0), "keep": np.sqrt(before / after), "renew": np.sqrt(1 - before / after)}

    def step(x, memory, c):
        random = noise(c["index"])

        def down(x, _):
            value = denoise(x, jnp.broadcast_to(c["time"], (len(x),)))
            x0, eps = to_x0(value, x, c["signal"], c["noise"], prediction), to_eps(value, x, c["signal"], c["noise"], prediction)
            x0 = x0 if threshold is None else threshold(x0)
            unknown = c["signal_after"] * x0 + c["direction"] * eps + c["deviation"] * random
            return mask * (c["signal_after"] * known + c["noise_after"] * random) + (1 - mask) * unknown, x0
        x, x0 = jax.lax.cond(c["up"], lambda x, x0: (c["keep"] * x + c["renew"] * random, x0), down, x, memory)
        return x, x0, x0
    return run_steps(step, x, jnp.zeros_like(x, dtype=jnp.float32), table, frames)

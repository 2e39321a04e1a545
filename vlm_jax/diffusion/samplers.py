"""Samplers of discrete processes, pure functions under one `lax.scan`: ancestral, DDIM and its inversion, DPM-Solver++.

    ancestral    Ho et al. (2020), algorithm 2; Nichol and Dhariwal (2021) for learned variances and fewer steps
    ddim         Song et al., "Denoising Diffusion Implicit Models" (2021), equation 12
    ddim_invert  the same equation towards the noise; with iterations Garibi et al., "ReNoise: Real Image Inversion Through Iterative Noising" (2024)
    dpm_solver   Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models" (2022), algorithm 2, orders 1 to 3

`denoise(x, t) -> prediction` gets x [B, ..., C] and t [B] (int32, or float32 where a plan has fractional steps); the channels are the last axis. `noise(step)
-> [B, ..., C]` is explicit (`noise.row_noise`), `step` counting the plan's. Coefficients are computed on the host in float64; jit the call, or a function
around it: guidance weights, eta, keys and parameters are arguments of the program then.
"""
from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from vlm_jax.diffusion.noise import Noise
from vlm_jax.diffusion.plans import Plan
from vlm_jax.diffusion.process import broadcast, check_variance, diffuse, log_variance, split_output, to_eps, to_x0
from vlm_jax.errors import ConfigError

Denoise = Callable[[Array, Array], Array]
Threshold = Callable[[Array], Array] | None
LOG_FLOOR = math.log(1e-20)


class Samples(NamedTuple):
    """x [B, ...] at the end, and where `frames` were asked for x after those steps and the x_0 predicted in them, both [F, B, ...]; else None."""
    x: Array
    frames_x: Array | None = None
    frames_x0: Array | None = None


def ancestral(denoise: Denoise, x: Float[Array, "B ... C"], plan: Plan, noise: Noise, *, prediction: str = "eps", variance: str = "small",
              threshold: Threshold = None, frames: int = 0) -> Samples:
    """Draws from the reverse chain; a plan of fewer steps than the process is improved DDPM's respacing.

    Args:
      x: standard normal, to begin with.
      variance: of `process.VARIANCES`; "small" is beta-tilde, "large" beta, of the respaced process; learned ones need twice the output channels.
      threshold: applied to the predicted x_0 (`guidance.static_threshold` in the published sampler).
      frames: how many evenly spaced steps to keep, the last among them.
    Raises:
      ConfigError: for unknown names, an output of another shape, "eps" at a level without signal, more frames than steps.
    """
    plan.check(prediction)
    check_variance(variance)
    before, after = plan.alpha_bar, plan.after
    ratio = before / after
    beta = 1 - ratio
    small = beta * (1 - after) / (1 - before)
    table = _levels(plan) | {
        "x0": np.sqrt(after) * beta / (1 - before), "x": np.sqrt(ratio) * (1 - after) / (1 - before), "random": plan.times > 0,
        "log_small": np.log(np.maximum(small, math.exp(LOG_FLOOR))), "log_large": np.log(beta)}

    def step(x, memory, c):
        value, raw = split_output(denoise(x, _rows(c["time"], x)), x, variance)
        x0 = _limited(threshold, to_x0(value, x, c["signal"], c["noise"], prediction))
        deviation = jnp.exp(0.5 * log_variance(raw, x, c["log_small"], c["log_large"], variance))
        return c["x0"] * x0 + c["x"] * x + c["random"] * deviation * noise(c["index"]), memory, x0
    return run_steps(step, x, None, table, frames)


def ddim(denoise: Denoise, x: Float[Array, "B ... C"], plan: Plan, *, prediction: str = "eps", eta: float | Array = 0.0, noise: Noise | None = None,
         threshold: Threshold = None, rederive: bool = False, frames: int = 0) -> Samples:
    """DDIM with any eta: 0 is deterministic, 1 is `ancestral` with beta-tilde.

    Args:
      eta: a number, or an array of the program; other than the number 0 it needs `noise`.
      rederive: compute eps again from the thresholded x_0 (diffusers' `use_clipped_model_output`).
      Others as in `ancestral`.
    Raises:
      ConfigError: as `ancestral`, for a negative eta and for eta without noise.
    """
    plan.check(prediction)
    random = not (isinstance(eta, (int, float)) and eta == 0)
    if isinstance(eta, (int, float)) and not eta >= 0:
        raise ConfigError(f"eta {eta} is negative; 0 is deterministic, 1 as random as DDPM.")
    if random and noise is None:
        raise ConfigError("eta other than 0 draws noise in every step; give noise=row_noise(keys, shape).")
    before, after = plan.alpha_bar, plan.after
    table = _levels(plan) | {"signal_after": np.sqrt(after), "rest": 1 - after, "small": (1 - before / after) * (1 - after) / (1 - before)}

    def step(x, memory, c):
        value = denoise(x, _rows(c["time"], x))
        x0, eps = _both(value, x, c["signal"], c["noise"], prediction, threshold, rederive)
        added = eta ** 2 * c["small"]
        x = c["signal_after"] * x0 + jnp.sqrt(jnp.maximum(c["rest"] - added, 0)) * eps
        if random:
            x = x + jnp.sqrt(added) * noise(c["index"])
        return x, memory, x0
    return run_steps(step, x, None, table, frames)


def ddim_invert(denoise: Denoise, x: Float[Array, "B ... C"], plan: Plan, *, prediction: str = "eps", threshold: Threshold = None, iterations: int = 1,
                frames: int = 0) -> Samples:
    """From images to the noise that `ddim` with the same plan would start from: its steps backwards, from `after[i]` to `alpha_bar[i]`.

    A step needs the prediction at the noisier x that it is looking for. With 1 iteration it is taken at the x it has (the usual approximation, also
    diffusers'); further ones repeat the step with the prediction at its last result, whose fixed point `ddim` undoes exactly where no threshold cuts.
    Raises:
      ConfigError: as `ddim`, for iterations < 1, and for "x0" and "edm" where the plan ends at data: they say nothing about its noise (end at "first").
    """
    plan.check(prediction)
    if iterations < 1:
        raise ConfigError(f"iterations {iterations}: an inversion step needs at least 1.")
    if prediction in ("x0", "edm") and np.any(plan.after == 1):
        raise ConfigError(f'inversion with prediction "{prediction}" cannot start at data without noise; make the plan with final="first".')
    backwards = Plan(plan.times[::-1], plan.after[::-1], plan.alpha_bar[::-1])
    table = _levels(backwards) | {"signal_after": np.sqrt(backwards.after), "noise_after": np.sqrt(1 - backwards.after)}

    def step(x, memory, c):
        t = _rows(c["time"], x)
        x0, eps = _both(denoise(x, t), x, c["signal"], c["noise"], prediction, threshold, False)
        moved = c["signal_after"] * x0 + c["noise_after"] * eps

        def again(_, moved):
            eps = to_eps(denoise(moved, t), moved, c["signal_after"], c["noise_after"], prediction)
            return c["signal_after"] * (x - c["noise"] * eps) / c["signal"] + c["noise_after"] * eps
        return (moved if iterations == 1 else jax.lax.fori_loop(1, iterations, again, moved)), memory, x0
    return run_steps(step, x, None, table, frames)


def dpm_solver(denoise: Denoise, x: Float[Array, "B ... C"], plan: Plan, *, prediction: str = "eps", order: int = 2, solver: str = "midpoint",
               lower_order_final: bool = True, euler_at_final: bool = False, threshold: Threshold = None, frames: int = 0) -> Samples:
    """DPM-Solver++ (multistep, deterministic): one network call a step, the x_0 of earlier steps reused.

    Args:
      plan: of `plans.solver_plan`, whose steps follow each other.
      order: 1 (which is DDIM), 2 or 3; the first steps have lower ones, and the last two of fewer than 15 if `lower_order_final`.
      solver: "midpoint" or "heun", the two second-order forms; `euler_at_final`: the last step has order 1.
    Raises:
      ConfigError: as `ddim`, for another order or solver, and for a plan with gaps or a level without signal.
    """
    plan.check(prediction)
    weights = multistep_weights(plan, order, solver, lower_order_final, euler_at_final)
    table = _levels(plan) | {"x": weights[:, 0], "x0": weights[:, 1], "x1": weights[:, 2], "x2": weights[:, 3]}

    def step(x, memory, c):
        one, two = memory
        x0 = _limited(threshold, to_x0(denoise(x, _rows(c["time"], x)), x, c["signal"], c["noise"], prediction))
        return c["x"] * x + c["x0"] * x0 + c["x1"] * one + c["x2"] * two, (x0, one), x0
    return run_steps(step, x, (jnp.zeros_like(x),) * 2, table, frames)


def multistep_weights(plan: Plan, order: int = 2, solver: str = "midpoint", lower_order_final: bool = True, euler_at_final: bool = False) -> np.ndarray:
    """[S, 4] float64: the factors of x and of the x_0 predicted in this step and the two before, of which every step is a sum."""
    if order not in (1, 2, 3) or solver not in ("midpoint", "heun"):
        raise ConfigError(f'dpm_solver: order {order} with solver "{solver}"; orders are 1, 2, 3 and solvers "midpoint" and "heun".')
    if not plan.connected or np.any(plan.alpha_bar == 0):
        raise ConfigError("dpm_solver needs a plan whose steps follow each other from a level with some signal; make it with solver_plan.")
    alpha_bar = np.append(plan.alpha_bar, plan.after[-1])
    signal, noise, count = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar), len(plan)
    with np.errstate(divide="ignore"):
        half_log_snr = np.log(signal) - np.log(noise)
    weights = np.zeros((count, 4))
    for i in range(count):
        here = min(order, i + 1)
        if lower_order_final and count < 15:
            here = min(here, count - i)
        if i == count - 1 and (euler_at_final or alpha_bar[-1] == 1):
            here = 1
        h = half_log_snr[i + 1] - half_log_snr[i]
        if h == 0:      # a plan that stays where it is ("smallest" after Karras's levels): nothing moves
            weights[i, 0] = 1
            continue
        shrink = np.expm1(-h)
        now, one, two = np.eye(3)
        if here == 1:
            mixed = -shrink * now
        else:
            r0 = (half_log_snr[i] - half_log_snr[i - 1]) / h
            slope = (now - one) / r0
            if here == 2:
                mixed = -shrink * now + (-0.5 * shrink if solver == "midpoint" else shrink / h + 1) * slope
            else:
                r1 = (half_log_snr[i - 1] - half_log_snr[i - 2]) / h
                change = (slope - (one - two) / r1) / (r0 + r1)
                mixed = -shrink * now + (shrink / h + 1) * (slope + r0 * change) - ((shrink + h) / h ** 2 - 0.5) * change
        weights[i] = [noise[i + 1] / noise[i], *(signal[i + 1] * mixed)]
    return weights


def renoised(x0: Float[Array, "B ..."], plan: Any, eps: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
    """Images with the noise at which a plan begins: image-to-image is a sampler on `plan.tail(strength)` from here (SDEdit; Meng et al. 2022)."""
    return diffuse(x0, eps, *plan.start)


def run_steps(step: Callable, x: Array, memory: Any, table: dict[str, np.ndarray], frames: int, ends: np.ndarray | None = None) -> Samples:
    """Scans `step(x, memory, coefficients) -> (x, memory, x_0)` over the rows of `table`; `ends` marks the rows that finish a step (all by default)."""
    count = len(table["time"])
    rows = np.arange(count) if ends is None else np.flatnonzero(ends)
    if not 0 <= frames <= len(rows):
        raise ConfigError(f"{frames} frames of {len(rows)} steps; keep from 0 to {len(rows)}.")
    slots = np.full(count, frames)
    slots[rows[np.round(np.linspace(0, len(rows) - 1, frames) if frames > 1 else np.arange(frames) + len(rows) - 1).astype(int)]] = np.arange(frames)
    coefficients = {name: jnp.asarray(_narrow(name, column)) for name, column in (table | {"slot": slots}).items()}
    x = jnp.asarray(x, jnp.float32)
    kept = jnp.zeros((2, frames, *x.shape), jnp.float32) if frames else None

    def body(carry, c):
        x, memory, kept = carry
        x, memory, x0 = step(x, memory, c)
        if frames:
            kept = kept.at[:, c["slot"]].set(jnp.stack([x, x0]), mode="drop")
        return (x, memory, kept), None
    (x, _, kept), _ = jax.lax.scan(body, (x, memory, kept), coefficients)
    return Samples(x, *(kept if frames else ()))


def _levels(plan: Plan) -> dict[str, np.ndarray]:
    return {"time": plan.times, "index": np.arange(len(plan)), "signal": np.sqrt(plan.alpha_bar), "noise": np.sqrt(1 - plan.alpha_bar)}


def _narrow(name: str, column: np.ndarray) -> np.ndarray:
    """The dtype of a column on the device: whole steps are int32, as networks with tables of embeddings need them."""
    whole = column.dtype.kind in "iu" or (name == "time" and np.array_equal(column, np.round(column)))
    return column.astype(np.int32 if whole else bool if column.dtype == bool else np.float32)


def _rows(value: Array, x: Array) -> Array:
    return jnp.broadcast_to(value, (len(x),))


def _limited(threshold: Threshold, x0: Array) -> Array:
    return x0 if threshold is None else threshold(x0)


def _both(value: Array, x: Array, signal: Array, noise: Array, prediction: str, threshold: Threshold, rederive: bool) -> tuple[Array, Array]:
    """(x_0, eps) of a prediction; x_0 within its threshold."""
    x0, eps = _limited(threshold, to_x0(value, x, signal, noise, prediction)), to_eps(value, x, signal, noise, prediction)
    if rederive:
        eps = (x - broadcast(signal, x) * x0) / broadcast(noise, x)
    return x0, eps

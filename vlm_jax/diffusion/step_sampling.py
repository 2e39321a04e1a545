"""Which steps a network is trained at: uniform, or in proportion to the root mean square of their last losses.

Nichol and Dhariwal (2021), section 3.3: for the bound alone, whose terms differ by orders of magnitude. The history is a value, passed in and out.
"""
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.errors import ConfigError

UNIFORM_SHARE = 0.001


class StepHistory(NamedTuple):
    """The last losses of every step: `losses` [T, K] float32, oldest first, and how many of them there are, `counts` [T] int32."""
    losses: Float[Array, "T K"]
    counts: Int[Array, "T"]


def step_history(steps: int, kept: int = 10) -> StepHistory:
    """An empty history of a process of T steps that keeps `kept` losses of each; ConfigError for less than one."""
    if steps < 1 or kept < 1:
        raise ConfigError(f"step history of {steps} steps and {kept} losses each; both must be at least 1 (published: 10 losses).")
    return StepHistory(jnp.zeros((steps, kept), jnp.float32), jnp.zeros(steps, jnp.int32))


def step_probabilities(history: StepHistory) -> Float[Array, "T"]:
    """sqrt(E L_t^2), normalised and mixed with 0.001 of the uniform distribution; uniform until every step has its losses."""
    steps, kept = history.losses.shape
    size = jnp.sqrt(jnp.mean(history.losses ** 2, axis=1))
    learned = size / jnp.maximum(jnp.sum(size), 1e-30)
    mixed = (1 - UNIFORM_SHARE) * learned + UNIFORM_SHARE / steps
    warm = jnp.all(history.counts == kept) & (jnp.sum(size) > 0)
    return jnp.where(warm, mixed, 1.0 / steps)


def sample_steps(rng: Array, batch: int, history: StepHistory | int) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draws (t [B], weights [B]): the mean of weights times losses estimates the uniform mean. A number T in place of the history: uniform, weights 1."""
    if isinstance(history, int):
        return jax.random.randint(rng, (batch,), 0, history), jnp.ones(batch, jnp.float32)
    probabilities = step_probabilities(history)
    t = jax.random.categorical(rng, jnp.log(probabilities), shape=(batch,)).astype(jnp.int32)
    return t, 1 / (len(probabilities) * probabilities[t])


def update_history(history: StepHistory, t: Int[Array, "B"], losses: Float[Array, "B"], weight: Float[Array, "B"] | None = None) -> StepHistory:
    """The history with a batch's losses (before their weights), a step that occurs more than once taken in the batch's order.

    Rows of weight 0 and losses that are not finite are left out; no gradient flows.
    """
    losses = jax.lax.stop_gradient(losses)
    counted = jnp.isfinite(losses) if weight is None else jnp.isfinite(losses) & (weight > 0)

    def add(history: StepHistory, row: tuple[Array, Array, Array]) -> tuple[StepHistory, None]:
        step, loss, counts = row
        kept = history.losses.shape[1]
        new = jnp.roll(history.losses[step], -1).at[-1].set(loss)
        return StepHistory(history.losses.at[step].set(jnp.where(counts, new, history.losses[step])),
                           history.counts.at[step].set(jnp.minimum(history.counts[step] + counts, kept))), None
    return jax.lax.scan(add, history, (t, losses, counted))[0]

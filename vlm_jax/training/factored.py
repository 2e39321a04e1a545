"""The factored second moment of Adafactor, layer by layer. Shazeer and Stern, "Adafactor" (2018), section 3."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vlm_jax.training.trees import flatten, is_stacked, unflatten


class FactoredState(NamedTuple):
    """Running means of the squared gradient: over columns (`row`) and rows (`column`) where a parameter is factored, else of every entry (`full`).

    Each is a tree with the leaves that exist; a parameter has either `row` and `column`, or `full`.
    """
    count: jax.Array
    row: Any
    column: Any
    full: Any


def factored_axes(shape: tuple[int, ...], stacked: bool, min_dim: int) -> tuple[int, int] | None:
    """Returns (second largest axis, largest axis) of one layer's shape, or None if the second largest is below `min_dim`.

    The layer axis of a stack is never factored over, so that a stack of blocks trains exactly as its blocks would, stored apart.
    """
    first = int(stacked)
    if len(shape) - first < 2:
        return None
    order = np.argsort(shape[first:], kind="stable") + first
    second, largest = int(order[-2]), int(order[-1])
    return (second, largest) if shape[second] >= min_dim else None


def scale_by_factored_rms(decay_rate: float = 0.8, decay_cap: float = 0.999, eps: float = 1e-30, min_dim: int = 32,
                          clip_threshold: float | None = None) -> optax.GradientTransformation:
    """Divides gradients by the root of a running mean of their squares, factored into rows and columns for parameters with two axes of at least
    `min_dim`.

    Equals `optax.scale_by_factored_rms` with decay min(decay_cap, 1 - (t + 1)^-decay_rate) for a parameter that is not stacked, and applies to
    each layer of a stacked one by itself. `clip_threshold` bounds the root mean square of an update, again by layer. The state is float32.
    """
    def init(params):
        row, column, full = {}, {}, {}
        for path, leaf in flatten(params).items():
            axes = factored_axes(leaf.shape, is_stacked(path), min_dim)
            if axes is None:
                full[path] = jnp.zeros(leaf.shape, jnp.float32)
            else:
                second, largest = axes
                row[path] = jnp.zeros(_without(leaf.shape, largest), jnp.float32)
                column[path] = jnp.zeros(_without(leaf.shape, second), jnp.float32)
        return FactoredState(jnp.zeros((), jnp.int32), unflatten(row), unflatten(column), unflatten(full))

    def update(gradients, state, params=None):
        decay = jnp.minimum(decay_cap, 1.0 - (state.count.astype(jnp.float32) + 1.0) ** -decay_rate)
        rows, columns, fulls, updates = flatten(state.row), flatten(state.column), flatten(state.full), {}
        for path, gradient in flatten(gradients).items():
            stacked = is_stacked(path)
            exact = gradient.astype(jnp.float32)
            square = exact * exact + eps
            axes = factored_axes(gradient.shape, stacked, min_dim)
            if axes is None:
                fulls[path] = decay * fulls[path] + (1 - decay) * square
                scaled = exact * fulls[path] ** -0.5
            else:
                second, largest = axes
                rows[path] = decay * rows[path] + (1 - decay) * jnp.mean(square, largest)
                columns[path] = decay * columns[path] + (1 - decay) * jnp.mean(square, second)
                mean = jnp.mean(rows[path], second - (second > largest), keepdims=True)
                scaled = exact * jnp.expand_dims((rows[path] / mean) ** -0.5, largest) * jnp.expand_dims(columns[path] ** -0.5, second)
            if clip_threshold:
                layer = tuple(range(int(stacked), gradient.ndim))
                scaled = scaled / jnp.maximum(1.0, jnp.sqrt(jnp.mean(scaled * scaled, layer, keepdims=True)) / clip_threshold)
            updates[path] = scaled.astype(gradient.dtype)
        return unflatten(updates), FactoredState(optax.safe_increment(state.count), unflatten(rows), unflatten(columns), unflatten(fulls))

    return optax.GradientTransformation(init, update)


def _without(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return shape[:axis] + shape[axis + 1:]

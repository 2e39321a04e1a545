"""Random numbers that belong to a row and a step, not to a batch; interpolation of noise; drawing many images in batches of one size."""
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from vlm_jax.diffusion.process import broadcast
from vlm_jax.errors import ConfigError

Noise = Callable[[Any], Array]   # noise(step) -> standard normal [B, ...]


def slerp(first: Float[Array, "B ..."], second: Float[Array, "B ..."], fraction: Array) -> Float[Array, "B ..."]:
    """Spherical interpolation row by row, which keeps noise looking like noise (Song et al. 2021, "Denoising Diffusion Implicit Models", appendix D.5).

    `fraction` [B] or scalar in [0, 1]; rows that point the same way (sin theta < 1e-4) are interpolated linearly.
    """
    axes = tuple(range(1, first.ndim))
    lengths = jnp.sqrt(jnp.sum(first ** 2, axes) * jnp.sum(second ** 2, axes))
    angle = jnp.arccos(jnp.clip(jnp.sum(first * second, axes) / jnp.maximum(lengths, 1e-30), -1, 1))
    fraction = jnp.broadcast_to(jnp.asarray(fraction, jnp.float32), angle.shape)
    straight = jnp.sin(angle) < 1e-4
    scale = jnp.where(straight, 1.0, jnp.sin(angle))
    left = jnp.where(straight, 1 - fraction, jnp.sin((1 - fraction) * angle) / scale)
    right = jnp.where(straight, fraction, jnp.sin(fraction * angle) / scale)
    return broadcast(left, first) * first + broadcast(right, first) * second


def row_noise(keys: Array, shape: tuple[int, ...]) -> Noise:
    """The noise of a sampler: `noise(step)` is standard normal [B, *shape], each row's from its key and the step alone, in whatever batch it is drawn."""
    def noise(step: Array) -> Float[Array, "B ..."]:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape))(keys)
    return noise


def row_keys(seed: Int[Array, ""], rows: Int[Array, "B"]) -> Array:
    """One random key a row, folded from the seed and the row's number."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(rows)


def initial_noise(keys: Array, shape: tuple[int, ...]) -> Float[Array, "B ..."]:
    """Standard normal [B, *shape] to start from, a row from its key; independent of every step of `row_noise`."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, np.uint32(2 ** 32 - 1)), shape))(keys)


def in_batches(sample: Callable[..., Array], count: int, batch_size: int, inputs: Any = None) -> Iterator[np.ndarray]:
    """Yields `count` rows of samples in batches of at most `batch_size`, from a (jitted) `sample(rows, inputs)` that always gets `batch_size` of them.

    Args:
      sample: gets row numbers [B] int32 (to fold into keys) and the rows of `inputs`, and returns [B, ...]. It compiles once, whatever `count` is.
      inputs: a tree of arrays with `count` rows (conditions, guidance weights), or None.
    Raises:
      ConfigError: for fewer than one image or row, or inputs of another number of rows.
    """
    if count < 1 or batch_size < 1:
        raise ConfigError(f"{count} images in batches of {batch_size}; both must be at least 1.")
    for leaf in jax.tree.leaves(inputs):
        if np.shape(leaf)[:1] != (count,):
            raise ConfigError(f"inputs of shape {np.shape(leaf)} for {count} images; give one row an image.")
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size, dtype=np.int32)
        taken = jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf)[np.minimum(rows, count - 1)], inputs)
        yield np.asarray(sample(rows, taken))[:count - start]

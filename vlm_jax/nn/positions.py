"""Position embeddings: fixed sine-cosine on a grid, and learned tables resampled to another grid."""
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from vlm_jax.errors import ConfigError


def sincos2d(height: int, width: int, features: int, temperature: float = 10_000.0) -> Float[Array, "N D"]:
    """Fixed embeddings of a grid in raster order: a quarter of the features each for sin x, cos x, sin y, cos y (Chen et al., "MoCo v3", 2021).

    Raises:
      ConfigError: unless `features` is a multiple of 4 and at least 8.
    """
    if features % 4 or features < 8:
        raise ConfigError(f"positions: sincos2d needs a width that is a multiple of 4 and at least 8, got {features}; change the width or "
                          'use positions="learned".')
    quarter = features // 4
    frequencies = temperature ** (-np.arange(quarter) / (quarter - 1))
    y, x = np.mgrid[:height, :width]
    y, x = np.outer(y.ravel(), frequencies), np.outer(x.ravel(), frequencies)
    return jnp.asarray(np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1), jnp.float32)


def resample_positions(table: Float[Array, "N D"], old: tuple[int, int], new: tuple[int, int], keep_first: int = 0) -> Float[Array, "M D"]:
    """Resizes a table of grid positions in raster order from the grid `old` to the grid `new` by bilinear interpolation, antialiased when it shrinks.

    Args:
      keep_first: leading rows (of a class token) that are copied.
    Raises:
      ValueError: if the table does not have keep_first + old[0] * old[1] rows.
    """
    if table.shape[0] != keep_first + old[0] * old[1]:
        raise ValueError(f"resample_positions: the table has {table.shape[0]} rows, not {keep_first} + {old[0]} x {old[1]}; pass its own grid.")
    if tuple(old) == tuple(new):
        return table
    grid = table[keep_first:].reshape(*old, -1).astype(jnp.float32)
    resized = jax.image.resize(grid, (*new, grid.shape[-1]), "bilinear", antialias=True)
    return jnp.concatenate([table[:keep_first], resized.reshape(new[0] * new[1], -1).astype(table.dtype)])


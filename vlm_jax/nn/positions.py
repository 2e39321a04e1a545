"""Position embeddings: fixed sine-cosine on a grid, and learned tables resampled to another grid."""
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from vlm_jax.errors import ConfigError
from vlm_jax.settings import choose

RESAMPLING = {name: name for name in ("bilinear", "bicubic", "bicubic_dino")}


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


def resample_positions(table: Float[Array, "N D"], old: tuple[int, int], new: tuple[int, int], keep_first: int = 0,
                       method: str = "bilinear") -> Float[Array, "M D"]:
    """Resamples a table of grid positions in raster order from the grid `old` to the grid `new`.

    Args:
      keep_first: leading rows (of a class token) that are copied.
      method: "bilinear", antialiased when it shrinks; "bicubic", cubic convolution that is not, as transformers does it; "bicubic_dino", the same with points a
        little closer together, as DINO's code and transformers' IDEFICS do it: a tenth of a point is added to the new sides.
    Raises:
      ValueError: if the table does not have keep_first + old[0] * old[1] rows.
      ConfigError: for an unknown method.
    """
    if table.shape[0] != keep_first + old[0] * old[1]:
        raise ValueError(f"resample_positions: the table has {table.shape[0]} rows, not {keep_first} + {old[0]} x {old[1]}; pass its own grid.")
    if tuple(old) == tuple(new):
        return table
    grid = table[keep_first:].reshape(*old, -1).astype(jnp.float32)
    if choose(RESAMPLING, method, "resample") == "bilinear":
        resized = jax.image.resize(grid, (*new, grid.shape[-1]), "bilinear", antialias=True)
    else:
        more = 0.1 if method == "bicubic_dino" else 0.0
        down, across = (jnp.asarray(cubic_weights(a, b, more=more)) for a, b in zip(old, new))
        resized = jnp.einsum("ya,xb,abd->yxd", down, across, grid, precision="highest")
    return jnp.concatenate([table[:keep_first], resized.reshape(new[0] * new[1], -1).astype(table.dtype)])


def cubic_weights(old: int, new: int, sharpness: float = -0.75, more: float = 0.0) -> Float[np.ndarray, "M N"]:
    """The matrix that resamples `old` points to `new` by cubic convolution, pixel centres at half integers, the edges repeated; the new ones lie as if there
    were `more` of them.

    Keys, "Cubic Convolution Interpolation" (1981), equation 4 with a = `sharpness`: -0.75 in PyTorch, -0.5 in the paper.
    """
    weights = np.zeros((new, old))
    for row in range(new):
        centre = (row + 0.5) * old / (new + more) - 0.5
        for place in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x = abs(centre - place)
            weight = (sharpness + 2) * x ** 3 - (sharpness + 3) * x ** 2 + 1 if x <= 1 else sharpness * (x ** 3 - 5 * x ** 2 + 8 * x - 4)
            weights[row, min(max(place, 0), old - 1)] += weight
    return weights.astype(np.float32)


def triangle_weights(index: Int[Array, "..."], old: int, new: Int[Array, "..."]) -> Float[Array, "... N"]:
    """What point `index` of `new` takes from each of `old` points by antialiased bilinear resampling; `new` may be data, one size a picture."""
    scale = old / new.astype(jnp.float32)
    centre = (index.astype(jnp.float32) + 0.5) * scale
    reach = jnp.maximum(scale, 1.0)[..., None]
    weights = jnp.maximum(1 - jnp.abs(jnp.arange(old) + 0.5 - centre[..., None]) / reach, 0)
    return weights / weights.sum(-1, keepdims=True)

"""What is done to a prediction before a step is taken: classifier-free guidance, thresholding.

    guidance   Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), equation 6
    rescale    Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (2023), section 3.4
    dynamic    Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding" (2022), section 2.3
"""
from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from vlm_jax.diffusion.process import broadcast
from vlm_jax.errors import ConfigError


def classifier_free(denoise: Callable[[Array, Array, Any], Array], condition: Any, null: Any, weight: Float[Array, "#B"],
                    rescale: float | Array = 0.0) -> Callable[[Array, Array], Array]:
    """Turns a conditional network into a guided `denoise(x, t)`: (1 + w) prediction(condition) - w prediction(null), in one call of twice the rows.

    Args:
      denoise: `denoise(x, t, condition) -> prediction`; of twice the channels of x, the second half is a learned variance and taken from the condition.
      condition, null: trees of arrays of equal structure and shapes, one row a row of x; `null` is what dropped conditions were trained with.
      weight: the paper's w, scalar or [B], an argument of the program like any array. 0 is the conditional model, -1 the unconditional one; the scale of
        other libraries is 1 + w.
      rescale: how far the guided prediction is brought back to the conditional one's deviation, row by row; 0 not at all, 1 entirely (0.7 published).
    Raises:
      ConfigError: without a condition or a null one, where the two differ in structure or shape, and on the first call where their rows are not x's.
    """
    if not jax.tree.leaves(condition) or not jax.tree.leaves(null):
        raise ConfigError("guidance needs a conditional model: give both a condition and the null condition that it was trained with, or drop the weight.")
    if jax.tree.structure(condition) != jax.tree.structure(null) or not all(
            np.shape(a) == np.shape(b) for a, b in zip(jax.tree.leaves(condition), jax.tree.leaves(null), strict=True)):
        raise ConfigError("guidance: condition and null condition differ in structure or shape; pad the null condition to the condition's shapes.")
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), condition, null)

    def guided(x: Array, t: Array) -> Array:
        rows = {len(leaf) // 2 for leaf in jax.tree.leaves(both)}
        if rows != {len(x)}:
            raise ConfigError(f"guidance: conditions of {sorted(rows)} rows for {len(x)} images; give one row an image.")
        output = denoise(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        conditional, unconditional = jnp.split(output, 2)
        channels = x.shape[-1]
        wanted, free = conditional[..., :channels], unconditional[..., :channels]
        prediction = wanted + broadcast(weight, x) * (wanted - free)
        axes = tuple(range(1, x.ndim))
        ratio = jnp.std(wanted, axes, keepdims=True) / jnp.maximum(jnp.std(prediction, axes, keepdims=True), 1e-12)
        prediction = prediction * (1 + broadcast(rescale, x) * (ratio - 1))
        return jnp.concatenate([prediction, conditional[..., channels:]], axis=-1)
    return guided


def static_threshold(x0: Float[Array, "B ..."], limit: float = 1.0) -> Float[Array, "B ..."]:
    """x_0 clipped to [-limit, limit] (the published DDPM sampler)."""
    return jnp.clip(x0, -limit, limit)


def dynamic_threshold(x0: Float[Array, "B ..."], quantile: float = 0.995, largest: float = math.inf) -> Float[Array, "B ..."]:
    """x_0 clipped to [-s, s] and divided by s, the `quantile` of a row's magnitudes, at least 1 and at most `largest`."""
    size = jnp.quantile(jnp.abs(x0).reshape(len(x0), -1), quantile, axis=1)
    size = broadcast(jnp.clip(size, 1.0, largest), x0)
    return jnp.clip(x0, -size, size) / size

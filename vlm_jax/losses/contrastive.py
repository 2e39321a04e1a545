"""Sigmoid and softmax contrastive losses between images and texts, as sums with weights.

    sigmoid   Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), section 3.2: the sum over all pairs, divided by the number of images
    softmax   Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.3 and figure 3: the mean
              of the cross-entropies of the images over the texts and of the texts over the images

Both return `(sum, weight)`; the paper's loss is sum / weight. `scale` is the multiplier of the similarities, the exponential of the learned t'.

A row of weight 0 (a bad record, padding) is neither a positive nor a negative. The weight of a pair is the mean of its two rows', so a weight
common to all rows cancels in sum / weight. Weights are constants: no gradient flows to them.

`chunked=True` is the ring of `ring.py`; `chunked=False` writes the matrix of all pairs and is what the ring is tested against. They agree in value
and gradient to relative 1e-6 in float32 at the highest matmul precision. The gradient of `scale` is a sum of similarities times d loss / d logit
whose terms have both signs and nearly cancel late in training: its error is relative to the sum of the terms' magnitudes, not to their total.
Likewise a softmax loss that is almost 0 because its probabilities are almost 1 is exact relative to 1, chunked or dense.
"""
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.losses.ring import MASKED, Layout, layout_of, mesh_or_context, pair_weight, ring_matches, ring_sigmoid, ring_softmax

AXES = ("data", "fsdp")


def sigmoid_loss(image: Float[Array, "B D"], text: Float[Array, "B D"], scale: Float[Array, ""], bias: Float[Array, ""], *,
                 weight: Float[Array, "B"] | None = None, mesh: Any = None, axes: tuple[str, ...] = AXES,
                 chunked: bool = True) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sigmoid loss of B matching pairs against all B x B pairs.

    Args:
      image, text: embeddings, normalised by the caller; row i of one belongs to row i of the other.
      scale, bias: logit = scale * similarity + bias (the paper starts at scale = 10, bias = -10).
      weight: a weight >= 0 for each pair, by default 1.
      mesh: the mesh whose `axes` split the rows; by default the one entered by `jax.set_mesh`, if any. B need not divide by the devices.
      chunked: never hold the matrix of similarities.
    Returns:
      (sum over pairs of -log sigmoid(z logit), sum of the weights), float32 scalars.
    Raises:
      ValueError: if the shapes of image, text and weight do not fit.
    """
    size = len(image)
    image, text, weight, layout = _prepare("sigmoid_loss", image, text, weight, mesh, axes, chunked)
    scale, bias = (jnp.asarray(x, jnp.float32).reshape(()) for x in (scale, bias))
    if chunked:
        return ring_sigmoid(layout, image, text, scale, bias, weight), jnp.sum(weight)
    logits = scale * (image @ text.T) + bias
    losses = jax.nn.softplus(jnp.where(jnp.eye(size, dtype=bool), -logits, logits))
    return jnp.sum(jnp.sum(pair_weight(weight, weight) * losses, axis=1)), jnp.sum(weight)


def softmax_loss(image: Float[Array, "B D"], text: Float[Array, "B D"], scale: Float[Array, ""], *,
                 weight: Float[Array, "B"] | None = None, mesh: Any = None, axes: tuple[str, ...] = AXES,
                 chunked: bool = True) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The symmetric softmax loss (InfoNCE) of B matching pairs.

    Arguments and errors as in `sigmoid_loss`, without a bias, which would cancel; scale > 0.
    Returns:
      (sum over rows of the weighted mean of both cross-entropies, sum of the weights), float32 scalars.
    """
    image, text, weight, layout = _prepare("softmax_loss", image, text, weight, mesh, axes, chunked)
    scale = jnp.asarray(scale, jnp.float32).reshape(())
    if chunked:
        return ring_softmax(layout, image, text, scale, weight), jnp.sum(weight)
    similar = image @ text.T
    own = jnp.diagonal(similar)
    # log sum_j exp(l_ij - l_ii): subtracting afterwards would lose the digits of a loss that is small beside the logits.
    by_image = jax.nn.logsumexp(jnp.where(weight[None, :] > 0, scale * (similar - own[:, None]), MASKED), axis=1)
    by_text = jax.nn.logsumexp(jnp.where(weight[:, None] > 0, scale * (similar - own[None, :]), MASKED), axis=0)
    return jnp.sum(weight * 0.5 * (by_image + by_text)), jnp.sum(weight)


def matching_accuracy(image: Float[Array, "B D"], text: Float[Array, "B D"], *, weight: Float[Array, "B"] | None = None,
                      mesh: Any = None, axes: tuple[str, ...] = AXES) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How many images find their text: (weighted number of images more similar to their own text than to every other one, sum of the weights).

    A tie counts as wrong, so that collapsed embeddings score nothing. Arguments as in `sigmoid_loss`; no gradient flows.
    """
    image, text = jax.lax.stop_gradient((image, text))
    image, text, weight, layout = _prepare("matching_accuracy", image, text, weight, mesh, axes, True)
    return ring_matches(layout, image, text, weight), jnp.sum(weight)


def _prepare(name: str, image: Array, text: Array, weight: Array | None, mesh: Any, axes: tuple[str, ...],
             pad: bool) -> tuple[Array, Array, Array, Layout]:
    """Float32 features whose rows of weight 0 are zeros (a NaN in them must not spread), the weights, and the layout, padded to it if asked."""
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(f"{name}: image {image.shape} and text {text.shape} must both be [pairs, width]; embed as many texts as images, one width.")
    if weight is not None and weight.shape != image.shape[:1]:
        raise ValueError(f"{name}: weight has shape {weight.shape} for {len(image)} pairs; give one weight for each pair.")
    image, text = image.astype(jnp.float32), text.astype(jnp.float32)
    if weight is None:
        weight = jnp.ones(len(image), jnp.float32)
    else:
        weight = jax.lax.stop_gradient(weight.astype(jnp.float32))
        image, text = (jnp.where(weight[:, None] > 0, x, 0.0) for x in (image, text))
    layout = layout_of(len(image), mesh_or_context(mesh), tuple(axes))
    missing = layout.padded - len(image) if pad else 0
    if missing:
        image, text = (jnp.pad(x, ((0, missing), (0, 0))) for x in (image, text))
        weight = jnp.pad(weight, (0, missing))
    return image, text, weight, layout

"""Gradient caching: the gradient of a loss that compares all examples of a batch, with the activations of only one micro-batch in memory.

Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2021), section 3.2: embed every micro-batch and keep nothing
but the embeddings; take the loss of all embeddings and its gradient by them; embed every micro-batch again, now with the backward pass, and pull the
cached gradients through. All negatives of the large batch count, and the result is its gradient, not an approximation.
"""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vlm_jax.errors import ConfigError
from vlm_jax.sharding import constrain


def split_rows(tree: Any, micro_batches: int) -> Any:
    """Leaves [B, ...] as [M, B / M, ...]: micro-batch m holds the rows m, m + M, m + 2 M ... , so that rows split over devices stay where they are.

    Raises:
      ConfigError: if the rows do not divide by M.
    """
    def split(x):
        if x.shape[0] % micro_batches:
            raise ConfigError(f"accumulate.micro_batches={micro_batches} does not divide the batch of {x.shape[0]}; "
                              "choose a divisor of the batch size.")
        x = jnp.moveaxis(x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]), 1, 0)
        return constrain(x, None, "batch", *(None,) * (x.ndim - 2))

    return jax.tree.map(split, tree)


def join_rows(tree: Any) -> Any:
    """The inverse of `split_rows`."""
    def join(x):
        x = jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])
        return constrain(x, "batch", *(None,) * (x.ndim - 1))

    return jax.tree.map(join, tree)


def cached_value_and_gradients(embed: Callable[[Any, Any, jax.Array], Any], loss: Callable[[Any, Any], tuple[jax.Array, Any]],
                               micro_batches: int) -> Callable[[Any, Any, jax.Array], tuple[tuple[jax.Array, Any], Any]]:
    """Returns `function(params, batch, rng) -> ((value, auxiliary), gradients)`: `jax.value_and_grad` of `loss(params, embed(params, batch, rng))`.

    Args:
      embed: (params, batch, key) -> a tree of embeddings, one row for each row of the batch, each a function of its own row. Both passes over
        micro-batch m get the key `fold_in(rng, m)`, so that they draw the same dropout; only what is drawn differs from the undivided batch.
      loss: (params, embeddings of the whole batch in its order) -> (scalar, anything else). Parameters that it uses itself (scale, bias) get their
        gradient too.
      micro_batches: M; the rows of every leaf of the batch must divide by it.
    Raises:
      ConfigError: when called with a batch that does not divide.
    """
    def function(params, batch, rng):
        parts = split_rows(batch, micro_batches)
        numbers = jnp.arange(micro_batches)
        embeddings = jax.lax.map(lambda part: embed(params, part[0], jax.random.fold_in(rng, part[1])), (parts, numbers))
        (value, auxiliary), (gradients, cached) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, join_rows(embeddings))

        def pull(gradients, part):
            rows, number, cotangents = part
            _, backward = jax.vjp(lambda p: embed(p, rows, jax.random.fold_in(rng, number)), params)
            return jax.tree.map(jnp.add, gradients, backward(cotangents)[0]), None

        return (value, auxiliary), jax.lax.scan(pull, gradients, (parts, numbers, split_rows(cached, micro_batches)))[0]

    return function

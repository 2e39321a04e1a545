"""Gradients of a task's loss: of a whole batch or summed over micro-batches, clipped, checked; and the moving average of parameters."""
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlm_jax.errors import ConfigError
from vlm_jax.losses.cached import cached_value_and_gradients, split_rows
from vlm_jax.settings import call
from vlm_jax.training.trees import flatten, unflatten


def total_loss(terms: Mapping[str, tuple[Any, Any]], weights: Mapping[str, Any] | None = None) -> Float[Array, ""]:
    """Returns the sum over terms of sum / weight; a term of weight 0 (a batch of bad records) counts 0. `weights` replaces the terms' own."""
    total = jnp.zeros((), jnp.float32)
    for name, (value, weight) in terms.items():
        weight = jax.lax.stop_gradient(jnp.asarray(weight if weights is None else weights[name], jnp.float32))
        total = total + jnp.where(weight > 0, value / jnp.where(weight > 0, weight, 1.0), 0.0)
    return total


def value_and_gradients(task: Any, accumulate: Mapping[str, Any] | None = None, where: str = "accumulate", rules: Any = None) -> Callable:
    """Returns `function(params, state, batch, rng, step) -> ((loss, state, metrics), gradients)` for a task.

    With the stage's `rules` the gradient is that of the trained parameters alone. Wholly frozen ones are constants of the differentiation: a tower of them
    runs once, outside rematerialisation, and keeps no activation.

    Args:
      task: has `loss(params, state, batch, rng, step) -> ({term: (sum, weight)}, state, metrics)`; the loss is the sum over terms of sum / weight.
      accumulate: None takes the batch at once. `{"micro_batches": M}` takes it in M parts, one after the other, which gives the gradient of the whole
        batch where the loss is a sum over examples: weights are summed first, so that unequal parts count as they should. A task whose loss
        compares the examples of a batch (it has `loss_from_embeddings`) needs `{"micro_batches": M, "cached": True}`, gradient caching, which
        keeps all negatives.
    Raises:
      ConfigError: if the task cannot be accumulated in this way, or for an unknown setting.
    """
    settings = (1, False) if accumulate is None else call(accumulation, accumulate, where)
    micro_batches, cached = settings
    compares = hasattr(task, "loss_from_embeddings")
    if cached and not compares:
        raise ConfigError(f"{where}.cached=True is for contrastive tasks; the loss of {type(task).__name__} is a sum over examples: "
                          "set cached=False.")
    if micro_batches > 1 and compares and not cached:
        raise ConfigError(f"{where}: the loss of {type(task).__name__} compares the examples of a batch, so the sum over micro-batches is another "
                          f"loss with fewer negatives; set accumulate=dict(micro_batches={micro_batches}, cached=True) for gradient caching.")
    def of(task: Any) -> Callable:
        if micro_batches == 1:
            return _whole(task)
        return _cached(task, micro_batches) if cached else _summed(task, micro_batches)
    if rules is None:
        return of(task)

    def function(params, state, batch, rng, step):
        trained, frozen = rules.split(params)
        return of(_Trained(task, frozen))(trained, state, batch, rng, step)
    return function


class _Trained:
    """A task whose parameters are those that are trained; the frozen ones are constants."""

    def __init__(self, task: Any, frozen: Any):
        self.task, self.frozen = task, jax.lax.stop_gradient(flatten(frozen))

    def _all(self, trained: Any) -> dict:
        return unflatten({**flatten(trained), **self.frozen})

    def loss(self, params, *arguments):
        return self.task.loss(self._all(params), *arguments)

    def embed(self, params, *arguments):
        return self.task.embed(self._all(params), *arguments)

    def loss_from_embeddings(self, params, *arguments):
        return self.task.loss_from_embeddings(self._all(params), *arguments)


def accumulation(micro_batches: int, cached: bool = False) -> tuple[int, bool]:
    """The settings of `accumulate`, checked."""
    if type(micro_batches) is not int or micro_batches < 1:
        raise ConfigError(f"accumulate.micro_batches is {micro_batches!r}; it must be an integer of at least 1.")
    return micro_batches, cached


def _whole(task: Any) -> Callable:
    def value(params, state, batch, rng, step):
        terms, state, metrics = task.loss(params, state, batch, rng, step)
        return total_loss(terms), (state, _with_terms(metrics, terms))

    def function(params, state, batch, rng, step):
        (loss, (state, metrics)), gradients = jax.value_and_grad(value, has_aux=True)(params, state, batch, rng, step)
        return (loss, state, metrics), gradients
    return function


def _summed(task: Any, micro_batches: int) -> Callable:
    def function(params, state, batch, rng, step):
        parts = split_rows(batch, micro_batches)
        numbers = jnp.arange(micro_batches)

        def weights_of(state, part):
            terms, state, _ = task.loss(params, state, part[0], jax.random.fold_in(rng, part[1]), step)
            return state, {name: jnp.asarray(weight, jnp.float32) for name, (_, weight) in terms.items()}

        # The compiler removes everything from this first pass but the sums of weights, which the gradients are divided by.
        weights = jax.tree.map(lambda w: w.sum(0), jax.lax.scan(weights_of, state, (parts, numbers))[1])

        def value(params, state, part, number):
            terms, state, metrics = task.loss(params, state, part, jax.random.fold_in(rng, number), step)
            return total_loss(terms, weights), (state, metrics, {name: value for name, (value, _) in terms.items()})

        def one(carry, part):
            state, loss, gradients = carry
            (share, (state, metrics, sums)), more = jax.value_and_grad(value, has_aux=True)(params, state, *part)
            return (state, loss + share, jax.tree.map(jnp.add, gradients, more)), (metrics, sums)

        zeros = jax.tree.map(jnp.zeros_like, params)
        (state, loss, gradients), (metrics, sums) = jax.lax.scan(one, (state, jnp.zeros((), jnp.float32), zeros), (parts, numbers))
        metrics = jax.tree.map(lambda values: values.mean(0), metrics)
        terms = {name: (values.sum(0), weights[name]) for name, values in sums.items()}
        return (loss, state, _with_terms(metrics, terms)), gradients
    return function


def _cached(task: Any, micro_batches: int) -> Callable:
    def function(params, state, batch, rng, step):
        def loss(params, embeddings):
            terms, after, metrics = task.loss_from_embeddings(params, state, embeddings, batch, step)
            return total_loss(terms), (after, _with_terms(metrics, terms))

        def embed(params, part, key):
            return task.embed(params, state, part, key, step)
        (value, (after, metrics)), gradients = cached_value_and_gradients(embed, loss, micro_batches)(params, batch, rng)
        return (value, after, metrics), gradients
    return function


def _with_terms(metrics: Mapping[str, Any], terms: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Adds `loss/TERM` to the metrics where a loss has several terms."""
    if len(terms) < 2:
        return dict(metrics)
    return {**metrics, **{f"loss/{name}": total_loss({name: term}) for name, term in terms.items()}}


def global_norm(tree: Any) -> Float[Array, ""]:
    """Returns the Euclidean norm of all leaves together, in float32."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)), jnp.zeros((), jnp.float32)))


def clip_by_global_norm(gradients: Any, limit: float | None) -> tuple[Any, Float[Array, ""]]:
    """Returns (gradients scaled down to a global norm of at most `limit`, their norm before); None does not scale."""
    norm = global_norm(gradients)
    if limit is None:
        return gradients, norm
    factor = jnp.where(norm > limit, limit / norm, 1.0)
    return jax.tree.map(lambda gradient: (gradient * factor).astype(gradient.dtype), gradients), norm


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Returns whether every entry of every floating-point leaf is finite."""
    checks = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.ones((), bool)


def ema_decay(step: Any, decay: float, warmup: bool = False) -> Float[Array, ""]:
    """Returns the decay at `step`, from 0; with `warmup`, min(decay, (1 + step) / (10 + step)), so that the first steps are forgotten soon."""
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1 + step) / (10 + step)) if warmup else jnp.asarray(decay, jnp.float32)


def ema_update(ema: Any, params: Any, step: Any, decay: float, warmup: bool = False) -> Any:
    """Returns the moving average after a step, `d * ema + (1 - d) * params`, leaf by leaf in its dtype; `d` is `ema_decay`.

    Computed as `ema + (1 - d) * (params - ema)`, which leaves frozen parameters exactly as they are.
    """
    rate = 1 - ema_decay(step, decay, warmup)

    def move(average, value):
        if not jnp.issubdtype(average.dtype, jnp.inexact):
            return value
        exact = average.astype(jnp.float32)
        return (exact + rate * (value.astype(jnp.float32) - exact)).astype(average.dtype)
    return jax.tree.map(move, ema, params)

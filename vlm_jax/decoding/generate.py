"""`generate`: answers to a batch of prompts, as one jitted `lax.while_loop` over a preallocated cache."""
from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from vlm_jax.decoding.program import Plan, Prefix, advance, begin, by_layer, make_plan, on_mesh, read_prompt, whole
from vlm_jax.decoding.prompts import batch_size, place, prepare
from vlm_jax.decoding.sampling import GREEDY, Rules, Sampler, row_keys, row_numbers


@dataclasses.dataclass(frozen=True)
class Generated:
    """The answers of a batch, in numpy.

    Attributes:
      tokens: the ids; zeros behind the end of an answer.
      lengths: how many of them are the answer, with the end mark that ended it.
      logprobs: the log-probability of each in the model's own distribution, whatever the sampler; 0 behind the end.
      finished: whether the answer ended with an end mark; False where `max_tokens` cut it.
    """
    tokens: Int[np.ndarray, "B N"]
    lengths: Int[np.ndarray, "B"]
    logprobs: Float[np.ndarray, "B N"]
    finished: Bool[np.ndarray, "B"]

    def answers(self) -> list[list[int]]:
        """The ids of every answer, without the end mark."""
        return [row[:length - ended].tolist() for row, length, ended in zip(self.tokens, self.lengths, self.finished.astype(int))]


def generate(model: Any, params: Any, inputs: Mapping[str, Any], *, max_tokens: int, eos: int | Sequence[int] = (), sampler: Sampler = GREEDY, seed: int = 0,
             rows: Sequence[int] | None = None, mesh: jax.sharding.Mesh | None = None, prefix: Any = None, cache_length: int | None = None,
             buckets: Sequence[int] | None = None) -> Generated:
    """Answers every prompt of a batch.

    Args:
      model: a generative model (`start` and `extend`); params: its parameters.
      inputs: `{"tokens" [B, T], "valid" [B, T], ...}`, see docs/architecture.md; `pad_rows` makes them from lists of ids. They are padded to a bucket, so that
        prompts of any length need no more programs than there are buckets.
      max_tokens: the longest answer. eos: the ids that end one; the loop ends when all rows have.
      sampler: how tokens are chosen; by default the likeliest.
      seed: of the random draws, which depend on it, on the row's number and on the place of the token alone: not on the batch that the row is in.
      rows: the numbers of the rows; by default 0, 1, ...
      mesh: the devices, where the parameters are spread over several.
      prefix: what `prefix_cache` returned, to go on from, of one row (shared by all) or of B; it is not changed.
      cache_length: the most slots that the cache may have.
      buckets: the lengths that prompts are padded to; by default the powers of two from 16.
    Raises:
      ConfigError: for prompts that do not fit, with the number to change.
    """
    prompts, length = prepare(model, inputs, max_tokens, prefix=prefix, cache_length=cache_length, buckets=buckets)
    numbers = row_numbers(rows, batch_size(prompts))
    plan = make_plan(model, length, max_tokens, eos)
    with on_mesh(mesh):
        made = _generate(plan, params, place(prompts, mesh), sampler.rules(), np.uint32(seed), place(numbers, mesh), prefix)
    return Generated(*map(np.asarray, made))


def prefix_cache(model: Any, params: Any, inputs: Mapping[str, Any], *, mesh: jax.sharding.Mesh | None = None, buckets: Sequence[int] | None = None) -> Prefix:
    """What many prompts begin with, read once: a `Prefix`, a cache and its tokens, for the argument `prefix` of `generate` and its like."""
    prompts, length = prepare(model, inputs, 1, buckets=buckets)
    with on_mesh(mesh):
        return _prefix(make_plan(model, length, 1, ()), params, place(prompts, mesh))


@functools.partial(jax.jit, static_argnames="plan")
def _prefix(plan: Plan, params: Any, inputs: Mapping[str, Array]) -> Prefix:
    tokens = jnp.where(inputs["valid"], inputs["tokens"], -1) if "tokens" in inputs else jnp.full((batch_size(inputs), 1), -1)
    return Prefix(read_prompt(plan, params, inputs)[1].stacked(), tokens)


@functools.partial(jax.jit, static_argnames="plan")
def _generate(plan: Plan, params: Any, inputs: Mapping[str, Array], rules: Rules, seed: Array, rows: Array, prefix: Any) -> tuple[Array, ...]:
    keys = row_keys(seed, rows)
    state = advance(plan, by_layer(params), begin(plan, params, inputs, rules, keys, prefix), rules, keys, plan.max_tokens)
    return whole((state.tokens, state.lengths, state.logprobs, state.finished))

"""How likely a model finds each of several texts behind a prompt: closed-ended answers without writing a word.

Alayrac et al., "Flamingo" (2022), section 3.1: all possible answers are scored by their log-likelihood given picture and prompt. The prompt is read once, into
a cache; each candidate is an extension of a copy of its row.
"""
from collections.abc import Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from vlm_jax.decoding.program import Plan, chosen_logprob, make_plan, on_mesh, read_prompt, whole
from vlm_jax.decoding.prompts import batch_size, place, prepare
from vlm_jax.errors import ConfigError
from vlm_jax.settings import choose

NORMALIZERS = {"sum": lambda scores, lengths: scores, "mean": lambda scores, lengths: scores / lengths}


def rank(model: Any, params: Any, inputs: Mapping[str, Any], candidates: Sequence[Any], *, prefix: Any = None, mesh: jax.sharding.Mesh | None = None,
         normalize: str = "sum", at_once: int = 8, cache_length: int | None = None, buckets: Sequence[int] | None = None) -> Float[np.ndarray, "B C"]:
    """Returns the log-likelihood of every candidate behind every prompt of a batch.

    Args:
      model: a generative model (`start` and `extend`), an encoder-decoder among them; params: its parameters.
      inputs: the prompts, as of `decoding.generate`; padded to a bucket.
      candidates: lists of token ids, the same for all prompts, or one list of such lists for each prompt. A mark that ends an answer counts like any token.
      prefix: what `decoding.prefix_cache` returned, to go on from, of one row (shared by all) or of B.
      mesh: the devices, where the parameters are spread over several.
      normalize: "sum", the paper's, of the log-probabilities of a candidate's tokens, or their "mean", which does not favour short ones.
      at_once: candidates of a prompt that are read together: the cache is copied so many times. Neither it nor the batch changes a result.
      cache_length, buckets: as of `decoding.generate`.
    Returns:
      float32; -inf where a prompt has fewer candidates than another. A program is compiled for the bucket of the prompts and the powers of two that hold the
      longest candidate and, up to `at_once`, their number.
    Raises:
      ConfigError: for a prompt without candidates, an empty one, or prompts that do not fit.
    """
    scale = choose(NORMALIZERS, normalize, "normalize")
    if at_once < 1:
        raise ConfigError(f"at_once is {at_once}; read at least one candidate at a time.")
    tokens, valid = _table(candidates, batch_size(inputs))
    lengths, count, longest = valid.sum(-1), tokens.shape[1], tokens.shape[2]
    room, step = _power(longest), min(at_once, _power(count))
    grow = [(0, 0), (0, -count % step), (0, room - longest)]
    tokens, valid = np.pad(tokens, grow), np.pad(valid, grow)
    prompts, slots = prepare(model, inputs, longest, prefix=prefix, cache_length=cache_length, buckets=buckets, extra=room - longest)
    plan = make_plan(model, slots, room, ())
    with on_mesh(mesh):
        logits, cache = _read(plan, params, place(prompts, mesh), prefix)
        parts = [_score(plan, params, logits, cache, *(place(array[:, first:first + step], mesh) for array in (tokens, valid)))
                 for first in range(0, tokens.shape[1], step)]
    scores = np.concatenate([np.asarray(part) for part in parts], axis=1)[:, :count]
    return np.where(lengths > 0, scale(scores, np.maximum(lengths, 1)), -np.inf).astype(np.float32)


@functools.partial(jax.jit, static_argnames="plan")
def _read(plan: Plan, params: Any, inputs: Mapping[str, Array], prefix: Any) -> tuple[Float[Array, "B V"], Any]:
    return read_prompt(plan, params, inputs, prefix)


@functools.partial(jax.jit, static_argnames="plan")
def _score(plan: Plan, params: Any, logits: Float[Array, "B V"], cache: Any, tokens: Int[Array, "B C T"], valid: Bool[Array, "B C T"]) -> Float[Array, "B C"]:
    """The sum of the log-probabilities of each candidate's tokens."""
    batch, count, length = tokens.shape
    rows = jnp.repeat(jnp.arange(batch), count)
    tokens, valid = tokens.reshape(-1, length), valid.reshape(-1, length)
    scores = chosen_logprob(logits[rows].astype(jnp.float32), tokens[:, 0])
    if length > 1:
        after, _ = plan.model.model.apply({"params": params}, tokens[:, :-1], cache.rows(rows), valid[:, :-1], method="extend")
        scores += jnp.sum(jnp.where(valid[:, 1:], chosen_logprob(after.astype(jnp.float32), tokens[:, 1:]), 0.0), axis=1)
    return whole(scores.reshape(batch, count))


def _table(candidates: Sequence[Any], rows: int) -> tuple[Int[np.ndarray, "B C T"], Bool[np.ndarray, "B C T"]]:
    """The candidates of every row as one array, and which of its places hold a token."""
    if not len(candidates):
        raise ConfigError("candidates: there are none; give at least one list of token ids.")
    shared = all(len(one) == 0 or np.ndim(one[0]) == 0 for one in candidates)
    by_row = [list(candidates)] * rows if shared else [list(row) for row in candidates]
    if len(by_row) != rows:
        raise ConfigError(f"candidates: {len(by_row)} lists for {rows} prompts; give one list of candidates for each, or the candidates of all.")
    for row, listed in enumerate(by_row):
        if not listed or any(len(one) == 0 for one in listed):
            what = "there are none" if not listed else f"number {next(i for i, one in enumerate(listed) if len(one) == 0)} has no token"
            raise ConfigError(f"candidates of prompt {row}: {what}; give each prompt at least one, of at least one token each.")
    tokens = np.zeros((rows, max(map(len, by_row)), max(len(one) for listed in by_row for one in listed)), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, listed in enumerate(by_row):
        for place_of, one in enumerate(listed):
            tokens[row, place_of, :len(one)], valid[row, place_of, :len(one)] = one, True
    return tokens, valid


def _power(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()

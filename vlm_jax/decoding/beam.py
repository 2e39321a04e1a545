"""Beam search with a length penalty, with the conventions of transformers (5.x), which its tokens are compared with.

A hypothesis of n tokens (its end mark counts) and log-probability s has the score s / n^length_penalty. Hypotheses end at an end mark or at `max_tokens`,
and only those among the `beams` best continuations of a step count as ended. `early_stopping` says when a prompt is done:
  True: as soon as `beams` hypotheses have ended.
  False: when the best running one, scored at its present length, is no better than the worst of the ended ones.
  "never": the same, but where the penalty is positive scored as if it were `max_tokens` long, which bounds what it can still reach.
"""
from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from vlm_jax.decoding.generate import generate
from vlm_jax.decoding.program import PAD, Plan, by_layer, is_end, make_plan, on_mesh, read_prompt, whole
from vlm_jax.decoding.prompts import place, prepare
from vlm_jax.errors import ConfigError

WORST = -1.0e9   # of a beam that does not exist yet: finite, so that sums and quotients stay numbers


@dataclasses.dataclass(frozen=True)
class Beams:
    """The best hypotheses of every prompt, best first, in numpy: R are returned.

    Attributes:
      tokens: the ids; zeros behind the end. lengths: with the end mark; 0 where fewer than R hypotheses ended.
      scores: the log-probability over length^length_penalty. finished: whether it ended with an end mark.
    """
    tokens: Int[np.ndarray, "B R N"]
    lengths: Int[np.ndarray, "B R"]
    scores: Float[np.ndarray, "B R"]
    finished: Bool[np.ndarray, "B R"]

    def answers(self) -> list[list[int]]:
        """The ids of the best hypothesis of every prompt, without the end mark."""
        return [row[0, :length[0] - ended[0]].tolist() for row, length, ended in zip(self.tokens, self.lengths, self.finished.astype(int))]


@flax.struct.dataclass
class _Search:
    """K running hypotheses and the K best that ended, of every prompt; `cache` has B K rows."""
    step: Int[Array, ""]
    tokens: Int[Array, "B K N"]
    scores: Float[Array, "B K"]            # log-probabilities
    ended_tokens: Int[Array, "B K N"]
    ended_lengths: Int[Array, "B K"]
    ended_scores: Float[Array, "B K"]      # with the length penalty
    ended: Bool[Array, "B K"]
    improvable: Bool[Array, "B"]
    out_of_room: Bool[Array, ""]           # every continuation of the last step ended
    token: Int[Array, "B*K 1"]             # the newest of every running one, which the model has not read yet
    cache: Any


def beam_search(model: Any, params: Any, inputs: Mapping[str, Any], *, max_tokens: int, beams: int = 4, length_penalty: float = 1.0,
                early_stopping: bool | str = False, returned: int = 1, eos: int | Sequence[int] = (), mesh: jax.sharding.Mesh | None = None,
                prefix: Any = None, cache_length: int | None = None, buckets: Sequence[int] | None = None) -> Beams:
    """The likeliest answers that a search over `beams` hypotheses a prompt finds; one beam is greedy decoding.

    Args:
      length_penalty, early_stopping: see the module's description; a positive penalty favours long answers.
      returned: how many hypotheses of each prompt are returned.
      model, params, inputs, max_tokens, eos, mesh, prefix, cache_length, buckets: as for `generate`.
    Raises:
      ConfigError: for settings out of range, and for prompts that do not fit.
    """
    if beams < 1 or not 1 <= returned <= beams:
        raise ConfigError(f"beams is {beams} and returned {returned}; at least one beam is needed, and no more can be returned than there are.")
    if early_stopping not in (True, False, "never"):
        raise ConfigError(f'early_stopping is {early_stopping!r}; choose True, False or "never".')
    if beams == 1:
        made = generate(model, params, inputs, max_tokens=max_tokens, eos=eos, mesh=mesh, prefix=prefix, cache_length=cache_length, buckets=buckets)
        scores = made.logprobs.sum(1) / made.lengths ** length_penalty
        return Beams(made.tokens[:, None], made.lengths[:, None], scores[:, None], made.finished[:, None])
    prompts, length = prepare(model, inputs, max_tokens, prefix=prefix, cache_length=cache_length, buckets=buckets)
    plan = make_plan(model, length, max_tokens, eos)
    with on_mesh(mesh):
        made = _search(plan, beams, returned, early_stopping, params, place(prompts, mesh), prefix, np.float32(length_penalty))
    return Beams(*map(np.asarray, made))


@functools.partial(jax.jit, static_argnames=("plan", "beams", "returned", "early_stopping"))
def _search(plan: Plan, beams: int, returned: int, early_stopping: bool | str, params: Any, inputs: Mapping[str, Array], prefix: Any,
            penalty: Array) -> tuple[Array, ...]:
    model = plan.model.model
    logits, cache = read_prompt(plan, params, inputs, prefix)
    params = by_layer(params)
    copies = jnp.repeat(jnp.arange(logits.shape[0]), beams)
    state = _choose(plan, _begin(plan, beams, logits.shape[0], cache.rows(copies)), logits[copies], penalty, early_stopping)

    def going(state: _Search) -> Bool[Array, ""]:
        going = state.improvable.any() & ~state.out_of_room
        return going & ~state.ended.all() if early_stopping is True else going

    def one(state: _Search) -> _Search:
        logits, cache = model.apply({"params": params}, state.token, state.cache, method="extend")
        return _choose(plan, state.replace(cache=cache), logits[:, -1], penalty, early_stopping)

    state = lax.while_loop(going, one, state)
    tokens, lengths, scores, ended = (x[:, :returned] for x in (state.ended_tokens, state.ended_lengths, state.ended_scores, state.ended))
    tokens, lengths = jnp.where(ended[..., None], tokens, PAD), jnp.where(ended, lengths, 0)
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[..., None], axis=2)[..., 0]
    return whole((tokens, lengths, scores, is_end(last, plan.eos) & (lengths > 0)))


def _begin(plan: Plan, beams: int, batch: int, cache: Any) -> _Search:
    """All beams of a prompt are the same at first, so that only one of them counts."""
    tokens = jnp.full((batch, beams, plan.max_tokens), PAD, jnp.int32)
    nobody = jnp.full((batch, beams), WORST, jnp.float32)
    return _Search(step=jnp.zeros((), jnp.int32), tokens=tokens, scores=nobody.at[:, 0].set(0.0), ended_tokens=tokens,
                   ended_lengths=jnp.zeros((batch, beams), jnp.int32), ended_scores=nobody, ended=jnp.zeros((batch, beams), bool),
                   improvable=jnp.ones(batch, bool), out_of_room=jnp.zeros((), bool), token=jnp.zeros((batch * beams, 1), jnp.int32), cache=cache)


def _choose(plan: Plan, state: _Search, logits: Float[Array, "B*K V"], penalty: Float[Array, ""], early_stopping: bool | str) -> _Search:
    """One step of the search: the best continuations, those of them that ended and those that run on, whose caches are gathered."""
    batch, beams, _ = state.tokens.shape
    vocabulary = logits.shape[-1]
    scores = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(batch, beams, vocabulary) + state.scores[..., None]
    # With as many candidates as these, `beams` of them run on, whatever ends.
    candidates = min(max(2, 1 + len(plan.eos)) * beams, beams * vocabulary)
    scores, index = lax.top_k(scores.reshape(batch, -1), candidates)
    parents, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
    tokens = lax.dynamic_update_slice(_pick(state.tokens, parents), token[..., None], (0, 0, state.step))
    length = (state.step + 1).astype(jnp.float32)
    ends = is_end(token, plan.eos) | (state.step + 1 >= plan.max_tokens)

    running, best = lax.top_k(scores + jnp.where(ends, WORST, 0.0), beams)

    counted = ends & (jnp.arange(candidates) < beams)
    final = scores / length ** penalty + jnp.where(counted, 0.0, WORST) + jnp.where(state.improvable, 0.0, WORST)[:, None]
    if early_stopping is True:
        final = final + jnp.where(state.ended.all(1), WORST, 0.0)[:, None]
    ended_scores, kept = lax.top_k(jnp.concatenate([state.ended_scores, final], 1), beams)
    lengths = jnp.broadcast_to(state.step + 1, (batch, candidates))
    ended_tokens, ended_lengths, ended = (_pick(jnp.concatenate(pair, 1), kept) for pair in (
        (state.ended_tokens, tokens), (state.ended_lengths, lengths), (state.ended, counted)))
    reach = jnp.where(penalty > 0, float(plan.max_tokens), length) if early_stopping == "never" else length
    worst = jnp.where(ended, ended_scores.min(1, keepdims=True), WORST)
    improvable = state.improvable & (running[:, :1] / reach ** penalty > worst).any(1)
    source = (jnp.arange(batch)[:, None] * beams + _pick(parents, best)).reshape(-1)
    return state.replace(step=state.step + 1, tokens=_pick(tokens, best), scores=running, ended_tokens=ended_tokens, ended_lengths=ended_lengths,
                         ended_scores=ended_scores, ended=ended, improvable=improvable, out_of_room=ends.all(),
                         token=_pick(token, best).reshape(-1, 1), cache=state.cache.rows(source))


def _pick(x: Array, index: Int[Array, "B M"]) -> Array:
    """x[b, index[b, m]] of an array with the axes B, K, ..."""
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

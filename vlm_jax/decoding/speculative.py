"""Speculative decoding: a small model proposes a few tokens, the large one reads them all at once and keeps those that it would have said.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), algorithm 1; Chen et al., "Accelerating Large Language Model Decoding
with Speculative Sampling" (2023). Greedy: the tokens are those of greedy decoding. Sampling: they are distributed as if the large model alone had drawn
them, whatever the small one proposes; p and q are the distributions of the two after the sampler's processors.
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

from vlm_jax.decoding.generate import Generated
from vlm_jax.decoding.program import PAD, Plan, Static, by_layer, chosen_logprob, for_decoding, is_end, make_plan, on_mesh, read_prompt, whole
from vlm_jax.decoding.prompts import batch_size, place, prepare
from vlm_jax.decoding.sampling import GREEDY, Rules, Sampler, row_keys, row_numbers, step_keys
from vlm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Speculated(Generated):
    """As `Generated`, with how well the draft did.

    Attributes:
      rounds: how often the large model was called for each row. proposed, accepted: the proposals that were compared, and that were kept.
    """
    rounds: Int[np.ndarray, "B"]
    proposed: Int[np.ndarray, "B"]
    accepted: Int[np.ndarray, "B"]


@flax.struct.dataclass
class _State:
    """Between two rounds. `last` is the newest token of every row, which neither model has read yet; `done` rows have finished or are full."""
    last: Int[Array, "B"]
    lengths: Int[Array, "B"]
    finished: Bool[Array, "B"]
    done: Bool[Array, "B"]
    tokens: Int[Array, "B N+k+1"]
    logprobs: Float[Array, "B N+k+1"]
    rounds: Int[Array, "B"]
    accepted: Int[Array, "B"]
    cache: Any
    draft_cache: Any


def speculative(model: Any, params: Any, draft_model: Any, draft_params: Any, inputs: Mapping[str, Any], *, max_tokens: int, proposals: int = 4,
                eos: int | Sequence[int] = (), sampler: Sampler = GREEDY, seed: int = 0, rows: Sequence[int] | None = None,
                draft_inputs: Mapping[str, Any] | None = None, mesh: jax.sharding.Mesh | None = None, cache_length: int | None = None,
                buckets: Sequence[int] | None = None) -> Speculated:
    """Answers as `generate` does, with fewer calls of the large model.

    Args:
      draft_model, draft_params: a generative model with the same vocabulary.
      proposals: how many tokens it proposes a round, k.
      draft_inputs: its prompts, where they differ from the large model's (a draft that sees no picture).
      the others: as for `generate`.
    Raises:
      ConfigError: for prompts that do not fit, vocabularies that differ, or a sampler with a repetition penalty, which has no place in a parallel check.
    """
    if proposals < 1:
        raise ConfigError(f"proposals is {proposals}; the draft must propose at least one token a round.")
    if sampler.repetition_penalty != 1.0:
        raise ConfigError("sampler.repetition_penalty does not work with speculative decoding; set it to 1, or use generate.")
    extra = proposals + 1
    prompts, length = prepare(model, inputs, max_tokens, cache_length=cache_length, buckets=buckets, extra=extra)
    drafts, draft_length = prepare(draft_model, inputs if draft_inputs is None else draft_inputs, max_tokens, cache_length=cache_length, buckets=buckets,
                                   extra=extra)
    batch = batch_size(prompts)
    if batch_size(drafts) != batch:
        raise ConfigError(f"draft_inputs: {batch_size(drafts)} rows, the prompts have {batch}; give one a prompt.")
    plan = make_plan(model, length, max_tokens, eos)
    draft = dataclasses.replace(plan, model=Static(for_decoding(draft_model)), cache_length=draft_length)
    _check_vocabularies(plan, draft, params, draft_params, prompts, drafts)
    with on_mesh(mesh):
        made = _run(plan, draft, proposals, params, draft_params, place(prompts, mesh), place(drafts, mesh), sampler.rules(), np.uint32(seed),
                    place(row_numbers(rows, batch), mesh))
    return Speculated(*map(np.asarray, made))


def _check_vocabularies(plan: Plan, draft: Plan, params: Any, draft_params: Any, prompts: Any, drafts: Any) -> None:
    sizes = [_vocabulary(*given) for given in ((plan, params, prompts), (draft, draft_params, drafts))]
    if sizes[0] != sizes[1]:
        raise ConfigError(f"draft_model has a vocabulary of {sizes[1]} tokens, the model one of {sizes[0]}; choose a draft with the model's tokenizer.")


def _vocabulary(plan: Plan, params: Any, prompts: Mapping[str, Any]) -> int:
    size = getattr(plan.model.model, "vocab_size", None)
    return size if size is not None else jax.eval_shape(functools.partial(read_prompt, plan), params, dict(prompts))[0].shape[-1]


@functools.partial(jax.jit, static_argnames=("plan", "draft", "proposals"))
def _run(plan: Plan, draft: Plan, proposals: int, params: Any, draft_params: Any, inputs: Mapping[str, Array], draft_inputs: Mapping[str, Array], rules: Rules,
         seed: Array, rows: Array) -> tuple[Array, ...]:
    keys = row_keys(seed, rows)
    logits, cache = read_prompt(plan, params, inputs)
    first = rules.choose(logits.astype(jnp.float32), _keys(keys, jnp.zeros((), jnp.int32), DRAW))
    batch = first.shape[0]
    room = jnp.zeros((batch, plan.max_tokens + proposals + 1), jnp.int32)
    finished = is_end(first, plan.eos)
    nothing = jnp.zeros(batch, jnp.int32)
    state = _State(last=first, lengths=nothing + 1, finished=finished, done=finished | (plan.max_tokens <= 1), tokens=room.at[:, 0].set(first),
                   logprobs=room.astype(jnp.float32).at[:, 0].set(chosen_logprob(logits.astype(jnp.float32), first)), rounds=nothing + 1, accepted=nothing,
                   cache=cache, draft_cache=read_prompt(draft, draft_params, draft_inputs)[1])
    params, draft_params = by_layer(params), by_layer(draft_params)
    state = lax.while_loop(lambda state: ~state.done.all(), lambda state: _round(plan, draft, proposals, params, draft_params, rules, keys, state), state)
    behind = jnp.arange(plan.max_tokens) >= state.lengths[:, None]
    tokens = jnp.where(behind, PAD, state.tokens[:, :plan.max_tokens])
    logprobs = jnp.where(behind, 0.0, state.logprobs[:, :plan.max_tokens])
    return whole((tokens, state.lengths, logprobs, state.finished, state.rounds, (state.rounds - 1) * proposals, state.accepted))


DRAW, PROPOSE, ACCEPT, CORRECT = range(4)   # what a key is for


def _keys(keys: Array, step: Int[Array, "#B"], purpose: int) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(step_keys(keys, step), purpose)


def _round(plan: Plan, draft: Plan, proposals: int, params: Any, draft_params: Any, rules: Rules, keys: Array, state: _State) -> _State:
    """k proposals, one call of the large model, and at least one token more in every row that is not done."""
    going = ~state.done

    def propose(carry, i):
        token, cache = carry
        logits, cache = draft.model.model.apply({"params": draft_params}, token[:, None], cache, going[:, None], method="extend")
        logits = logits[:, -1].astype(jnp.float32)
        return (rules.choose(logits, _keys(keys, state.lengths + i, PROPOSE)), cache), (token, logits)

    # One call more than there are proposals: the draft, too, must have read the last of them if all are kept.
    (_, draft_cache), (read, draft_logits) = lax.scan(propose, (state.last, state.draft_cache), jnp.arange(proposals + 1))
    read, draft_logits = read.swapaxes(0, 1), draft_logits.swapaxes(0, 1)                               # [B, k + 1], [B, k + 1, V]
    logits, cache = plan.model.model.apply({"params": params}, read, state.cache, jnp.broadcast_to(going[:, None], read.shape), method="extend")
    logits = logits.astype(jnp.float32)
    said, kept = verify(logits, draft_logits[:, :-1], read[:, 1:], rules, keys, state.lengths)

    places = jnp.arange(proposals + 1)
    ends = is_end(said, plan.eos) & (places <= kept[:, None])
    count = jnp.minimum(jnp.where(ends.any(1), ends.argmax(1), kept) + 1, plan.max_tokens - state.lengths)   # an end mark, and max_tokens, cut
    count = jnp.where(going, count, 0)
    finished = state.finished | (ends & (places < count[:, None])).any(1)
    write = jax.vmap(lambda row, new, start: lax.dynamic_update_slice(row, new, (start,)))
    at = jnp.minimum(state.lengths, plan.max_tokens)
    lengths = state.lengths + count
    tokens_read = jnp.where(going, proposals + 1, 0).astype(jnp.int32)
    # Of the k + 1 tokens that were read, `count` have become part of the text.
    return state.replace(
        last=jnp.where(going, jnp.take_along_axis(said, jnp.maximum(count - 1, 0)[:, None], axis=1)[:, 0], state.last), lengths=lengths, finished=finished,
        done=state.done | finished | (lengths >= plan.max_tokens), tokens=write(state.tokens, said, at),
        logprobs=write(state.logprobs, chosen_logprob(logits, said), at), rounds=state.rounds + going,
        accepted=state.accepted + jnp.where(going, jnp.minimum(kept, count), 0),
        cache=rewound(cache, tokens_read, count), draft_cache=rewound(draft_cache, tokens_read, count))


def verify(logits: Float[Array, "B k+1 V"], draft_logits: Float[Array, "B k V"], proposed: Int[Array, "B k"], rules: Rules, keys: Array,
           step: Int[Array, "B"]) -> tuple[Int[Array, "B k+1"], Int[Array, "B"]]:
    """Which proposals are kept and what is said in the place of the first that is not.

    Returns:
      tokens, of which the first `kept` are proposals and the next one is the large model's own; and `kept` [B].
    """
    batch, count = proposed.shape
    if rules.temperature is None:
        said = rules.choose(logits.reshape(-1, logits.shape[-1]), keys).reshape(batch, count + 1)
        return said, jnp.cumprod(said[:, :-1] == proposed, axis=1).sum(1)
    p, q = jax.nn.softmax(rules.processed(logits)), jax.nn.softmax(rules.processed(draft_logits))
    probability = jnp.take_along_axis(p[:, :-1], proposed[..., None], axis=2)[..., 0] / jnp.take_along_axis(q, proposed[..., None], axis=2)[..., 0]
    uniform = jnp.stack([jax.vmap(jax.random.uniform)(_keys(keys, step + i, ACCEPT)) for i in range(count)], axis=1)
    kept = jnp.cumprod(uniform < probability, axis=1).sum(1)
    # What the draft proposes too seldom; behind the last proposal there is no draft, and the large model draws freely.
    rest = jnp.concatenate([jnp.maximum(p[:, :-1] - q, 0), p[:, -1:]], axis=1)
    rest = jnp.take_along_axis(rest, kept[:, None, None], axis=1)[:, 0]
    own = jax.vmap(jax.random.categorical)(_keys(keys, step + kept, CORRECT), jnp.log(rest)).astype(jnp.int32)
    said = jnp.concatenate([proposed, proposed[:, -1:]], axis=1)
    return jnp.where(jnp.arange(count + 1) == kept[:, None], own[:, None], said), kept


def rewound(cache: Any, read: Int[Array, "B"], count: Int[Array, "B"]) -> Any:
    """The cache with only the first `count` of the newest `read` tokens of each row, however many calls wrote them."""
    return cache.replace(written=read).keep(count)

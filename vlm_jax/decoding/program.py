"""The pure functions that every way of decoding is made of: the prompt into a cache, and one token after the other out of it.

A program is compiled for a model, a batch size, a bucket and a cache length; what the sampler's settings, seed and rows are, are its arguments.
"""
from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import functools
from typing import Any

import flax.struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from vlm_jax.decoding.sampling import Rules, step_keys
from vlm_jax.errors import ConfigError
from vlm_jax.nn.stack import platform, unstacked

PAD = 0   # what stands behind the end of an answer


class Static:
    """A model as a static argument of a jitted function: modules whose settings are equal share a program, whether or not they can be hashed."""

    def __init__(self, model: Any):
        self.model = model
        self._identity = (type(model), repr(model))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled for: the model, the slots of the cache, the size of the answer and the tokens that end it."""
    model: Static
    cache_length: int
    max_tokens: int
    eos: tuple[int, ...] = ()


def make_plan(model: Any, cache_length: int, max_tokens: int, eos: int | Sequence[int]) -> Plan:
    """A `Plan` of a model in the form that its backend decodes fastest with (see `for_decoding`); `eos` is one id or several."""
    return Plan(Static(for_decoding(model)), cache_length, max_tokens, end_ids(eos))


def end_ids(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids that end an answer, as a tuple.

    Raises:
      ConfigError: for a negative id.
    """
    ids = tuple(int(number) for number in np.atleast_1d(np.asarray([] if eos is None else eos, np.int64)))
    if any(number < 0 for number in ids):
        raise ConfigError(f"eos: {min(ids)} is no token id; give ids from 0, or () to end at max_tokens only.")
    return ids


def unrolls() -> bool:
    """Whether the layers are unrolled for decoding: on CPUs, where a scan, or a slice of a stack, copies every kernel for every token."""
    return platform() == "cpu"


def for_decoding(model: Any) -> Any:
    """The same model, with its layers unrolled where that is faster."""
    return model.clone(scan=False) if unrolls() and getattr(model, "scan", None) is True else model


def by_layer(params: Any) -> Any:
    """The parameters as the loop reads them: on CPUs with every stack of layers as tuples, copied once for a whole answer instead of once a token."""
    return unstacked(params) if unrolls() else params


@flax.struct.dataclass
class Prefix:
    """What prompts go on from: a cache, and the tokens that it holds, which repetition penalties count.

    Attributes:
      cache: of one row, which all prompts share, or of one for each.
      tokens: the ids in any order; what is negative is none.
    """
    cache: Any
    tokens: Int[Array, "B S"]

    @property
    def index(self) -> Int[Array, "B"]:
        """The slots that each row has filled."""
        return self.cache.index

    @property
    def next_position(self) -> Int[Array, "B"]:
        """The position of each row's next token."""
        return self.cache.next_position

    def rows(self, index: Int[Array, "B2"]) -> "Prefix":
        """The rows of these indices."""
        return Prefix(self.cache.rows(index), jnp.take(self.tokens, index, axis=0))


@flax.struct.dataclass
class State:
    """Decoding between two tokens.

    Attributes:
      step: how many tokens of the answer are chosen. token [B]: the last of them, which the model has not read yet.
      finished [B]: rows whose answer has ended. tokens, logprobs [B, N]; lengths [B]: tokens of the answer, with the one that ended it.
      seen [B, V]: the tokens that occurred, where there is a repetition penalty.
    """
    step: Int[Array, ""]
    token: Int[Array, "B"]
    finished: Bool[Array, "B"]
    tokens: Int[Array, "B N"]
    logprobs: Float[Array, "B N"]
    lengths: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None
    cache: Any


def read_prompt(plan: Plan, params: Any, inputs: Mapping[str, Array], prefix: Any = None) -> tuple[Float[Array, "B V"], Any]:
    """The logits of what follows each prompt, and the cache that holds it; behind `prefix`, a `Prefix` or a cache, where one is given."""
    model, layered = plan.model.model, unrolls()
    if prefix is None:
        logits, cache = model.apply({"params": params}, dict(inputs), plan.cache_length, method="start")
        return logits, cache.unstacked() if layered else cache
    tokens, valid = inputs["tokens"], inputs["valid"]
    cache = grown(prefix.cache if isinstance(prefix, Prefix) else prefix, plan.cache_length)
    if cache.index.shape[0] != tokens.shape[0]:
        cache = cache.rows(jnp.zeros(tokens.shape[0], jnp.int32))
    pictures = {name: inputs[name] for name in ("images", "slots", "media_index") if name in inputs and inputs.get("images") is not None}
    logits, cache = model.apply({"params": params}, tokens, cache, valid, **pictures, method="extend")
    last = jnp.where(valid, jnp.arange(tokens.shape[1]), -1).max(1)
    return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0], cache.unstacked() if layered else cache


def grown(cache: Any, length: int) -> Any:
    """The cache with empty slots behind its own, up to `length`; unchanged where it has as many, or takes them round and round."""
    extra = length - cache.length
    if extra <= 0 or cache.ring:
        return cache
    def with_room(values):
        return jnp.pad(values, [(0, 0), (0, 0), (0, extra), (0, 0), (0, 0)])

    cache = cache.stacked()
    return cache.replace(key=with_room(cache.key), value=with_room(cache.value), position=jnp.pad(cache.position, [(0, 0), (0, extra)], constant_values=-1))


def begin(plan: Plan, params: Any, inputs: Mapping[str, Array], rules: Rules, keys: Array, prefix: Any = None) -> State:
    """Reads the prompts and chooses the first token of every answer."""
    logits, cache = read_prompt(plan, params, inputs, prefix)
    batch, vocabulary = logits.shape
    seen = None
    if rules.repetition_penalty is not None:
        seen = jnp.zeros((batch, vocabulary), bool)
        if "tokens" in inputs and not _encoder_decoder(plan):
            seen = _marked(seen, jnp.where(inputs["valid"], inputs["tokens"], -1))
        if prefix is not None:
            if not isinstance(prefix, Prefix):
                raise ConfigError("sampler.repetition_penalty: a bare cache does not say which tokens it holds; give what prefix_cache returns as prefix.")
            seen = _marked(seen, prefix.tokens)
    state = State(step=jnp.zeros((), jnp.int32), token=jnp.zeros(batch, jnp.int32), finished=jnp.zeros(batch, bool),
                  tokens=jnp.full((batch, plan.max_tokens), PAD, jnp.int32), logprobs=jnp.zeros((batch, plan.max_tokens), jnp.float32),
                  lengths=jnp.zeros(batch, jnp.int32), seen=seen, cache=cache)
    return record(plan, state, logits, rules, keys)


def _marked(seen: Bool[Array, "B V"], tokens: Int[Array, "#B T"]) -> Bool[Array, "B V"]:
    """`seen` with the ids of each row, negative ones left out."""
    tokens = jnp.broadcast_to(tokens, (seen.shape[0], tokens.shape[1]))
    return seen.at[jnp.arange(seen.shape[0])[:, None], jnp.where(tokens < 0, seen.shape[1], tokens)].set(True, mode="drop")


def _encoder_decoder(plan: Plan) -> bool:
    from vlm_jax.decoding.prompts import is_encoder_decoder
    return is_encoder_decoder(plan.model.model)


def record(plan: Plan, state: State, logits: Float[Array, "B V"], rules: Rules, keys: Array) -> State:
    """Chooses a token of every row that has not finished and writes it down."""
    logits = logits.astype(jnp.float32)
    token = rules.choose(logits, step_keys(keys, state.step), state.seen)
    logprob = chosen_logprob(logits, token)
    token = jnp.where(state.finished, PAD, token)
    logprob = jnp.where(state.finished, 0.0, logprob)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].max(~state.finished)
    return state.replace(step=state.step + 1, token=token, finished=state.finished | is_end(token, plan.eos),
                         tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (0, state.step)),
                         logprobs=lax.dynamic_update_slice(state.logprobs, logprob[:, None], (0, state.step)),
                         lengths=state.lengths + ~state.finished, seen=seen)


def chosen_logprob(logits: Float[Array, "... V"], token: Int[Array, "..."]) -> Float[Array, "..."]:
    """The log-probability of the tokens in the model's own distribution, before any processor."""
    return jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)


def is_end(token: Int[Array, "..."], eos: tuple[int, ...]) -> Bool[Array, "..."]:
    """Whether tokens end an answer."""
    return functools.reduce(jnp.logical_or, [token == number for number in eos], jnp.zeros(token.shape, bool))


def advance(plan: Plan, params: Any, state: State, rules: Rules, keys: Array, until: int | Int[Array, ""]) -> State:
    """Chooses tokens up to number `until`, or until all rows have finished."""
    model = plan.model.model

    def going(state: State) -> Bool[Array, ""]:
        return (state.step < until) & ~state.finished.all()

    def one(state: State) -> State:
        # Of a batch, rows that have finished write nothing into the cache.
        valid = None if state.token.shape[0] == 1 else ~state.finished[:, None]
        logits, cache = model.apply({"params": params}, state.token[:, None], state.cache, valid, method="extend")
        return record(plan, state.replace(cache=cache), logits[:, -1], rules, keys)

    return lax.while_loop(going, one, state)


@contextlib.contextmanager
def on_mesh(mesh: jax.sharding.Mesh | None):
    """Enters a mesh, if there is one."""
    if mesh is None:
        yield
    else:
        with jax.set_mesh(mesh):
            yield


def whole(tree: Any) -> Any:
    """Arrays that every device of the mesh that is set holds whole, so that any process can read them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    return jax.tree.map(lambda x: lax.with_sharding_constraint(x, jax.sharding.PartitionSpec()), tree)

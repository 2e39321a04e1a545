"""`stream`: text as it comes. The jitted loop runs a few tokens at a time, and between two such runs the host looks at the text."""
from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import Any

import jax
from jaxtyping import Array
import numpy as np

from vlm_jax.decoding.program import Plan, State, advance, begin, by_layer, make_plan, on_mesh, unrolls, whole
from vlm_jax.decoding.prompts import batch_size, place, prepare
from vlm_jax.decoding.sampling import GREEDY, Rules, Sampler, row_keys, row_numbers
from vlm_jax.decoding.text import TextStream, stop_strings
from vlm_jax.errors import ConfigError


def stream(model: Any, params: Any, inputs: Mapping[str, Any], *, tokenizer: Any, max_tokens: int, eos: int | Sequence[int] = (),
           stop: str | Sequence[str] = (), sampler: Sampler = GREEDY, seed: int = 0, rows: Sequence[int] | None = None, chunk: int = 8,
           mesh: jax.sharding.Mesh | None = None, prefix: Any = None, cache_length: int | None = None,
           buckets: Sequence[int] | None = None, on_end: Callable[[State], None] | None = None) -> Iterator[list[str]]:
    """Yields the new text of every row of the batch, a list of B strings (empty where nothing is new), until all rows have ended.

    The pieces of a row joined are its answer: whole characters, without end marks, up to and without the first stop string. The tokens are those of
    `generate` with the same seed, whatever the size of the chunks.

    Args:
      tokenizer: has `decode(ids) -> str`.
      stop: strings that end an answer. They are looked for in the text, so that it does not matter how it is cut into tokens.
      chunk: tokens between two looks at the text.
      on_end: is given the last `program.State` when the text has ended, or when nobody asks for more of it.
      the others: as for `generate`.
    Raises:
      ConfigError: for prompts or settings that do not fit, before the first piece.
    """
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}; it must be at least 1.")
    stop = stop_strings(stop)
    prompts, length = prepare(model, inputs, max_tokens, prefix=prefix, cache_length=cache_length, buckets=buckets)
    batch = batch_size(prompts)
    numbers = row_numbers(rows, batch)
    plan = make_plan(model, length, max_tokens, eos)
    texts = [TextStream(tokenizer, stop) for _ in range(batch)]
    return _pieces(plan, params, prompts, prefix, sampler.rules(), np.uint32(seed), numbers, texts, chunk, mesh, on_end or (lambda state: None))


def _pieces(plan: Plan, params: Any, prompts: Mapping[str, Any], prefix: Any, rules: Rules, seed: Any, numbers: np.ndarray, texts: list[TextStream], chunk: int,
            mesh: jax.sharding.Mesh | None, on_end: Callable[[State], None]) -> Iterator[list[str]]:
    numbers = place(numbers, mesh)
    done = 0
    with on_mesh(mesh):
        state, shown = _begin(plan, params, place(prompts, mesh), rules, seed, numbers, prefix)
        params = _by_layer(params) if unrolls() else params
    while True:
        step, tokens, lengths, finished = map(np.asarray, shown)
        ends = finished.astype(bool)
        over = bool(ends.all()) or int(step) >= plan.max_tokens
        pieces = []
        for row, text in enumerate(texts):
            ended = bool(ends[row]) and tokens[row, lengths[row] - 1] in plan.eos
            new = tokens[row, done:max(done, int(lengths[row]) - ended)]
            pieces.append(text.push(new, last=bool(ends[row]) or over))
        done = int(step)
        stopped = np.array([text.stopped for text in texts])
        last = over or bool((stopped | ends).all())
        if last:
            on_end(state)
        try:
            yield pieces
        except GeneratorExit:
            if not last:
                on_end(state)
            raise
        if last:
            return
        with on_mesh(mesh):
            state, shown = _continue(plan, params, state, rules, seed, numbers, place(stopped, mesh), np.int32(min(done + chunk, plan.max_tokens)))


def _shown(state: State) -> tuple[Array, ...]:
    return whole((state.step, state.tokens, state.lengths, state.finished))


_by_layer = jax.jit(by_layer)


@functools.partial(jax.jit, static_argnames="plan")
def _begin(plan: Plan, params: Any, inputs: Mapping[str, Array], rules: Rules, seed: Array, rows: Array, prefix: Any) -> tuple[State, tuple[Array, ...]]:
    state = begin(plan, params, inputs, rules, row_keys(seed, rows), prefix)
    return state, _shown(state)


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def _continue(plan: Plan, params: Any, state: State, rules: Rules, seed: Array, rows: Array, stopped: Array,
              until: Array) -> tuple[State, tuple[Array, ...]]:
    state = advance(plan, params, state.replace(finished=state.finished | stopped), rules, row_keys(seed, rows), until)
    return state, _shown(state)

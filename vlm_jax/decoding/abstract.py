"""The programs of decoding from shapes alone, laid out on the mesh that is set: what `generate` runs, for compilers of devices that need not be there."""
from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
from jaxtyping import Array
import numpy as np

from vlm_jax.decoding.program import State, advance, begin, by_layer, make_plan
from vlm_jax.decoding.prompts import is_encoder_decoder, prepare
from vlm_jax.decoding.sampling import GREEDY, row_keys
from vlm_jax.errors import ConfigError
from vlm_jax.sharding.mesh import batch_sharding, replicated

BATCH = 16   # that of `evaluation.Generator`


@dataclasses.dataclass(frozen=True)
class DecodingPrograms:
    """The two programs of greedy decoding, and the shapes of what they take, with their shardings.

    Attributes:
      prompt: jitted (params, inputs) -> state: reads the prompts into a cache and chooses the first token of every answer.
      step: jitted (params, state) -> state, which is donated: the loop that `generate` runs, for one more token of every answer.
      inputs: of the prompts, padded to their bucket. state: a `State`.
      rows: prompts of a batch. prompt_length: slots of a prompt (0 where it is an image alone). cache_length, max_tokens: of the plan.
    """
    prompt: Callable
    step: Callable
    inputs: Mapping[str, Any]
    state: State
    rows: int
    prompt_length: int
    cache_length: int
    max_tokens: int


def decoding_programs(model: Any, params: Any, shapes: Mapping[str, tuple[tuple[int, ...], Any]], mesh: jax.sharding.Mesh, *, max_tokens: int,
                      rows: int = BATCH) -> DecodingPrograms:
    """Makes the programs that answer `rows` prompts; called, and lowered, with `mesh` entered.

    Args:
      params: shapes, dtypes and shardings of the parameters.
      shapes: {name: (shape, dtype)} of the inputs of one prompt, without padding.
      max_tokens: of an answer.
      rows: of a batch, rounded up to what the mesh splits evenly.
    Raises:
      ConfigError: for prompts and answers that do not fit the model.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = -(-rows // shards) * shards
    zeros = {name: np.zeros((rows, *shape), np.dtype(dtype)) for name, (shape, dtype) in shapes.items()}
    if "tokens" in zeros:
        zeros["valid"] = np.ones(zeros["tokens"].shape, bool)
    padded, cache_length = prepare(model, zeros, max_tokens)
    plan = make_plan(model, cache_length, max_tokens, ())
    inputs = {name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=batch_sharding(mesh)) for name, value in padded.items()}
    rules, numbers = GREEDY.rules(), np.arange(rows, dtype=np.uint32)

    def prompt(params: Any, inputs: Mapping[str, Array]) -> State:
        return begin(plan, params, inputs, rules, row_keys(np.uint32(0), numbers))

    def step(params: Any, state: State) -> State:
        return advance(plan, by_layer(params), state, rules, row_keys(np.uint32(0), numbers), state.step + 1)

    state = jax.eval_shape(prompt, params, inputs)
    layout = jax.tree.map(lambda leaf: batch_sharding(mesh) if leaf.ndim else replicated(mesh), state.replace(cache=None))
    layout = layout.replace(cache=state.cache.shardings(mesh))
    state = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, layout)
    return DecodingPrograms(jax.jit(prompt, out_shardings=layout), jax.jit(step, donate_argnums=1, out_shardings=layout), inputs, state, rows,
                            padded["tokens"].shape[1] if "tokens" in padded else 0, cache_length, max_tokens)


def prompt_of_format(model: Any, shapes: Mapping[str, tuple[tuple[int, ...], Any]], form: Mapping[str, Any]) -> tuple[dict[str, tuple], int]:
    """Returns ({name: (shape, dtype)} of the longest prompt's inputs, tokens of the answer) of a processor's format.

    Of an encoder-decoder `length` and `target_length`; a decoder's `length` is shared by prompt and answer, who get half of its text each.

    Args:
      shapes: of one training example, as the task's `batch_shapes` gives them.
      form: the section `processor.format`.
    Raises:
      ConfigError: for a format that is another model's.
    """
    encodes = is_encoder_decoder(model)
    if encodes != (form.get("kind") == "encoder_decoder"):
        raise ConfigError(f"processor.format.kind is {form.get('kind')!r}, but {type(model).__name__} is "
                          f"{'an encoder-decoder' if encodes else 'a decoder'}; choose {'encoder_decoder' if encodes else 'prefix_lm or causal'}.")
    inputs = {name: value for name, value in shapes.items() if name not in ("targets", "loss_weights")}
    if encodes:
        return inputs, form["target_length"]
    answer = max(1, (form["length"] - form.get("image_tokens", 0)) // 2)
    along = ("tokens", "valid", "prefix", "slots", "media_index", "segment_ids")
    return {name: ((form["length"] - answer,) if name in along else shape, dtype) for name, (shape, dtype) in inputs.items()}, answer

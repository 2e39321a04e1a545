"""Prompts of unequal length in batches of few sizes: padded to buckets, so that the number of programs is that of the buckets."""
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.errors import ConfigError

SMALLEST_BUCKET = 16
# What a padded place holds, of the inputs that have a token axis.
FILL = {"tokens": 0, "valid": False, "positions": 0, "prefix": False, "segment_ids": 0, "slots": -1, "media_index": -1, "embeddings": 0}


def bucket(length: int, buckets: Sequence[int] | None = None) -> int:
    """The padded length of a prompt: the smallest of `buckets` that holds it; by default the powers of two from 16.

    Raises:
      ConfigError: for a prompt longer than the largest bucket.
    """
    if buckets is None:
        return max(SMALLEST_BUCKET, 1 << max(0, length - 1).bit_length())
    fitting = [size for size in buckets if size >= length]
    if not fitting:
        raise ConfigError(f"a prompt of {length} tokens is longer than the largest bucket, {max(buckets, default=0)}; add a bucket of at least {length}.")
    return min(fitting)


def pad_rows(prompts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """The inputs `{"tokens", "valid"}` [B, T] of prompts of unequal length, padded on the right.

    Raises:
      ConfigError: for an empty prompt.
    """
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ConfigError(f"prompt {row} is empty; give it at least one token, such as the begin mark.")
    length = max(map(len, prompts))
    tokens = np.zeros((len(prompts), length), np.int32)
    valid = np.zeros(tokens.shape, bool)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)], valid[row, :len(prompt)] = prompt, True
    return {"tokens": tokens, "valid": valid}


def padded(inputs: Mapping[str, Any], length: int) -> dict[str, np.ndarray]:
    """The inputs with their token axis padded on the right to `length`, and `valid` always there."""
    result = {key: np.asarray(value) for key, value in inputs.items() if value is not None}
    shape = token_shape(result)
    if shape is None:
        return result
    result.setdefault("valid", np.ones(shape, bool))
    extra = length - shape[1]
    for key in result.keys() & FILL.keys():
        value = result[key]
        result[key] = np.pad(value, [(0, 0), (0, extra)] + [(0, 0)] * (value.ndim - 2), constant_values=FILL[key])
    return result


def token_shape(inputs: Mapping[str, Any]) -> tuple[int, int] | None:
    """(B, T) of the prompt; None where there is none but an image."""
    for key in ("tokens", "embeddings"):
        if inputs.get(key) is not None:
            return tuple(inputs[key].shape[:2])
    return None


def batch_size(inputs: Mapping[str, Any]) -> int:
    """The number of rows.

    Raises:
      ConfigError: for no inputs, or some that differ in their number of rows.
    """
    sizes = {key: value.shape[0] for key, value in inputs.items() if value is not None}
    if len(set(sizes.values())) != 1:
        raise ConfigError(f"inputs: the numbers of rows differ or are missing ({sizes}); give every input one row a prompt.")
    return next(iter(sizes.values()))


def prepare(model: Any, inputs: Mapping[str, Any], max_tokens: int, *, prefix: Any = None, cache_length: int | None = None,
            buckets: Sequence[int] | None = None, extra: int = 0) -> tuple[dict[str, np.ndarray], int]:
    """Pads the inputs to their bucket; returns them and the length of the cache that the answer needs.

    Args:
      prefix: a cache to go on from.
      cache_length: the most slots a cache may have; None is as many as are needed.
      extra: slots needed besides (the proposals of speculative decoding).
    Raises:
      ConfigError: for a prompt and an answer that do not fit into the cache, the buckets or the model's positions; the message names the numbers.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens is {max_tokens}; it must be at least 1.")
    inputs = {key: np.asarray(value) for key, value in inputs.items() if value is not None}
    batch, shape = batch_size(inputs), token_shape(inputs)
    if shape is None:
        return inputs, max_tokens + extra + 1
    valid = np.asarray(inputs.get("valid", np.ones(shape, bool)))
    row = int(valid.sum(1).argmax())
    longest = int(valid.sum(1)[row])
    empty = np.flatnonzero(valid.sum(1) == 0)
    if empty.size:
        raise ConfigError(f"prompt {int(empty[0])} has no valid token; give it at least one, such as the begin mark.")
    if is_encoder_decoder(model):
        if cache_length is not None and cache_length < max_tokens + 1 + extra:
            raise ConfigError(f"max_tokens {max_tokens} does not fit into cache_length {cache_length}; "
                              f"raise cache_length to {max_tokens + 1 + extra} or lower max_tokens.")
        return padded(inputs, bucket(shape[1], buckets)), max_tokens + 1 + extra
    _check_prefix(prefix, batch)
    before = 0 if prefix is None else int(np.max(np.asarray(prefix.index)))
    limit = position_limit(model)
    said = 0 if prefix is None else int(np.max(np.asarray(prefix.next_position)))
    if limit is not None and said + longest + max_tokens > limit:
        raise ConfigError(f"prompt {row} has {said + longest} tokens and max_tokens is {max_tokens}, but the model has {limit} positions; "
                          f"shorten the prompt to {max(limit - max_tokens, 0)} tokens or set max_tokens to at most {max(limit - said - longest, 0)}.")
    length = bucket(shape[1], buckets)
    needed = (bucket(before) if before else 0) + length + max_tokens + extra   # prefixes of any length need no more programs than there are buckets, either
    if cache_length is not None and needed > cache_length:
        length = min(length, max(shape[1], cache_length - before - max_tokens - extra))
        needed = before + length + max_tokens + extra
        if needed > cache_length:
            raise ConfigError(f"prompt {row} has {before + longest} tokens (padded {before + shape[1]}) and max_tokens is {max_tokens}, but cache_length is "
                              f"{cache_length}; raise cache_length to {needed}, shorten the prompt or lower max_tokens.")
    return padded(inputs, length), needed


def _check_prefix(prefix: Any, batch: int) -> None:
    if prefix is not None and prefix.index.shape[0] not in (1, batch):
        raise ConfigError(f"prefix: the cache has {prefix.index.shape[0]} rows, the prompts {batch}; give a cache of one row or of {batch}.")


def is_encoder_decoder(model: Any) -> bool:
    """Whether prompts go to an encoder, so that the cache holds the answer only."""
    return "targets" in model.input_shapes()


def position_limit(model: Any) -> int | None:
    """How many positions the model has a learned embedding for; None where there is no such limit."""
    return model.max_positions if getattr(model, "positions", None) == "learned" else None


def place(inputs: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """The arrays on the devices: their rows split over the mesh where they divide, else whole on each."""
    if mesh is None:
        return jax.tree.map(jnp.asarray, inputs)
    from vlm_jax.sharding.mesh import batch_sharding, replicated
    shards = int(np.prod([mesh.shape.get(axis, 1) for axis in ("data", "fsdp")]))

    def put(value):
        value = np.asarray(value)
        sharding = batch_sharding(mesh) if value.ndim and value.shape[0] % shards == 0 else replicated(mesh)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
    return jax.tree.map(put, inputs)

"""`Session`: one conversation with a model, whose cache is kept from answer to answer, so that each prompt is read only from where it differs."""
from collections.abc import Iterator, Mapping, Sequence
import functools
import hashlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
import numpy as np

from vlm_jax.decoding.program import Prefix, State, grown, on_mesh
from vlm_jax.decoding.prompts import bucket, is_encoder_decoder
from vlm_jax.decoding.streaming import stream

KNOWN = {"tokens", "valid", "prefix", "slots", "images", "media_index"}   # inputs of which it is known what they make of a token
# Of a token: its id; or the picture and which of its tokens stands there; or, where tokens read pictures, its id and the picture (None: it reads none).
Key = int | tuple[str, int] | tuple[int, str | None]


class Session:
    """A model that goes on from what it has read.

    A prompt that begins as the cache does (the conversation so far, and the answer as it was generated) is read from there on. Others are read whole: those
    that change something earlier than a ring of slots remembers, prompts whose tokens see what comes after them (a prefix LM's), all of an encoder-decoder.
    The answers are those of `stream` without a session.

    Args:
      model: a generative model; params: its parameters. mesh: the devices, where they are spread over several.
    Attributes:
      read, reused: tokens of the last prompt that the model read, and that the cache held already.
    """

    def __init__(self, model: Any, params: Any, mesh: jax.sharding.Mesh | None = None):
        self.model, self.params, self.mesh = model, params, mesh
        self._sees = "images" in inspect.signature(model.extend).parameters
        self.read = self.reused = 0
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._cache, self._keys, self._reads = None, [], np.zeros(0, np.int32)

    def stream(self, inputs: Mapping[str, Any], **options: Any) -> Iterator[str]:
        """Yields the answer to one prompt, piece by piece.

        Args:
          inputs: of one row, as for `generate`. options: keyword arguments of `stream`.
        Raises:
          ConfigError: as `stream`.
        """
        inputs = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
        keys = self._keys_of(inputs)
        cache, self._cache, known, self._keys = self._cache, None, self._keys, []   # what is interrupted is forgotten
        count = self._common(cache, known, keys, inputs.get("media_index"))
        index = inputs["media_index"][0] if "media_index" in inputs else np.full(len(keys or ()), -1)
        before, kept = self._reads[:count], int(self._reads[:count].max(initial=-1)) + 1   # what they read among the pictures of the cache
        if keys is not None:
            inputs = _rest(inputs, count)
        prefix = None
        if count:
            tokens = np.full((1, bucket(count)), -1, np.int32)
            tokens[0, :count] = [_id(key) for key in keys[:count]]
            with on_mesh(self.mesh):
                cache = cache if cache.ring else _first(cache, np.int32(count), bucket(count))
            if cache.media is not None:
                cache = _with_pictures(cache, kept * self.model.media_tokens(), before[-1])
                kept = 0 if cache.encoded is None else cache.encoded[2].shape[1] // self.model.media_tokens()
            prefix = Prefix(cache, jnp.asarray(tokens))
        reads = np.concatenate([before, _reads_behind(index, count, before, kept)])
        self.read, self.reused = _length(inputs), count
        del cache

        def keep(state: State) -> None:
            if keys is not None:
                said = np.asarray(state.tokens)[0, :max(0, int(state.step) - 1)]   # the model has not read the last one
                self._cache, self._keys = state.cache.stacked(), [*keys, *(_key(int(token), keys[-1]) for token in said)]
                self._reads = np.concatenate([reads, np.full(len(said), reads[-1])])

        pieces = stream(self.model, self.params, inputs, mesh=self.mesh, prefix=prefix, on_end=keep, **options)
        try:
            for piece in pieces:
                yield piece[0]
        finally:
            pieces.close()

    def _common(self, cache: Any, known: Sequence[Key], keys: Sequence[Key] | None, media_index: Int[np.ndarray, "1 T"] | None) -> int:
        """How many tokens the cache and the prompt begin with alike. At least one of the prompt is left, whose logits begin the answer."""
        if cache is None or not keys:
            return 0
        least = min(len(known), len(keys) - 1)
        count = next((i for i in range(least) if known[i] != keys[i]), least)
        if cache.ring and (count < len(known) or bucket(len(keys) - count) > cache.length):
            return 0
        if media_index is not None and count:
            shown, rest = media_index[0, :count], media_index[0, count:]
            if (rest[rest != shown[-1]] <= shown.max()).any():   # they go back to a picture before the last, or to none
                return 0
        return count if self._sees or all(isinstance(key, int) for key in keys[count:]) else 0

    def _keys_of(self, inputs: Mapping[str, np.ndarray]) -> list[Key] | None:
        """What tells the tokens of a prompt apart; None where they depend on more than what is before them."""
        if not inputs.keys() <= KNOWN or "tokens" not in inputs or inputs["tokens"].shape[0] != 1 or is_encoder_decoder(self.model):
            return None
        if "prefix" in inputs and inputs["prefix"].any() or "valid" in inputs and not inputs["valid"].all():
            return None
        keys: list[Key] = [int(number) for number in inputs["tokens"][0]]
        if "images" not in inputs:
            return keys
        names = [hashlib.sha256(np.ascontiguousarray(image)).hexdigest() for image in inputs["images"][0]]
        if "media_index" in inputs:
            return [(key, names[index] if index >= 0 else None) for key, index in zip(keys, inputs["media_index"][0].tolist())]
        if "slots" not in inputs:
            return None
        per = self.model.image_tokens() if hasattr(self.model, "image_tokens") else max(1, int((inputs["slots"] >= 0).sum()) // len(names))
        return [key if slot < 0 else (names[slot // per], slot % per) for key, slot in zip(keys, inputs["slots"][0].tolist())]


def _id(key: Key) -> int:
    """The token of a key, -1 where it is one of a picture's."""
    return key if isinstance(key, int) else key[0] if isinstance(key[0], int) else -1


def _key(token: int, before: Key) -> Key:
    """Of a token that the model said behind another, and that reads the same picture."""
    return (token, before[1]) if isinstance(before, tuple) and isinstance(before[0], int) else token


def _reads_behind(index: Int[np.ndarray, "T"], count: int, before: Int[np.ndarray, "N"], kept: int) -> Int[np.ndarray, "T-N"]:
    """What the tokens from number `count` on read among the pictures of the cache, `kept` of which it has, and then those that are new."""
    rest = index[count:]
    if not count:
        return rest
    new = rest != index[count - 1]
    return np.where(new, kept + rest - rest[new].min(initial=np.iinfo(rest.dtype).max), before[-1])


def _rest(inputs: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The inputs without their first `count` tokens, and without the pictures that only those show."""
    if not count:
        return dict(inputs)
    rest = {name: value if name == "images" else value[:, count:] for name, value in inputs.items()}
    if "media_index" in rest:
        index, images = rest.pop("media_index"), rest.pop("images", None)
        new = index != inputs["media_index"][0, count - 1]
        if images is not None and new.any():
            first = int(index[new].min())
            rest |= {"images": images[:, first:int(index.max()) + 1], "media_index": np.where(new, index - first, -1)}   # -1: as the token before
    elif "images" in rest:
        slots, images = rest.pop("slots"), rest.pop("images")
        per = int((inputs["slots"] >= 0).sum()) // images.shape[1]
        if (slots >= 0).any():
            first = int(slots[slots >= 0].min()) // per
            rest |= {"images": images[:, first:], "slots": np.where(slots >= 0, slots - first * per, -1)}
    return rest


def _length(inputs: Mapping[str, np.ndarray]) -> int:
    return int(inputs["valid"].sum()) if "valid" in inputs else inputs["tokens"].shape[1] if "tokens" in inputs else 0


@functools.partial(jax.jit, static_argnames="length")
def _first(cache: Any, count: Int[Array, ""], length: int) -> Any:
    """The cache with its first `count` tokens alone, in `length` slots."""
    cache = grown(cache, length)
    position = jnp.where(jnp.arange(length) < count, cache.position[:, :length], -1)
    row = jnp.full(cache.index.shape, count, jnp.int32)
    return cache.replace(key=cache.key[:, :, :length], value=cache.value[:, :, :length], position=position, index=row, next_position=position.max(1) + 1,
                         written=jnp.zeros_like(row))


@functools.partial(jax.jit, static_argnames="vectors")
def _with_pictures(cache: Any, vectors: int, media: Int[Array, ""]) -> Any:
    """The cache with its first `vectors` of pictures alone, of which the row read number `media` last."""
    encoded = cache.encoded
    if encoded is not None:
        encoded = (encoded[0][:, :, :vectors], encoded[1][:, :, :vectors], encoded[2][:, :vectors]) if vectors else None
    return cache.replace(encoded=encoded, media=jnp.full_like(cache.media, media))

"""Keys and values of the tokens that a decoder has read: one pytree, allocated once, written in place."""
from typing import Any

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.errors import ConfigError
from vlm_jax.sharding.activations import constrain, is_split, logical_spec

AXES = ("layers", "batch", "keys", "heads", "head_dim")   # logical axes of keys and values
LAYER_AXES = ("batch", "heads", "keys", "head_dim")       # of one layer in the form of `unstacked`
ROWS_ONE_BY_ONE = 32   # the tokens of a decoding step are written one row after the other up to so many rows, beyond by a scatter


@struct.dataclass
class Slots:
    """Where the tokens of one `Cache.extend` go, and what they may read.

    Attributes:
      index: slot of each token; the number of slots for a token that is not kept.
      position: position of each token; -1 for padding. The queries' positions.
      key_position: positions of the keys that `Cache.write` returns: all slots of the cache; of a ring extended by several tokens the slots as they were
        before, then the tokens; of a fresh cache the tokens alone.
    """
    index: Int[Array, "B T"]
    position: Int[Array, "B T"]
    key_position: Int[Array, "B S"]
    fresh: bool = struct.field(pytree_node=False)
    joined: bool = struct.field(pytree_node=False)

    def place(self, values: Array, default: Any = 0) -> Array:
        """Facts about the tokens [B, T] (whether they are of the prefix) at the places of their keys, as `key_position` has them; `default` elsewhere."""
        values = jnp.asarray(values)
        if self.fresh:
            return values
        if self.joined:
            before = jnp.full((values.shape[0], self.key_position.shape[1] - values.shape[1]), default, values.dtype)
            return jnp.concatenate([before, values], axis=1)
        return _put(jnp.full(self.key_position.shape, default, values.dtype), self.index, values)


@struct.dataclass
class Cache:
    """Keys and values of every layer, by slots; row b of the batch holds tokens in the slots whose `position` is not -1.

    Slots are filled in the order of the tokens, padding takes none: rows of unequal length, padded on either side or between, hold the same as each alone.

    Attributes:
      key, value: [L, B, S, K, D], or a tuple of L arrays [B, K, S, D] (`unstacked`).
      position: of the token in each slot; -1 is empty.
      index: the slot that the next token of each row takes (in a ring modulo S).
      next_position: of the next token of each row.
      written: tokens of each row that the last `extend` wrote.
      encoded: (keys [L, B, M, K, D], values, valid [B, M]) of an encoder, or of pictures for the blocks inserted between the layers; they are only read.
      media: which of the pictures each row read last (-1: none yet), where `encoded` is of pictures.
      ring: slots are taken round and round; for models all of whose layers have a window of at most S. A ring from which `keep` takes tokens back (speculative
        decoding) needs S to be the window plus the tokens of one extension, since what was written over is gone.
    """
    key: Float[Array, "L B S K D"] | tuple[Float[Array, "B K S D"], ...]
    value: Float[Array, "L B S K D"] | tuple[Float[Array, "B K S D"], ...]
    position: Int[Array, "B S"]
    index: Int[Array, "B"]
    next_position: Int[Array, "B"]
    written: Int[Array, "B"]
    encoded: tuple[Float[Array, "L B M K D"], Float[Array, "L B M K D"], Bool[Array, "B M"]] | None = None
    media: Int[Array, "B"] | None = None
    ring: bool = struct.field(pytree_node=False, default=False)

    @classmethod
    def create(cls, depth: int, batch: int, length: int, num_kv_heads: int, head_dim: int, dtype: str = "float32", *, ring: bool = False,
               encoded: tuple[Array, Array, Array] | None = None) -> "Cache":
        """An empty cache of `length` slots a row.

        Raises:
          ConfigError: if `length` is not positive.
        """
        if length < 1:
            raise ConfigError(f"cache: a length of {length} slots holds no token; choose a positive cache_length.")
        zeros = constrain(jnp.zeros((depth, batch, length, num_kv_heads, head_dim), dtype), *AXES)
        row = jnp.zeros((batch,), jnp.int32)
        return cls(zeros, zeros, jnp.full((batch, length), -1, jnp.int32), row, row, row, encoded, ring=ring)

    @property
    def length(self) -> int:
        """S, the slots of a row."""
        return self.position.shape[1]

    def extend(self, valid: Bool[Array, "B T"], positions: Int[Array, "B T"] | None = None, *, fresh: bool = False) -> tuple["Cache", Slots]:
        """Gives slots to T tokens of each row; their keys and values are then written by `write`, layer by layer.

        Args:
          valid: False for padding, which takes no slot.
          positions: of the tokens; by default each row goes on from `next_position`.
          fresh: states that the cache is empty: the tokens then read each other and not the slots, and a ring may take more tokens than it has slots.
        Returns:
          the cache with its bookkeeping brought up to date, and the slots. Tokens beyond the end of a full row are dropped.
        Raises:
          ConfigError: if more tokens come than the cache has slots.
        """
        tokens, length = valid.shape[1], self.length
        if tokens > length and not (self.ring and fresh):
            raise ConfigError(f"cache: {tokens} tokens do not fit into its {length} slots; make cache_length at least {tokens}, or the prompt shorter.")
        valid = valid.astype(bool)
        before = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
        count = before[:, -1]
        order = before - 1
        position = self.next_position[:, None] + order if positions is None else positions.astype(jnp.int32)
        position = jnp.where(valid, position, -1)
        slot = self.index[:, None] + order
        kept = valid
        if self.ring:
            slot = slot % length
            kept = valid & (order >= count[:, None] - length)   # of more tokens than slots only the last
        slot = jnp.where(kept & (slot < length), slot, length)
        joined = self.ring and tokens > 1 and not fresh
        after = _put(self.position, slot, position)
        key_position = position if fresh else jnp.concatenate([self.position, position], axis=1) if joined else after
        index = self.index + count
        cache = self.replace(position=after, index=index % length if self.ring else jnp.minimum(index, length),
                             next_position=jnp.maximum(self.next_position, position.max(1) + 1), written=count)
        return cache, Slots(slot, position, key_position, fresh, joined)

    def write(self, layer: int | Int[Array, ""], key: Float[Array, "B T K D"], value: Float[Array, "B T K D"],
              slots: Slots) -> tuple["Cache", Float[Array, "B S K D"], Float[Array, "B S K D"]]:
        """Writes the tokens' keys and values of one layer; returns the cache, and the keys and values that the tokens read (`slots.key_position`)."""
        key, value = (x.astype(old.dtype) for x, old in ((key, self._any(self.key)), (value, self._any(self.value))))
        held = self.read(layer) if slots.joined else None
        cache = self.replace(key=_write(self.key, layer, key, slots.index), value=_write(self.value, layer, value, slots.index))
        if slots.fresh:
            return cache, key, value
        if slots.joined:
            return cache, jnp.concatenate([held[0], key], axis=1), jnp.concatenate([held[1], value], axis=1)
        return cache, *cache.read(layer)

    def read(self, layer: int | Int[Array, ""]) -> tuple[Float[Array, "B S K D"], Float[Array, "B S K D"]]:
        """Keys and values of all slots of one layer."""
        return _layer(self.key, layer), _layer(self.value, layer)

    def read_encoded(self, layer: int | Int[Array, ""]) -> tuple[Float[Array, "B M K D"], Float[Array, "B M K D"], Bool[Array, "B M"]]:
        """Keys and values of one layer, and which are valid, of the encoder's output."""
        key, value, valid = self.encoded
        return _layer(key, layer), _layer(value, layer), valid

    def rows(self, index: Int[Array, "B2"]) -> "Cache":
        """The rows of these indices: a gather for beams, a repetition for samples."""
        def of_layers(x):
            return tuple(jnp.take(y, index, axis=0) for y in x) if isinstance(x, tuple) else jnp.take(x, index, axis=1)

        encoded = self.encoded
        if encoded is not None:
            encoded = of_layers(encoded[0]), of_layers(encoded[1]), jnp.take(encoded[2], index, axis=0)
        rows = ("position", "index", "next_position", "written", *(("media",) if self.media is not None else ()))
        one = {name: jnp.take(getattr(self, name), index, axis=0) for name in rows}
        return self.replace(key=of_layers(self.key), value=of_layers(self.value), encoded=encoded, **one)

    def keep(self, count: Int[Array, "B"]) -> "Cache":
        """Takes back what the last `extend` wrote beyond the first `count` tokens of each row."""
        count = jnp.clip(count, 0, self.written)
        dropped = self.written - count
        index = self.index - dropped
        index = index % self.length if self.ring else index
        behind = (jnp.arange(self.length)[None] - index[:, None]) % self.length   # slots from the new end on, in the order in which they were taken
        position = jnp.where(behind < dropped[:, None], -1, self.position)
        return self.replace(position=position, index=index, next_position=position.max(1) + 1, written=count)

    def unstacked(self) -> "Cache":
        """The same with keys and values as tuples of layers [B, K, S, D]: an unrolled decoder updates them without taking slices, and the products of
        attention read them as they are. (`read` and `write` take and give [B, S, K, D] in either form.)"""
        def split(x):
            return x if isinstance(x, tuple) else tuple(x[i].swapaxes(1, 2) for i in range(x.shape[0]))
        return self._with(split)

    def stacked(self) -> "Cache":
        """The same with keys and values as single arrays with a layer axis."""
        def join(x):
            return jnp.stack([layer.swapaxes(1, 2) for layer in x]) if isinstance(x, tuple) else x
        return self._with(join)

    def _with(self, form):
        encoded = None if self.encoded is None else (form(self.encoded[0]), form(self.encoded[1]), self.encoded[2])
        return self.replace(key=form(self.key), value=form(self.value), encoded=encoded)

    def shardings(self, mesh: jax.sharding.Mesh) -> "Cache":
        """The layout on a mesh as a tree of NamedSharding: rows over `data` and `fsdp`, heads over `tensor`, where they divide."""
        def of(x):
            names = AXES if x.ndim == 5 else LAYER_AXES if x.ndim == 4 else ("batch",) + (None,) * (x.ndim - 1)
            spec = logical_spec(x.shape, names, mesh)
            entries = (None if entry is PartitionSpec.UNCONSTRAINED else entry for entry in spec)
            return NamedSharding(mesh, PartitionSpec(*entries))
        return jax.tree.map(of, self)

    @staticmethod
    def _any(x):
        return x[0] if isinstance(x, tuple) else x


def _layer(x, layer):
    if isinstance(x, tuple):
        return x[layer].swapaxes(1, 2)
    return x[layer] if isinstance(layer, int) else lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)


def _put(x: Int[Array, "B S"], index: Int[Array, "B T"], values: Int[Array, "B T"]) -> Int[Array, "B S"]:
    """x with values[b, t] at index[b, t]; an index of S writes nowhere."""
    if index.shape[1] == 1:
        return jnp.where(jnp.arange(x.shape[1])[None] == index, values, x)
    return jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop"))(x, index, values)


def _write(x, layer, new: Float[Array, "B T K D"], index: Int[Array, "B T"]):
    """The array (or tuple of arrays) with new[b, t] in slot index[b, t] of a layer; an index of S writes nowhere."""
    if isinstance(x, tuple):
        return (*x[:layer], _write_split(x[layer], None, constrain(new, *AXES[1:]), index, LAYER_AXES), *x[layer + 1:])
    return _write_split(x, layer, constrain(new, *AXES[1:]), index, AXES)


def _write_split(x, layer, new, index, names):
    batch = names.index("batch")
    entry = logical_spec(x.shape, names, jax.sharding.get_abstract_mesh())[batch] if is_split("batch") else None
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return constrain(_write_rows(x, layer, new, index), *names)
    # Each device writes its own rows; a scatter over split rows would gather the tokens of all.
    whole, rows, axes = PartitionSpec(*(None,) * batch, entry), PartitionSpec(entry), set(entry if isinstance(entry, tuple) else (entry,))
    write = jax.shard_map(_write_rows, in_specs=(whole, PartitionSpec(), rows, rows), out_specs=whole, axis_names=axes, check_vma=False)
    return write(x, None if layer is None else jnp.asarray(layer), new, index)


def _write_rows(x, layer, new, index):
    """`new` [B, T, K, D] in x: a layer of [L, B, S, K, D], or [B, K, S, D] where `layer` is None."""
    batch, tokens = index.shape
    length = x.shape[2]
    if tokens > 1 or batch > ROWS_ONE_BY_ONE:
        rows = jnp.arange(batch)[:, None]
        if layer is not None:
            return x.at[layer, rows, index].set(new, mode="drop")
        return x.at[rows[:, None], jnp.arange(x.shape[1])[:, None], index[:, None]].set(new.swapaxes(1, 2), mode="drop")
    if layer is None:
        # A branch, which the compiler cannot merge into what reads the slots; merged, it would update a copy for each reader.
        return lax.cond((index < length).any(), lambda x: _one_by_one(x, None, new.swapaxes(1, 2), index[:, 0]), lambda x: x, x)
    return _one_by_one(x, layer, new[None], index[:, 0])


def _one_by_one(x, layer, new, index):
    """One token of each row, given in the form of x; what has the index S writes what is there."""
    slot = jnp.minimum(index, x.shape[2] - 1)
    places = [(row, 0, slot[row], 0) if layer is None else (layer, row, slot[row], 0, 0) for row in range(len(slot))]
    shape = (1, x.shape[1], 1, x.shape[3]) if layer is None else (1, 1, 1, *x.shape[3:])
    # All of that is read before the first write: what is read later would have to be copied.
    old = jnp.concatenate([lax.dynamic_slice(x, at, shape) for at in places], axis=-4)
    update = lax.optimization_barrier(jnp.where((index < x.shape[2])[:, None, None, None], new, old))
    for row, at in enumerate(places):
        x = lax.dynamic_update_slice(x, lax.slice_in_dim(update, row, row + 1, axis=update.ndim - 4), at)
    return x

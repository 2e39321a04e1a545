"""Which keys a query may read, said by facts about positions, so that no [T, S] mask need exist as a whole."""
from flax import struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@struct.dataclass
class Visibility:
    """A query reads the keys of its segment whose position is not above its own, or that are of the prefix, within the window.

    It is a pytree: slices, scans and shardings treat its arrays as data.

    Attributes:
      query_position: position of each query; -1 is padding, which reads nothing.
      key_position: position of each key; -1 is padding or an empty slot of a cache, which nobody reads.
      query_segment, key_segment: both or neither; documents packed into one row, which do not see each other.
      key_prefix: True where every query of the segment may read the key, also from before it.
      query_prefix: True where a query is itself of the prefix and reads all of it, also beyond the window (PaliGemma 2 as transformers has it;
        without, as big_vision has it, the window holds there too).
      window: a scalar (it may be traced: data of a scanned layer); keys at a distance of `window` or more are not read, on either side. None or a value
        below 1 is no window.
      causal: False lets a query read keys above its own position too.
      layout: what is known of the positions without looking at them, for kernels: "ordered": queries are the keys, and in each segment those that are no
        padding stand in the order of their positions; "full": besides, nothing is padding and positions of a segment go up by one. None: nothing.
    """
    query_position: Int[Array, "B T"]
    key_position: Int[Array, "B S"]
    query_segment: Int[Array, "B T"] | None = None
    key_segment: Int[Array, "B S"] | None = None
    key_prefix: Bool[Array, "B S"] | None = None
    window: Int[Array, ""] | int | None = None
    causal: bool = struct.field(pytree_node=False, default=True)
    query_prefix: Bool[Array, "B T"] | None = None
    layout: str | None = struct.field(pytree_node=False, default=None)

    def allowed(self, queries: slice = slice(None), keys: slice = slice(None)) -> Bool[Array, "B 1 T S"]:
        """True where a query may read a key, for the queries and keys of two (static) slices.

        Raises:
          ValueError: if only one of `query_segment` and `key_segment` is given.
        """
        query, key = self.query_position[:, queries, None], self.key_position[:, None, keys]
        allowed = (query >= 0) & (key >= 0)
        if self.causal:
            below = key <= query
            allowed &= below if self.key_prefix is None else below | self.key_prefix[:, None, keys].astype(bool)
        if (self.query_segment is None) != (self.key_segment is None):
            raise ValueError("Visibility: one of query_segment and key_segment is missing; give both or neither.")
        if self.query_segment is not None:
            allowed &= self.query_segment[:, queries, None] == self.key_segment[:, None, keys]
        if self.window is not None:
            window = jnp.asarray(self.window)
            near = (window < 1) | (jnp.abs(query - key) < window)
            if self.query_prefix is not None and self.key_prefix is not None:
                near |= self.query_prefix[:, queries, None].astype(bool) & self.key_prefix[:, None, keys].astype(bool)
            allowed &= near
        return allowed[:, None]


def positions_of(valid: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions 0, 1, ... of the valid tokens of each row in their order, wherever the padding is; -1 for the others."""
    valid = valid.astype(bool)
    return jnp.where(valid, jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1, -1)

"""Transforms of weight tables: pairs of inverse functions between an array as others store it and as we do. Nothing is computed, only moved.

Sizes: D width, H heads, G heads of keys and values, K width of a head, P side of a patch, C channels.
"""
from collections.abc import Callable
import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """`to_ours(*theirs)` and `to_theirs(*ours)`, inverse to each other; each returns an array, or a tuple where the other side has several names."""
    to_ours: Callable[..., np.ndarray | tuple[np.ndarray, ...]]
    to_theirs: Callable[..., np.ndarray | tuple[np.ndarray, ...]]


def chain(*transforms: Transform) -> Transform:
    """One transform after the other, from theirs to ours."""
    def to_ours(*arrays):
        for transform in transforms:
            arrays = as_tuple(transform.to_ours(*arrays))
        return arrays

    def to_theirs(*arrays):
        for transform in reversed(transforms):
            arrays = as_tuple(transform.to_theirs(*arrays))
        return arrays
    return Transform(to_ours, to_theirs)


def as_tuple(value: np.ndarray | tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """What a transform returned, as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def reshape(theirs: tuple[int, ...], ours: tuple[int, ...]) -> Transform:
    """The same numbers in another shape; -1 stands for what is left."""
    return Transform(lambda x: x.reshape(ours), lambda x: x.reshape(theirs))


def heads_out(heads: int) -> Transform:
    """The kernel of queries, keys or values: [H K, D] <-> [D, H, K]."""
    return Transform(lambda x: x.T.reshape(x.shape[1], heads, -1), lambda x: x.reshape(x.shape[0], -1).T)


def heads_in(heads: int) -> Transform:
    """The kernel of the output projection of attention: [D, H K] <-> [H, K, D]."""
    return Transform(lambda x: x.T.reshape(heads, -1, x.shape[0]), lambda x: x.reshape(-1, x.shape[-1]).T)


def heads_bias(heads: int) -> Transform:
    """The bias of queries, keys or values: [H K] <-> [H, K]."""
    return Transform(lambda x: x.reshape(heads, -1), lambda x: x.reshape(-1))


def heads_out_plain(heads: int) -> Transform:
    """As `heads_out` for kernels stored [in, out] (GPT-2's Conv1D): [D, H K] <-> [D, H, K]."""
    return Transform(lambda x: x.reshape(x.shape[0], heads, -1), lambda x: x.reshape(x.shape[0], -1))


def heads_in_plain(heads: int) -> Transform:
    """As `heads_in` for kernels stored [in, out]: [H K, D] <-> [H, K, D]."""
    return Transform(lambda x: x.reshape(heads, -1, x.shape[-1]), lambda x: x.reshape(-1, x.shape[-1]))


def fused(sizes: tuple[int, ...], each: tuple[Transform, ...], axis: int = 0) -> Transform:
    """Several parts stored as one array, one after the other along `axis`: the parts have `sizes` there and go through `each`."""
    places = np.cumsum(sizes)[:-1].tolist()
    return Transform(lambda x: tuple(t.to_ours(part) for t, part in zip(each, np.split(x, places, axis), strict=True)),
                     lambda *parts: np.concatenate([t.to_theirs(part) for t, part in zip(each, parts, strict=True)], axis))


def qkv(heads: int, head_dim: int, kv_heads: int | None = None) -> Transform:
    """A fused kernel [(H + 2 G) K, D] <-> query [D, H, K], key and value [D, G, K]."""
    groups = heads if kv_heads is None else kv_heads
    return fused((heads * head_dim, groups * head_dim, groups * head_dim), (heads_out(heads), heads_out(groups), heads_out(groups)))


def qkv_bias(heads: int, head_dim: int, kv_heads: int | None = None) -> Transform:
    """The bias of `qkv`, and of `qkv_plain`: [(H + 2 G) K] <-> query [H, K], key and value [G, K]."""
    groups = heads if kv_heads is None else kv_heads
    return fused((heads * head_dim, groups * head_dim, groups * head_dim), (heads_bias(heads), heads_bias(groups), heads_bias(groups)))


def qkv_plain(heads: int, head_dim: int) -> Transform:
    """A fused kernel stored [in, out] (GPT-2's c_attn): [D, 3 H K] <-> three of [D, H, K]."""
    return fused((heads * head_dim,) * 3, (heads_out_plain(heads),) * 3, axis=1)


def qkv_interleaved(heads: int) -> Transform:
    """A fused kernel with query, key and value of a head side by side (GPT-NeoX): [H 3 K, D] <-> three of [D, H, K]."""
    def to_ours(x):
        x = x.reshape(heads, 3, -1, x.shape[-1])                 # [H, 3, K, D]
        return tuple(x[:, k].transpose(2, 0, 1) for k in range(3))

    def to_theirs(*parts):
        stacked = np.stack([part.transpose(1, 2, 0) for part in parts], 1)
        return stacked.reshape(-1, stacked.shape[-1])
    return Transform(to_ours, to_theirs)


def qkv_interleaved_bias(heads: int) -> Transform:
    """The bias of `qkv_interleaved`: [H 3 K] <-> three of [H, K]."""
    return Transform(lambda x: tuple(x.reshape(heads, 3, -1)[:, k] for k in range(3)), lambda *parts: np.stack(parts, 1).reshape(-1))


def linear_patches(patch: int, channels: int = 3) -> Transform:
    """The kernel of a linear map of flattened patches: [D, P P C] <-> [P, P, C, D]."""
    return Transform(lambda x: x.T.reshape(patch, patch, channels, -1), lambda x: x.reshape(-1, x.shape[-1]).T)


identity = Transform(lambda x: x, lambda x: x)
linear = Transform(lambda x: x.T, lambda x: x.T)                                                  # [out, in] <-> [in, out]
conv_patches = Transform(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))    # [D, C, P, P] <-> [P, P, C, D]
scalar = Transform(lambda x: x.reshape(()), lambda x: x.reshape(1))                               # [1] <-> []
first_axis = Transform(lambda x: x[0], lambda x: x[None])                                         # [1, ...] <-> [...]

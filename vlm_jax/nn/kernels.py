"""Attention by a kernel of the accelerator, which keeps no [T, S] array and passes over blocks that nobody reads: on TPUs, splash attention.

`fits` decides, from what is known when the program is traced; `attention` asks it and keeps to its own arithmetic elsewhere. The kernel comes with JAX
(`jax.experimental.pallas.ops.tpu.splash_attention`).
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.nn.stack import platform
from vlm_jax.nn.visibility import Visibility
from vlm_jax.sharding.activations import logical_spec

FEWEST_TOKENS = 1024        # of fewer, the [T, S] array is small, and XLA's products need no padding
BLOCKS = (512, 256, 128)    # tokens that are read at once
MOST_PADDING = 8            # a block may lengthen the sequence by an eighth
PADDING = jnp.iinfo(jnp.int32).min   # the segment of padding


def fits(query: Float[Array, "B T H K"], key: Float[Array, "B S G K"], value: Float[Array, "B S G K"], *, mask: Any = None, lengths: Any = None,
         visibility: Visibility | None = None, bias: Any = None, softmax_dtype: str = "float32") -> bool:
    """Whether `attend` computes this attention on the devices of the entered mesh (without a mesh, on the only device).

    It does on TPUs, in bfloat16 with float32 sums, where tokens read each other (T = S) and what they may read is known without looking at numbers: all,
    what is before them, a window, their segment. Biases, prefixes, masks and windows that are data, and meshes that split anything but rows and heads
    are not for it.
    """
    alike = query.dtype == key.dtype == value.dtype == jnp.bfloat16 and jnp.dtype(softmax_dtype) == jnp.float32
    plain = all(x is None for x in (mask, lengths, bias)) and query.shape[1] == key.shape[1] and key.shape == value.shape
    return platform() == "tpu" and alike and plain and query.shape[1] >= FEWEST_TOKENS and _known(visibility) and _partition(query, key) is not None


def attend(query: Float[Array, "B T H K"], key: Float[Array, "B T G K"], value: Float[Array, "B T G K"], *, causal: bool = False,
           visibility: Visibility | None = None, soft_cap: float | None = None, scale: float | None = None,
           interpret: bool = False) -> Float[Array, "B T H K"]:
    """What `attention` computes, for arguments that `fits` accepts. The scale multiplies the queries, in float32, before they are rounded to their dtype.

    Args:
      interpret: runs the kernel as ordinary operations, on any device.
    """
    valid = segments = window = None
    if visibility is not None:
        causal, window = causal or visibility.causal, _window(visibility)
        segments = visibility.query_segment
        if visibility.layout == "ordered":
            valid = visibility.query_position >= 0
            segments = jnp.where(valid, jnp.zeros_like(visibility.query_position) if segments is None else segments, PADDING)
    dtype = query.dtype
    query = (query.astype(jnp.float32) * (query.shape[-1] ** -0.5 if scale is None else scale)).astype(dtype)
    local = functools.partial(_attend, causal=causal, window=window, soft_cap=None if soft_cap is None else float(soft_cap), interpret=interpret)
    of_query, of_key = _partition(query, key) or (None, None)
    if of_query is not None:
        rows = PartitionSpec(of_query[0], None)
        local = jax.shard_map(local, in_specs=(of_query, of_key, of_key, None if segments is None else rows), out_specs=of_query, check_vma=False)
    out = local(query, key, value, segments)
    return out if valid is None else _zero_padding(out, valid)


def _zero_padding(out: Float[Array, "B T H K"], valid: Bool[Array, "B T"]) -> Float[Array, "B T H K"]:
    """Padding has read padding here; it gets zeros and passes no gradient."""
    return jnp.where(valid[:, :, None, None], out, jnp.zeros_like(out))


def _window(visibility: Visibility) -> int | None:
    return None if visibility.window is None or visibility.window < 1 else visibility.window


def _known(visibility: Visibility | None) -> bool:
    """Whether the places of tokens say what they may read."""
    if visibility is None:
        return True
    if visibility.layout is None or visibility.key_prefix is not None or (visibility.query_segment is None) != (visibility.key_segment is None):
        return False
    if visibility.window is None:
        return True
    # Between tokens of one segment there may be padding, which counts for places, not for positions.
    return isinstance(visibility.window, int) and visibility.layout == "full"


def _partition(query: Array, key: Array) -> tuple[PartitionSpec | None, PartitionSpec | None] | None:
    """How the entered mesh splits queries and keys for `shard_map`, (None, None) where there is nothing to split; None if the kernel cannot follow it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:   # nobody knows how arrays lie on several devices, and the compiler cannot split a kernel
        return (None, None) if jax.device_count() == 1 else None
    if all(kind is AxisType.Manual for kind in mesh.axis_types) or mesh.size == 1:
        return None, None
    if any(kind is not AxisType.Auto for kind in mesh.axis_types):
        return None
    of_query, of_key = (logical_spec(x.shape, ("batch", None, "heads", None), mesh) for x in (query, key))
    used = {axis for entry in of_query if isinstance(entry, (str, tuple)) for axis in ((entry,) if isinstance(entry, str) else entry)}
    if used != {axis for axis in mesh.axis_names if mesh.shape[axis] > 1}:
        return None
    return (of_query, of_key) if of_query == of_key or key.shape[2] == 1 else None


def _block(tokens: int) -> int:
    """The largest block that lengthens the sequence by no more than an eighth, else the smallest."""
    return next((block for block in BLOCKS if -tokens % block <= tokens // MOST_PADDING), BLOCKS[-1])


def _attend(query: Array, key: Array, value: Array, segments: Int[Array, "B T"] | None, *, causal: bool, window: int | None, soft_cap: float | None,
            interpret: bool) -> Array:
    """The kernel on whole arrays of one device."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash, splash_attention_mask as masks
    tokens, heads = query.shape[1:3]
    block = _block(tokens)
    padding = -tokens % block
    if padding and not causal and segments is None:   # of causal attention nobody reads what is behind
        segments = jnp.zeros(query.shape[:2], jnp.int32)
    query, key, value = (jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0))) for x in (query, key, value))
    if segments is not None:
        segments = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, padding)), constant_values=PADDING)
    square = (tokens + padding, tokens + padding)
    if window is not None:
        mask = masks.LocalMask(square, (window - 1, 0 if causal else window - 1), 0)
    else:
        mask = masks.CausalMask(square) if causal else masks.FullMask(square)
    sizes = splash.BlockSizes(**dict.fromkeys(("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block))
    kernel = splash.make_splash_mha(masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, attn_logits_soft_cap=soft_cap,
                                    residual_checkpoint_name="mixed", interpret=interpret)

    def row(query, key, value, segments):
        return kernel(query, key, value, None if segments is None else splash.SegmentIds(segments, segments))
    out = jax.vmap(row, in_axes=(0, 0, 0, None if segments is None else 0))(query, key, value, segments)
    return out.swapaxes(1, 2)[:, :tokens]

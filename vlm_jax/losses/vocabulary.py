"""Cross-entropy over a vocabulary whose logits never exist as a whole.

A language model's head turns N positions into [N, V] logits; at V = 256,000 they outweigh everything else in a training step. Here the head is
applied in tiles of the vocabulary: the forward pass keeps a running maximum and sum of exponentials of every position, the backward pass computes
each tile again and turns it into gradients at once. What is kept between the passes is two numbers a position. Gradients of the head are
summed in float32 tile by tile and written once.

Positions of weight 0 cost no products: the supervised positions of a device are moved to the front, and blocks of `ROWS` that hold none are
skipped at run time. Shapes under `jit` do not depend on the mask, so there is no capacity to choose, none to exceed, and every mask is exact.

On a mesh the rows of the batch lie over `data` and `fsdp`, positions over `sequence`, the vocabulary over `tensor`. Where `fsdp` divides the width,
the head itself stays split over it: a tile is gathered when its turn comes, and its gradient is reduced and scattered at once.
"""
from dataclasses import dataclass
from functools import partial
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from vlm_jax.losses.ring import MASKED, mesh_or_context

TILE = 4096     # columns of the vocabulary worked on at once
ROWS = 2048     # positions worked on at once: a tile of logits is [ROWS, TILE] in float32, 32 MiB
LANES = 128     # tiles are a multiple of it, the width of a TPU's vector register


class TokenScores(NamedTuple):
    """What the head says of each position, all [...] float32 and 0 at positions that are not supervised.

    Attributes:
      log_probability: of the target.
      log_normalizer: the logarithm of the sum of exponentials of the logits, which z-loss keeps near 0.
      mean_log_probability: over the vocabulary, which label smoothing needs; 0 unless asked for.
      correct: 1 where the target's logit exceeds every other (a tie is wrong); no gradient.
    """
    log_probability: Array
    log_normalizer: Array
    mean_log_probability: Array
    correct: Array


def vocabulary_loss(hidden: Float[Array, "... D"], kernel: Float[Array, "D V"], targets: Int[Array, "..."], *,
                    weight: Float[Array, "..."] | None = None, bias: Float[Array, "V"] | None = None, tied: bool = False,
                    label_smoothing: float = 0.0, z_loss: float = 0.0, soft_cap: float | None = None, tiled: bool = True, tile: int = TILE,
                    rows: int = ROWS, mesh: Any = None) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The cross-entropy of `hidden @ kernel + bias` against `targets`, summed with weights.

    Per position: (1 - label_smoothing) (-log p[target]) + label_smoothing (-mean of log p over the vocabulary) + z_loss log(Z)^2, Z the sum of
    exponentials (Chowdhery et al., "PaLM" (2022), section 5, with 1e-4).

    Args: see `token_scores`.
    Returns:
      (sum of weight * loss, sum of the weights), float32 scalars; their quotient is the mean over supervised positions.
    Raises:
      ValueError: if shapes do not fit, or a setting is out of range.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"vocabulary_loss: label_smoothing is {label_smoothing}; it must be at least 0 and below 1.")
    if z_loss < 0:
        raise ValueError(f"vocabulary_loss: z_loss is {z_loss}; it must be at least 0.")
    scores = token_scores(hidden, kernel, targets, weight=weight, bias=bias, tied=tied, soft_cap=soft_cap, mean=label_smoothing > 0, tiled=tiled,
                          tile=tile, rows=rows, mesh=mesh)
    return weighted_loss(scores, supervision(targets, weight), label_smoothing=label_smoothing, z_loss=z_loss)


def weighted_loss(scores: TokenScores, weight: Float[Array, "..."], *, label_smoothing: float = 0.0,
                  z_loss: float = 0.0) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum, weight) of `vocabulary_loss` from scores, for callers who want the scores too; `weight` is that of `supervision`."""
    losses = -(1 - label_smoothing) * scores.log_probability
    if label_smoothing:
        losses = losses - label_smoothing * scores.mean_log_probability
    if z_loss:
        losses = losses + z_loss * jnp.square(scores.log_normalizer)
    return jnp.sum(jnp.where(weight > 0, weight * losses, 0.0)), jnp.sum(weight)


def supervision(targets: Int[Array, "..."], weight: Float[Array, "..."] | None = None) -> Float[Array, "..."]:
    """The weight of each position in float32, a constant: 0 where `weight` is 0 or the target is negative (as -100, which PyTorch ignores)."""
    weight = jnp.ones(targets.shape, jnp.float32) if weight is None else weight.astype(jnp.float32)
    return lax.stop_gradient(jnp.where(targets >= 0, weight, 0.0))


def token_scores(hidden: Float[Array, "... D"], kernel: Float[Array, "D V"], targets: Int[Array, "..."], *,
                 weight: Float[Array, "..."] | None = None, bias: Float[Array, "V"] | None = None, tied: bool = False,
                 soft_cap: float | None = None, mean: bool = False, tiled: bool = True, tile: int = TILE, rows: int = ROWS,
                 mesh: Any = None) -> TokenScores:
    """Scores of the targets under a softmax head, differentiable by hidden, kernel and bias.

    Args:
      hidden: one vector a position; its first axis is the batch, a second one, if any, the sequence. The products are taken in its dtype and
        summed in float32.
      kernel: [D, V], or with `tied` a table of embeddings [V, D]; cast to the dtype of `hidden` tile by tile.
      targets: ids; a negative one is not supervised, one of V or more gives NaN.
      weight: a weight >= 0 for each position; only positions above 0 are supervised, and only they are computed.
      soft_cap: c replaces the logits by c tanh(logits / c), as Gemma 2 does (c = 30).
      mean: whether `mean_log_probability` is wanted.
      tiled: False writes all logits, and is what the tiles are tested against.
      tile, rows: see `TILE` and `ROWS`; any numbers are exact.
      mesh: by default the one entered by `jax.set_mesh`, if any. Neither batch nor vocabulary need divide by it.
    Raises:
      ValueError: if shapes do not fit, or a setting is out of range.
    """
    width, size = kernel.shape[::-1] if tied else kernel.shape
    _check(hidden, kernel, targets, weight, bias, width, size, tied, soft_cap, tile, rows)
    weight = supervision(targets, weight)
    supervised = weight > 0
    hidden = jnp.where(supervised[..., None], hidden, 0)   # a NaN at an ignored position must not spread
    if tiled:
        plan, padding = _plan(hidden.shape, size, width, tied, soft_cap, mean, tile, rows, mesh_or_context(mesh))
        rows_added, columns_added = padding
        if columns_added:
            kernel = jnp.pad(kernel, ((0, columns_added), (0, 0)) if tied else ((0, 0), (0, columns_added)))
            bias = None if bias is None else jnp.pad(bias, (0, columns_added))
        arguments = [jnp.pad(x, ((0, rows_added),) + ((0, 0),) * (x.ndim - 1)) if rows_added else x for x in (hidden, targets, supervised)]
        scores = _scores(plan, arguments[0], kernel, bias, *arguments[1:])
        scores = [score[:len(score) - rows_added] for score in scores] if rows_added else scores
    else:
        scores = _dense(hidden, kernel, bias, targets, size, tied, soft_cap)
    scores = [jnp.where(supervised, jnp.where(targets < size, score, jnp.nan), 0.0) for score in scores]
    return TokenScores(*scores[:3], lax.stop_gradient(scores[3]))


def _check(hidden, kernel, targets, weight, bias, width, size, tied, soft_cap, tile, rows) -> None:
    shape = f"[{'V, D' if tied else 'D, V'}]"
    if hidden.ndim < 2 or kernel.ndim != 2 or hidden.shape[-1] != width:
        raise ValueError(f"vocabulary: hidden {hidden.shape} and kernel {kernel.shape} do not fit; give hidden [..., D] and a kernel {shape}"
                         f" (tied={tied}).")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"vocabulary: targets have shape {targets.shape} for hidden {hidden.shape}; give one target for each position.")
    if weight is not None and weight.shape != targets.shape:
        raise ValueError(f"vocabulary: weight has shape {weight.shape} for targets {targets.shape}; give one weight for each position.")
    if bias is not None and bias.shape != (size,):
        raise ValueError(f"vocabulary: bias has shape {bias.shape} for a vocabulary of {size}; give one number for each entry.")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"vocabulary: soft_cap is {soft_cap}; it must be positive, or None.")
    if tile < 1 or rows < 1:
        raise ValueError(f"vocabulary: tile={tile}, rows={rows}; both must be at least 1.")


def _dense(hidden, kernel, bias, targets, size, tied, soft_cap) -> tuple[Array, ...]:
    """The four scores by the formula, with all logits in memory."""
    logits = jnp.einsum("...d,vd->...v" if tied else "...d,dv->...v", hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = logits if bias is None else logits + bias.astype(jnp.float32)
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    log_probabilities = jax.nn.log_softmax(logits)
    matching = jnp.arange(size) == targets[..., None]
    own = jnp.max(jnp.where(matching, logits, MASKED), -1)
    best = jnp.max(jnp.where(matching, MASKED, logits), -1)
    return (jnp.sum(jnp.where(matching, log_probabilities, 0.0), -1), jax.nn.logsumexp(logits, axis=-1), log_probabilities.mean(-1),
            (own > best).astype(jnp.float32))


@dataclass(frozen=True)
class _Plan:
    """Sizes and layout of one call, static under jit.

    Attributes:
      size: entries of the vocabulary; the kernel may have a few columns more, so that it divides by `tensor`.
      columns, rows: of one tile on one device.
      batch, sequence, tensor, width: the mesh axes over which the batch, the positions, the vocabulary and the width of the head are split.
    """
    size: int
    tied: bool
    soft_cap: float | None
    mean: bool
    columns: int
    rows: int
    mesh: Any
    batch: tuple[str, ...]
    sequence: tuple[str, ...]
    tensor: tuple[str, ...]
    width: tuple[str, ...]

    @property
    def axis(self) -> int:
        """The axis of the vocabulary in the kernel."""
        return 0 if self.tied else 1

    def specs(self, ndim: int) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
        """The partitions of positions (`ndim` axes), kernel and bias."""
        positions = PartitionSpec(self.batch or None, *(self.sequence or None,) * (ndim > 1))
        kernel = (self.tensor or None, self.width or None)
        return positions, PartitionSpec(*kernel if self.tied else kernel[::-1]), PartitionSpec(self.tensor or None)

    def spread(self, function, inputs: tuple, outputs: tuple):
        """`function` on each device's part."""
        used = {*self.batch, *self.sequence, *self.tensor, *self.width}
        if not used:
            return function
        manual = {axis for axis, size in self.mesh.shape.items() if size == 1 or axis in used}
        return jax.shard_map(function, mesh=self.mesh, in_specs=inputs, out_specs=outputs, axis_names=manual, check_vma=False)


def _plan(shape, size, width, tied, soft_cap, mean, tile, rows, mesh) -> tuple[_Plan, tuple[int, int]]:
    """The plan, and how many rows and columns must be added so that batch and vocabulary divide by the mesh."""
    def there(axis: str, extent: int | None = None) -> tuple[str, ...]:
        many = mesh.shape.get(axis, 1) if mesh is not None else 1
        return (axis,) if many > 1 and (extent is None or extent % many == 0) else ()

    batch, tensor = there("data") + there("fsdp"), there("tensor")
    parts, shards = (math.prod(mesh.shape[axis] for axis in axes) if axes else 1 for axes in (batch, tensor))
    sequence = there("sequence", shape[1]) if len(shape) > 2 else ()
    padding = (-shape[0] % parts, -size % shards)
    local = (size + padding[1]) // shards
    columns = min(local, math.ceil(local / math.ceil(local / tile) / LANES) * LANES)
    positions = math.prod(shape[1:-1]) * ((shape[0] + padding[0]) // parts) // (mesh.shape["sequence"] if sequence else 1)
    rows = math.ceil(positions / math.ceil(positions / rows)) if positions else 1
    plan = _Plan(size, tied, soft_cap, mean, columns, rows, mesh, batch, sequence, tensor, there("fsdp", width))
    return plan, padding


class _Sums(NamedTuple):
    """Running sums over the vocabulary, each [blocks, rows]: the largest logit, the sum of exp(logit - it), the target's logit, the largest of the
    others, the sum of the logits."""
    maximum: Array
    exponentials: Array
    own: Array
    rival: Array
    total: Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scores(plan: _Plan, hidden, kernel, bias, targets, supervised):
    return _forward(plan, hidden, kernel, bias, targets, supervised)[0]


def _forward(plan: _Plan, hidden, kernel, bias, targets, supervised):
    def local(hidden, kernel, bias, targets, supervised):
        order, h, t, live = _blocks(plan, hidden, targets, supervised)

        def tile(sums, number):
            part = _Tile(plan, number, kernel, bias, hidden.dtype)

            def block(_, inputs):
                def work(sums):
                    logits = part.logits(inputs[0])
                    matching = part.columns == inputs[1][:, None]
                    maximum = jnp.maximum(sums.maximum, logits.max(1))
                    exponentials = sums.exponentials * jnp.exp(sums.maximum - maximum) + jnp.exp(logits - maximum[:, None]).sum(1)
                    own = sums.own + jnp.where(matching, logits, 0.0).sum(1)
                    rival = jnp.maximum(sums.rival, jnp.where(matching, MASKED, logits).max(1))
                    total = sums.total + jnp.where(part.valid, logits, 0.0).sum(1) if plan.mean else sums.total
                    return _Sums(maximum, exponentials, own, rival, total)
                return None, lax.cond(inputs[2], work, lambda sums: sums, inputs[3])
            return lax.scan(block, None, (h, t, live, sums))[1], None

        lowest, zero = jnp.full(t.shape, MASKED), jnp.zeros(t.shape)
        sums = lax.scan(tile, _Sums(lowest, zero, zero, lowest, zero), jnp.arange(_tiles(plan, kernel)))[0]
        maximum, exponentials, own, rival, total = sums
        if plan.tensor:
            maximum = lax.pmax(sums.maximum, plan.tensor)
            exponentials = lax.psum(exponentials * jnp.exp(sums.maximum - maximum), plan.tensor)
            own, total, rival = lax.psum(own, plan.tensor), lax.psum(total, plan.tensor), lax.pmax(rival, plan.tensor)
        log_sum = jnp.log(jnp.maximum(exponentials, 1.0))   # the largest logit alone contributes 1; less is a block that was skipped
        # The maximum is subtracted before the logarithm, so that a probability near 1 keeps its digits.
        log_probability = (own - maximum) - log_sum
        mean = (total / plan.size - maximum) - log_sum if plan.mean else zero
        scores = (log_probability, maximum + log_sum, mean, (own > rival).astype(jnp.float32), maximum, log_sum)
        return tuple(_unblocked(score, order, targets.shape) for score in scores)

    tokens, of_kernel, of_bias = plan.specs(targets.ndim)
    specs = (tokens, of_kernel, None if bias is None else of_bias, tokens, tokens)
    *scores, maximum, log_sum = plan.spread(local, specs, (tokens,) * 6)(hidden, kernel, bias, targets, supervised)
    return tuple(scores), (hidden, kernel, bias, targets, supervised, maximum, log_sum)


def _backward(plan: _Plan, kept, gradients):
    def local(hidden, kernel, bias, targets, supervised, maximum, log_sum, by_target, by_normalizer, by_mean):
        order, h, t, live = _blocks(plan, hidden, targets, supervised)
        # log p_t = l_t - log Z, mean log p = mean l - log Z, and d log Z / d l = p.
        by_softmax = by_normalizer - by_target - by_mean
        tokens = [_blocked(plan, x.reshape(-1), order) for x in (maximum, log_sum, by_target, by_softmax, by_mean)]

        def tile(carry, number):
            part = _Tile(plan, number, kernel, bias, hidden.dtype)

            def block(carry, index):
                d_hidden, d_tile, d_bias = carry

                def work(d_tile, d_bias):
                    x = h[index]
                    top, log_z, own, soft, mean = (y[index][:, None] for y in tokens)
                    logits = part.logits(x)
                    d_logits = soft * jnp.exp(jnp.minimum(logits - top - log_z, 0.0)) + jnp.where(part.columns == t[index][:, None], own, 0.0)
                    d_logits = d_logits + mean / plan.size if plan.mean else d_logits
                    if plan.soft_cap is not None:
                        d_logits = d_logits * (1 - jnp.square(logits / plan.soft_cap))
                    d_logits = jnp.where(part.valid, d_logits, 0.0)
                    low = d_logits.astype(hidden.dtype)
                    d_tile = d_tile + (_product(low, x, 0, 0) if plan.tied else _product(x, low, 0, 0))
                    return _product(low, part.weights, 1, plan.axis), d_tile, d_bias + d_logits.sum(0)
                d_x, d_tile, d_bias = lax.cond(live[index], work, lambda *sums: (jnp.zeros(h.shape[1:]), *sums), d_tile, d_bias)
                return (lax.dynamic_update_index_in_dim(d_hidden, d_hidden[index] + d_x, index, 0), d_tile, d_bias), None

            d_hidden, d_kernel, d_bias = carry
            start = (d_hidden, jnp.zeros(part.weights.shape), jnp.zeros(plan.columns))
            (d_hidden, d_tile, d_of_tile), _ = lax.scan(block, start, jnp.arange(len(h)))
            if plan.width:
                d_tile = lax.psum_scatter(d_tile, plan.width, scatter_dimension=1 - plan.axis, tiled=True)
            return (d_hidden, part.add(d_kernel, d_tile, plan.axis), part.add(d_bias, d_of_tile, 0)), None

        start = (jnp.zeros(h.shape), jnp.zeros(kernel.shape), jnp.zeros(kernel.shape[plan.axis]))
        (d_hidden, d_kernel, d_bias), _ = lax.scan(tile, start, jnp.arange(_tiles(plan, kernel)))
        holders = plan.batch + plan.sequence
        if plan.tensor:
            d_hidden = lax.psum(d_hidden, plan.tensor)
        if holders:
            rest = tuple(axis for axis in holders if axis not in plan.width)
            d_kernel = lax.psum(d_kernel, rest) if rest else d_kernel
            d_bias = lax.psum(d_bias, holders)
        d_hidden = _unblocked(d_hidden, order, targets.shape).astype(hidden.dtype)
        return d_hidden, d_kernel.astype(kernel.dtype), None if bias is None else d_bias.astype(bias.dtype)

    hidden, kernel, bias, targets, supervised, maximum, log_sum = kept
    tokens, of_kernel, of_bias = plan.specs(targets.ndim)
    of_bias = None if bias is None else of_bias
    spread = plan.spread(local, (tokens, of_kernel, of_bias, *(tokens,) * 7), (tokens, of_kernel, of_bias))
    return (*spread(*kept, *gradients[:3]), None, None)


_scores.defvjp(_forward, _backward)


class _Tile:
    """One tile of the head on one device.

    Attributes:
      weights: [D, columns], or [columns, D] when tied, in the dtype of the products.
      columns: the entries of the vocabulary that they stand for; -1 for those of padding and, in the last tile, those of the tile before.
      valid: where that is not so.
    """

    def __init__(self, plan: _Plan, number, kernel, bias, dtype):
        self.plan = plan
        here = kernel.shape[plan.axis]
        self.start = jnp.minimum(number * plan.columns, here - plan.columns)   # the last tile reaches back, so that nothing is padded
        weights = lax.dynamic_slice_in_dim(kernel, self.start, plan.columns, plan.axis).astype(dtype)
        self.weights = lax.all_gather(weights, plan.width, axis=1 - plan.axis, tiled=True) if plan.width else weights
        self.bias = None if bias is None else lax.dynamic_slice_in_dim(bias, self.start, plan.columns).astype(jnp.float32)
        places = self.start + jnp.arange(plan.columns)
        columns = places + (lax.axis_index(plan.tensor) * here if plan.tensor else 0)
        self.valid = (places >= number * plan.columns) & (columns < plan.size)
        self.columns = jnp.where(self.valid, columns, -1)

    def logits(self, x: Float[Array, "n D"]) -> Float[Array, "n columns"]:
        """The logits in float32, `MASKED` where not valid."""
        logits = _product(x, self.weights, 1, 1 - self.plan.axis)
        logits = logits if self.bias is None else logits + self.bias
        cap = self.plan.soft_cap
        return jnp.where(self.valid, logits if cap is None else cap * jnp.tanh(logits / cap), MASKED)

    def add(self, whole: Array, part: Array, axis: int) -> Array:
        """`whole` with `part` added at the tile's place."""
        old = lax.dynamic_slice_in_dim(whole, self.start, self.plan.columns, axis)
        return lax.dynamic_update_slice_in_dim(whole, old + part, self.start, axis)


def _tiles(plan: _Plan, kernel) -> int:
    return -(-kernel.shape[plan.axis] // plan.columns)


def _product(a: Array, b: Array, axis: int, other: int) -> Float[Array, "m n"]:
    """The product of two matrices over `axis` of one and `other` of the other, summed in float32."""
    return lax.dot_general(a, b, (((axis,), (other,)), ((), ())), preferred_element_type=jnp.float32)


def _blocks(plan: _Plan, hidden, targets, supervised: Bool[Array, "..."]) -> tuple[Array, Array, Array, Array]:
    """The order that puts supervised positions first, hidden [blocks, rows, D] and targets [blocks, rows] in it, and which blocks hold any."""
    order = jnp.argsort(~supervised.reshape(-1), stable=True)
    t = _blocked(plan, targets.reshape(-1), order)
    live = jnp.arange(len(t)) * plan.rows < jnp.sum(supervised)
    return order, _blocked(plan, hidden.reshape(-1, hidden.shape[-1]), order), t, live


def _blocked(plan: _Plan, x: Array, order: Int[Array, "n"]) -> Array:
    """Values [n, ...] of positions as [blocks, rows, ...] in `order`, padded with zeros."""
    x = jnp.pad(x[order], ((0, -len(order) % plan.rows),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(-1, plan.rows, *x.shape[1:])


def _unblocked(x: Array, order: Int[Array, "n"], shape: tuple[int, ...]) -> Array:
    """The inverse of `_blocked`, in the shape of the positions."""
    flat = x.reshape(-1, *x.shape[2:])[:len(order)]
    return jnp.zeros_like(flat).at[order].set(flat, unique_indices=True).reshape(*shape, *flat.shape[1:])

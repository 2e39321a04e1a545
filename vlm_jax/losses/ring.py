"""Contrastive losses of a global batch whose similarity matrix no device ever holds.

Every device keeps its block of images; the blocks of texts travel around a ring of the devices that split the batch (`jax.shard_map`,
`lax.ppermute`), and at each hop a device works through its images in tiles of at most `TILE` rows, so the largest intermediate is
[TILE, local texts]. The backward pass runs the ring again and recomputes the tiles: the gradients of the texts travel with their block and are
complete when it is home. What is kept between the passes is the features alone (and four sums per pair for the softmax), hence the memory
does not grow with the number of devices.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), section 3.3, describe the sigmoid ring. The softmax adds an online maximum
and sum of exponentials in both directions: those of an image's row stay with the image, those of a text's column travel with the text.

Masks: `weight` [B] is 0 for rows that count neither as positives nor as negatives. `contrastive.py` holds the public functions.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

TILE = 128          # rows of images worked on at once: a tile of logits is [TILE, local texts]
MASKED = -1e30      # the similarity of a masked pair: finite, so that a row of masked pairs gives no NaN


@dataclass(frozen=True)
class Layout:
    """Where the rows of a batch lie: over the `axes` of `mesh` (of more than one device), on each of `devices` in `tiles` tiles of `rows` rows."""
    mesh: Any
    axes: tuple[str, ...]
    devices: int
    tiles: int
    rows: int

    @property
    def padded(self) -> int:
        """The rows of the whole batch with those that must be added so that every device has as many."""
        return self.devices * self.tiles * self.rows


def mesh_or_context(mesh: Any) -> Any:
    """`mesh`, or the one entered by `jax.set_mesh`; None without, and inside `jax.shard_map`, where every array is already local."""
    if mesh is not None:
        return mesh
    context = jax.sharding.get_abstract_mesh()
    automatic = all(kind is jax.sharding.AxisType.Auto for kind in context.axis_types)
    return context if not context.empty and automatic else None


def layout_of(batch: int, mesh: Any, axes: tuple[str, ...], tile: int = TILE) -> Layout:
    """The layout of `batch` rows on the mesh (None, or one without those axes: a ring of one device)."""
    axes = () if mesh is None else tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
    devices = math.prod(mesh.shape[axis] for axis in axes)
    local = -(-batch // devices)
    tiles = -(-local // tile)
    return Layout(mesh if axes else None, axes, devices, tiles, -(-local // tiles))


def _spread(layout: Layout, function: Callable, rows_in: tuple[bool, ...], rows_out: tuple[bool, ...]) -> Callable:
    """`function` on each device's block: arguments and results that are True hold rows, the others are equal everywhere."""
    if layout.devices == 1:
        return function
    spec = {True: PartitionSpec(layout.axes), False: PartitionSpec()}
    manual = {axis for axis, size in layout.mesh.shape.items() if size == 1 or axis in layout.axes}
    return jax.shard_map(function, mesh=layout.mesh, in_specs=tuple(spec[rows] for rows in rows_in), out_specs=tuple(spec[rows] for rows in rows_out),
                         axis_names=manual, check_vma=False)


def _around(layout: Layout, step: Callable, carry: Any, travelling: Any) -> tuple[Any, Any]:
    """Runs `carry, travelling = step(hop, carry, travelling)` once a block: at hop 0 each device meets its own, after the last all are home."""
    if layout.devices == 1:
        return step(0, carry, travelling)
    ring = [(k, (k + 1) % layout.devices) for k in range(layout.devices)]

    def body(hop, state):
        carry, travelling = step(hop, *state)
        return carry, jax.tree.map(lambda x: lax.ppermute(x, layout.axes, ring), travelling)

    return lax.fori_loop(0, layout.devices, body, (carry, travelling))


def _total(layout: Layout, x: Array) -> Array:
    return lax.psum(x, layout.axes) if layout.devices > 1 else x


def _tiled(layout: Layout, *arrays: Array) -> tuple[Array, ...]:
    """Each array [rows of the device, ...] as [tiles, rows, ...]."""
    return tuple(x.reshape(layout.tiles, layout.rows, *x.shape[1:]) for x in arrays)


def _untiled(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])


def _numbers(layout: Layout) -> Array:
    """The number of every row on its device, tiled."""
    return jnp.arange(layout.tiles * layout.rows).reshape(layout.tiles, layout.rows)


def _matching(hop: Array | int, numbers: Float[Array, "r"], texts: int) -> Array:
    """[r, texts]: which texts of the block belong to which images of the tile."""
    return (numbers[:, None] == jnp.arange(texts)[None, :]) & (hop == 0)


def pair_weight(image_weight: Float[Array, "I"], text_weight: Float[Array, "T"]) -> Float[Array, "I T"]:
    """The weight of a pair: the mean of both rows' weights, 0 where either is 0 (so equal weights w weigh the whole sum by w)."""
    both = (image_weight > 0)[:, None] & (text_weight > 0)[None, :]
    return jnp.where(both, 0.5 * (image_weight[:, None] + text_weight[None, :]), 0.0)


# The sigmoid loss: - sum_ij log sigmoid(z_ij (scale x_i . y_j + bias)), z = 1 for matching pairs and -1 for all others.

@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_sigmoid(layout: Layout, image: Float[Array, "B D"], text: Float[Array, "B D"], scale: Float[Array, ""], bias: Float[Array, ""],
                 weight: Float[Array, "B"]) -> Float[Array, ""]:
    """The sum of the sigmoid loss over all pairs of `layout.padded` rows in float32; `weight` has no gradient."""
    def local(image, text, scale, bias, weight):
        tiles = _tiled(layout, image, weight) + (_numbers(layout),)

        def step(hop, total, travelling):
            text, text_weight = travelling

            def tile(total, part):
                x, w, numbers = part
                logits = scale * (x @ text.T) + bias
                losses = jax.nn.softplus(jnp.where(_matching(hop, numbers, len(text)), -logits, logits))
                return total + jnp.sum(jnp.sum(pair_weight(w, text_weight) * losses, axis=1)), None

            return lax.scan(tile, total, tiles)[0], travelling

        return (_total(layout, _around(layout, step, jnp.zeros(()), (text, weight))[0]),)

    return _spread(layout, local, (True, True, False, False, True), (False,))(image, text, scale, bias, weight)[0]


def _ring_sigmoid_forward(layout, image, text, scale, bias, weight):
    return ring_sigmoid(layout, image, text, scale, bias, weight), (image, text, scale, bias, weight)


def _ring_sigmoid_backward(layout, kept, gradient):
    def local(image, text, scale, bias, weight, gradient):
        tiles = _tiled(layout, image, weight) + (_numbers(layout),)

        def step(hop, carry, travelling):
            d_image, d_bias = carry
            text, text_weight, d_text = travelling

            def tile(carry, part):
                d_text, d_bias = carry
                x, w, numbers, d_x = part
                logits = scale * (x @ text.T) + bias
                match = _matching(hop, numbers, len(text))
                # d loss / d logit = -z sigmoid(-z logit)
                d_logits = pair_weight(w, text_weight) * jnp.where(match, -1.0, 1.0) * jax.nn.sigmoid(jnp.where(match, -logits, logits))
                return (d_text + d_logits.T @ x, d_bias + jnp.sum(jnp.sum(d_logits, axis=1))), d_x + d_logits @ text

            (d_text, d_bias), d_image = lax.scan(tile, (d_text, d_bias), (*tiles, d_image))
            return (d_image, d_bias), (text, text_weight, d_text)

        start = (jnp.zeros_like(tiles[0]), jnp.zeros(()))
        (d_image, d_bias), (_, _, d_text) = _around(layout, step, start, (text, weight, jnp.zeros_like(text)))
        d_image = _untiled(d_image)
        # sum_ij d_logit_ij x_i . y_j, without the pairs: d_image still lacks its factor `scale`.
        d_scale = _total(layout, jnp.sum(jnp.sum(image * d_image, axis=1)))
        return gradient * scale * d_image, gradient * scale * d_text, gradient * d_scale, gradient * _total(layout, d_bias)

    image, text, scale, bias, weight = kept
    spread = _spread(layout, local, (True, True, False, False, True, False), (True, True, False, False))
    return (*spread(image, text, scale, bias, weight, gradient), jnp.zeros_like(weight))


ring_sigmoid.defvjp(_ring_sigmoid_forward, _ring_sigmoid_backward)


# The softmax loss: sum_i w_i (1/2 (log sum_j exp l_ij + log sum_j exp l_ji) - l_ii), l_ij = scale x_i . y_j.

@partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_softmax(layout: Layout, image: Float[Array, "B D"], text: Float[Array, "B D"], scale: Float[Array, ""],
                 weight: Float[Array, "B"]) -> Float[Array, ""]:
    """The sum of the two cross-entropies' mean over `layout.padded` rows in float32, for scale > 0; `weight` has no gradient."""
    return _ring_softmax_forward(layout, image, text, scale, weight)[0]


def _merge(sums: tuple[Array, Array], similar: Array, scale: Array, axis: int) -> tuple[Array, Array]:
    """(the largest similarity m, sum of exp(scale (similarity - m))) of the similarities seen so far and of these."""
    maximum, total = sums
    larger = jnp.maximum(maximum, jnp.max(similar, axis=axis))
    return larger, total * jnp.exp(scale * (maximum - larger)) + jnp.sum(jnp.exp(scale * (similar - jnp.expand_dims(larger, axis))), axis=axis)


def _ring_softmax_forward(layout, image, text, scale, weight):
    def local(image, text, scale, weight):
        tiles = _tiled(layout, image, weight) + (_numbers(layout),)

        def step(hop, carry, travelling):
            text, text_weight, columns = travelling

            def tile(columns, part):
                x, w, numbers, row, own = part
                similar = x @ text.T
                # The positives come from the same product as the maxima and are subtracted before the scale (compilers fuse a product with a
                # difference), so that both cancel exactly where a row is sure of its text.
                own = own + jnp.sum(jnp.where(_matching(hop, numbers, len(text)), similar, 0.0), axis=1)
                row = _merge(row, jnp.where(text_weight[None, :] > 0, similar, MASKED), scale, 1)
                return _merge(columns, jnp.where(w[:, None] > 0, similar, MASKED), scale, 0), (row, own)

            columns, carry = lax.scan(tile, columns, (*tiles, *carry))
            return carry, (text, text_weight, columns)

        nothing = (jnp.full_like(weight, MASKED), jnp.zeros_like(weight))
        (rows, own), (_, _, columns) = _around(layout, step, (_tiled(layout, *nothing), jnp.zeros_like(tiles[1])), (text, weight, nothing))
        (maximum, exponentials), own = jax.tree.map(_untiled, (rows, own))
        by_image = scale * (maximum - own) + jnp.log(exponentials)
        by_text = scale * (columns[0] - own) + jnp.log(columns[1])
        total = jnp.sum(jnp.where(weight > 0, weight * 0.5 * (by_image + by_text), 0.0))
        return _total(layout, total), (maximum, exponentials), columns

    loss, rows, columns = _spread(layout, local, (True, True, False, True), (False, True, True))(image, text, scale, weight)
    return loss, (image, text, scale, weight, rows, columns)


def _ring_softmax_backward(layout, kept, gradient):
    def local(image, text, scale, weight, rows, columns, gradient):
        tiles = _tiled(layout, image, weight) + (_numbers(layout), _tiled(layout, *rows))

        def step(hop, d_image, travelling):
            text, text_weight, columns, d_text = travelling

            def tile(d_text, part):
                x, w, numbers, row, d_x = part
                similar = x @ text.T
                by_image = (w / row[1])[:, None] * jnp.exp(scale * (similar - row[0][:, None]))
                by_text = (text_weight / columns[1])[None, :] * jnp.exp(scale * (similar - columns[0][None, :]))
                positive = jnp.where(_matching(hop, numbers, len(text)), w[:, None], 0.0)
                both = (w[:, None] > 0) & (text_weight[None, :] > 0)
                d_logits = jnp.where(both, 0.5 * (by_image + by_text) - positive, 0.0)
                return d_text + d_logits.T @ x, d_x + d_logits @ text

            d_text, d_image = lax.scan(tile, d_text, (*tiles, d_image))
            return d_image, (text, text_weight, columns, d_text)

        d_image, (_, _, _, d_text) = _around(layout, step, jnp.zeros_like(tiles[0]), (text, weight, columns, jnp.zeros_like(text)))
        d_image = _untiled(d_image)
        d_scale = _total(layout, jnp.sum(jnp.sum(image * d_image, axis=1)))
        return gradient * scale * d_image, gradient * scale * d_text, gradient * d_scale

    image, text, scale, weight, rows, columns = kept
    spread = _spread(layout, local, (True, True, False, True, True, True, False), (True, True, False))
    return (*spread(image, text, scale, weight, rows, columns, gradient), jnp.zeros_like(weight))


ring_softmax.defvjp(_ring_softmax_forward, _ring_softmax_backward)


def ring_matches(layout: Layout, image: Float[Array, "B D"], text: Float[Array, "B D"], weight: Float[Array, "B"]) -> Float[Array, ""]:
    """The weighted number of images whose own text is more similar than every other text of the batch. Not differentiable."""
    def local(image, text, weight):
        tiles = _tiled(layout, image) + (_numbers(layout),)

        def step(hop, best, travelling):
            text, text_weight = travelling

            def tile(_, part):
                x, numbers, best = part
                rival = (text_weight > 0)[None, :] & ~_matching(hop, numbers, len(text))
                return None, jnp.maximum(best, jnp.max(jnp.where(rival, x @ text.T, MASKED), axis=1))

            return lax.scan(tile, None, (*tiles, best))[1], travelling

        best, _ = _around(layout, step, jnp.full((layout.tiles, layout.rows), MASKED), (text, weight))
        return (_total(layout, jnp.sum(weight * (jnp.sum(image * text, axis=1) > best.reshape(-1)))),)

    return _spread(layout, local, (True, True, True), (False,))(image, text, weight)[0]

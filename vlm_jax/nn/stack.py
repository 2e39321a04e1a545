"""A stack of equal blocks whose parameters are stored with a leading layer axis, run by `lax.scan` or as an unrolled loop over slices."""
from collections.abc import Callable
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.settings import choose

# What the backward pass finds in memory; the rest it computes again. "none" leaves everything to the compiler, as without rematerialisation.
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
}


@jax.custom_vjp
def _layers(stacked: Any) -> list[Any]:
    """The slices of a tree of stacked arrays. Its gradient is one concatenation; indexing would sum padded arrays, quadratic in the depth."""
    return _layers_forward(stacked)[0]


def _layers_forward(stacked):
    depth = jax.tree.leaves(stacked)[0].shape[0]
    leaves, structure = jax.tree.flatten(stacked)
    return [structure.unflatten([leaf[i] for leaf in leaves]) for i in range(depth)], None


def _layers_backward(_, gradients):
    return (_stack(gradients),)


_layers.defvjp(_layers_forward, _layers_backward)


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


class Stack(nn.Module):
    """Applies `depth` blocks one after the other.

    The parameters are those of one block with a leading layer axis on every leaf, whatever `scan` and `remat` are, so that one set of parameters
    serves all. Layer i is initialised, and draws its dropout, from its own random key.

    Attributes:
      block: makes one block, an unbound module: `block(parent=None)`; called as `block(x, *inputs, **options)`, it returns x or (x, {name: array}).
      scan: True compiles one block and loops over it (fast to compile); False unrolls (fast to run where loops copy their parameters, as on CPUs).
      remat: a name of `REMAT_POLICIES`.

    Returns:
      x after the last block, and {"output": x after every block [L, ...], name: the blocks' own intermediates [L, ...]}.
    """
    block: Callable[..., nn.Module]
    depth: int
    scan: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Float[Array, "..."], *inputs: Any, **options: Any) -> tuple[Float[Array, "..."], dict[str, Array]]:
        policy = choose(REMAT_POLICIES, self.remat, "remat")
        block = self.block(parent=None)
        if self.is_initializing() and not self.variables.get("params"):
            keys = jax.random.split(self.make_rng("params"), self.depth)
            made = jax.vmap(lambda key: block.init({"params": key, "dropout": key}, x, *inputs, **options)["params"])(keys)
            for name, value in made.items():
                self.put_variable("params", name, value)
        params = dict(self.variables["params"])
        key = self.make_rng("dropout") if self.has_rng("dropout") else None

        def apply(carry, layer):
            layer_params, index = layer
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, index)}
            out = block.apply({"params": layer_params}, carry, *inputs, rngs=rngs, **options)
            carry, intermediates = out if isinstance(out, tuple) else (out, {})
            return carry, {"output": carry, **intermediates}

        if self.remat != "none":
            # Inside a scan the loop itself keeps the compiler from merging the second computation with the first.
            apply = jax.checkpoint(apply, policy=policy, prevent_cse=not self.scan)
        if self.scan:
            return lax.scan(apply, x, (params, jnp.arange(self.depth)))
        every_layer = []
        for index, layer_params in enumerate(_layers(params)):
            x, intermediates = apply(x, (layer_params, index))
            every_layer.append(intermediates)
        return x, _stack(every_layer)

"""A stack of equal blocks whose parameters are stored with a leading layer axis, run by `lax.scan` or as an unrolled loop over slices."""
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.errors import ConfigError
from vlm_jax.settings import choose

# What the blocks of this library name with `checkpoint_name`, in the order in which they compute it: queries, keys and values; the mixed values;
# what attention adds, after its output projection; the hidden layer of the MLP before its activation.
SAVED_NAMES = ("qkv", "mixed", "attended", "hidden")
HOST = "pinned_host"

_policies = jax.checkpoint_policies
# What the backward pass finds in memory; the rest it computes again. "none" leaves everything to the compiler, as without rematerialisation. From "full",
# which keeps the blocks' inputs only, memory grows and work shrinks down to "everything".
REMAT_POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": _policies.nothing_saveable,
    "attention": _policies.save_only_these_names("qkv", "mixed"),      # the projections of attention are not computed again
    "mlp": _policies.save_only_these_names("hidden"),                  # nor, here, the largest product
    "minimal": _policies.save_only_these_names(*SAVED_NAMES),          # nothing that has parameters is computed again: norms, softmax and activation are
    "offload": _policies.save_and_offload_only_these_names(           # as "minimal", kept in the host's memory
        names_which_can_be_saved=[], names_which_can_be_offloaded=list(SAVED_NAMES), offload_src="device", offload_dst=HOST),
    "dots_no_batch": _policies.dots_with_no_batch_dims_saveable,
    "dots": _policies.dots_saveable,
    "everything": _policies.everything_saveable,
}


def remat_policy(name: str) -> Callable | None:
    """Returns the policy of `REMAT_POLICIES` that a `remat` setting names.

    Raises:
      ConfigError: for an unknown name, or "offload" on a backend that has no host memory to keep activations in. (On a CPU it runs and saves nothing.)
    """
    policy = choose(REMAT_POLICIES, name, "remat")
    if name == "offload" and HOST not in memory_kinds():
        raise ConfigError(f'remat="offload": the backend "{platform()}" has no memory "{HOST}"; choose "minimal", "full" or another policy.')
    return policy


def memory_kinds() -> set[str]:
    """The kinds of memory that the devices of the entered mesh have, else those of the default backend; a TPU that is compiled for ahead of time counts."""
    if platform() == "tpu":
        return {"device", HOST}
    return {memory.kind for memory in jax.local_devices(backend=platform())[0].addressable_memories()}


def platform() -> str:
    """The platform of the devices of the entered mesh (a TPU that is compiled for ahead of time, too), else the default backend's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


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


def unstacked(params: Any, name: str = "blocks") -> Any:
    """The parameters with every array under a `Stack` of this name as a tuple of its layers, which the stack then runs unrolled, whatever its `scan`.

    A program that applies the blocks many times (decoding, a token at a time) would otherwise slice, on CPUs copy, every kernel each time.
    """
    if not isinstance(params, Mapping):
        return params

    def split(leaf):
        return leaf if isinstance(leaf, tuple) else tuple(leaf[i] for i in range(leaf.shape[0]))
    return {key: jax.tree.map(split, value, is_leaf=_is_layers) if key == name else unstacked(value, name) for key, value in params.items()}


def _is_layers(leaf: Any) -> bool:
    return isinstance(leaf, tuple)


def _layers_of(params: Any, per_layer: Any, depth: int) -> list[Any]:
    """(parameters, settings) of each layer; the parameters are arrays with a layer axis, or tuples."""
    if not any(map(_is_layers, jax.tree.leaves(params, is_leaf=_is_layers))):
        return _layers((params, per_layer))
    settings = _layers(per_layer) if per_layer is not None else [None] * depth
    leaves, structure = jax.tree.flatten(params, is_leaf=_is_layers)
    return [(structure.unflatten([leaf[i] for leaf in leaves]), settings[i]) for i in range(depth)]


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
    """
    block: Callable[..., nn.Module]
    depth: int
    scan: bool = True
    remat: str = "none"

    @nn.compact
    def __call__(self, x: Float[Array, "..."], *inputs: Any, per_layer: Any = None, state: Any = None,
                 **options: Any) -> tuple[Float[Array, "..."], dict[str, Array]] | tuple[Float[Array, "..."], dict[str, Array], Any]:
        """Runs the blocks.

        Args:
          x: what passes from block to block.
          inputs, options: what every block gets as it is. Arrays among the options must not be differentiated with rematerialisation; the inputs may.
          per_layer: a pytree of arrays with a leading layer axis (which layers have a window, tables of one layer each); where given, each block is called with
            `per_layer=` its slice of it.
          state: a pytree that the blocks read and change in turn (a cache of keys and values, which must be one object to be updated in place); where given,
            each block is called with `state=` what the block before it returned and `layer=` its index (an int where unrolled, a traced scalar in a scan) and
            returns (x, {name: array}, state) with a state of the same shapes and dtypes.

        Returns:
          x after the last block, and {"output": x after every block [L, ...], name: the blocks' own intermediates [L, ...]}; and the state, where one is given.
        Raises:
          ConfigError: if a leaf of `per_layer` does not have `depth` rows.
        """
        policy = remat_policy(self.remat)
        block = self.block(parent=None)
        for path, leaf in jax.tree_util.tree_leaves_with_path(per_layer):
            if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != self.depth:
                raise ConfigError(f"Stack: per_layer{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; its first axis must be the {self.depth} layers.")

        def settings(index, of_layer, state):
            """What a block is given by name."""
            extra = {} if per_layer is None else {"per_layer": of_layer}
            return {**options, **extra, **({} if state is None else {"state": state, "layer": index})}

        if self.is_initializing() and not self.variables.get("params"):
            keys = jax.random.split(self.make_rng("params"), self.depth)
            first = settings(0, jax.tree.map(lambda leaf: leaf[0], per_layer), state)
            made = jax.vmap(lambda key: block.init({"params": key, "dropout": key}, x, *inputs, **first)["params"])(keys)
            for name, value in made.items():
                self.put_variable("params", name, value)
        params = dict(self.variables["params"])
        unrolled = not self.scan or any(map(_is_layers, jax.tree.leaves(params, is_leaf=_is_layers)))
        key = self.make_rng("dropout") if self.has_rng("dropout") else None

        def apply(carry, layer, index):
            x, state = carry
            layer_params, of_layer = layer
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, index)}
            out = block.apply({"params": layer_params}, x, *inputs, rngs=rngs, **settings(index, of_layer, state))
            x, intermediates, *after = out if isinstance(out, tuple) else (out, {})
            return (x, after[0] if after else state), {"output": x, **intermediates}

        if self.remat != "none":
            # Inside a scan the loop itself keeps the compiler from merging the second computation with the first. The index of an unrolled layer stays an int.
            apply = jax.checkpoint(apply, policy=policy, prevent_cse=unrolled, static_argnums=() if not unrolled else (2,))
        if not unrolled:
            (x, state_after), every = lax.scan(lambda carry, xs: apply(carry, *xs), (x, state), ((params, per_layer), jnp.arange(self.depth)))
        else:
            carry, every_layer = (x, state), []
            for index, layer in enumerate(_layers_of(params, per_layer, self.depth)):
                carry, intermediates = apply(carry, layer, index)
                every_layer.append(intermediates)
            (x, state_after), every = carry, _stack(every_layer)
        return (x, every) if state is None else (x, every, state_after)

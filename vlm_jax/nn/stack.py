"""A stack of equal blocks whose parameters are stored with a leading layer axis, run by `lax.scan` or as an unrolled loop over slices."""
from collections.abc import Callable, Mapping, Sequence
import dataclasses
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


def _has_layers(data: Any) -> bool:
    """Whether arrays are given as tuples of layers (`unstacked`)."""
    return any(map(_is_layers, jax.tree.leaves(data, is_leaf=_is_layers)))


def layers_of(data: Any, depth: int) -> list[Any]:
    """The part of each layer; leaves are arrays with a layer axis, or tuples."""
    if not _has_layers(data):
        return _layers(data)
    leaves, structure = jax.tree.flatten(data, is_leaf=_is_layers)
    return [structure.unflatten([leaf[i] for leaf in leaves]) for i in range(depth)]


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@dataclasses.dataclass(frozen=True)
class Inserted:
    """Blocks with parameters of their own that stand before some layers of another stack (made by `Stack.inserted`).

    Attributes:
      places: the layers before which they stand, equally far apart.
      params: theirs, with a leading axis of `len(places)`, or with tuples in the place of arrays.
      apply: (the parameters of one, x, its number) -> (x, {name: array}).
    """
    places: tuple[int, ...]
    params: Any
    apply: Callable[[Any, Array, Any], tuple[Array, dict[str, Array]]]


def inserted_places(depth: int, every: int, first: int = 0) -> tuple[int, ...]:
    """The layers `first`, `first + every`, ... of a stack of `depth`.

    Raises:
      ConfigError: where that is none.
    """
    if every < 1 or not 0 <= first < depth:
        raise ConfigError(f"every={every}, first={first}: blocks cannot stand there in a stack of {depth} layers; "
                          f"choose every of at least 1 and first from 0 to {depth - 1}.")
    return tuple(range(first, depth, every))


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

    def __call__(self, x: Float[Array, "..."], *inputs: Any, per_layer: Any = None, state: Any = None, inserted: Inserted | None = None,
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
          inserted: blocks that stand between these.

        Returns:
          x after the last block, and {"output": x after every block [L, ...], name: the blocks' own intermediates [L, ...]}, with "inserted": those of the
          inserted blocks; and the state, where one is given.
        Raises:
          ConfigError: if a leaf of `per_layer` does not have `depth` rows.
        """
        block = self.block(parent=None)
        for path, leaf in jax.tree_util.tree_leaves_with_path(per_layer):
            if jnp.ndim(leaf) < 1 or jnp.shape(leaf)[0] != self.depth:
                raise ConfigError(f"Stack: per_layer{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; its first axis must be the {self.depth} layers.")

        def settings(index, of_layer, state):
            """What a block is given by name."""
            extra = {} if per_layer is None else {"per_layer": of_layer}
            return {**options, **extra, **({} if state is None else {"state": state, "layer": index})}

        params = self._parameters(x, inputs, settings(0, jax.tree.map(lambda leaf: leaf[0], per_layer), state))
        unrolled = not self.scan or _has_layers(params)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None

        def apply(carry, layer, index):
            x, state = carry
            layer_params, of_layer = layer
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, index)}
            out = block.apply({"params": layer_params}, x, *inputs, rngs=rngs, **settings(index, of_layer, state))
            x, intermediates, *after = out if isinstance(out, tuple) else (out, {})
            return (x, after[0] if after else state), {"output": x, **intermediates}

        def insert(carry, layer, index):
            x, intermediates = inserted.apply(layer, carry[0], index)
            return (x, carry[1]), intermediates

        layers = _Layers(self._remat(apply, unrolled), [params, per_layer], self.depth)
        between = None if inserted is None else _Layers(self._remat(insert, unrolled), inserted.params, len(inserted.places))
        run = _unroll if unrolled else _scan
        (x, state_after), every = run((x, state), layers, between, inserted.places if inserted else ())
        return (x, every) if state is None else (x, every, state_after)

    def inserted(self, places: Sequence[int], x: Float[Array, "..."], *inputs: Any, **options: Any) -> Inserted:
        """These blocks as what another stack runs before its layers `places`, one each; a block gets `layer=` its number besides inputs and options.

        Raises:
          ConfigError: if the places are not as many as the blocks, or not equally far apart.
        """
        places = tuple(places)
        if len(places) != self.depth or len({after - before for before, after in zip(places, places[1:])}) > 1:
            raise ConfigError(f"Stack: {self.depth} blocks cannot stand before the layers {places}; give one place for each, equally far apart.")
        block = self.block(parent=None)
        params = self._parameters(x, inputs, {**options, "layer": 0})
        key = self.make_rng("dropout") if self.has_rng("dropout") else None

        def apply(layer, x, index):
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, index)}
            return block.apply({"params": layer}, x, *inputs, rngs=rngs, layer=index, **options)
        return Inserted(places, params, apply)

    def _parameters(self, x: Any, inputs: tuple, options: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters, which are made where the stack is initialised; `options`: what the first block is called with."""
        if self.is_initializing() and not self.variables.get("params"):
            block = self.block(parent=None)
            keys = jax.random.split(self.make_rng("params"), self.depth)
            made = jax.vmap(lambda key: block.init({"params": key, "dropout": key}, x, *inputs, **options)["params"])(keys)
            for name, value in made.items():
                self.put_variable("params", name, value)
        return dict(self.variables["params"])

    def _remat(self, apply: Callable, unrolled: bool) -> Callable:
        """`apply` whose intermediates the backward pass computes again, as the policy says."""
        policy = remat_policy(self.remat)
        if self.remat == "none":
            return apply
        # Inside a scan the loop itself keeps the compiler from merging the second computation with the first. The index of an unrolled layer stays an int.
        return jax.checkpoint(apply, policy=policy, prevent_cse=unrolled, static_argnums=() if not unrolled else (2,))


@dataclasses.dataclass(frozen=True)
class _Layers:
    """`apply(carry, data of one layer, its index) -> (carry, {name: array})`, and the data of `depth` layers with a leading axis."""
    apply: Callable
    data: Any
    depth: int

    def one(self, carry: Any, index: int) -> tuple[Any, Any]:
        """Applies one layer; its intermediates have a leading axis of one."""
        carry, made = self.apply(carry, jax.tree.map(lambda leaf: leaf[index], self.data), jnp.asarray(index))
        return carry, jax.tree.map(lambda leaf: leaf[None], made)

    def run(self, carry: Any, begin: int, end: int) -> tuple[Any, list[Any]]:
        """Applies the layers from `begin` to `end` in a loop; a list of none or one tree of intermediates."""
        if begin == end:
            return carry, []
        carry, made = lax.scan(lambda carry, xs: self.apply(carry, *xs), carry, (_part(self.data, begin, end, self.depth), jnp.arange(begin, end)))
        return carry, [made]


def _scan(carry: Any, layers: _Layers, between: _Layers | None, places: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    """Runs the layers in a loop; with blocks between them in a loop over groups, of one such block and the layers up to the next."""
    if between is None:
        carry, made = layers.run(carry, 0, layers.depth)
        return carry, made[0]
    borders = [*places, layers.depth]
    size = borders[1] - borders[0]
    whole = len(places) if borders[-1] - borders[-2] == size else len(places) - 1   # the last group may have fewer layers
    carry, every = layers.run(carry, 0, places[0])
    inserted = []
    if whole:
        first = places[0]

        def group(carry, xs):
            block, inner, number = xs
            carry, of_block = between.apply(carry, block, number)
            carry, of_layers = lax.scan(lambda carry, xs: layers.apply(carry, *xs), carry, (inner, first + number * size + jnp.arange(size)))
            return carry, (of_block, of_layers)

        inner = jax.tree.map(lambda leaf: leaf.reshape(whole, size, *leaf.shape[1:]), _part(layers.data, first, first + whole * size, layers.depth))
        carry, (of_block, of_layers) = lax.scan(group, carry, (_part(between.data, 0, whole, between.depth), inner, jnp.arange(whole)))
        inserted.append(of_block)
        every.append(jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), of_layers))
    if whole < len(places):
        carry, of_block = between.one(carry, whole)
        inserted.append(of_block)
        carry, made = layers.run(carry, places[-1], layers.depth)
        every += made
    return carry, {**_joined(every), "inserted": _joined(inserted)}


def _unroll(carry: Any, layers: _Layers, between: _Layers | None, places: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    """Runs the layers, and the blocks between them, one after the other."""
    blocks = [] if between is None else layers_of(between.data, between.depth)
    every, inserted = [], []
    for index, layer in enumerate(layers_of(layers.data, layers.depth)):
        if index in places:
            number = places.index(index)
            carry, made = between.apply(carry, blocks[number], number)
            inserted.append(made)
        carry, made = layers.apply(carry, layer, index)
        every.append(made)
    return carry, {**_stack(every), **({} if between is None else {"inserted": _stack(inserted)})}


def _part(data: Any, begin: int, end: int, depth: int) -> Any:
    return data if (begin, end) == (0, depth) else jax.tree.map(lambda leaf: leaf[begin:end], data)


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

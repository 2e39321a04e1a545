"""Layouts by name: their meshes, and what the compiled program of a transformer does on them, read from its collectives."""
from functools import partial
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import pytest

from vlm_jax import registry
from vlm_jax.errors import ConfigError
from vlm_jax.nn import Stack, TransformerBlock
from vlm_jax.sharding import abstract_mesh, check_replicated, constrain, layout, make_mesh, parameter_shardings, replicated_share
from vlm_jax.tasks import build_task

BATCH, TOKENS, WIDTH, HEADS, MLP = 16, 12, 128, 4, 512


@pytest.mark.parametrize("name, topology, mesh", [
    ("replicated", "v5e-256", dict(data=-1, fsdp=1, tensor=1, slices=1)),
    ("fsdp", "v5e-256", dict(data=-1, fsdp=128, tensor=1, slices=1)),
    ("fsdp", "h100-8", dict(data=-1, fsdp=8, tensor=1, slices=1)),
    ("fsdp", None, dict(data=1, fsdp=-1, tensor=1, slices=1)),
    ("tensor", "v5e-16", dict(data=-1, fsdp=1, tensor=4, slices=1)),
    ("fsdp_tensor", "v5e:16x16*4", dict(data=-1, fsdp=64, tensor=4, slices=4)),
    ("fsdp_tensor", "cpu-1", dict(data=-1, fsdp=1, tensor=1, slices=1)),
])
def test_meshes_by_name(name, topology, mesh):
    assert layout(name, topology)["mesh"] == mesh


@pytest.mark.parametrize("millions, topology, fsdp, tensor", [
    (86, "v5e-256", 1, 1), (203, "v5e-256", 1, 1), (877, "v5e-256", 4, 1), (1872, "v5e-256", 8, 1), (877, "v5p-256", 1, 1), (60_000, "v5e-256", 128, 2),
])
def test_automatic_layouts_split_no_further_than_memory_asks(millions, topology, fsdp, tensor):
    mesh = layout("auto", topology, parameters=millions * 1_000_000)["mesh"]
    assert (mesh["fsdp"], mesh["tensor"]) == (fsdp, tensor)


@pytest.mark.parametrize("arguments, words", [
    (dict(name="fsdb"), 'layout "fsdb" is unknown.*Did you mean "fsdp"'),
    (dict(name="fsdp", topology="v5x-256"), "v5x"),
    (dict(name="auto", topology="v5e-256"), "needs the number of parameters"),
    (dict(name="auto", topology="v5e-8", parameters=10**11), "choose a larger topology"),
])
def test_layouts_that_cannot_work(arguments, words):
    with pytest.raises(ConfigError, match=words):
        layout(**arguments)


@pytest.mark.parametrize("preset", [("siglip", "b16-224"), ("siglip", "so400m14-224"), ("siglip2", "b16-224"), ("clip", "b32-224")])
@pytest.mark.parametrize("name, topology", [("fsdp", "v5e-256"), ("tensor", "v5e-16"), ("fsdp_tensor", "v5e:16x16*4")])
def test_published_models_leave_little_replicated(preset, name, topology):
    shapes = shapes_of(*preset)
    settings = layout(name, topology)
    shardings = parameter_shardings(abstract_mesh(topology, settings["mesh"]), shapes, settings["sharding"])
    assert replicated_share(shapes, shardings)[0] < 0.02
    check_replicated(shapes, shardings)


_SHAPES = {}


def shapes_of(name, preset):
    if (name, preset) not in _SHAPES:
        model = registry.build(name=name, preset=preset)
        task = build_task(dict(name="contrastive", loss=model.loss), model)
        _SHAPES[name, preset] = jax.eval_shape(task.init, jax.random.key(0))
    return _SHAPES[name, preset]


def test_what_does_not_divide_falls_back():
    shapes = {"a": {"query": {"kernel": (768, 12, 64), "bias": (12, 64)}, "out": {"kernel": (12, 64, 768)}, "mlp": {"up": {"kernel": (768, 4300)}}},
              "token_embedding": (1001, 768)}
    shapes = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))
    found = parameter_shardings(abstract_mesh("v5e-8", dict(data=1, tensor=8)), shapes, layout("tensor")["sharding"])
    assert found["a"]["query"]["kernel"].spec == P("tensor") and found["a"]["query"]["bias"].spec == P()
    assert found["a"]["out"]["kernel"].spec == P(None, None, "tensor")
    assert found["a"]["mlp"]["up"]["kernel"].spec == P("tensor") and found["token_embedding"].spec == P(None, "tensor")


def collectives(name, tokens=TOKENS, **sizes):
    """[(kind, shapes)] of the compiled gradient of two blocks, laid out by `name` on a mesh of `sizes`."""
    mesh = make_mesh(**sizes)
    stack = Stack(partial(TransformerBlock, HEADS, MLP), 2)
    shapes = {"blocks": jax.eval_shape(lambda key: stack.init(key, jnp.zeros((1, tokens, WIDTH)))["params"], jax.random.key(0))}
    shardings = parameter_shardings(mesh, shapes, layout(name)["sharding"])
    params = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)
    x = jax.ShapeDtypeStruct((BATCH, tokens, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

    def loss(params, x):
        y, _ = stack.apply({"params": params["blocks"]}, constrain(x, "batch", "sequence", "embed"))
        return jnp.sum(y ** 2)

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss), out_shardings=shardings).lower(params, x).compile().as_text()
    found = re.findall(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    return [(kind, [tuple(int(n) for n in shape.split(",") if n) for shape in re.findall(r"f32\[([\d,]*)\]", shapes)]) for shapes, kind in found]


def gathered(found):
    return [shape for kind, shapes in found if kind == "all-gather" for shape in shapes]


def test_fsdp_gathers_parameters_and_no_activation():
    found = collectives("fsdp", data=2, fsdp=4)
    rows = {BATCH // 8, BATCH // 8 * TOKENS, BATCH * TOKENS, BATCH}
    assert (WIDTH, MLP) in gathered(found) and (MLP, WIDTH) in gathered(found)
    assert all(not rows & set(shape[:1]) for _, shapes in found for shape in shapes)


def test_tensor_parallel_blocks_sum_activations_twice_and_gather_nothing():
    found = collectives("tensor", data=2, tensor=4)
    local = (BATCH // 2 * TOKENS, WIDTH)
    sums = [shapes for kind, shapes in found if kind == "all-reduce" and local in shapes]
    assert not gathered(found)
    assert len(sums) == 4     # after attention and MLP, on the way there and back, in the one body that the scan compiles


def test_tokens_split_over_sequence_gather_keys_and_values_only():
    found = collectives("replicated", data=2, sequence=4)
    keys = (BATCH // 2, TOKENS, HEADS, WIDTH // HEADS)
    assert gathered(found) == [keys, keys]


def test_tokens_that_do_not_divide_are_whole():
    assert not gathered(collectives("replicated", tokens=TOKENS + 1, data=2, sequence=4))

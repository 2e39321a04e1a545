"""Published sizes have the published numbers of parameters, counted from shapes alone."""
import math

import jax
import jax.numpy as jnp
import pytest

from vlm_jax import registry
from vlm_jax.sharding import abstract_mesh, check_replicated, layout, parameter_shardings, replicated_share

COUNTS = {
    ("decoder", "llama-2-7b"): 6_738_415_616, ("decoder", "llama-3-8b"): 8_030_261_248, ("decoder", "llama-3.2-1b"): 1_235_814_400,
    ("decoder", "mistral-7b-v0.1"): 7_241_732_096, ("decoder", "qwen2-0.5b"): 494_032_768, ("decoder", "qwen3-0.6b"): 596_049_920,
    ("decoder", "gemma-2b"): 2_506_172_416, ("decoder", "gemma2-9b"): 9_241_705_984, ("decoder", "gemma3-270m"): 268_098_176,
    ("decoder", "gemma3-1b"): 999_885_952, ("decoder", "gpt2"): 124_439_808, ("decoder", "gpt2-xl"): 1_557_611_200, ("decoder", "opt-125m"): 125_239_296,
    ("decoder", "opt-350m"): 331_196_416, ("decoder", "pythia-70m"): 70_426_624, ("decoder", "pythia-6.9b"): 6_857_302_016,
    ("decoder", "phi-2"): 2_779_683_840, ("decoder", "mpt-7b"): 6_649_286_656, ("decoder", "mpt-1b"): 1_311_311_872,
    ("encoder_decoder", "t5-small"): 60_506_624, ("encoder_decoder", "t5-v1.1-base"): 247_577_856, ("encoder_decoder", "flan-t5-xxl"): 11_135_332_352,
    ("encoder_decoder", "mt5-small"): 300_176_768, ("bert", "bert-base-uncased"): 109_482_240, ("bert", "bert-large-cased"): 333_579_264,
}


def shapes_of(family, preset):
    model = registry.build(family, preset)
    inputs = {name: jax.ShapeDtypeStruct((1, *shape), jnp.int32) for name, shape in model.input_shapes().items()}
    return jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]


@pytest.mark.parametrize("family, preset", COUNTS)
def test_parameters_of_published_sizes(family, preset):
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes_of(family, preset))) == COUNTS[family, preset]


@pytest.mark.parametrize("family", ["decoder", "encoder_decoder", "bert"])
def test_every_preset_can_be_built(family):
    for preset in registry.presets(family):
        model = registry.build(family, preset)
        assert set(model.input_shapes()) >= {"tokens"} and hash(model) == hash(registry.build(family, preset))


@pytest.mark.parametrize("preset", [("decoder", "gemma-2b"), ("decoder", "llama-3-8b"), ("decoder", "qwen2-7b"), ("encoder_decoder", "mt5-small")])
@pytest.mark.parametrize("name, topology", [("fsdp", "v5e-256"), ("tensor", "v5e-16"), ("fsdp_tensor", "v5e:16x16*4")])
def test_layouts_split_published_sizes(preset, name, topology):
    shapes, settings = shapes_of(*preset), layout(name, topology)
    shardings = parameter_shardings(abstract_mesh(topology, settings["mesh"]), shapes, settings["sharding"])
    assert replicated_share(shapes, shardings)[0] < 0.02
    check_replicated(shapes, shardings)


def test_layouts_name_what_language_models_have():
    shapes, settings = shapes_of("encoder_decoder", "mt5-small"), layout("tensor", "cpu-2")
    found = parameter_shardings(abstract_mesh("cpu-2", dict(tensor=2)), shapes, settings["sharding"])
    spec = {"/".join(key.key for key in path): tuple(leaf.spec) for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    assert spec["decoder/blocks/mlp/gate/kernel"] == spec["decoder/blocks/mlp/up/kernel"] == (None, None, "tensor")
    assert spec["decoder/blocks/cross_attention/key/kernel"] == (None, None, "tensor")
    assert spec["head/kernel"] == (None, "tensor") and spec["token_embedding"] == ("tensor",) and spec["decoder/relative_bias"] == ()

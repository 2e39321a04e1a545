"""Adapters and int8 kernels as changes to parameters, and a stage that trains adapters."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlm_jax
from vlm_jax import registry
from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.settings import plain
from vlm_jax.training import adapters, setup
from vlm_jax.training.config import load_config, resolve
from vlm_jax.training.loop import begin, train
from vlm_jax.training.parameters import count_parameters
from vlm_jax.training.stages import Rules
from vlm_jax.training.trees import flatten

TARGETS = [".*/attention/(query|value)", "image/.*/out"]
LORA = dict(targets=[".*/attention/(query|value|out)"], rank=2, alpha=3.0, dropout=0.1)


@pytest.fixture(scope="module")
def dual():
    """A small SigLIP, its perturbed parameters, and its image embeddings as a function of parameters."""
    towers = dict(width=12, depth=2, mlp_dim=20, num_heads=3)
    model = registry.build("siglip", embed_dim=12, image=dict(image_size=(8, 12), patch_size=4, **towers), text=dict(vocab_size=30, length=5, **towers))
    inputs = model.input_shapes()
    image = np.random.default_rng(0).normal(size=(2, *inputs["image"])).astype(np.float32)
    tokens = np.random.default_rng(1).integers(1, 30, (2, *inputs["tokens"])).astype(np.int32)
    params = jax.jit(model.init)(jax.random.key(0), image, tokens)["params"]
    leaves, structure = jax.tree.flatten(params)
    noise = np.random.default_rng(2)
    params = structure.unflatten([leaf + 0.1 * noise.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])
    apply = jax.jit(lambda p: jnp.concatenate(model.apply({"params": p}, image, tokens)[0]))
    return params, apply


def perturbed(params):
    """`params` with adapters that say something."""
    noise, table = np.random.default_rng(3), flatten(params)
    return adapters.unflatten({path: leaf + 0.3 * noise.normal(size=leaf.shape).astype(np.float32) if path.endswith("lora/b") else leaf
                               for path, leaf in table.items()})


def test_fresh_adapters_change_no_bit_and_merged_ones_give_the_same_output(dual):
    params, apply = dual
    added = adapters.add(params, TARGETS, rank=2, alpha=3.0, rng=jax.random.key(5))
    found = flatten(added)
    assert found["image/blocks/attention/query/lora/a"].shape == (2, 12, 2) and found["image/blocks/attention/out/lora/b"].shape == (2, 2, 12)
    assert found["image/pooling/out/lora/a"].shape == (12, 2) and float(found["image/pooling/out/lora/scaling"]) == 1.5
    assert "text/blocks/attention/out/lora/a" not in found
    bound = 1 / 12 ** 0.5
    assert 0.8 * bound < np.abs(found["image/blocks/attention/query/lora/a"]).max() <= bound
    np.testing.assert_array_equal(apply(added), apply(params))
    trained = perturbed(added)
    assert np.abs(apply(trained) - apply(params)).max() > 0.02
    merged = adapters.merge(trained)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(apply(merged), apply(trained), atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, adapters.strip(trained), params)
    adapted = adapters.counts(added)
    assert adapted["base"] == count_parameters(params) and adapted["adapters"] == count_parameters(added) - count_parameters(params) - 5 * 2 - 1
    assert adapters.merge(params) is not None and jax.tree.structure(adapters.merge(params)) == jax.tree.structure(params)


def test_quantised_kernels_are_within_half_a_level_and_carry_adapters(dual):
    params, apply = dual
    small = adapters.quantize(params, [".*"])
    table, before = flatten(small), flatten(params)
    assert table["image/blocks/mlp/up/kernel"].dtype == jnp.int8 and table["image/blocks/attention/query/scale"].shape == (2, 3, 4)
    assert table["image/patch_embedding/scale"].shape == (12,) and table["image/blocks/attention/out/scale"].shape == (2, 12)
    assert table["text/token_embedding"].dtype == jnp.float32
    for path, leaf in flatten(adapters.dequantize(small)).items():
        scale = table.get(path.removesuffix("kernel") + "scale") if path.endswith("kernel") else None
        bound = 0 if scale is None else 0.5001 * float(np.max(scale))
        assert np.abs(leaf - before[path]).max() <= bound, path
    assert 0 < np.abs(apply(small) - apply(params)).max() < 0.02
    np.testing.assert_allclose(apply(small), apply(adapters.dequantize(small)), atol=2e-6)
    again = adapters.quantize(adapters.dequantize(small), [".*"])
    for path, leaf in flatten(again).items():
        np.testing.assert_allclose(leaf, table[path], rtol=1e-6, err_msg=path)
    both = perturbed(adapters.add(small, TARGETS, rank=2, rng=jax.random.key(5)))
    np.testing.assert_allclose(apply(adapters.merge(both)), apply(both), atol=2e-6)
    count = adapters.counts(both)
    assert count["base"] == count_parameters(params) and count["bytes"] < adapters.counts(params)["bytes"]
    zero = adapters.quantize({"head": {"kernel": np.zeros((3, 2), np.float32)}})
    assert np.isfinite(adapters.dequantize(zero)["head"]["kernel"]).all()


def test_errors_name_target_and_remedy(dual):
    params, _ = dual
    with pytest.raises(ConfigError, match='"image/blocks/attention/qeury" matches no Linear. Did you mean "image/blocks/attention/query"'):
        adapters.add(params, ["image/blocks/attention/qeury"])
    with pytest.raises(ConfigError, match="rank is 13, but .* 12 x 12; choose a rank of at most 12"):
        adapters.add(params, [".*/attention/query"], rank=13)
    with pytest.raises(ConfigError, match="has an adapter already; merge it first"):
        adapters.add(adapters.add(params, TARGETS, 1), TARGETS, 1)
    for settings, message in ((dict(targets="x"), "list of regexes"), (dict(targets=["("]), "not a regular"), (dict(targets=["x"], rank=0), "rank is 0"),
                              (dict(targets=["x"], alpha=0), "alpha is 0"), (dict(targets=["x"], dropout=1), "dropout is 1"),
                              (dict(targets=["x"], rnak=4), 'Did you mean "rank"')):
        with pytest.raises(ConfigError, match=message):
            adapters.read_lora(settings)


def test_rules_that_name_lora_decide_adapters_and_no_other_rule_does(dual):
    shapes = jax.eval_shape(lambda p: adapters.add(p, TARGETS, 2), dual[0])
    rules = Rules([(r"image/blocks/1/.*/lora/b", {"lr": 5.0}), ("image/.*/lora/.*", {"lr": 0.1}), ("image/.*", None), (".*", {})], shapes)
    leaves = rules.leaves
    np.testing.assert_allclose(leaves["image/blocks/attention/query/lora/b"].lr.reshape(-1), [0.1, 5.0])
    assert leaves["image/pooling/out/lora/a"].lr == 0.1 and leaves["text/blocks/attention/query/lora/a"].lr == 1.0
    assert not leaves["image/blocks/attention/query/kernel"].moves and leaves["text/blocks/attention/query/kernel"].moves
    assert not any(leaf.moves for path, leaf in leaves.items() if path.endswith("lora/scaling"))
    assert ".*/lora/(scaling|dropout)" in rules.summary()
    frozen = Rules([(".*", None)], shapes)
    assert {path.rsplit("/", 1)[-1] for path in flatten(frozen.trained(shapes))} == {"a", "b"}
    with pytest.raises(ConfigError, match="freezes every parameter"):
        Rules([(".*/lora/.*", None), (".*", None)], shapes)
    with pytest.raises(ConfigError, match="matches no parameter"):
        Rules([(".*/lora/.*", {}), (".*", {})], dual[0])


def config_of(**stage):
    config = plain(load_config("configs/siglip/shapes.py:variant=test"))
    config.update(evaluations={}, log_every=1, checkpoint=dict(every=2, keep=3), mesh=dict(data=1))
    config["stages"][0] = {key: value for key, value in config["stages"][0].items() if key != "train"} | dict(steps=2, **stage)
    return config


def parts_of(config, index=0):
    config = resolve(config)
    return setup.build(config, index, setup.read(config), jax.devices()[:1], data=False)


def test_the_base_is_frozen_unless_rules_say_otherwise():
    resolved = resolve(config_of(lora=LORA))
    assert resolved["stages"][0]["train"] == [[".*", None]] and resolve(resolved) == resolved
    parts = parts_of(resolved)
    state = parts.abstract_state
    moments = set(flatten(state["optimizer"]))
    assert moments and all(path.endswith(("lora/a", "lora/b")) for path in moments if "/" in path and "blocks" in path)
    assert not any("kernel" in path for path in moments)
    kernels = {tuple(leaf.shape) for path, leaf in flatten(state["params"]).items() if path.endswith("mlp/up/kernel")}
    jaxpr = jax.make_jaxpr(lambda s, b, n: parts.step(s, b, n))(state, setup_batch(parts), jax.ShapeDtypeStruct((), np.int32))
    (call,) = [equation for equation in jaxpr.jaxpr.eqns if equation.primitive.name in ("jit", "pjit")]
    produced = [tuple(v.aval.shape) for equation in call.params["jaxpr"].jaxpr.eqns for v in equation.outvars
                if equation.primitive.name in ("transpose", "scan", "add", "mul", "dot_general", "add_any", "concatenate")]
    assert kernels and not kernels & set(produced)      # neither a gradient of a frozen stack nor a moment of it
    trains = parts_of(config_of(lora=LORA, train=[["logit_scale", {"lr": 2.0}], [".*", None]]))
    assert trains.rules.leaves["logit_scale"].lr == 2.0 and trains.rules.leaves["text/blocks/attention/query/lora/b"].moves
    with pytest.raises(ConfigError, match=r"stages\[0\].lora.rank is 0"):
        resolve(config_of(lora={**LORA, "rank": 0}))


def setup_batch(parts):
    from vlm_jax.training.dry_run import abstract_batch
    return abstract_batch(parts)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A full run of two steps, and one of two steps that trains adapters on it."""
    folder = tmp_path_factory.mktemp("runs")
    train(config_of(), folder / "base", devices=jax.devices()[:1])
    config = config_of(lora=LORA, init_from=dict(workdir=str(folder / "base")))
    train(config, folder / "adapted", devices=jax.devices()[:1])
    return folder, config


def test_a_run_with_adapters_leaves_its_base_alone_and_is_loaded_as_any_other(runs):
    folder, _ = runs
    base, tuned = vlm_jax.load(folder / "base"), vlm_jax.load(folder / "adapted")
    jax.tree.map(np.testing.assert_array_equal, adapters.strip(tuned.params), base.params)
    table = flatten(tuned.params)
    assert np.abs(table["text/blocks/attention/query/lora/b"]).max() > 0 and np.all(table["text/blocks/attention/query/lora/scaling"] == 1.5)
    image = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    before, after = (loaded.predictor(batch_size=1).embed_images([image]) for loaded in (base, tuned))
    assert np.abs(before - after).max() > 1e-7
    kept = json.loads((folder / "adapted" / "config.json").read_text())["stages"][0]
    assert kept["lora"] == LORA and kept["train"] == [[".*", None]]


def test_stages_hand_adapters_over_merge_them_or_add_others(runs):
    folder, config = runs
    params = vlm_jax.load(folder / "adapted").params
    stage = config["stages"][0]
    following = [{**stage, "init_from": None, "lora": {**LORA, "alpha": 8.0, "dropout": 0.0}},
                 {**stage, "init_from": None, "lora": None, "train": [[".*", {}]]},
                 {**stage, "init_from": None, "lora": {**LORA, "rank": 3}}]
    config = {**config, "stages": [stage, *following]}
    same, merged, other = (flatten(begin(parts_of(config, index), jax.device_get(params))["params"]) for index in (1, 2, 3))
    name = "text/blocks/attention/query"
    np.testing.assert_array_equal(same[f"{name}/lora/b"], flatten(params)[f"{name}/lora/b"])
    assert np.all(same[f"{name}/lora/scaling"] == 4.0) and f"{name}/lora/dropout" not in same
    assert not any("lora" in path for path in merged) and other[f"{name}/lora/a"].shape[-1] == 3
    for found in (merged, other):
        np.testing.assert_array_equal(found[f"{name}/kernel"], flatten(adapters.merge(params))[f"{name}/kernel"])


def test_a_run_whose_adapters_are_not_its_configs_is_refused(runs):
    from vlm_jax.restore import check_parameters
    from vlm_jax.tasks import build_task
    folder, _ = runs
    loaded = vlm_jax.load(folder / "adapted")
    task = build_task(loaded.config["task"], loaded.model)
    broken = {**loaded.params, "extra": np.zeros(3)}
    with pytest.raises(CheckpointError, match="extra"):
        check_parameters(task, broken, "run")


def test_convolutions_are_no_linears():
    table = {"stages_0/blocks/conv_0/kernel": (3, 1, 1, 8, 4), "stages_0/blocks/conv_0/gain": (3, 4), "stem/kernel": (7, 7, 3, 8), "stem/gain": (8,),
             "stages_0/blocks/squeeze_excite/down/kernel": (3, 8, 4), "stages_0/blocks/squeeze_excite/down/bias": (3, 4)}
    params = adapters.unflatten({path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in table.items()})
    assert list(adapters.linears(params)) == ["stages_0/blocks/squeeze_excite/down"]

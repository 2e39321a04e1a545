"""Adapters in PEFT's layout: names, axes and numbers as documented, there and back to the bit."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import registry
from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.interop import table
from vlm_jax.interop.families import family
from vlm_jax.interop.peft import load_adapters, save_adapters
from vlm_jax.interop.safetensors import open_file, write_file
from vlm_jax.training import adapters
from vlm_jax.training.trees import flatten, unflatten

LLAMA = dict(vocab_size=13, width=12, depth=3, mlp_dim=10, num_heads=3, num_kv_heads=1, head_dim=4)
GPT2 = dict(vocab_size=13, width=12, depth=2, mlp_dim=10, num_heads=3, norm="layer", activation="gelu_tanh", gated=False, positions="learned",
            max_positions=9, biases=("query", "key", "value", "out", "up", "down"))


@dataclasses.dataclass(frozen=True)
class Loaded:
    model: object
    params: object
    config: dict


def loaded(settings, model_type):
    model = registry.build("decoder", **settings)
    params = jax.jit(model.init)(jax.random.key(0), {"tokens": jnp.zeros((1, 4), jnp.int32)})["params"]
    return Loaded(model, params, {"model": {"name": "decoder"}, "hf": {"model_type": model_type}})


@pytest.fixture(scope="module")
def llama():
    return loaded(LLAMA, "llama")


def perturbed(params, seed=0):
    noise = np.random.default_rng(seed)
    return unflatten({path: jnp.asarray(noise.normal(size=leaf.shape), jnp.float32) if path.endswith("lora/b") else leaf
                      for path, leaf in flatten(params).items()})


def with_adapters(base, targets, **settings):
    return dataclasses.replace(base, params=perturbed(adapters.add(base.params, targets, rng=jax.random.key(1), **settings)))


def assert_same(a, b):
    a, b = flatten(a), flatten(b)
    assert set(a) == set(b)
    for path, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[path], err_msg=path)


def test_the_layout_is_the_documented_one_and_reads_back_to_the_bit(llama, tmp_path):
    ours = with_adapters(llama, [".*/(query|value|out)", ".*/mlp/down", "head"] if not llama.model.tied else [".*/(query|value|out)", ".*/mlp/down"],
                         rank=2, alpha=3, dropout=0.25)
    save_adapters(ours, tmp_path, base="some/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"], config["fan_in_fan_out"]) == ("LORA", 2, 3, 0.25, False)
    assert "model.layers.1.self_attn.q_proj" in config["target_modules"] and config["base_model_name_or_path"] == "some/base" and config["bias"] == "none"
    file = open_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.2.self_attn.{}_proj.lora_{}.weight"
    assert file.shape(name.format("q", "A")) == (2, 12) and file.shape(name.format("v", "B")) == (4, 2) and len(file.names()) == 2 * 3 * 4
    # W + (alpha / r) B A of theirs is the merged kernel of ours, in the names and axes of the family's table.
    rows, merged = family("llama").rows(ours.model), table.write(family("llama").rows(ours.model), adapters.merge(ours.params))
    base = table.write(rows, llama.params)
    for module in config["target_modules"]:
        a, b = (file.read(f"base_model.model.{module}.lora_{side}.weight") for side in "AB")
        weight = f"{module}.weight"
        np.testing.assert_allclose(base[weight].compute() + 1.5 * b @ a, merged[weight].compute(), atol=1e-5, err_msg=module)
    assert_same(load_adapters(llama, tmp_path), ours.params)


def test_fused_modules_are_the_linears_that_they_hold(tmp_path):
    base = loaded(GPT2, "gpt2")
    apart = with_adapters(base, [".*/(query|value)", ".*/mlp/up"], rank=2)
    save_adapters(apart, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] and config["r"] in (2, 4) and config["rank_pattern"]
    file = open_file(tmp_path / "adapter_model.safetensors")
    assert file.shape("base_model.model.transformer.h.0.attn.c_attn.lora_A.weight") == (4, 12)      # two adapters of rank 2
    read = load_adapters(base, tmp_path)
    tokens = {"tokens": jnp.asarray([[1, 2, 3, 4]])}
    apply = jax.jit(lambda params: base.model.apply({"params": params}, tokens)[0])
    np.testing.assert_allclose(apply(read), apply(apart.params), atol=2e-5)
    assert "blocks/attention/key/lora/a" not in flatten(read)
    save_adapters(dataclasses.replace(base, params=read), tmp_path / "again")      # now they share A: back to the bit
    again = load_adapters(base, tmp_path / "again")
    assert_same(again, read)


def test_layers_without_an_adapter_have_scaling_zero_and_are_left_out_again(llama, tmp_path):
    ours = with_adapters(llama, [".*/query"], rank=2)
    save_adapters(ours, tmp_path)
    file = open_file(tmp_path / "adapter_model.safetensors")
    kept = {name: file.read(name) for name in file.names() if ".layers.1." in name}
    write_file(tmp_path / "adapter_model.safetensors", kept)
    some = load_adapters(llama, tmp_path)
    np.testing.assert_array_equal(flatten(some)["blocks/attention/query/lora/scaling"], [0, 8, 0])
    save_adapters(dataclasses.replace(llama, params=some), tmp_path / "again")
    assert set(open_file(tmp_path / "again" / "adapter_model.safetensors").names()) == set(kept)


def test_names_and_scalings_of_other_versions_are_read(llama, tmp_path):
    ours = with_adapters(llama, [".*/query"], rank=4, alpha=8)
    save_adapters(ours, tmp_path)
    file = open_file(tmp_path / "adapter_model.safetensors")
    write_file(tmp_path / "adapter_model.safetensors", {name.replace(".weight", ".default.weight"): file.read(name) for name in file.names()})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}}))
    assert_same(load_adapters(llama, tmp_path), ours.params)     # 4 / sqrt(4) = 8 / 4


def test_what_cannot_be_read_or_written_is_named(llama, tmp_path):
    with pytest.raises(ConfigError, match="have no adapters"):
        save_adapters(llama, tmp_path)
    save_adapters(with_adapters(llama, [".*/query"], rank=2), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = open_file(tmp_path / "adapter_model.safetensors")
    tensors = {name: tensors.read(name) for name in tensors.names()}
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"

    def refused(error, match, change=None, **settings):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **settings}))
        write_file(tmp_path / "adapter_model.safetensors", change or tensors)
        with pytest.raises(error, match=match):
            load_adapters(llama, tmp_path)
    refused(ConfigError, "use_dora", use_dora=True)
    refused(ConfigError, "peft_type", peft_type="IA3")
    refused(CheckpointError, "has rank 2, adapter_config.json says 3", r=3)
    refused(ConfigError, "r: 'x'|r: \"x\"", r="x")
    refused(CheckpointError, "belongs to no linear module.*Did you mean", {**tensors, first.replace("q_proj", "q_prj"): tensors[first]})
    refused(CheckpointError, "lora_A alone", {first: tensors[first]})
    refused(CheckpointError, "has 12 inputs and 12 outputs", {**tensors, first: np.zeros((2, 5), np.float32)})
    with pytest.raises(ConfigError, match="have adapters already"):
        write_file(tmp_path / "adapter_model.safetensors", tensors)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        load_adapters(dataclasses.replace(llama, params=load_adapters(llama, tmp_path)), tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="never read"):
        load_adapters(llama, tmp_path)


def test_peft_loads_what_is_written(llama, tmp_path):
    """Where PEFT and transformers are installed: its model with our adapters gives our logits."""
    peft, transformers, torch = (pytest.importorskip(name) for name in ("peft", "transformers", "torch"))
    from vlm_jax.interop.directory import save_directory
    ours = with_adapters(llama, [".*/(query|value|out)", ".*/mlp/down"], rank=2)
    whole = dataclasses.make_dataclass("Whole", ["model", "params", "config", "processor"])
    save_directory(whole(llama.model, llama.params, {"model": {"name": "decoder"}}, None), tmp_path / "base")
    save_adapters(ours, tmp_path / "adapters")
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapters").eval()
    tokens = np.asarray([[1, 5, 7, 2]])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = ours.model.apply({"params": ours.params}, {"tokens": jnp.asarray(tokens)})[0]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(load_adapters(llama, tmp_path / "theirs"), ours.params)

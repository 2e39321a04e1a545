"""The checker: equal models pass layer by layer, another number anywhere does not; and the converter between the layouts."""
import json
import sys

import numpy as np
import pytest

from tests.interop import reference
import vlm_jax
from vlm_jax import convert
from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.interop import compare
from vlm_jax.interop.safetensors import open_folder, write_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PREPROCESSING = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 23, "width": 23}, "resample": 3, "image_mean": [0.5] * 3,
                 "image_std": [0.5] * 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "do_resize": True}


def test_layer_by_layer(tmp_path, capsys):
    reference.siglip_vision().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    assert compare.run([str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["random", "encoder.layers.0"], ["random", "encoder.layers.1"], ["random", "output"]]
    assert lines[3].startswith("real    encoder.layers.0") and lines[-1].startswith("largest relative difference") and "within 0.0001" in lines[-1]


def test_a_small_language_model(tmp_path, capsys):
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=37,
                                      max_position_embeddings=32, bos_token_id=0, eos_token_id=1)
    reference.make(transformers.LlamaForCausalLM, config).save_pretrained(tmp_path)
    assert compare.compare(tmp_path) <= 1e-4
    out = capsys.readouterr().out
    assert "model.layers.1" in out and "logits" in out and "no processor or tokenizer" in out


def test_a_difference_is_found(tmp_path, capsys, monkeypatch):
    reference.siglip_vision().save_pretrained(tmp_path)
    load = compare.load_directory

    def changed(folder, **options):
        import dataclasses

        import jax
        made = load(folder, **options)
        return dataclasses.replace(made, params=jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf.at[1].add(0.01) if "up" in str(path) and "blocks" in str(path) and leaf.ndim == 3 else leaf, made.params))
    monkeypatch.setattr(compare, "load_directory", changed)
    assert compare.run([str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "<-- above" not in lines[0] and "<-- above" in lines[1] and "ABOVE" in lines[-1]


def test_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConfigError, match=r"compare needs PyTorch and transformers .*vlm_jax\[parity\]"):
        compare.compare(tmp_path)


def test_convert(tmp_path, capsys):
    reference.siglip().save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(PREPROCESSING))
    convert.run([str(tmp_path / "theirs"), str(tmp_path / "half"), "--from", "hf", "--dtype", "bfloat16", "--shard_gb", "0.00002"])
    assert "half: siglip" in capsys.readouterr().out
    first, half = open_folder(tmp_path / "theirs"), open_folder(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert json.loads((tmp_path / "half" / "preprocessor_config.json").read_text()) == PREPROCESSING
    assert all(np.array_equal(first.read(name).astype(half.dtype(name)), half.read(name)) for name in first.names())
    with pytest.raises(ConfigError, match="same folder"):
        convert.run([str(tmp_path / "theirs"), str(tmp_path / "theirs")])
    with pytest.raises(ConfigError, match="directory .hf., not what --from workdir says"):
        convert.run([str(tmp_path / "theirs"), str(tmp_path / "x"), "--from", "workdir"])


def test_big_vision_to_hf(tmp_path):
    from vlm_jax.interop import table
    from vlm_jax.interop.families import big_vision
    reference.siglip(image_size=21).save_pretrained(tmp_path / "theirs")
    loaded = vlm_jax.load(tmp_path / "theirs")
    np.savez(tmp_path / "a.npz", **{name: tensor.compute() for name, tensor in table.write(big_vision.rows(loaded.model), loaded.params).items()})
    convert.run([str(tmp_path / "a.npz"), str(tmp_path / "ours")])
    first, second = open_folder(tmp_path / "theirs"), open_folder(tmp_path / "ours")
    assert {n: first.read(n).tobytes() for n in first.names()} == {n: second.read(n).tobytes() for n in second.names()}


def test_weights_of_another_model(tmp_path):
    model = reference.siglip_vision()
    model.save_pretrained(tmp_path)
    tensors = {name: open_folder(tmp_path).read(name) for name in open_folder(tmp_path).names()}
    name = "encoder.layers.1.mlp.fc1.bias"

    def fails(changed, message):
        write_folder(tmp_path, changed)
        with pytest.raises(CheckpointError, match=message) as error:
            vlm_jax.load(tmp_path)
        assert "\n" not in str(error.value)

    fails({key: value for key, value in tensors.items() if key != name}, "1 tensors are missing: 'vision_model.encoder.layers.1.mlp.fc1.bias'")
    fails({**tensors, "encoder.layers.2.mlp.fc1.bias": tensors[name]}, "1 tensors are not consumed: 'vision_model.encoder.layers.2.mlp.fc1.bias'. Did you mean")
    fails({**tensors, name: tensors[name][:-1]}, r"gives blocks/mlp/up/bias the shape \(51,\), the config asks for \(52,\)")
    fails({**tensors, name: tensors[name].astype(np.float16)}, "has dtype float16, other layers have float32")
    write_folder(tmp_path, {**tensors, "embeddings.position_ids": np.arange(9)[None]})
    assert vlm_jax.load(tmp_path).model.depth == 2

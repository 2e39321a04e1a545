"""Directories of transformers' ViT, SigLIP, SigLIP 2 and CLIP: the same numbers, and bit for bit back."""
import json

import jax
import numpy as np
import pytest

from tests.interop import reference
from tests.models.parity import FLOAT32_MODEL, relative_error
import vlm_jax
from vlm_jax.errors import ConfigError
from vlm_jax.interop.directory import load_directory, save_directory
from vlm_jax.interop.safetensors import open_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MODELS = {"siglip": reference.siglip, "siglip_vision": reference.siglip_vision, "siglip2": reference.siglip2, "clip": reference.clip,
          "vit": reference.vit, "vit_labels": lambda: reference.vit(labels=5)}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    model = MODELS[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder, vlm_jax.load(folder)


def outputs_of(name, loaded, pictures, tokens, patches):
    """What our model gives, in the order of `expected_of`."""
    apply = jax.jit(lambda params, *inputs: loaded.model.apply({"params": params}, *inputs))
    if name in ("siglip", "clip"):
        return apply(loaded.params, pictures, tokens)
    return apply(loaded.params, patches, tokens) if name == "siglip2" else apply(loaded.params, pictures)


def flexible(grids, longest, patch, seed=0):
    """Patches of pictures of several shapes, ours [row, column, pixels] and theirs."""
    rng = np.random.default_rng(seed)
    ours = np.zeros((len(grids), longest, 2 + patch * patch * 3), np.float32)
    for row, (rows, columns) in zip(ours, grids):
        count = rows * columns
        row[:count, 0], row[:count, 1] = np.repeat(np.arange(rows), columns) + 1, np.tile(np.arange(columns), rows) + 1
        row[:count, 2:] = rng.normal(size=(count, patch * patch * 3))
    theirs = dict(pixel_values=torch.from_numpy(ours[..., 2:].copy()), pixel_attention_mask=torch.from_numpy((ours[..., 0] > 0).astype(np.int64)),
                  spatial_shapes=torch.tensor(grids))
    return ours, theirs


def test_numbers_match(saved):
    name, model, folder, loaded = saved
    batch = 3
    values, theirs = reference.pictures(batch, 23, 23)
    ids, ids_theirs = reference.tokens(batch, 6)
    patches, naflex = flexible([(3, 5), (4, 4), (1, 2)], 17, 3)
    with torch.no_grad():
        if name in ("siglip", "clip"):
            expected = model(input_ids=ids_theirs, pixel_values=theirs)
        elif name == "siglip2":
            expected = model(input_ids=ids_theirs, **naflex)
        else:
            expected = model(pixel_values=theirs)
    if name in ("siglip", "clip", "siglip2"):
        (image, text), out = outputs_of(name, loaded, values, ids, patches)
        assert relative_error(image, expected.image_embeds) <= FLOAT32_MODEL
        assert relative_error(text, expected.text_embeds) <= FLOAT32_MODEL
        logits = np.exp(out["logit_scale"]) * np.asarray(text) @ np.asarray(image).T + out.get("logit_bias", 0.0)
        assert relative_error(logits, expected.logits_per_text) <= FLOAT32_MODEL
        return
    output, out = outputs_of(name, loaded, values, ids, patches)
    if name == "vit_labels":
        assert relative_error(output, expected.logits) <= FLOAT32_MODEL
    else:
        assert relative_error(output, expected.pooler_output) <= FLOAT32_MODEL


@pytest.mark.parametrize("height, width", [(30, 44), pytest.param(16, 9, marks=pytest.mark.slow)])
def test_other_sizes_match_interpolated_positions(saved, height, width):
    name, model, folder, loaded = saved
    if name == "siglip2":
        pytest.skip("its patches are of any size")
    values, theirs = reference.pictures(1, height, width, seed=1)
    tower = model.vision_model if name in ("siglip", "clip") else model
    with torch.no_grad():
        expected = tower(pixel_values=theirs, interpolate_pos_encoding=True)
    if name in ("siglip", "clip"):
        ours = jax.jit(lambda params, x: loaded.model.apply({"params": params}, x, method="encode_image")[1]["pooled"])(loaded.params, values)
    else:
        ours, _ = jax.jit(lambda params, x: loaded.model.apply({"params": params}, x))(loaded.params, values)
    assert relative_error(ours, expected.logits if name == "vit_labels" else expected.pooler_output) <= FLOAT32_MODEL


def test_round_trip_is_bit_exact_and_transformers_loads_it(saved, tmp_path):
    name, model, folder, loaded = saved
    vlm_jax.save(loaded, tmp_path, shard_bytes=20_000)
    first, second = open_folder(folder), open_folder(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert set(first.names()) == set(second.names())
    for tensor in first.names():
        assert first.dtype(tensor) == second.dtype(tensor) and first.read(tensor).tobytes() == second.read(tensor).tobytes(), tensor
    again = load_directory(tmp_path)
    assert again.model == loaded.model
    assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), again.params, loaded.params))
    other, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    for key, value in other.state_dict().items():
        assert torch.equal(value, state[key]), key
    before, after = json.loads((folder / "config.json").read_text()), json.loads((tmp_path / "config.json").read_text())
    for key in ("vision_config", "text_config", "hidden_size", "id2label", "projection_dim"):
        if isinstance(before.get(key), dict):
            assert {k: after[key][k] for k in before[key] if k in after[key]} == before[key]


def test_export_without_the_original_config(saved, tmp_path):
    import dataclasses
    name, model, folder, loaded = saved
    trained = dataclasses.replace(loaded, config={"model": loaded.config["model"]}, files={})
    save_directory(trained, tmp_path)
    other = type(model).from_pretrained(tmp_path).eval()
    values, theirs = reference.pictures(2, 23, 23)
    ids = reference.tokens(2, 6)[1]
    inputs = {"siglip2": dict(flexible([(3, 5), (2, 2)], 15, 3)[1], input_ids=ids), "siglip": dict(pixel_values=theirs, input_ids=ids),
              "clip": dict(pixel_values=theirs, input_ids=ids)}.get(name, dict(pixel_values=theirs))
    with torch.no_grad():
        one, two = model(**inputs), other(**inputs)
    assert torch.equal(one[0], two[0])


def test_old_and_new_names(tmp_path):
    """Files of towers with and without their prefix."""
    from safetensors.torch import load_file, save_file
    model = reference.siglip_vision()
    model.save_pretrained(tmp_path)
    plain = load_directory(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({f"vision_model.{key}": value for key, value in state.items()}, tmp_path / "model.safetensors")
    prefixed = load_directory(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), plain.params, prefixed.params))


def test_clip_of_the_old_end_mark_takes_the_highest_id(tmp_path):
    model = reference.clip(eos_token_id=2)
    model.save_pretrained(tmp_path)
    loaded = load_directory(tmp_path)
    ids, theirs = reference.tokens(5, 4, seed=3)
    ours, _ = jax.jit(lambda params, x: loaded.model.apply({"params": params}, x, method="encode_text"))(loaded.params, ids)
    with torch.no_grad():
        expected = model.get_text_features(theirs)
    expected = getattr(expected, "pooler_output", expected)
    assert relative_error(ours, expected / expected.norm(dim=-1, keepdim=True)) <= FLOAT32_MODEL


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    reference.siglip().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("change, message", [
    ({"model_type": "siglp"}, 'model_type: "siglp" is unknown. Did you mean "siglip"'),
    ({"model_type": 3}, "model_type is 3"),
    ({"vision_config": {**reference.IMAGE, "hidden_size": 10 ** 12}}, "hidden_size: 1000000000000 is not a whole number"),
    ({"vision_config": {**reference.IMAGE, "num_hidden_layers": "three"}}, "num_hidden_layers: 'three' is not a whole number"),
    ({"vision_config": {**reference.IMAGE, "num_attention_heads": 5}}, "num_attention_heads: 5 is not a divisor of the width 36"),
    ({"vision_config": 7}, "vision_config must be an object, got 7"),
    ({"vision_config": {**reference.IMAGE, "hidden_act": "gelo"}}, "hidden_act: 'gelo' is not supported. Did you mean \"gelu\""),
    ({"architectures": ["SiglipForImageClassification"]}, "architectures is 'SiglipForImageClassification'"),
])
def test_configs_that_cannot_be(siglip_folder, tmp_path, change, message):
    folder = siglip_folder
    config = {**json.loads((folder / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError) as error:
        vlm_jax.load(tmp_path)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPTextModelWithProjection", "SiglipTextModel", "Siglip2VisionModel"])
def test_towers_alone(name, tmp_path):
    if name.startswith("Siglip2"):
        sizes = {**reference.SIZES, "num_hidden_layers": 1, "num_patches": 9, "patch_size": 3, "vision_use_head": False}
        config = transformers.Siglip2VisionConfig(**sizes)
    elif "Text" in name:
        config = getattr(transformers, name.partition("Text")[0] + "TextConfig")(**reference.TEXT, **({"projection_dim": 10} if "CLIP" in name else {}))
    else:
        config = transformers.CLIPVisionConfig(**reference.IMAGE, projection_dim=10)
    model = reference.make(getattr(transformers, name), config)
    model.save_pretrained(tmp_path / "theirs")
    loaded = vlm_jax.load(tmp_path / "theirs")
    ids, ids_theirs = reference.tokens(2, 5)
    values, theirs = reference.pictures(2, 23, 23)
    if name.startswith("Siglip2"):
        values, inputs = flexible([(2, 4), (3, 3)], 9, 3)
    else:
        inputs = dict(input_ids=ids_theirs) if "Text" in name else dict(pixel_values=theirs)
    with torch.no_grad():
        expected = model(**inputs)
    expected = expected.last_hidden_state if name.startswith("Siglip2") else expected[0] if "Projection" in name else expected.pooler_output
    ours, _ = jax.jit(lambda params, x: loaded.model.apply({"params": params}, x))(loaded.params, ids if "Text" in name else values)
    assert relative_error(ours, expected) <= FLOAT32_MODEL
    vlm_jax.save(loaded, tmp_path / "ours")
    first, second = open_folder(tmp_path / "theirs"), open_folder(tmp_path / "ours")
    assert {n: first.read(n).tobytes() for n in first.names()} == {n: second.read(n).tobytes() for n in second.names()}

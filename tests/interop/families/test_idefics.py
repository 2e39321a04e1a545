"""Directories of transformers' IdeficsForVisionText2Text: the same logits and answers, and bit for bit back. The wide sweep is experiments/parity."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.parity.compare import compare, equal_trees, sample
from experiments.parity.greedy import greedy
from tests.models.parity import FLOAT32_BLOCK, FLOAT32_MODEL, perturb, relative_error
import vlm_jax
from vlm_jax import registry
from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.interop import families
from vlm_jax.interop.directory import build, load_directory, save_directory
from vlm_jax.interop.families import idefics
from vlm_jax.interop.safetensors import open_folder
from vlm_jax.language.gated_cross_attention import GatedCrossAttention, gated_block, gated_settings, media_visibility
from vlm_jax.restore import Loaded

VISION = dict(embed_dim=12, num_attention_heads=3, intermediate_size=20, num_hidden_layers=1, image_size=11, patch_size=5)
RESAMPLER = dict(resampler_n_latents=3, resampler_depth=2, resampler_n_heads=2, resampler_head_dim=5, qk_layer_norms_perceiver=True)
CONFIG = dict(vocab_size=31, additional_vocab_size=2, hidden_size=18, intermediate_size=22, num_hidden_layers=4, num_attention_heads=3, cross_layer_interval=2,
              alpha_type="vector", qk_layer_norms=True, use_resampler=True, vision_config=VISION, perceiver_config=RESAMPLER, max_position_embeddings=64)


@pytest.fixture(autouse=True)
def one_thread():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.set_num_threads(1)


def made(seed=0, **changes):
    import torch
    import transformers
    torch.manual_seed(seed)
    return perturb(transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**{**CONFIG, **changes})), seed, 0.2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pytest.importorskip("transformers")
    model, folder = made(), tmp_path_factory.mktemp("idefics")
    model.save_pretrained(folder, max_shard_size="20KB")
    return model, folder, vlm_jax.load(folder)


RNG = np.random.default_rng(0)
INPUTS = dict(images=RNG.normal(size=(3, 2, 11, 11, 3)).astype(np.float32), tokens=RNG.integers(0, 33, (3, 7)),
              media_index=np.array([[-1, 0, 0, 0, 1, 1, 1], [-1] * 7, [-1, -1, -1, -1, 0, 0, 0]]),
              valid=np.array([[True] * 7, [False] * 2 + [True] * 5, [True] * 5 + [False] * 2]))     # no padding, left (without pictures), right


def arguments(inputs):
    import torch
    number = inputs["images"].shape[1]
    return dict(input_ids=torch.from_numpy(inputs["tokens"]), attention_mask=torch.from_numpy(inputs["valid"]).long(),
                pixel_values=torch.from_numpy(inputs["images"].transpose(0, 1, 4, 2, 3).copy()),
                image_attention_mask=torch.from_numpy((inputs["media_index"][..., None] == np.arange(number)).astype(np.int64)))


def test_logits_and_the_gradient_of_the_gates(saved):
    import torch
    model, folder, loaded = saved
    assert (folder / "model.safetensors.index.json").exists()
    logits = model(**arguments(INPUTS)).logits
    valid = INPUTS["valid"]
    weights = RNG.normal(size=logits.shape).astype(np.float32) * valid[..., None]
    alphas = [layer.alpha_cross_attn for layer in model.model.gated_cross_attn_layers]
    gradients = torch.autograd.grad((torch.from_numpy(weights) * logits).sum(), alphas)

    def loss(gate):
        blocks = {**loaded.params["gated"]["blocks"], "gate_cross": gate}
        ours, out = loaded.model.apply({"params": {**loaded.params, "gated": {"blocks": blocks}}}, INPUTS)
        return jnp.sum(weights * ours), (ours, out["blocks"]["inserted"]["cross"])
    (_, (ours, cross)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(loaded.params["gated"]["blocks"]["gate_cross"])
    assert relative_error(np.asarray(ours)[valid], logits.detach().numpy()[valid]) <= FLOAT32_MODEL
    assert relative_error(gradient, torch.stack(gradients)[:, 0, 0]) <= FLOAT32_MODEL
    assert (np.asarray(cross)[:, INPUTS["media_index"] < 0] == 0).all() and np.abs(np.asarray(cross)[:, INPUTS["media_index"] >= 0]).min() > 0


@pytest.mark.parametrize("alpha, qk_norm", [("float", False), ("vector", True)])
def test_a_gated_block_alone(alpha, qk_norm):
    """To 1e-5; a token without a picture gets 0 from the attention, not a mean of all pictures."""
    import torch
    model = made(alpha_type=alpha, qk_layer_norms=qk_norm, num_hidden_layers=2)
    layer = model.model.gated_cross_attn_layers[0]
    x, media = RNG.normal(size=(2, 5, 18)).astype(np.float32), RNG.normal(size=(2, 6, 12)).astype(np.float32)
    index = np.array([[-1, 0, 0, 1, 1], [-1] * 5])
    allowed = torch.from_numpy(index[:, None, :, None] == np.repeat(np.arange(2), 3))
    with torch.no_grad():
        expected = layer(torch.from_numpy(x), image_hidden_states=torch.from_numpy(media),
                         image_attention_mask=torch.where(allowed, 0.0, torch.finfo(torch.float32).min),
                         cross_attention_gate=torch.from_numpy(index >= 0).float())
        without = x + (torch.tanh(layer.alpha_dense) * layer.mlp(layer.post_attention_layernorm(torch.from_numpy(x)))).numpy()
    settings = gated_settings(18, 3, mlp_dim=22, norm="rms", norm_eps=1e-6, norm_media=False, activation="silu", gated=True, qk_norm="rms" if qk_norm else None,
                              gate="vector" if alpha == "vector" else "scalar")
    ours = GatedCrossAttention(**gated_block(settings, 1))
    params = _block_params(layer, alpha, qk_norm)
    visibility = media_visibility(index, np.broadcast_to(np.repeat(np.arange(2), 3), (2, 6)))
    result, _ = jax.jit(lambda params, x, media: ours.apply({"params": params}, x, media, visibility))(params, x, media)
    assert relative_error(result, expected) <= FLOAT32_BLOCK
    assert relative_error(result[1], without[1]) <= FLOAT32_BLOCK


def _block_params(layer, alpha, qk_norm):
    """Written out by hand, beside the weight table."""
    state = {name: value.detach().numpy() for name, value in layer.named_parameters()}

    def heads(letter):
        weight = state[f"cross_attn.{letter}_proj.weight"]
        return {"kernel": weight.T.reshape(weight.shape[1], 3, 6)}
    attention = {"query": heads("q"), "key": heads("k"), "value": heads("v"), "out": {"kernel": state["cross_attn.o_proj.weight"].T.reshape(3, 6, 18)}}
    if qk_norm:
        attention |= {"query_norm": {"scale": state["cross_attn.q_layer_norm.weight"]}, "key_norm": {"scale": state["cross_attn.k_layer_norm.weight"]}}
    gates = {name: state[f"alpha_{theirs}"].reshape(-1) if alpha == "vector" else state[f"alpha_{theirs}"][0]
             for name, theirs in (("gate_cross", "cross_attn"), ("gate_mlp", "dense"))}
    return {"cross_attention": attention, "norm_cross": {"scale": state["input_layernorm.weight"]},
            "norm_mlp": {"scale": state["post_attention_layernorm.weight"]},
            "mlp": {name: {"kernel": state[f"mlp.{name}_proj.weight"].T} for name in ("gate", "up", "down")}, **gates}


def test_there_and_back(saved, tmp_path):
    import torch
    model, folder, loaded = saved
    vlm_jax.save(loaded, tmp_path / "again", shard_bytes=30_000)
    first, second = open_folder(folder), open_folder(tmp_path / "again")
    assert set(first.names()) == set(second.names()) and len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    for name in first.names():
        assert first.dtype(name) == second.dtype(name) and first.read(name).tobytes() == second.read(name).tobytes(), name
    assert load_directory(tmp_path / "again").model == loaded.model
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "again"))
    assert {key: after[key] for key in before if key not in ("transformers_version", "dtype")} == {
        key: value for key, value in before.items() if key not in ("transformers_version", "dtype")}
    # From the settings alone, without the config.json that it came with.
    save_directory(Loaded(loaded.model, loaded.params, None, {"model": loaded.config["model"]}, 0), tmp_path / "new")
    for path in (tmp_path / "again", tmp_path / "new"):
        assert equal_trees(load_directory(path).params, loaded.params)
        other, info = type(model).from_pretrained(path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            assert torch.equal(other.eval()(**arguments(INPUTS)).logits, model(**arguments(INPUTS)).logits)


def test_buffers_of_older_files_and_tied_rows(tmp_path):
    """Files of older versions hold position_ids and the frequencies of rotations; a file may hold the tied head too."""
    from safetensors.torch import load_file, save_file
    import torch
    model = made(tie_word_embeddings=True, use_resampler=False, num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    plain = load_directory(tmp_path)
    assert set(plain.params) == {"image", "gated", "language"} and "new_head" not in plain.params["language"]
    state = load_file(tmp_path / "model.safetensors")
    embedding = state["model.embed_tokens.additional_embedding.weight"]
    further = {"model.vision_model.embeddings.position_ids": torch.arange(5)[None], "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3),
               "model.gated_cross_attn_layers.0.cross_attn.rotary_emb.inv_freq": torch.ones(3), "lm_head.additional_fc.weight": embedding.clone()}
    save_file({**state, **further}, tmp_path / "model.safetensors")
    assert equal_trees(load_directory(tmp_path).params, plain.params)
    save_file({**state, **further, "lm_head.additional_fc.weight": embedding + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="differs from 'model.embed_tokens.additional_embedding.weight', which the config ties it to"):
        load_directory(tmp_path)


def test_an_interval_that_leaves_a_rest(tmp_path):
    """The class counts too few blocks then and cannot run; with the missing one it can, and ours is equal."""
    import torch
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
    model = made(num_hidden_layers=3)
    model.save_pretrained(tmp_path / "short")
    with pytest.raises(ConfigError, match="cross_layer_interval: 2 does not divide num_hidden_layers=3, and the file has 1 gated blocks for 2 places"):
        load_directory(tmp_path / "short")
    model.model.gated_cross_attn_layers.append(perturb(IdeficsGatedCrossAttentionLayer(model.config), 1, 0.3))
    model.save_pretrained(tmp_path / "whole")
    loaded = load_directory(tmp_path / "whole")
    with torch.no_grad():
        expected = model(**arguments(INPUTS)).logits
    ours, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, INPUTS)
    assert relative_error(np.asarray(ours)[INPUTS["valid"]], expected[torch.from_numpy(INPUTS["valid"])]) <= FLOAT32_MODEL
    with pytest.raises(ConfigError, match="every=2 does not divide the 3 layers"):
        save_directory(loaded, tmp_path / "back")


def test_pictures_of_another_size(tmp_path):
    """Positions are interpolated as the class does it, which is not what CLIP does."""
    import torch
    model = made(num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    loaded = load_directory(tmp_path)
    inputs = dict(INPUTS, images=RNG.normal(size=(3, 2, 16, 21, 3)).astype(np.float32))
    with torch.no_grad():
        expected = model(**arguments(inputs), interpolate_pos_encoding=True).logits
    ours, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, inputs)
    assert relative_error(np.asarray(ours)[inputs["valid"]], expected[torch.from_numpy(inputs["valid"])]) <= FLOAT32_MODEL


@pytest.mark.parametrize("seed", [2, pytest.param(0, marks=pytest.mark.slow), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(12, 20))])
def test_random_configurations_with_answers(seed, tmp_path):
    found = compare(sample("idefics", seed), tmp_path, dtypes=("float32",), also=greedy)
    assert found["float32"] <= FLOAT32_MODEL and found["export"] <= 1e-5 and found["round_trip"] and found["greedy_equal"] and found["greedy_tokens"] > 0


def test_cached_answers_with_pictures(saved):
    model, _, loaded = saved
    configuration = sample("idefics", 0)
    found = greedy(model, configuration, loaded, INPUTS, longest=5)
    assert found["greedy_equal"] and found["greedy_tokens"] >= 10


# What the releases say, in the words of their time.
def released(width, depth, mlp_dim, heads, eps):
    perceiver = dict(model_type="idefics", qk_layer_norms_perceiver=True, resampler_depth=6, resampler_head_dim=96, resampler_n_heads=16,
                     resampler_n_latents=64, use_resampler=True)
    vision = dict(attention_dropout=0.0, embed_dim=1280, hidden_act="gelu", image_size=224, initializer_factor=1.0, initializer_range=0.02,
                  intermediate_size=5120, layer_norm_eps=1e-05, model_type="idefics", num_attention_heads=16, num_channels=3, num_hidden_layers=32,
                  patch_size=14, vision_model_name="laion/CLIP-ViT-H-14-laion2B-s32B-b79K")
    return dict(additional_vocab_size=2, alpha_initializer="zeros", alpha_type="float", alphas_initializer_range=0.0, architectures=[idefics.CLASS],
                bos_token_id=1, cross_layer_activation_function="swiglu", cross_layer_interval=4, dropout=0.0, eos_token_id=2, ffn_dim=4 * width,
                freeze_lm_head=True, freeze_text_layers=True, freeze_text_module_exceptions=[], freeze_vision_layers=True,
                freeze_vision_module_exceptions=[], hidden_act="silu", hidden_size=width, initializer_range=0.02, intermediate_size=mlp_dim,
                max_new_tokens=100, max_sequence_length=2048, model_type="idefics", num_attention_heads=heads, num_hidden_layers=depth, pad_token_id=0,
                perceiver_config=perceiver, qk_layer_norms=True, rms_norm_eps=eps, tie_word_embeddings=False, torch_dtype="bfloat16", use_cache=True,
                use_resampler=True, vision_config=vision, vocab_size=32_000, word_embed_proj_dim=width)


@pytest.mark.parametrize("preset, config", [("idefics-9b", released(4096, 32, 11_008, 32, 1e-6)), ("idefics-80b", released(8192, 80, 22_016, 64, 1e-5))])
def test_released_sizes(preset, config):
    model, wanted = build(families.family("idefics").to_settings(config)), registry.build("idefics", preset)
    decoder = wanted.parts()[1].clone(scan=model.scan, num_kv_heads=wanted.parts()[1].num_heads, rope=model.parts()[1].rope)
    assert model.parts()[1] == decoder.clone(head_dim=decoder.width // decoder.num_heads) and dict(model.parts()[1].rope)["theta"] == 10_000
    assert model.gated_settings() == wanted.gated_settings()
    assert model.connector() == wanted.connector().clone(scan=model.scan)
    tower, other = model.parts()[0], wanted.parts()[0].clone(scan=model.scan)
    assert {key: value for key, value in vars(tower).items() if not key.startswith("_")} == {
        key: value for key, value in vars(other).items() if not key.startswith("_")}
    written = families.writer("idefics", wanted).to_config(wanted)
    assert build(families.family("idefics").to_settings({key: value for key, value in written.items() if value is not None})) == model


@pytest.mark.parametrize("change, message", [
    (dict(alpha_type="matrix"), "alpha_type: 'matrix' is not supported"), (dict(alpha_initializer="twos"), "alpha_initializer: 'twos'"),
    (dict(cross_layer_interval=9), "cross_layer_interval: 9 is not a whole number from 1 to 4"),
    (dict(num_attention_heads=4), "4 heads do not divide the width 18"),
    (dict(vision_config=dict(VISION, num_attention_heads=5)), "vision_config.num_attention_heads: 5 is not a divisor of the width 12"),
    (dict(perceiver_config=dict(RESAMPLER, resampler_depth=0)), "resampler_depth: 0 is not a whole number"),
    (dict(use_resampler="yes"), "use_resampler: 'yes'"),
])
def test_configs_that_cannot_be(change, message):
    with pytest.raises(ConfigError) as error:
        idefics.to_settings({"model_type": "idefics", **CONFIG, **change})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change, message", [
    (dict(image_features="unnormalised"), "image_features is 'unnormalised'"), (dict(gated=dict(first=1, every=2, num_heads=4)), "first is 1"),
    (dict(resampler=dict(num_latents=4)), "activation is 'squared_relu'"),
    (dict(language=dict(vocab_size=31, width=32, depth=4, mlp_dim=48, num_heads=4, norm="layer")), "norm"),
])
def test_models_that_the_class_does_not_have(change, message):
    model = registry.build("idefics", "test").clone(gated=dict(registry.settings("idefics", "test")["gated"], every=1))
    with pytest.raises(ConfigError, match=message):
        idefics.to_config(model.clone(**change))

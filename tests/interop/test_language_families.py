"""Language families against transformers through files, and what their config.json may say. The wide sweep is experiments/parity."""
import dataclasses

import jax
import numpy as np
import pytest

from experiments.parity.compare import compare, equal_trees, reference, relative_error
from experiments.parity.configurations import FAMILIES, sample
from experiments.parity.texts import batch, run_ours, run_reference
from vlm_jax import registry
from vlm_jax.errors import ConfigError
from vlm_jax.interop import families
from vlm_jax.interop.abstract import abstract_params
from vlm_jax.interop.directory import build, load_directory, save_directory
from vlm_jax.language.presets import BERT, DECODER, ENCODER_DECODER

# Chosen so that the options that changed most often are on, with padding left, right and none.
SEEDS = {"llama": 1, "mistral": 0, "qwen2": 1, "qwen3": 5, "gemma": 0, "gemma2": 1, "gemma3": 5, "gpt2": 4, "opt": 0, "gpt_neox": 4, "phi": 4, "mpt": 1,
         "t5": 1, "mt5": 2, "umt5": 5, "bert": 0, "bert_pretraining": 2, "bert_base": 1}


@pytest.fixture(autouse=True)
def one_thread():
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.set_num_threads(1)


@pytest.mark.parametrize("family", sorted(SEEDS))
def test_logits_round_trip_and_export(family, tmp_path):
    found = compare(sample(family, SEEDS[family]), tmp_path, dtypes=("float32",))
    assert found["float32"] <= 1e-4 and found["export"] <= 1e-5 and found["round_trip"]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("seed", range(12, 18))
def test_other_configurations(family, seed, tmp_path):
    found = compare(sample(family, seed), tmp_path)
    assert found["float32"] <= 1e-4 and found["export"] <= 1e-5 and found["round_trip"], found
    # The bar for every configuration. Some are known to miss it (experiments/parity/README.md).
    assert found["bfloat16"] <= 1.5 * found["reference_bfloat16"], found


def test_a_head_of_its_own_is_seen_in_the_tensors(tmp_path):
    """transformers writes tie_word_embeddings=true for T5 1.1 and FLAN, whose head is another matrix."""
    import torch
    configuration = dataclasses.replace(sample("t5", 0), padding="right")
    model = reference(configuration)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path / "theirs")
    model = type(model).from_pretrained(tmp_path / "theirs").eval()
    loaded, inputs = load_directory(tmp_path / "theirs"), batch(configuration)
    assert not loaded.model.tied
    expected = run_reference(model, configuration, inputs)
    assert relative_error(run_ours(loaded, configuration, inputs), expected) <= 1e-4
    save_directory(loaded, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    assert relative_error(run_reference(again, configuration, inputs), expected) <= 1e-5
    assert equal_trees(load_directory(tmp_path / "ours").params, loaded.params)


def as_read(config):
    """config.json as it is read again: None is left out, NULL is null."""
    return {key: as_read(value) if isinstance(value, dict) else None if value is families.NULL else value for key, value in config.items() if value is not None}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_config_says_the_same_after_a_round_trip(family):
    import transformers
    for seed in range(25):
        configuration = sample(family, seed)
        config = getattr(transformers, configuration.config_class)(**configuration.settings).to_dict() | {"architectures": [configuration.architecture]}
        known = families.family(config["model_type"])
        settings = known.to_settings(config)
        model = build(settings)
        written = as_read(known.to_config(model))
        again = build(families.family(written["model_type"]).to_settings(written))
        assert again == model, (seed, settings, written)


def said(model):
    """What a model's settings say, defaults written out."""
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model) if field.name not in ("parent", "name", "scan")}
    if "rope" in values:
        sizes = dict(head_dim=model.head_dim or model.width // model.num_heads, num_kv_heads=model.num_kv_heads or model.num_heads)
        rope = {"theta": 10_000.0, "fraction": 1.0, **{key: value for key, value in dict(model.rope).items() if value is not None}}
        values |= sizes | dict(attention_scale=model.attention_scale or sizes["head_dim"] ** -0.5, biases=set(model.biases),
                               rope=rope if model.positions == "rope" else None)
    if "relative" in values:
        values["relative"] = {"buckets": 32, "max_distance": 128, "shared": True, **dict(model.relative)}
    return values


@pytest.mark.parametrize("name, presets", [("decoder", DECODER), ("encoder_decoder", ENCODER_DECODER), ("bert", BERT)])
def test_published_sizes_can_be_written(name, presets):
    for preset in presets:
        model = registry.build(name, preset)
        if preset == "mpt-1b":    # transformers has no class for it
            with pytest.raises(ConfigError, match="qk_norm_whole=True"):
                families.writer(name, model).to_config(model)
            continue
        written = as_read(families.writer(name, model).to_config(model))
        again = build(families.family(written["model_type"]).to_settings(written))
        again = again.clone(tied=model.tied) if name == "encoder_decoder" else again      # whether T5 has a head of its own is said by the tensors
        assert said(again) == said(model), preset


# What releases say, in the words of their time.
RELEASES = {
    "gpt2": (dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], activation_function="gelu_new", layer_norm_epsilon=1e-5, n_ctx=1024, n_embd=768,
                  n_head=12, n_layer=12, n_positions=1024, vocab_size=50257), "gpt2"),
    "phi": (dict(model_type="phi", hidden_act="gelu_new", hidden_size=2560, intermediate_size=10240, layer_norm_eps=1e-5, max_position_embeddings=2048,
                 num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, partial_rotary_factor=0.4, qk_layernorm=False, rope_scaling=None,
                 rope_theta=10000.0, tie_word_embeddings=False, vocab_size=51200), "phi-2"),
    "pythia": (dict(model_type="gpt_neox", hidden_act="gelu", hidden_size=512, intermediate_size=2048, layer_norm_eps=1e-5, max_position_embeddings=2048,
                    num_attention_heads=8, num_hidden_layers=6, rotary_emb_base=10000, rotary_pct=0.25, tie_word_embeddings=False, use_parallel_residual=True,
                    vocab_size=50304), "pythia-70m"),
    "opt": (dict(model_type="opt", activation_function="relu", do_layer_norm_before=False, ffn_dim=4096, hidden_size=1024, max_position_embeddings=2048,
                 num_attention_heads=16, num_hidden_layers=24, vocab_size=50272, word_embed_proj_dim=512), "opt-350m"),
    "llama": (dict(model_type="llama", hidden_act="silu", head_dim=64, hidden_size=2048, intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False,
                   num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=500000.0,
                   rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192, rope_type="llama3"),
                   tie_word_embeddings=True, vocab_size=128256), "llama-3.2-1b"),
    "gemma": (dict(model_type="gemma", attention_bias=False, head_dim=256, hidden_act="gelu", hidden_activation=None, hidden_size=2048, intermediate_size=16384,
                   max_position_embeddings=8192, num_attention_heads=8, num_hidden_layers=18, num_key_value_heads=1, rms_norm_eps=1e-6, rope_theta=10000.0,
                   vocab_size=256000), "gemma-2b"),
    "gemma3": (dict(model_type="gemma3_text", head_dim=256, hidden_activation="gelu_pytorch_tanh", hidden_size=1152, intermediate_size=6912,
                    max_position_embeddings=32768, num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1, query_pre_attn_scalar=256,
                    rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000, sliding_window=512, sliding_window_pattern=6, vocab_size=262144),
               "gemma3-1b"),
    "mpt": (dict(model_type="mpt", attn_config=dict(alibi=True, attn_impl="torch", clip_qkv=None, prefix_lm=False, qk_ln=False, softmax_scale=None),
                 d_model=4096, expansion_ratio=4, learned_pos_emb=True, logit_scale=None, max_seq_len=2048, n_heads=32, n_layers=32, no_bias=True,
                 vocab_size=50432), "mpt-7b"),
}


@pytest.mark.parametrize("release", sorted(RELEASES))
def test_configs_of_releases_are_the_presets(release):
    config, preset = RELEASES[release]
    found = registry.build(**{key: value for key, value in families.family(config["model_type"]).to_settings(config).items() if value is not None})
    expected = registry.build("decoder", preset)
    assert said(found) == said(expected)


LLAMA = dict(model_type="llama", vocab_size=31, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3)
BASE = {
    "llama": LLAMA, "gemma2": LLAMA | dict(model_type="gemma2", num_key_value_heads=1), "qwen2": LLAMA | dict(model_type="qwen2", num_key_value_heads=1),
    "gpt2": dict(model_type="gpt2", vocab_size=31, n_embd=12, n_layer=2, n_head=3), "bert": LLAMA | dict(model_type="bert"),
    "mpt": dict(model_type="mpt", vocab_size=31, d_model=12, n_layers=2, n_heads=3),
    "t5": dict(model_type="t5", vocab_size=31, d_model=12, d_kv=4, d_ff=20, num_layers=2, num_heads=3),
}


@pytest.mark.parametrize("family, change, message", [
    ("llama", dict(hidden_act="prelu"), "hidden_act: 'prelu' is not supported"),
    ("llama", dict(num_key_value_heads=2), "num_key_value_heads: 2 does not divide num_attention_heads=3"),
    ("llama", dict(rope_parameters=dict(rope_type="mrope")), "rope_parameters.rope_type: 'mrope' is not supported"),
    ("llama", dict(rope_scaling=dict(type="linear", factor=2.0), partial_rotary_factor=0.5), None),
    ("llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, partial_rotary_factor=0.5)), "partial_rotary_factor: 0.5 is not supported"),
    ("llama", dict(quantization_config=dict(bits=4)), "quantization_config"),
    ("llama", dict(is_causal=False), "is_causal: False is not supported"),
    ("llama", dict(hidden_size=13), "3 heads do not divide the width 13"),
    ("llama", dict(hidden_size=True), "hidden_size"),
    ("gemma2", dict(use_bidirectional_attention=True), "use_bidirectional_attention: True is not supported"),
    ("gemma2", dict(layer_types=["full_attention"]), "layer_types has 1 entries for 2 layers"),
    ("gemma2", dict(sliding_window=None), "sliding_window is missing"),
    ("qwen2", dict(layer_types=["chunked_attention"] * 2), "layer_types"),
    ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
    ("mpt", dict(attn_config=dict(alibi=False)), "attn_config.alibi: False is not supported"),
    ("mpt", dict(logit_scale=0.5), "logit_scale"),
    ("t5", dict(feed_forward_proj="gated-prelu"), 'feed_forward_proj: "gated-prelu" is not supported'),
    ("t5", dict(relative_attention_max_distance=8), "relative_attention_max_distance: 8"),
    ("bert", dict(position_embedding_type="relative_key"), "position_embedding_type"),
    ("bert", dict(is_decoder=True), "is_decoder"),
])
def test_what_is_not_computed_is_refused(family, change, message):
    config = BASE[family] | change
    if message is None:      # the reference rotates whole heads there, and reads the field nowhere
        assert families.family(family).to_settings(config)["rope"]["scaling"] == {"kind": "linear", "factor": 2.0}
        return
    with pytest.raises(ConfigError, match=message):
        families.family(family).to_settings(config)


def test_a_model_that_no_family_has_is_refused():
    for change, message in ((dict(clip_qkv=2.0), "clip_qkv=2.0 cannot be written as llama"), (dict(positions="alibi"), "norm='rms' cannot be written as mpt")):
        model = registry.build("decoder", "test", **change)
        with pytest.raises(ConfigError, match=message):
            families.writer("decoder", model).to_config(model)


def test_a_decoder_of_our_own_loads_in_transformers(tmp_path):
    import torch
    import transformers

    from vlm_jax.interop.directory import Imported
    model = registry.build("decoder", "test")
    tokens = np.arange(7)[None] * 5 % 61
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract_params(model))
    save_directory(Imported(model, params, None, {"model": {"name": "decoder"}}, {}), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    ours = jax.jit(lambda params: model.apply({"params": params}, {"tokens": tokens})[0])(params)
    assert relative_error(np.asarray(ours), expected) <= 1e-4

"""Random configurations of the language families: every option of transformers' config classes that changes what is computed, at odd sizes.

`sample(family, seed)` is a pure function of its arguments.
"""
from collections.abc import Callable
import dataclasses
import random
from typing import Any

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "quick_gelu", "tanh", "gelu_fast", "mish", "hardswish", "sigmoid",
               "leaky_relu", "relu6", "swish", "linear", "gelu_accurate", "gelu_python")


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One model of the reference and the texts that it reads.

    Attributes:
      family: a key of `FAMILIES`.
      architecture, config_class: names of classes of transformers.
      settings: arguments of the config class.
      rows, length, target_length: of the batch; `padding` is "left", "right" or "none".
      seed: of weights and tokens.
    """
    family: str
    architecture: str
    config_class: str
    settings: dict[str, Any]
    rows: int
    length: int
    target_length: int
    padding: str
    seed: int


def sample(family: str, seed: int) -> Configuration:
    """Configuration number `seed` of a family; those of equal seed modulo 4 have the same rows and padding."""
    rng = random.Random(f"{family} {seed}")
    architecture, config_class, draw = FAMILIES[family]
    settings = draw(rng)
    rows, padding = [(5, "left"), (5, "right"), (1, "none"), (1, "left")][seed % 4]
    limit = min(settings.get(key, 64) for key in ("n_positions", "max_seq_len")) if config_class != "OPTConfig" else settings["max_position_embeddings"]
    if config_class == "BertConfig":
        limit = settings["max_position_embeddings"]
    length = min(rng.randint(5, 23), limit)
    return Configuration(family, architecture, config_class, settings, rows, length, rng.randint(3, 11), padding, seed)


def _sizes(rng: random.Random, names: str = "hidden_size num_hidden_layers num_attention_heads intermediate_size") -> dict[str, Any]:
    """Sizes that share no factor on purpose; the heads divide the width, which need not be even."""
    width, depth, heads, mlp = names.split()
    count = rng.choice([1, 2, 3, 5, 6, 7])
    made = {"vocab_size": rng.randrange(31, 120, 2), width: count * rng.choice([2, 4, 6, 8, 10]), depth: rng.randint(1, 4), heads: count,
            mlp: rng.randint(9, 61)}
    return made | {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _rope(rng: random.Random, settings: dict[str, Any], head_dim: int, partial: bool = False, odd: bool = False) -> dict[str, Any]:
    """Rotary settings for a model whose texts may be longer than max_position_embeddings; `odd`: of a part of an odd number of features too."""
    settings["max_position_embeddings"] = rng.choice([7, 12, 16, 64])
    made: dict[str, Any] = {"rope_theta": rng.choice([10_000.0, 500.0, 1_000_000.0])}
    rotated = head_dim
    if partial:
        parts = [part for part in (0.25, 0.4, 0.5, 0.75, 1.0) if odd or int(head_dim * part) >= 2 and int(head_dim * part) % 2 == 0]
        made["partial_rotary_factor"] = rng.choice(parts)
        rotated = int(head_dim * made["partial_rotary_factor"])
    kind = rng.choice(["default", "default", "linear", "dynamic", "llama3", "yarn", "longrope"])
    if (kind == "dynamic" and rotated == 2) or (kind in ("yarn", "dynamic") and (rotated % 2 or not rotated)):   # the reference fails there
        kind = "linear"
    made["rope_type"] = kind
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        made["factor"] = rng.choice([2.0, 3.5, 8.0])
    if kind == "llama3":
        low = rng.choice([0.5, 1.0])
        made |= {"low_freq_factor": low, "high_freq_factor": rng.choice([2.0, 4.0]), "original_max_position_embeddings": rng.choice([4, 6, 32])}
    if kind == "yarn":
        made["original_max_position_embeddings"] = rng.choice([4, 6, 32])
        for key, values in (("attention_factor", [0.8, 1.3]), ("beta_fast", [8.0, 32.0]), ("beta_slow", [1.0, 2.0]), ("truncate", [True, False])):
            if rng.random() < 0.4:
                made[key] = rng.choice(values)
        if rng.random() < 0.3:
            made |= {"mscale": 0.7, "mscale_all_dim": 1.4}
    if kind == "longrope":
        count = (rotated + 1) // 2
        made |= {"short_factor": [round(rng.uniform(1, 2), 3) for _ in range(count)], "long_factor": [round(rng.uniform(2, 6), 3) for _ in range(count)],
                 "original_max_position_embeddings": rng.choice([4, 8, 32])}
        if rng.random() < 0.5:
            made["factor"] = rng.choice([1.0, 4.0])
        if rng.random() < 0.3:
            made["attention_factor"] = 1.2
    return made


def _groups(rng: random.Random, heads: int) -> int:
    return rng.choice([count for count in range(1, heads + 1) if heads % count == 0])


def _layer_types(rng: random.Random, depth: int) -> list[str]:
    return [rng.choice(["sliding_attention", "full_attention"]) for _ in range(depth)]


def _llama_like(rng: random.Random, free_head: bool = True) -> dict[str, Any]:
    made = _sizes(rng)
    made["num_key_value_heads"] = _groups(rng, made["num_attention_heads"])
    head_dim = made["hidden_size"] // made["num_attention_heads"]
    if free_head:
        made["head_dim"] = head_dim = rng.choice([head_dim, 2, 4, 6, 10, 14])
    made |= {"rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3]), "hidden_act": rng.choice(["silu", *ACTIVATIONS]), "tie_word_embeddings": rng.random() < 0.5}
    made["rope_parameters"] = _rope(rng, made, head_dim)
    return made


def _llama(rng: random.Random) -> dict[str, Any]:
    return _llama_like(rng) | {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}


def _any_width(rng: random.Random, made: dict[str, Any]) -> dict[str, Any]:
    """A width that the heads need not divide."""
    return made | {"hidden_size": rng.randint(7, 41)}


def _mistral(rng: random.Random) -> dict[str, Any]:
    return _any_width(rng, _llama_like(rng)) | {"sliding_window": rng.choice([None, 1, 3, 5, 40])}


def _qwen(rng: random.Random, free_head: bool) -> dict[str, Any]:
    made = _llama_like(rng, free_head)
    made |= {"use_sliding_window": rng.random() < 0.7, "sliding_window": rng.choice([2, 3, 7]), "max_window_layers": rng.randint(0, 3)}
    if made["use_sliding_window"] and rng.random() < 0.5:
        made["layer_types"] = _layer_types(rng, made["num_hidden_layers"])
    return made


def _qwen2(rng: random.Random) -> dict[str, Any]:
    return _qwen(rng, False)


def _qwen3(rng: random.Random) -> dict[str, Any]:
    return _any_width(rng, _qwen(rng, True)) | {"attention_bias": rng.random() < 0.5}


def _gemma(rng: random.Random) -> dict[str, Any]:
    return _any_width(rng, _llama_like(rng)) | {"attention_bias": rng.random() < 0.5, "tie_word_embeddings": rng.random() < 0.8}


def _gemma2(rng: random.Random) -> dict[str, Any]:
    made = _llama_like(rng)
    made["hidden_activation"] = made.pop("hidden_act")
    made |= {"attention_bias": rng.random() < 0.5, "query_pre_attn_scalar": rng.choice([3, 8, 144]), "sliding_window": rng.choice([2, 3, 6]),
             "final_logit_softcapping": rng.choice([None, 1.5, 30.0]), "attn_logit_softcapping": rng.choice([None, 0.7, 50.0])}
    if rng.random() < 0.5:
        made["layer_types"] = _layer_types(rng, made["num_hidden_layers"])
    return made


def _gemma3(rng: random.Random) -> dict[str, Any]:
    made = _gemma2(rng)
    if "layer_types" not in made and rng.random() < 0.7:
        made["sliding_window_pattern"] = rng.randint(1, 4)
    # The reference cannot stretch one kind of layer by longrope or dynamic NTK.
    ropes = []
    while len(ropes) < 2:
        rope = _rope(rng, made, made["head_dim"])
        rope.pop("truncate", None)
        if rope["rope_type"] in ("default", "linear", "llama3", "yarn"):
            ropes.append(rope)
    made["rope_parameters"] = {"full_attention": ropes[0], "sliding_attention": ropes[1]}
    return made


def _gpt2(rng: random.Random) -> dict[str, Any]:
    made = _sizes(rng, "n_embd n_layer n_head n_inner")
    if rng.random() < 0.3:
        made["n_inner"] = None
    return made | {"n_positions": rng.randint(9, 30), "activation_function": rng.choice(["gelu_new", *ACTIVATIONS]), "scale_attn_weights": rng.random() < 0.7,
                   "scale_attn_by_inverse_layer_idx": rng.random() < 0.4, "reorder_and_upcast_attn": rng.random() < 0.3,
                   "layer_norm_epsilon": rng.choice([1e-5, 1e-3]), "tie_word_embeddings": rng.random() < 0.7}


def _opt(rng: random.Random) -> dict[str, Any]:
    made = _sizes(rng, "hidden_size num_hidden_layers num_attention_heads ffn_dim")
    return made | {"max_position_embeddings": rng.randint(9, 30), "do_layer_norm_before": rng.random() < 0.6,
                   "activation_function": rng.choice(["relu", *ACTIVATIONS]),
                   "word_embed_proj_dim": rng.choice([None, 5, 11]), "enable_bias": rng.random() < 0.7, "layer_norm_elementwise_affine": rng.random() < 0.7,
                   "_remove_final_layer_norm": rng.random() < 0.3, "tie_word_embeddings": rng.random() < 0.7}


def _gpt_neox(rng: random.Random) -> dict[str, Any]:
    made = _sizes(rng)
    made["rope_parameters"] = _rope(rng, made, made["hidden_size"] // made["num_attention_heads"], partial=True, odd=True)
    return made | {"use_parallel_residual": rng.random() < 0.6, "hidden_act": rng.choice(["gelu", *ACTIVATIONS]), "attention_bias": rng.random() < 0.6,
                   "layer_norm_eps": rng.choice([1e-5, 1e-3]), "tie_word_embeddings": rng.random() < 0.4}


def _phi(rng: random.Random) -> dict[str, Any]:
    made = _sizes(rng)
    made["rope_parameters"] = _rope(rng, made, made["hidden_size"] // made["num_attention_heads"], partial=True)
    return made | {"num_key_value_heads": _groups(rng, made["num_attention_heads"]), "qk_layernorm": rng.random() < 0.5,
                   "hidden_act": rng.choice(["gelu_new", *ACTIVATIONS]), "layer_norm_eps": rng.choice([1e-5, 1e-3]), "tie_word_embeddings": rng.random() < 0.4}


def _mpt(rng: random.Random) -> dict[str, Any]:
    made = _sizes(rng, "d_model n_layers n_heads unused")
    made.pop("unused")
    attention = {"clip_qkv": rng.choice([None, 0.5, 2.0]), "softmax_scale": rng.choice([None, 0.3])}
    return made | {"max_seq_len": rng.randint(9, 30), "attn_config": attention, "layer_norm_epsilon": rng.choice([1e-5, 1e-3]),
                   "no_bias": rng.random() < 0.8, "tie_word_embeddings": rng.random() < 0.7}


def _t5(rng: random.Random) -> dict[str, Any]:
    made = _sizes(rng, "d_model num_layers num_heads d_ff") | {"pad_token_id": 0}
    names = [("gated-" if rng.random() < 0.5 else "") + rng.choice(["gelu", "relu", *ACTIVATIONS]) for _ in range(1)]
    return made | {"d_model": rng.randint(7, 41), "d_kv": rng.randint(3, 13), "num_decoder_layers": rng.choice([None, 1, 2, 3]), "feed_forward_proj": names[0],
                   "relative_attention_num_buckets": rng.choice([8, 10, 13, 32]), "relative_attention_max_distance": rng.choice([17, 40, 128]),
                   "layer_norm_epsilon": rng.choice([1e-6, 1e-3]), "decoder_start_token_id": 0}


def _t5_any(rng: random.Random) -> dict[str, Any]:
    """T5 1.0 scales what its head reads, 1.1 and FLAN do not."""
    return _t5(rng) | {"tie_word_embeddings": rng.random() < 0.5}


def _bert(rng: random.Random) -> dict[str, Any]:
    made = _sizes(rng) | {"pad_token_id": 0}
    return made | {"max_position_embeddings": rng.randint(25, 40), "type_vocab_size": rng.randint(1, 4), "hidden_act": rng.choice(["gelu", *ACTIVATIONS]),
                   "layer_norm_eps": rng.choice([1e-12, 1e-3])}


FAMILIES: dict[str, tuple[str, str, Callable[[random.Random], dict[str, Any]]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _llama),
    "mistral": ("MistralForCausalLM", "MistralConfig", _mistral),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _qwen3),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _gemma),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _gemma2),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _gemma3),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _gpt2),
    "opt": ("OPTForCausalLM", "OPTConfig", _opt),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _gpt_neox),
    "phi": ("PhiForCausalLM", "PhiConfig", _phi),
    "mpt": ("MptForCausalLM", "MptConfig", _mpt),
    "t5": ("T5ForConditionalGeneration", "T5Config", _t5_any),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", _t5),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", _t5),
    "bert": ("BertForMaskedLM", "BertConfig", _bert),
    "bert_pretraining": ("BertForPreTraining", "BertConfig", _bert),
    "bert_base": ("BertModel", "BertConfig", _bert),
}

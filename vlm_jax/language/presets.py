"""Published sizes of language models, as settings of `Decoder`, `EncoderDecoder` and `Bert`.

Sizes are those of the papers' tables and of the released weights; vocabularies are the rows of the released tables, padding included. A preset "test" is small
enough for tests.
"""
from typing import Any

Preset = dict[str, Any]


def _sizes(width: int, depth: int, mlp_dim: int, num_heads: int, num_kv_heads: int | None = None, head_dim: int | None = None) -> Preset:
    sizes = dict(width=width, depth=depth, mlp_dim=mlp_dim, num_heads=num_heads)
    return sizes | ({} if num_kv_heads is None else dict(num_kv_heads=num_kv_heads)) | ({} if head_dim is None else dict(head_dim=head_dim))


# Touvron et al., "LLaMA" and "Llama 2" (2023); Llama 3 (2024), whose long context stretches the rotary base.
_LLAMA = dict(norm="rms", norm_eps=1e-5, activation="silu", gated=True, tied=False)
_LLAMA2 = dict(_LLAMA, vocab_size=32_000, max_positions=4096)
_LLAMA3 = dict(_LLAMA, vocab_size=128_256, max_positions=8192, rope=dict(theta=500_000.0))
_LLAMA32 = dict(_LLAMA3, tied=True, max_positions=131_072, rope=dict(theta=500_000.0, scaling=dict(
    kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)))
# Jiang et al., "Mistral 7B" (2023), table 1.
_MISTRAL = dict(_LLAMA, **_sizes(4096, 32, 14_336, 32, 8), max_positions=32_768)
# Yang et al., "Qwen2" (2024), table 1; Qwen3 (2025) normalises queries and keys and drops the biases.
_QWEN2 = dict(_LLAMA, norm_eps=1e-6, biases=("query", "key", "value"), vocab_size=151_936, max_positions=131_072, rope=dict(theta=1_000_000.0))
_QWEN3 = dict(_LLAMA, norm_eps=1e-6, qk_norm="rms", vocab_size=151_936, max_positions=40_960, rope=dict(theta=1_000_000.0))


def _gemma(width: int, *sizes: int, **settings: Any) -> Preset:
    """Gemma Team (2024): scale of the norms stored minus one, embeddings times the root of the width, a gated tanh-GELU."""
    return dict(_sizes(width, *sizes), norm="rms_plus_one", norm_eps=1e-6, activation="gelu_tanh", gated=True, tied=True, embed_scale=width ** 0.5) | settings


def _gemma2(*sizes: int, query_scale: int) -> Preset:
    """Gemma 2 (2024), section 2: norms before and after, every other layer (the first too) in a window, soft caps."""
    return _gemma(*sizes, vocab_size=256_000, max_positions=8192, norm_place="both", window=4096, windowed=(True, False), attention_soft_cap=50.0,
                  logits_soft_cap=30.0, attention_scale=query_scale ** -0.5)


def _gemma3(*sizes: int, window: int, query_scale: int = 256, vocab_size: int = 262_208, long: bool = True) -> Preset:
    """Gemma 3 (2025), section 2: five layers in a window to one that reads all, of another rotary base; normalised queries and keys instead of soft caps."""
    rope = dict(theta=1_000_000.0, local_theta=10_000.0) | (dict(scaling=dict(kind="linear", factor=8.0)) if long else {})
    return _gemma(*sizes, vocab_size=vocab_size, max_positions=131_072 if long else 32_768, norm_place="both", qk_norm="rms_plus_one", window=window,
                  windowed=(True,) * 5 + (False,), rope=rope, attention_scale=query_scale ** -0.5)


_ALL = ("query", "key", "value", "out", "up", "down")


def _gpt2(width: int, depth: int, num_heads: int) -> Preset:
    """Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 2."""
    return dict(_sizes(width, depth, 4 * width, num_heads), vocab_size=50_257, norm="layer", norm_eps=1e-5, activation="gelu_tanh", gated=False, biases=_ALL,
                positions="learned", max_positions=1024, tied=True)


def _opt(width: int, depth: int, num_heads: int, **settings: Any) -> Preset:
    """Zhang et al., "OPT" (2022), table 1. The table of positions begins with two rows that are never read."""
    return dict(_sizes(width, depth, 4 * width, num_heads), vocab_size=50_272, norm="layer", norm_eps=1e-5, activation="relu", gated=False, biases=_ALL,
                positions="learned", max_positions=2048, position_offset=2, tied=True) | settings


def _pythia(width: int, depth: int, num_heads: int, vocab_size: int = 50_304) -> Preset:
    """Biderman et al., "Pythia" (2023), table 1: attention and MLP side by side, a quarter of each head rotated."""
    return dict(_sizes(width, depth, 4 * width, num_heads), vocab_size=vocab_size, norm="layer", norm_eps=1e-5, parallel=True, activation="gelu", gated=False,
                biases=_ALL, rope=dict(fraction=0.25), max_positions=2048, tied=False)


DECODER: dict[str, Preset] = {
    "test": dict(_LLAMA, **_sizes(24, 2, 40, 4, 2), vocab_size=61, max_positions=64),
    "llama-2-7b": dict(_LLAMA2, **_sizes(4096, 32, 11_008, 32)),
    "llama-2-13b": dict(_LLAMA2, **_sizes(5120, 40, 13_824, 40)),
    "llama-2-70b": dict(_LLAMA2, **_sizes(8192, 80, 28_672, 64, 8)),
    "llama-3-8b": dict(_LLAMA3, **_sizes(4096, 32, 14_336, 32, 8)),
    "llama-3-70b": dict(_LLAMA3, **_sizes(8192, 80, 28_672, 64, 8)),
    "llama-3.2-1b": dict(_LLAMA32, **_sizes(2048, 16, 8192, 32, 8, 64)),
    "llama-3.2-3b": dict(_LLAMA32, **_sizes(3072, 28, 8192, 24, 8, 128)),
    "mistral-7b-v0.1": dict(_MISTRAL, vocab_size=32_000, window=4096),
    "mistral-7b-v0.3": dict(_MISTRAL, vocab_size=32_768, rope=dict(theta=1_000_000.0)),
    "qwen2-0.5b": dict(_QWEN2, **_sizes(896, 24, 4864, 14, 2), tied=True),
    "qwen2-1.5b": dict(_QWEN2, **_sizes(1536, 28, 8960, 12, 2), tied=True),
    "qwen2-7b": dict(_QWEN2, **_sizes(3584, 28, 18_944, 28, 4), vocab_size=152_064),
    "qwen3-0.6b": dict(_QWEN3, **_sizes(1024, 28, 3072, 16, 8, 128), tied=True),
    "qwen3-1.7b": dict(_QWEN3, **_sizes(2048, 28, 6144, 16, 8, 128), tied=True),
    "qwen3-4b": dict(_QWEN3, **_sizes(2560, 36, 9728, 32, 8, 128), tied=True),
    "qwen3-8b": dict(_QWEN3, **_sizes(4096, 36, 12_288, 32, 8, 128)),
    "gemma-2b": _gemma(2048, 18, 16_384, 8, 1, 256, vocab_size=256_000, max_positions=8192),
    "gemma-7b": _gemma(3072, 28, 24_576, 16, 16, 256, vocab_size=256_000, max_positions=8192),
    "gemma2-2b": _gemma2(2304, 26, 9216, 8, 4, 256, query_scale=256),
    "gemma2-9b": _gemma2(3584, 42, 14_336, 16, 8, 256, query_scale=256),
    "gemma2-27b": _gemma2(4608, 46, 36_864, 32, 16, 128, query_scale=144),
    "gemma3-270m": _gemma3(640, 18, 2048, 4, 1, 256, window=512, vocab_size=262_144, long=False),
    "gemma3-1b": _gemma3(1152, 26, 6912, 4, 1, 256, window=512, vocab_size=262_144, long=False),
    "gemma3-4b": _gemma3(2560, 34, 10_240, 8, 4, 256, window=1024),
    "gemma3-12b": _gemma3(3840, 48, 15_360, 16, 8, 256, window=1024),
    "gemma3-27b": _gemma3(5376, 62, 21_504, 32, 16, 128, window=1024, query_scale=168),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, embed_dim=512, norm_place="post", final_norm=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "pythia-70m": _pythia(512, 6, 8),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "pythia-6.9b": _pythia(4096, 32, 32, 50_432),
    "pythia-12b": _pythia(5120, 36, 40, 50_688),
    # Javaheripi et al., "Phi-2" (2023): one norm for attention and MLP, side by side.
    "phi-2": dict(_sizes(2560, 32, 10_240, 32), vocab_size=51_200, norm="layer", norm_eps=1e-5, parallel=True, shared_norm=True, activation="gelu_tanh",
                  gated=False, biases=(*_ALL, "head"), rope=dict(fraction=0.4), max_positions=2048, tied=False),
    # MosaicML (2023): ALiBi, nothing has a bias.
    "mpt-1b": dict(_sizes(2048, 24, 8192, 16), vocab_size=50_368, norm="layer_no_bias", norm_eps=1e-5, activation="gelu", gated=False, positions="alibi",
                   max_positions=2048, tied=True, qk_norm="layer_no_bias", qk_norm_whole=True),
    "mpt-7b": dict(_sizes(4096, 32, 16_384, 32), vocab_size=50_432, norm="layer_no_bias", norm_eps=1e-5, activation="gelu", gated=False, positions="alibi",
                   max_positions=2048, tied=True),
}


def _t5(width: int, depth: int, mlp_dim: int, num_heads: int, head_dim: int = 64) -> Preset:
    """Raffel et al., "T5" (2020), table 14: ReLU, one table for input and output, whose logits are divided by the root of the width."""
    return dict(vocab_size=32_128, width=width, encoder_depth=depth, decoder_depth=depth, mlp_dim=mlp_dim, num_heads=num_heads, head_dim=head_dim,
                norm="rms", norm_eps=1e-6, activation="relu", gated=False, tied=True, head_scale=width ** -0.5)


def _t5_v1_1(vocab_size: int, *sizes: int, shared: bool = True) -> Preset:
    """T5 1.1: a gated tanh-GELU and a head of its own; mT5 (Xue et al. 2021); UMT5 (Chung et al. 2023), which has a relative table in each layer."""
    settings = dict(_t5(*sizes), vocab_size=vocab_size, activation="gelu_tanh", gated=True, tied=False, head_scale=None)
    return settings | ({} if shared else dict(relative=dict(shared=False)))


_V1_1_SIZES = {"small": (512, 8, 1024, 6), "base": (768, 12, 2048, 12), "large": (1024, 24, 2816, 16), "xl": (2048, 24, 5120, 32),
               "xxl": (4096, 24, 10_240, 64)}

ENCODER_DECODER: dict[str, Preset] = {
    "test": dict(_t5(24, 2, 40, 3, 8), vocab_size=61),
    "t5-small": _t5(512, 6, 2048, 8),
    "t5-base": _t5(768, 12, 3072, 12),
    "t5-large": _t5(1024, 24, 4096, 16),
    "t5-3b": _t5(1024, 24, 16_384, 32, 128),
    "t5-11b": _t5(1024, 24, 65_536, 128, 128),
    **{f"t5-v1.1-{size}": _t5_v1_1(32_128, *numbers) for size, numbers in _V1_1_SIZES.items()},
    **{f"flan-t5-{size}": _t5_v1_1(32_128, *numbers) for size, numbers in _V1_1_SIZES.items()},
    **{f"mt5-{size}": _t5_v1_1(250_112, *numbers) for size, numbers in _V1_1_SIZES.items()},
    **{f"umt5-{size}": _t5_v1_1(256_384, *numbers, shared=False) for size, numbers in _V1_1_SIZES.items() if size != "large"},
}


def _bert(vocab_size: int, width: int = 768, depth: int = 12, num_heads: int = 12) -> Preset:
    """Devlin et al., "BERT" (2019), section 3."""
    return dict(vocab_size=vocab_size, type_vocab_size=2, max_positions=512, width=width, depth=depth, mlp_dim=4 * width, num_heads=num_heads, norm_eps=1e-12,
                activation="gelu")


BERT: dict[str, Preset] = {
    "test": dict(_bert(61, 24, 2, 3), max_positions=32),
    "bert-base-uncased": _bert(30_522),
    "bert-base-cased": _bert(28_996),
    "bert-large-uncased": _bert(30_522, 1024, 24, 16),
    "bert-large-cased": _bert(28_996, 1024, 24, 16),
}

"""Rows and settings that several families share: norms, linear maps, attention and MLP of an encoder layer."""
from collections.abc import Mapping
from typing import Any

from vlm_jax.errors import ConfigError
from vlm_jax.interop.config_reader import MAX_DEPTH, MAX_LENGTH, MAX_PIXELS, MAX_VOCABULARY, MAX_WIDTH, Section
from vlm_jax.interop.table import Row
from vlm_jax.interop.transforms import Transform, conv_patches, heads_bias, heads_in, heads_out, linear

# hidden_act of transformers -> our name
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu", "relu": "relu",
               "relu2": "squared_relu", "silu": "silu", "swish": "silu"}
ACTIVATIONS_OUT = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu", "relu": "relu", "squared_relu": "relu2", "silu": "silu"}


def norm(theirs: str, ours: str, bias: bool = True) -> list[Row]:
    """A normalisation: weight and bias <-> scale and bias."""
    return [Row(f"{theirs}.weight", f"{ours}/scale"), *([Row(f"{theirs}.bias", f"{ours}/bias")] if bias else [])]


def dense(theirs: str, ours: str, bias: bool = True, kernel: Transform = linear) -> list[Row]:
    """A linear map: weight [out, in] <-> kernel [in, out], and the bias."""
    return [Row(f"{theirs}.weight", f"{ours}/kernel", kernel), *([Row(f"{theirs}.bias", f"{ours}/bias")] if bias else [])]


def to_heads(theirs: str, ours: str, heads: int, bias: bool = True) -> list[Row]:
    """A projection to heads (query, key, value)."""
    return [Row(f"{theirs}.weight", f"{ours}/kernel", heads_out(heads)), *([Row(f"{theirs}.bias", f"{ours}/bias", heads_bias(heads))] if bias else [])]


def from_heads(theirs: str, ours: str, heads: int, bias: bool = True) -> list[Row]:
    """The output projection of attention."""
    return dense(theirs, ours, bias, heads_in(heads))


def clip_layers(theirs: str, ours: str, heads: int) -> list[Row]:
    """The layers of CLIP's and SigLIP's encoders: `theirs`.layers.{i} <-> `ours`/blocks."""
    layer, blocks = theirs + ".layers.{i}", f"{ours}/blocks" if ours else "blocks"
    rows = [row for name, letter in (("query", "q"), ("key", "k"), ("value", "v"))
            for row in to_heads(f"{layer}.self_attn.{letter}_proj", f"{blocks}/attention/{name}", heads)]
    return [*rows, *from_heads(f"{layer}.self_attn.out_proj", f"{blocks}/attention/out", heads),
            *norm(f"{layer}.layer_norm1", f"{blocks}/norm_attention"), *norm(f"{layer}.layer_norm2", f"{blocks}/norm_mlp"),
            *dense(f"{layer}.mlp.fc1", f"{blocks}/mlp/up"), *dense(f"{layer}.mlp.fc2", f"{blocks}/mlp/down")]


def conv_stem(theirs: str, ours: str, bias: bool = True) -> list[Row]:
    """The convolution that embeds patches."""
    return dense(theirs, ours, bias, conv_patches)


def tower_settings(section: Section, act: str = "gelu_pytorch_tanh", eps: float = 1e-6, width: int = 768, mlp_dim: int = 3072, depth: int = 12,
                   heads: int = 12) -> dict[str, Any]:
    """Sizes, activation and epsilon that CLIP's and SigLIP's configs of a tower hold; the arguments are the family's defaults."""
    width = section.integer("hidden_size", width, most=MAX_WIDTH)
    section.require("attention_dropout", section.values.get("attention_dropout"), None, "any value is taken")
    return dict(width=width, depth=section.integer("num_hidden_layers", depth, most=MAX_DEPTH), num_heads=section.heads(width, default=heads),
                mlp_dim=section.integer("intermediate_size", mlp_dim, most=MAX_WIDTH * 8), norm_eps=section.number("layer_norm_eps", eps, 0.0, 1.0),
                activation=activation(section, "hidden_act", act))


def activation(section: Section, key: str, default: str) -> str:
    """Our name of the activation that a config names."""
    return ACTIVATIONS[section.text(key, default, among=ACTIVATIONS)]


def activation_out(name: str) -> str:
    """Their name of an activation of ours."""
    if name not in ACTIVATIONS_OUT:
        raise ConfigError(f'activation "{name}" has no name in transformers; this model cannot be written as format="hf".')
    return ACTIVATIONS_OUT[name]


def tower_config(tower: Any) -> dict[str, Any]:
    """The inverse of `tower_settings`."""
    return dict(hidden_size=tower.width, num_hidden_layers=tower.depth, num_attention_heads=tower.num_heads, intermediate_size=tower.mlp_dim,
                layer_norm_eps=tower.norm_eps, hidden_act=activation_out(tower.activation), attention_dropout=0.0)


def image_settings(section: Section, image_size: int = 224, patch_size: int = 16) -> dict[str, Any]:
    """Picture, patch and channels of a vision config."""
    sides = section.integers("image_size", [image_size], least=1, most=MAX_PIXELS, longest=2)
    patches = section.integers("patch_size", [patch_size], least=1, most=MAX_PIXELS, longest=2)
    if not sides or not patches or len(set(patches)) > 1:
        raise ConfigError(f"{section.where}.patch_size: {patches} for images of {sides}; patches must be squares of one size.")
    height, width = sides[0], sides[-1]
    if patches[0] > min(height, width):
        raise ConfigError(f"{section.where}.patch_size: patches of {patches[0]} do not fit images of {height} x {width}.")
    return dict(image_size=height if height == width else [height, width], patch_size=patches[0], channels=section.integer("num_channels", 3, most=64),
                resample="bicubic")


def image_config(tower: Any) -> dict[str, Any]:
    """The inverse of `image_settings`."""
    height, width, channels = tower.input_shape()
    return dict(image_size=height if height == width else [height, width], patch_size=tower.patch_size, num_channels=channels)


def text_settings(section: Section, vocab_size: int, length: int) -> dict[str, Any]:
    """Vocabulary and length of a text config."""
    return dict(vocab_size=section.integer("vocab_size", vocab_size, most=MAX_VOCABULARY),
                length=section.integer("max_position_embeddings", length, most=MAX_LENGTH))


def expect(where: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises a ConfigError where a model has other settings than the format it is written to knows."""
    for key, value in wanted.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if found[key] not in allowed:
            raise ConfigError(f"{where}: {key} is {found[key]!r}, this layout has {' or '.join(map(repr, allowed))} only; write it as a workdir instead.")

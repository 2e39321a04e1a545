"""Parts of towers and language models: Linear, norms, activations, attention and what it may read, positions, caches, pooling, dropout, the block and the stack
of blocks."""
from vlm_jax.nn.activations import ACTIVATIONS, gelu, gelu_tanh, quick_gelu, squared_relu
from vlm_jax.nn.attention import SelfAttention, allowed_keys, attention, attention_weights
from vlm_jax.nn.biases import RelativeBias, alibi, alibi_slopes, relative_buckets
from vlm_jax.nn.block import BlockInit, TransformerBlock
from vlm_jax.nn.cache import Cache, Slots
from vlm_jax.nn.convolution import StandardizedConv, convolution
from vlm_jax.nn.dropout import Dropout, PatchDropout
from vlm_jax.nn.initializers import initializer
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.mlp import Mlp
from vlm_jax.nn.norms import NORMS, LayerNorm, RmsNorm, layer_norm, norm, rms_norm
from vlm_jax.nn.pooling import AttentionPooling, pool
from vlm_jax.nn.positions import resample_positions, sincos2d
from vlm_jax.nn.rotary import apply_rotary, check_rotary, rotary
from vlm_jax.nn.stack import REMAT_POLICIES, Stack
from vlm_jax.nn.visibility import Visibility, positions_of

__all__ = [
    "ACTIVATIONS", "AttentionPooling", "BlockInit", "Cache", "Dropout", "LayerNorm", "Linear", "Mlp", "NORMS", "PatchDropout", "REMAT_POLICIES",
    "RelativeBias", "RmsNorm", "SelfAttention", "Slots", "Stack", "StandardizedConv", "TransformerBlock", "Visibility", "alibi", "alibi_slopes",
    "allowed_keys", "apply_rotary", "attention", "attention_weights", "check_rotary", "convolution", "gelu", "gelu_tanh", "initializer", "layer_norm", "norm",
    "pool", "positions_of", "quick_gelu",
    "relative_buckets", "resample_positions", "rms_norm", "rotary", "sincos2d", "squared_relu",
]

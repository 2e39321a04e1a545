"""Parts of towers: Linear, norms, activations, attention, positions, pooling, dropout, the block and the stack of blocks."""
from vlm_jax.nn.activations import ACTIVATIONS, gelu, gelu_tanh, quick_gelu, squared_relu
from vlm_jax.nn.attention import SelfAttention, allowed_keys, attention, attention_weights
from vlm_jax.nn.block import BlockInit, TransformerBlock
from vlm_jax.nn.dropout import Dropout, PatchDropout
from vlm_jax.nn.initializers import initializer
from vlm_jax.nn.linear import Linear
from vlm_jax.nn.mlp import Mlp
from vlm_jax.nn.norms import LayerNorm, layer_norm
from vlm_jax.nn.pooling import AttentionPooling, pool
from vlm_jax.nn.positions import resample_positions, sincos2d
from vlm_jax.nn.stack import REMAT_POLICIES, Stack

__all__ = [
    "ACTIVATIONS", "AttentionPooling", "BlockInit", "Dropout", "LayerNorm", "Linear", "Mlp", "PatchDropout", "REMAT_POLICIES", "SelfAttention",
    "Stack", "TransformerBlock", "allowed_keys", "attention", "attention_weights", "gelu", "gelu_tanh", "initializer", "layer_norm", "pool", "quick_gelu",
    "resample_positions", "sincos2d", "squared_relu",
]

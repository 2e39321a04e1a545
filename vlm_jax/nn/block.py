"""The pre-norm transformer block that image and text towers share. Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), equations 2 and 3."""
import dataclasses

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from vlm_jax.nn.attention import SelfAttention
from vlm_jax.nn.dropout import Dropout
from vlm_jax.nn.mlp import Mlp
from vlm_jax.nn.norms import LayerNorm
from vlm_jax.sharding.activations import constrain


@dataclasses.dataclass(frozen=True)
class BlockInit:
    """Initialisers of a block's kernels and of the biases of its MLP (those of attention start at 0); the defaults are those of the ViT code."""
    qkv: str | float = "xavier_uniform"
    out: str | float = "xavier_uniform"
    up: str | float = "xavier_uniform"
    down: str | float = "xavier_uniform"
    mlp_bias: str | float = 1e-6


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout after both and inside the MLP.

    Returns:
      x [B, T, D] in the dtype in which it came (towers give float32, so that sums are not rounded), and {"attention": what attention added, "mlp": what the
      MLP added}.
    """
    num_heads: int
    mlp_dim: int
    activation: str = "gelu_tanh"
    causal: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.0
    kernel_init: BlockInit = BlockInit()
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B #H #T T"] | None = None,
                 train: bool = False) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        options, init = dict(dtype=self.dtype, param_dtype=self.param_dtype), self.kernel_init
        h = LayerNorm(self.norm_eps, name="norm_attention", **options)(x)
        attention = SelfAttention(self.num_heads, self.causal, init.qkv, init.out, softmax_dtype=self.softmax_dtype, name="attention", **options)
        attended = Dropout(self.dropout)(checkpoint_name(attention(h, mask), "attended"), train)
        x = constrain((x + attended).astype(x.dtype), "batch", "sequence", "embed")
        h = LayerNorm(self.norm_eps, name="norm_mlp", **options)(x)
        mlp = Mlp(self.mlp_dim, self.activation, self.dropout, init.up, init.down, init.mlp_bias, name="mlp", **options)
        added = Dropout(self.dropout)(mlp(h, train), train)
        x = constrain((x + added).astype(x.dtype), "batch", "sequence", "embed")
        return x, {"attention": attended, "mlp": added}

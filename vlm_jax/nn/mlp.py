"""The two-layer perceptron of a transformer block."""
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vlm_jax.nn.activations import ACTIVATIONS
from vlm_jax.nn.dropout import Dropout
from vlm_jax.nn.linear import Linear
from vlm_jax.settings import choose
from vlm_jax.sharding.activations import constrain


class Mlp(nn.Module):
    """down(activation(up(x))): Vaswani et al. 2017, section 3.3, with the activation named by `activation`; dropout after the activation.

    Attributes:
      hidden: the width of the hidden layer.
      up_init, down_init, bias_init: see `initializer`.
    """
    hidden: int
    activation: str = "gelu_tanh"
    dropout: float = 0.0
    up_init: str | float = "xavier_uniform"
    down_init: str | float = "xavier_uniform"
    bias_init: str | float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], train: bool = False) -> Float[Array, "B T D"]:
        options = dict(bias_init=self.bias_init, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = Linear(self.hidden, kernel_init=self.up_init, name="up", **options)(x)
        hidden = checkpoint_name(constrain(hidden, "batch", "sequence", "mlp"), "hidden")
        hidden = choose(ACTIVATIONS, self.activation, "activation")(hidden)
        hidden = Dropout(self.dropout)(hidden, train)
        return Linear(x.shape[-1], kernel_init=self.down_init, name="down", **options)(hidden)

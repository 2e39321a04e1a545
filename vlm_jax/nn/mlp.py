"""The two-layer perceptron of a transformer block, plain or gated."""
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vlm_jax.nn.activations import ACTIVATIONS
from vlm_jax.nn.dropout import Dropout
from vlm_jax.nn.linear import Linear, added_dtype
from vlm_jax.nn.precision import rounded_once
from vlm_jax.settings import choose
from vlm_jax.sharding.activations import constrain


class Mlp(nn.Module):
    """down(activation(up(x))): Vaswani et al. 2017, section 3.3, with the activation named by `activation`; dropout after it. Gated:
    down(activation(gate(x)) * up(x)), Shazeer, "GLU Variants Improve Transformer" (2020); dropout of the product.

    Activation and product of gates are computed in float32 and rounded to `dtype` once; the output is not rounded (see `added_dtype`).

    Attributes:
      hidden: the width of the hidden layer.
      up_init (of gate too), down_init, bias_init: see `initializer`.
      biases: the names of the kernels (of `gate`, `up`, `down`) that have one.
    """
    hidden: int
    activation: str = "gelu_tanh"
    dropout: float = 0.0
    up_init: str | float = "xavier_uniform"
    down_init: str | float = "xavier_uniform"
    bias_init: str | float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    gated: bool = False
    biases: tuple[str, ...] = ("gate", "up", "down")

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], train: bool = False) -> Float[Array, "B T D"]:
        def linear(features, init, name, out_dtype=None):
            return Linear(features, kernel_init=init, use_bias=name in self.biases, bias_init=self.bias_init, dtype=self.dtype,
                          param_dtype=self.param_dtype, out_dtype=out_dtype, name=name)

        def widen(name):
            return checkpoint_name(constrain(linear(self.hidden, self.up_init, name)(x), "batch", "sequence", "mlp"), "hidden")

        activation = choose(ACTIVATIONS, self.activation, "activation")
        hidden = rounded_once(lambda gate, up: activation(gate) * up, widen("gate"), widen("up")) if self.gated else rounded_once(activation, widen("up"))
        hidden = Dropout(self.dropout)(hidden, train)
        return linear(x.shape[-1], self.down_init, "down", added_dtype(self.dtype, "mlp"))(hidden)

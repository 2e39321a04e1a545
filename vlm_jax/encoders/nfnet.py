"""Convolutional towers without normalisation: NFNet-F0 to F6 and NF-ResNets.

Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization" (2021), section 4 and appendix C (NFNets, the tower of Flamingo); Brock et
al., "Characterizing signal propagation to close the performance gap in unnormalized ResNets" (2021), section 3 (NF-ResNets, the tower of Frozen).

A block is x + alpha g f(act(x) / s): f keeps variance 1, s is the standard deviation that x is predicted to have, g a scalar that starts at 0 (De and Smith,
"Batch Normalization Biases Residual Blocks Towards the Identity Function", 2020: SkipInit). Activations are multiplied by gamma, which gives act(z) of a
normal z variance 1.
"""
from collections.abc import Sequence
from functools import partial

from flax import linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from vlm_jax.encoders.tower import check_projection, projected
from vlm_jax.errors import ConfigError
from vlm_jax.nn import ACTIVATIONS, Dropout, Linear, Stack, StandardizedConv
from vlm_jax.nn.precision import rounded_once, wide
from vlm_jax.nn.stack import remat_policy
from vlm_jax.settings import choose
from vlm_jax.sharding.activations import constrain

# 1 / the standard deviation of act(z), z normal; the constants of the NFNet code, which are estimates and up to 0.1 % off.
GAMMAS = {"relu": 1.7139588594436646, "gelu": 1.7015043497085571, "gelu_tanh": 1.7015043497085571, "silu": 1.7881293296813965, "tanh": 1.5939117670059204}
STEM = ((16, 2), (32, 1), (64, 1))   # (features, stride) of an NFNet's first convolutions; one of half the first width with stride 2 follows
STEM_STRIDE = 4


def normalized(activation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """gamma act(x), computed in float32 and rounded once."""
    function, gamma = ACTIVATIONS[activation], choose(GAMMAS, activation, "NFNet.activation")
    return rounded_once(lambda z: gamma * function(z), x)


def predicted_deviations(depths: Sequence[int], alpha: float) -> list[list[float]]:
    """The standard deviation s that each block's input is divided by, by stages.

    It is 1 behind the stem. Each block adds alpha^2 to the variance, and the first of a stage, whose shortcut reads the divided input, starts again from 1.
    """
    deviations, deviation = [], 1.0
    for depth in depths:
        stage = []
        for block in range(depth):
            stage.append(deviation)
            deviation = ((1.0 if block == 0 else deviation ** 2) + alpha ** 2) ** 0.5
        deviations.append(stage)
    return deviations


class NFBlock(nn.Module):
    """One residual block: 1x1 to `hidden` channels, `middle` 3x3 convolutions in groups (the first strided), 1x1, perhaps squeeze and excite.

    Attributes:
      transition: the first block of a stage, whose shortcut is a 1x1 convolution of the scaled activation: "pool" averages 2x2 before it where the stride is
        2 (NFNets), "stride" has the stride itself (NF-ResNets). None: the shortcut is x.
      squeeze: hidden units of squeeze and excite; None has none.
      drops: whether there is stochastic depth, which draws from the "dropout" random stream, in training only.

    Call it with `per_layer={"scale": 1 / s, "drop": rate of stochastic depth}`.

    Returns:
      x [B, h, w, features], float32, and {"branch": what f gave, of variance 1 at initialisation}.
    """
    features: int
    hidden: int
    groups: int = 1
    middle: int = 2
    stride: int = 1
    transition: str | None = None
    squeeze: int | None = None
    activation: str = "gelu_tanh"
    alpha: float = 0.2
    drops: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False,
                 per_layer: dict[str, Array] | None = None) -> tuple[Float[Array, "B h w F"], dict[str, Array]]:
        conv = partial(StandardizedConv, dtype=self.dtype, param_dtype=self.param_dtype)
        act, out_dtype = partial(normalized, self.activation), wide(self.dtype)
        h = act(x) * per_layer["scale"].astype(x.dtype)
        shortcut = x
        if self.transition is not None:
            pooled = self.transition == "pool"
            # Windows at the edge of an odd size average the pixels that they have.
            shortcut = nn.avg_pool(h, (2, 2), (self.stride, self.stride), "SAME", count_include_pad=False) if pooled and self.stride > 1 else h
            shortcut = conv(self.features, 1, 1 if pooled else self.stride, out_dtype=out_dtype, name="shortcut")(shortcut)
        h = checkpoint_name(conv(self.hidden, 1, name="conv_0")(h), "hidden")
        for i in range(self.middle):
            middle = conv(self.hidden, 3, self.stride if i == 0 else 1, self.groups, name=f"conv_{i + 1}")
            h = checkpoint_name(middle(act(h)), "hidden")
        h = checkpoint_name(conv(self.features, 1, out_dtype=out_dtype, name=f"conv_{self.middle + 1}")(act(h)), "hidden")
        if self.squeeze is not None:
            h = 2 * SqueezeExcite(self.squeeze, self.dtype, self.param_dtype, name="squeeze_excite")(h) * h
        branch = h
        if train and self.drops:
            keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - per_layer["drop"], (h.shape[0], 1, 1, 1))
            h = jnp.where(keep, h, jnp.zeros_like(h))
        gain = self.param("skip_gain", nn.initializers.zeros, (), jnp.dtype(self.param_dtype)).astype(h.dtype)
        return constrain(shortcut + self.alpha * gain * h, "batch", "height", "width", "channels"), {"branch": branch}


class SqueezeExcite(nn.Module):
    """A factor from 0 to 1 for each channel of each picture: sigmoid(up(relu(down(mean over places)))). Hu et al., "Squeeze-and-Excitation" (2018)."""
    hidden: int
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 C"]:
        linear = partial(Linear, kernel_init="lecun_normal", dtype=self.dtype, param_dtype=self.param_dtype)
        h = linear(self.hidden, name="down")(x.mean((1, 2)))
        return jax.nn.sigmoid(linear(x.shape[-1], out_dtype=wide(self.dtype), name="up")(jax.nn.relu(h)))[:, None, None]


class NFNet(nn.Module):
    """An image tower. The defaults are NFNet-F0; `encoders.variants` has "F0" to "F6" and the NF-ResNets, whose other settings are `variants.NF_RESNET`.

    Pictures of any size are taken. Blocks of a stage behind its first are stored stacked: `stages_0/first/...`, `stages_0/blocks/...`.

    Attributes:
      image_size: (height, width) that `input_shape` and `grid` speak of; one number for squares.
      widths, depths, strides: of the stages; the stem divides the picture by 4.
      stem: "convolutions" (four 3x3) or "pool" (7x7 with stride 2, without a bias, and 3x3 max pool).
      bottleneck: the middle of a block over its width.
      group_size: channels of a group of the 3x3 convolutions; None has one group.
      middle: 3x3 convolutions of a block.
      shortcut: "pool" or "stride", see `NFBlock`.
      squeeze: hidden units of squeeze and excite over the block's width; None has none.
      final_ratio: width of the 1x1 convolution behind the last stage over that of the stage; None has none.
      activation: a name of `GAMMAS`.
      alpha: how much a block adds.
      stochastic_depth: block i of n is left out of a training example with probability stochastic_depth i / n. Kept ones are not rescaled, at test nothing is.
        The paper trains classifiers with 0.25; a frozen tower of a larger model wants 0, since that model's training is the tower's, too.
      pool: "gap" (mean over places) or "none" (the grid of the last stage, row by row).
      projection: None, "linear", "linear_no_bias" or "linear_tanh" to `embed_dim` after pooling.
      num_classes, dropout: a linear classifier of so many classes (needs "gap"), and the dropout before it.
      scan, remat: see `nn.Stack`; `remat` also of the first blocks.
      dtype, param_dtype: of products and parameters.

    Returns:
      the pooled embedding [B, D], with "none" [B, N, D], with `num_classes` logits [B, classes], float32, and {"stem": [B, h, w, C], "stages":
      {"stages_0": {"first": {"output", "branch"}, "blocks": the same [L, B, h, w, C]}}, "tokens": activations behind the last stage [B, N, D], "pooled":
      before projection or classifier}.
    Raises:
      ConfigError: for settings that do not fit each other, or images of another kind.
    """
    image_size: int | tuple[int, int] = 192
    channels: int = 3
    widths: tuple[int, ...] = (256, 512, 1536, 1536)
    depths: tuple[int, ...] = (1, 2, 6, 3)
    strides: tuple[int, ...] = (1, 2, 2, 2)
    stem: str = "convolutions"
    bottleneck: float = 0.5
    group_size: int | None = 128
    middle: int = 2
    shortcut: str = "pool"
    squeeze: float | None = 0.5
    final_ratio: float | None = 2.0
    activation: str = "gelu_tanh"
    alpha: float = 0.2
    stochastic_depth: float = 0.0
    pool: str = "gap"
    projection: str | None = None
    embed_dim: int | None = None
    num_classes: int | None = None
    dropout: float = 0.0
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"   # as every tower has it; there is no softmax here

    @property
    def options(self) -> dict[str, str]:
        """The dtypes, as parts whose output is rounded take them."""
        return dict(dtype=self.dtype, param_dtype=self.param_dtype)

    @property
    def unrounded(self) -> dict[str, str]:
        """The dtypes of a part whose output is float32."""
        return dict(self.options, out_dtype=wide(self.dtype))

    @property
    def width(self) -> int:
        """The width of its tokens."""
        return self.widths[-1] if self.final_ratio is None else int(self.final_ratio * self.widths[-1])

    @property
    def out_width(self) -> int:
        """The width of what it returns."""
        return self.num_classes or (self.embed_dim if self.projection is not None else self.width)

    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return height, width, self.channels

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"image": (height, width, channels)} of one example."""
        return {"image": self.input_shape()}

    def grid(self) -> tuple[int, int]:
        """Places (down, across) of the last stage for an image of `image_size`."""
        stride = STEM_STRIDE * int(np.prod(self.strides))
        return tuple(-(-side // stride) for side in self.input_shape()[:2])

    @nn.compact
    def __call__(self, image: Float[Array, "B H W C"], train: bool = False) -> tuple[Float[Array, "B D"], dict[str, Array]]:
        self._check(image.shape)
        out = {"stages": {}}
        out["stem"] = x = self._stem(image)

        deviations, rates = predicted_deviations(self.depths, self.alpha), self.stochastic_depth * np.arange(sum(self.depths)) / sum(self.depths)
        for stage, (width, depth, stride) in enumerate(zip(self.widths, self.depths, self.strides)):
            start = sum(self.depths[:stage])
            per_layer = {"scale": 1 / np.asarray(deviations[stage], np.float32), "drop": np.asarray(rates[start:start + depth], np.float32)}
            x, out["stages"][f"stages_{stage}"] = NFStage(depth, self._block(width), stride, self.shortcut, self.scan, self.remat,
                                                          name=f"stages_{stage}")(x, per_layer, train)
        if self.final_ratio is not None:
            x = StandardizedConv(self.width, 1, name="final", **self.unrounded)(x)
        x = normalized(self.activation, x)
        out["tokens"] = tokens = constrain(x.reshape(x.shape[0], -1, self.width), "batch", "sequence", "embed")

        out["pooled"] = pooled = tokens.mean(1) if self.pool == "gap" else tokens
        if self.num_classes is None:
            return projected(self, pooled, self.width ** -0.5), out
        return Linear(self.num_classes, kernel_init=0.01, name="head", **self.unrounded)(Dropout(self.dropout)(pooled, train)), out

    def _stem(self, image: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        if self.stem == "pool":
            x = StandardizedConv(self.widths[0] // 4, 7, 2, use_bias=False, name="stem", **self.unrounded)(image)
            return nn.max_pool(x, (3, 3), (2, 2), "SAME")
        x = image
        for i, (features, stride) in enumerate((*STEM, (self.widths[0] // 2, 2))):
            options = self.unrounded if i == len(STEM) else self.options
            x = StandardizedConv(features, 3, stride, name=f"stem_{i}", **options)(normalized(self.activation, x) if i else x)
        return constrain(x, "batch", "height", "width", "channels")

    def _block(self, width: int) -> partial:
        """Makes the blocks of a stage."""
        hidden = int(self.bottleneck * width)
        groups = 1 if self.group_size is None else hidden // self.group_size
        squeeze = None if self.squeeze is None else max(1, int(self.squeeze * width))
        return partial(NFBlock, width, hidden if self.group_size is None else groups * self.group_size, groups, self.middle, squeeze=squeeze,
                       activation=self.activation, alpha=self.alpha, drops=self.stochastic_depth > 0, **self.options)

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4 or shape[3] != self.channels or min(shape[1:3]) < 1:
            raise ConfigError(f"NFNet: images have shape {shape}; give [batch, height, width, {self.channels}].")
        if not len(self.widths) == len(self.depths) == len(self.strides) or min(*self.widths, *self.depths, *self.strides) < 1:
            raise ConfigError(f"NFNet: {len(self.widths)} widths {self.widths}, depths {self.depths} and strides {self.strides}; give each stage one of each, "
                              "at least 1.")
        choose(GAMMAS, self.activation, "NFNet.activation")
        for name, choices in (("stem", ("convolutions", "pool")), ("shortcut", ("pool", "stride")), ("pool", ("gap", "none"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f'NFNet.{name}: "{getattr(self, name)}" is unknown; choose "{choices[0]}" or "{choices[1]}".')
        narrowest = int(self.bottleneck * min(self.widths))
        if narrowest < (self.group_size or 1):
            raise ConfigError(f"NFNet.group_size: groups of {self.group_size} channels do not fit the {narrowest} in the middle of the narrowest block; "
                              "choose smaller groups, or None.")
        if not 0 <= self.stochastic_depth < 1:
            raise ConfigError(f"NFNet.stochastic_depth is {self.stochastic_depth}; it must be at least 0 and below 1.")
        if self.num_classes is not None and (self.pool != "gap" or self.projection is not None):
            raise ConfigError('NFNet.num_classes: a classifier reads the mean over places; set pool="gap" and leave projection out.')
        check_projection("NFNet", self.projection, self.embed_dim)


class NFStage(nn.Module):
    """The `first` block of a stage, which changes width and size, and the stack `blocks` of the others."""
    depth: int
    block: partial
    stride: int
    shortcut: str
    scan: bool
    remat: str

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], per_layer: dict[str, np.ndarray],
                 train: bool) -> tuple[Float[Array, "B h w F"], dict[str, dict[str, Array]]]:
        first, out = self.block, {}
        if self.remat != "none":
            first = partial(nn.remat(first.func, policy=remat_policy(self.remat), static_argnums=(2,)), *first.args, **first.keywords)
        of_first = {name: jnp.asarray(values[0]) for name, values in per_layer.items()}
        x, intermediates = first(stride=self.stride, transition=self.shortcut, name="first")(x, train, of_first)
        out["first"] = {"output": x, **intermediates}
        if self.depth > 1:
            others = {name: jnp.asarray(values[1:]) for name, values in per_layer.items()}
            x, out["blocks"] = Stack(self.block, self.depth - 1, self.scan, self.remat, name="blocks")(x, per_layer=others, train=train)
        return x, out

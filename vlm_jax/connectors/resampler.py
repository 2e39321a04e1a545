"""Perceiver Resampler: features of a picture or of the frames of a video, however many, become a fixed number of tokens.

Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022), section 2.1 and appendix A.1.1.
"""
from functools import partial

from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.errors import ConfigError
from vlm_jax.nn import LayerNorm, Linear, Mlp, Stack, attention, initializer
from vlm_jax.nn.attention import split_heads
from vlm_jax.nn.linear import added_dtype
from vlm_jax.nn.precision import wide
from vlm_jax.sharding.activations import constrain

QK_NORMS = (None, "layer")


class PerceiverAttention(nn.Module):
    """Cross-attention whose queries are the latents and whose keys and values are the features followed by the latents (appendix A.1.1).

    Features and latents have a norm each; no projection has a bias. Parameters: `norm_features`, `norm_latents`, `query`, `key`, `value`
    [D, heads, head_dim], `out` [heads, head_dim, D], and with `qk_norm="layer"` `query_norm`, `key_norm` [head_dim], shared by the heads (IDEFICS).
    """
    num_heads: int
    head_dim: int
    qk_norm: str | None = None
    norm_eps: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    @nn.compact
    def __call__(self, latents: Float[Array, "B R D"], features: Float[Array, "B S D"]) -> Float[Array, "B R D"]:
        options = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        heads = (self.num_heads, self.head_dim)
        normed = LayerNorm(self.norm_eps, name="norm_latents", **options)(latents)
        context = jnp.concatenate([LayerNorm(self.norm_eps, name="norm_features", **options)(features), normed], axis=1)

        def project(name: str, x: Float[Array, "B T D"], tokens: str) -> Float[Array, "B T H K"]:
            y = Linear(heads, use_bias=False, kernel_init="lecun_normal", name=name, **options)(x)
            if self.qk_norm is not None and name != "value":
                y = LayerNorm(self.norm_eps, name=f"{name}_norm", **options)(y)
            return checkpoint_name(split_heads(y, tokens), "qkv")

        query, key, value = project("query", normed, "sequence"), project("key", context, "keys"), project("value", context, "keys")
        mixed = constrain(attention(query, key, value, softmax_dtype=self.softmax_dtype), "batch", "sequence", "heads", "head_dim")
        return Linear(latents.shape[-1], contract=2, use_bias=False, kernel_init="lecun_normal", out_dtype=added_dtype(self.dtype, "heads"), name="out",
                      **options)(mixed)


class PerceiverBlock(nn.Module):
    """One layer of the resampler: latents + attention(latents, features), then latents + mlp(norm(latents)).

    Returns:
      the latents [B, R, D] in the dtype in which they came, and {"attention": what attention added, "mlp": what the MLP added}.
    """
    num_heads: int
    head_dim: int
    mlp_ratio: int
    activation: str
    qk_norm: str | None = None
    norm_eps: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "B R D"], features: Float[Array, "B S D"]) -> tuple[Float[Array, "B R D"], dict[str, Array]]:
        options = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        attend = PerceiverAttention(self.num_heads, self.head_dim, self.qk_norm, self.norm_eps, softmax_dtype=self.softmax_dtype, name="attention", **options)
        attended = checkpoint_name(attend(x, features), "attended")
        x = constrain((x + attended).astype(x.dtype), "batch", "sequence", "embed")
        mlp = Mlp(self.mlp_ratio * x.shape[-1], self.activation, up_init="lecun_normal", down_init="lecun_normal", biases=(), name="mlp", **options)
        added = mlp(LayerNorm(self.norm_eps, name="norm_mlp", **options)(x))
        return constrain((x + added).astype(x.dtype), "batch", "sequence", "embed"), {"attention": attended, "mlp": added}


class PerceiverResampler(nn.Module):
    """Maps the features of any number of frames and places to `num_latents` tokens: learned latents that read them, layer by layer.

    A picture is a video of one frame. Frames carry a learned embedding of their number, places carry none. Of fewer than `max_frames` frames each has the
    embedding of its number; more of them share the same span of time, so the table is interpolated linearly, its ends kept (trained on 8 frames, one a
    second, the paper evaluates on 30, three a second).

    Differs from the paper: a norm after the last layer, as in OpenFlamingo and IDEFICS; keys of 96 numbers a head (`head_dim`) as in its final version.

    Attributes:
      num_latents: tokens of one picture or video, whatever its frames.
      depth, num_heads, head_dim, mlp_ratio, activation: of the layers. OpenFlamingo has "gelu" and 8 heads of 64, IDEFICS "relu" and 16 heads of 96.
      qk_norm: None, or "layer" for a layer norm of each head's queries and keys (IDEFICS).
      width: None works at the width of the features; a number maps them to it first, without a bias (Flamingo: 3072 to 1536).
      frame_embedding, max_frames: whether frames have embeddings (IDEFICS: no), and the rows of their table.
      norm_eps: of all norms.
      scan, remat: see `nn.Stack`.
      dtype, param_dtype, softmax_dtype: of products, parameters, and the softmax of attention.

    Returns:
      tokens [B, R, D], float32 as all sums are, and {"features": what the latents read [B, F * S, D], "blocks": {"output": the latents after every layer
      [L, B, R, D], "attention", "mlp"}}.
    Raises:
      ConfigError: for features without a frame axis, or settings that do not fit each other.
    """
    num_latents: int = 64
    depth: int = 6
    num_heads: int = 16
    head_dim: int = 96
    mlp_ratio: int = 4
    activation: str = "squared_relu"
    qk_norm: str | None = None
    width: int | None = None
    frame_embedding: bool = True
    max_frames: int = 8
    norm_eps: float = 1e-5
    scan: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    softmax_dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Float[Array, "B F S D"]) -> tuple[Float[Array, "B R D"], dict[str, Array]]:
        self._check(features.shape)
        options, out_dtype = dict(dtype=self.dtype, param_dtype=self.param_dtype), wide(self.dtype)
        if self.width is not None:
            features = Linear(self.width, use_bias=False, kernel_init="lecun_normal", out_dtype=out_dtype, name="projection", **options)(features)
        batch, frames, _, width = features.shape
        features = features.astype(out_dtype)
        if self.frame_embedding:
            table = self._table("frame_embedding", self.max_frames, width)
            features = features + frame_rows(table, frames)[:, None]
        features = constrain(features.reshape(batch, -1, width), "batch", "sequence", "embed")

        latents = jnp.broadcast_to(self._table("latents", self.num_latents, width), (batch, self.num_latents, width))
        block = partial(PerceiverBlock, self.num_heads, self.head_dim, self.mlp_ratio, self.activation, self.qk_norm, self.norm_eps,
                        softmax_dtype=self.softmax_dtype, **options)
        x, blocks = Stack(block, self.depth, self.scan, self.remat, name="blocks")(constrain(latents, "batch", "sequence", "embed"), features)
        x = LayerNorm(self.norm_eps, name="norm", dtype=out_dtype, param_dtype=self.param_dtype)(x)
        return x, {"features": features, "blocks": blocks}

    def _table(self, name: str, rows: int, width: int) -> Float[Array, "N D"]:
        """A learned table that starts normal, rounded as kernels are."""
        table = self.param(name, initializer(1.0), (rows, width), jnp.dtype(self.param_dtype))
        return table.astype(self.dtype).astype(wide(self.dtype))

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4:
            raise ConfigError(f"PerceiverResampler: features have shape {shape}; give [batch, frames, tokens, width], one frame for a picture.")
        if self.qk_norm not in QK_NORMS:
            raise ConfigError(f'PerceiverResampler.qk_norm: "{self.qk_norm}" is unknown; choose "layer" or None.')
        for name in ("num_latents", "depth", "num_heads", "head_dim", "mlp_ratio", "max_frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"PerceiverResampler.{name} is {getattr(self, name)}; it must be at least 1.")


def frame_rows(table: Float[Array, "N D"], frames: int) -> Float[Array, "F D"]:
    """The embeddings of `frames` frames: the first rows of the table, or where it has too few, the table interpolated linearly with its ends kept."""
    known = table.shape[0]
    if frames <= known:
        return table[:frames]
    place = jnp.arange(frames) * ((known - 1) / (frames - 1))
    low = jnp.minimum(place.astype(jnp.int32), max(known - 2, 0))
    share = (place - low)[:, None].astype(table.dtype)
    return table[low] * (1 - share) + table[jnp.minimum(low + 1, known - 1)] * share

"""Text towers of SigLIP, SigLIP 2 and CLIP: one transformer with their differences as settings.

SigLIP (Zhai et al. 2023): reads both ways, pads included; the last token (a sticky end of sentence) -> linear with bias. SigLIP 2 differs in its
vocabulary of 256,000. CLIP (Radford et al. 2021): causal, QuickGELU, the feature at the end-of-text token -> linear without bias.
"""
from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlm_jax.encoders.tower import Tower, check_projection, projected, trunk
from vlm_jax.errors import ConfigError
from vlm_jax.nn import BlockInit, Dropout, pool
from vlm_jax.nn.initializers import initializer
from vlm_jax.nn.precision import wide
from vlm_jax.sharding.activations import constrain

POOLS = ("last", "eot", "eot_or_first", "argmax", "gap", "none")


class TextTransformer(Tower):
    """A text tower.

    Attributes:
      vocab_size, length: rows of the token table; tokens of a text (shorter ones are taken as well).
      width, depth, ...: see `Tower`.
      causal: each token reads only those before it.
      pool: "last"; "eot" (first token whose id is `eot_id`, the last of a text without one) and "eot_or_first" (the first of
        such a text); "argmax" (first of the highest id); "gap"; "none".
      projection: None, "linear", "linear_no_bias" or "linear_tanh" to `embed_dim` after pooling.
      initialization: "siglip" (Xavier; tokens and positions with standard deviation 1/sqrt(width)) or "clip" (see `clip_init`; tokens 0.02, positions
        0.01).

    Returns:
      the pooled embedding [B, D] and {"positions": tokens with positions [B, T, D], "blocks": {name: [L, B, T, D]}, "tokens": normalised tokens
      [B, T, D], "pooled": before the projection}. An id beyond the vocabulary gives NaN, never another token's embedding.
    Raises:
      ConfigError: for settings that do not fit each other, or a text longer than `length`.
    """
    vocab_size: int = 32_000
    length: int = 64
    causal: bool = False
    pool: str = "last"
    eot_id: int | None = None
    projection: str | None = "linear"
    embed_dim: int | None = None
    initialization: str = "siglip"

    def input_shape(self) -> tuple[int]:
        """(length,) of one text."""
        return (self.length,)

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"tokens": (length,)} of one example."""
        return {"tokens": self.input_shape()}

    @nn.compact
    def __call__(self, tokens: Int[Array, "B T"], train: bool = False) -> tuple[Float[Array, "B D"], dict[str, Array]]:
        self._check(tokens.shape)
        clip = self.initialization == "clip"
        out = {}

        std = self.width ** -0.5
        table = self.param("token_embedding", initializer(0.02 if clip else std), (self.vocab_size, self.width), jnp.dtype(self.param_dtype))
        x = jnp.take(table, tokens, axis=0, mode="fill", fill_value=jnp.nan).astype(self.dtype).astype(wide(self.dtype))
        positions = self.param("position_embedding", initializer(0.01 if clip else std), (self.length, self.width), jnp.dtype(self.param_dtype))
        x = x + positions[:tokens.shape[1]].astype(self.dtype).astype(x.dtype)
        out["positions"] = x = constrain(Dropout(self.dropout)(x, train), "batch", "sequence", "embed")

        x, of_trunk = trunk(self, x, train=train, causal=self.causal, kernel_init=clip_init(self.width, self.depth) if clip else BlockInit())
        out.update(of_trunk)
        out["tokens"] = x
        out["pooled"] = x = pool(x, self.pool, tokens=tokens, eot_id=self.eot_id)
        return projected(self, x, self.width ** -0.5 if clip else "lecun_normal"), out

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise ConfigError(f"TextTransformer: tokens have shape {shape}; give [batch, length].")
        if shape[1] > self.length:
            raise ConfigError(f"TextTransformer: texts of {shape[1]} tokens, but the tower has {self.length} positions; tokenise to that length or "
                              "raise model.text.length.")
        if self.pool not in POOLS:
            raise ConfigError(f'TextTransformer.pool: "{self.pool}" is not for texts; choose one of {", ".join(POOLS)}.')
        if self.initialization not in ("siglip", "clip"):
            raise ConfigError(f'TextTransformer.initialization: "{self.initialization}" is unknown; choose "siglip" or "clip".')
        check_projection("TextTransformer", self.projection, self.embed_dim)


def clip_init(width: int, depth: int) -> BlockInit:
    """CLIP's standard deviations: width^-1/2 for queries, keys and values; (2 width)^-1/2 going up; (2 depth width)^-1/2 into the residual."""
    residual = width ** -0.5 * (2 * depth) ** -0.5
    return BlockInit(qkv=width ** -0.5, out=residual, up=(2 * width) ** -0.5, down=residual, mlp_bias="zeros")

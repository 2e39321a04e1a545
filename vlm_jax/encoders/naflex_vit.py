"""SigLIP 2's image tower for native aspect ratios (NaFlex): patches of pictures of any shape, positions resampled to the grid of each picture.

Tschannen et al., "SigLIP 2" (2025), section 2.4; Dehghani et al., "Patch n' Pack: NaViT" (2023).
"""
import math

from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.encoders.flexible_vit import filled
from vlm_jax.encoders.tower import Tower, check_projection, projected, trunk
from vlm_jax.errors import ConfigError
from vlm_jax.nn import AttentionPooling, Dropout, Linear
from vlm_jax.nn.initializers import initializer
from vlm_jax.nn.positions import triangle_weights
from vlm_jax.sharding.activations import constrain

POOLINGS = ("map", "gap", "none")


class NaflexVit(Tower):
    """A vision transformer over the patches of pictures of any aspect ratio.

    The input is what the image operation `naflex_patches` makes: [row, column, pixels], counted from 1, zeros where nothing stands. The grid of a picture
    is its largest row and column. The learned positions, a square, are resampled to it (bilinear, antialiased), in one program for all shapes.

    Attributes:
      max_patches: how many patches the processor makes of a picture; the model itself takes any number.
      num_positions: rows of the position table, a square number.
      width, depth, ...: see `Tower`.
      pool: "map" (padding is not read), "gap" (mean of the patches that are there) or "none" (all tokens).
      projection: None, "linear" or "linear_no_bias" to `embed_dim` after pooling.

    Returns:
      the pooled embedding [B, D] ([B, P, D] for "none") and {"stem", "positions", "blocks": {name: [L, B, P, D]}, "tokens": normalised [B, P, D],
      "pooled"}.
    Raises:
      ConfigError: for settings that do not fit each other, or patches of another size.
    """
    max_patches: int = 256
    num_positions: int = 256
    patch_size: int = 16
    channels: int = 3
    pool: str = "map"
    projection: str | None = None
    embed_dim: int | None = None

    def input_shape(self) -> tuple[int, int]:
        """(patches, values of a patch) of one picture."""
        return self.max_patches, 2 + self.patch_size ** 2 * self.channels

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"image": (patches, values of a patch)} of one example."""
        return {"image": self.input_shape()}

    @nn.compact
    def __call__(self, patches: Float[Array, "B P 2+K"], train: bool = False) -> tuple[Float[Array, "B D"], dict[str, Array]]:
        self._check(patches.shape)
        out = {}
        pixels = patches[..., 2:].reshape(*patches.shape[:2], self.patch_size, self.patch_size, self.channels)
        x = Linear(self.width, contract=3, kernel_init="lecun_normal", name="patch_embedding", **self.unrounded)(pixels)
        out["stem"] = x = constrain(x, "batch", "sequence", "embed")
        x = x + self._positions(patches[..., :2].astype(jnp.int32)).astype(x.dtype)
        out["positions"] = x = Dropout(self.dropout)(x, train)

        there = filled(patches)
        x, of_trunk = trunk(self, x, there[:, None, None], train=train)
        out.update(of_trunk)
        out["tokens"] = x
        if self.pool == "map":
            x = AttentionPooling(self.num_heads, self.mlp_dim, self.activation, self.norm_eps, softmax_dtype=self.softmax_dtype, name="pooling",
                                 **self.options)(x, there[:, None, None])
        elif self.pool == "gap":
            weight = there[..., None].astype(x.dtype)
            x = (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1)
        out["pooled"] = x
        return projected(self, x, self.width ** -0.5), out

    def _positions(self, places: Array) -> Float[Array, "B P D"]:
        side = math.isqrt(self.num_positions)
        table = self.param("position_embedding", initializer(self.width ** -0.5), (self.num_positions, self.width), jnp.dtype(self.param_dtype))
        grid = jnp.maximum(places.max(1, keepdims=True), 1)
        place = jnp.maximum(places - 1, 0)
        down, across = (triangle_weights(place[..., axis], side, grid[..., axis]) for axis in range(2))
        weights = (down[..., :, None] * across[..., None, :]).reshape(*places.shape[:2], self.num_positions)
        return jnp.einsum("bpn,nd->bpd", weights, table.astype(jnp.float32), precision="highest")

    def _check(self, shape: tuple[int, ...]) -> None:
        values = 2 + self.patch_size ** 2 * self.channels
        if len(shape) != 3 or shape[2] != values:
            raise ConfigError(f"NaflexVit: patches have shape {shape}; it takes [batch, patches, {values}], patches of {self.patch_size} pixels: change "
                              "naflex_patches.patch_size or model.image.patch_size.")
        if math.isqrt(self.num_positions) ** 2 != self.num_positions:
            raise ConfigError(f"NaflexVit.num_positions: {self.num_positions} is no square number; the positions are a square grid.")
        if self.pool not in POOLINGS:
            raise ConfigError(f'NaflexVit.pool: "{self.pool}" is not for patches; choose one of {", ".join(POOLINGS)}.')
        check_projection("NaflexVit", self.projection, self.embed_dim)

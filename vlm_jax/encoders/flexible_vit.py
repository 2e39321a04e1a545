"""Image towers over flexible patches: pictures keep their aspect ratio, and a patch says itself in which row and column it stands.

Lee et al., "Pix2Struct" (2023), section 2.1; Baechler et al., "ScreenAI" (2024), section 3.1.
"""
from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.encoders.tower import Tower, trunk
from vlm_jax.errors import ConfigError
from vlm_jax.nn import Dropout, Linear
from vlm_jax.nn.initializers import initializer
from vlm_jax.nn.precision import wide
from vlm_jax.sharding.activations import constrain

MAX_ROWS = 4096   # of the two tables; the released Pix2Struct models


class PatchEmbedding(nn.Module):
    """Flexible patches become tokens: a linear map of the pixels, plus the row's and the column's learned embedding.

    The input is what the image operation `flexible_patches` makes: [row, column, pixels], counted from 1, zeros where nothing stands.
    """
    width: int
    patch_size: int = 16
    channels: int = 3
    max_rows: int = MAX_ROWS
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, patches: Float[Array, "B P 2+K"]) -> Float[Array, "B P D"]:
        pixels = self.patch_size ** 2 * self.channels
        if patches.ndim != 3 or patches.shape[2] != 2 + pixels:
            raise ConfigError(f"patches have shape {patches.shape}; the model takes [batch, patches, 2 + {pixels}], patches of {self.patch_size} pixels: "
                              "change flexible_patches.patch_size or model.image.patch_size.")
        options = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = Linear(self.width, kernel_init="lecun_normal", out_dtype=wide(self.dtype), name="patch_embedding", **options)(patches[..., 2:])
        for axis, name in enumerate(("row_embedding", "column_embedding")):
            table = self.param(name, initializer(self.width ** -0.5), (self.max_rows, self.width), jnp.dtype(self.param_dtype))
            x = x + jnp.take(table, patches[..., axis].astype(jnp.int32), axis=0, mode="clip").astype(self.dtype).astype(x.dtype)
        return constrain(x, "batch", "sequence", "embed")


def filled(patches: Float[Array, "B P 2+K"]) -> Array:
    """Which patches hold something: bool [B, P]."""
    return patches[..., 0] > 0


class FlexibleVit(Tower):
    """A vision transformer over flexible patches.

    Differs from the paper: ScreenAI does not say how its ViT knows positions; these are Pix2Struct's, with which the sizes add up.

    Attributes:
      max_patches: how many patches the processor makes of a picture; the model itself takes any number.
      max_rows: rows and columns that have an embedding.
      width, depth, ...: see `Tower`.

    Returns:
      normalised tokens [B, P, D], and {"stem": patches with positions, "blocks": {name: [L, B, P, D]}, "tokens"}. Padding is read by no other token.
    """
    max_patches: int = 2048
    patch_size: int = 16
    channels: int = 3
    max_rows: int = MAX_ROWS

    def input_shape(self) -> tuple[int, int]:
        """(patches, values of a patch) of one picture."""
        return self.max_patches, 2 + self.patch_size ** 2 * self.channels

    @nn.compact
    def __call__(self, patches: Float[Array, "B P 2+K"], train: bool = False) -> tuple[Float[Array, "B P D"], dict[str, Array]]:
        out = {}
        x = PatchEmbedding(self.width, self.patch_size, self.channels, self.max_rows, name="embedding", **self.options)(patches)
        out["stem"] = x = Dropout(self.dropout)(x, train)
        x, of_trunk = trunk(self, x, filled(patches)[:, None, None], train=train)
        out.update(of_trunk)
        out["tokens"] = x
        return x, out

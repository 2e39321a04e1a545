"""The vision transformer. Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), with the choices of SigLIP and of CLIP as settings.

SigLIP (Zhai et al. 2023): no class token, attention pooling. CLIP (Radford et al. 2021): class token, no bias on patches, a norm before the blocks, a
linear projection after the pooling. Initialisation is that of the ViT code.
"""
from flax import linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlm_jax.encoders.tower import Tower, check_projection, final_norm, projected, trunk
from vlm_jax.errors import ConfigError
from vlm_jax.nn import AttentionPooling, Dropout, Linear, PatchDropout, pool, resample_positions, sincos2d
from vlm_jax.nn.initializers import initializer
from vlm_jax.nn.pooling import POOLINGS
from vlm_jax.nn.precision import wide
from vlm_jax.sharding.activations import constrain

POSITIONS = ("learned", "sincos2d")


class Vit(Tower):
    """An image tower.

    An image whose size is not `image_size` is taken as well: learned positions are resampled to its grid. Pixels beyond the last whole patch are left
    out.

    Attributes:
      image_size: (height, width) of the images that the positions are made for; one number for squares.
      patch_size: side of the square patches.
      width, depth, ...: see `Tower`.
      pool: "map", "gap", "cls" (adds a class token) or "none" (all tokens).
      positions: "learned" or "sincos2d" (fixed).
      resample: how learned positions are brought to another grid, see `nn.resample_positions`.
      patch_bias, norm_before: bias of the patch projection; a norm between positions and blocks.
      projection: None, "linear", "linear_no_bias" or "linear_tanh" to `embed_dim` after pooling.
      patch_dropout: share of patches left out in training.

    Returns:
      the pooled embedding [B, D] ([B, N, D] for "none"), float32 as all sums are, and {"stem": patches [B, N, D], "positions": tokens with positions, "blocks":
      {name: [L, B, T, D]}, "tokens": normalised tokens [B, N, D] without the class token, "pooled": before the projection}.
    Raises:
      ConfigError: for settings that do not fit each other, or an image smaller than one patch.
    """
    image_size: int | tuple[int, int] = 224
    patch_size: int = 16
    channels: int = 3
    pool: str = "map"
    positions: str = "learned"
    resample: str = "bilinear"
    patch_bias: bool = True
    norm_before: bool = False
    projection: str | None = None
    embed_dim: int | None = None
    patch_dropout: float = 0.0

    def grid(self) -> tuple[int, int]:
        """Patches (down, across) of an image of `image_size`."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size

    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        height, width = (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size
        return height, width, self.channels

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"image": (height, width, channels)} of one example."""
        return {"image": self.input_shape()}

    @nn.compact
    def __call__(self, image: Float[Array, "B H W C"], train: bool = False) -> tuple[Float[Array, "B D"], dict[str, Array]]:
        self._check(image.shape)
        out = {}

        patches = extract_patches(image.astype(self.dtype), self.patch_size)
        batch, *grid = patches.shape[:3]
        patches = patches.reshape(batch, -1, *patches.shape[3:])
        x = Linear(self.width, contract=3, use_bias=self.patch_bias, kernel_init="lecun_normal", name="patch_embedding", **self.unrounded)(patches)
        out["stem"] = x = constrain(x, "batch", "sequence", "embed")

        class_tokens = 1 if self.pool == "cls" else 0
        if class_tokens:
            init = initializer(self.width ** -0.5 if self.norm_before else "zeros")   # CLIP draws it, ViT starts it at 0
            token = self.param("class_token", init, (1, self.width), jnp.dtype(self.param_dtype))
            x = jnp.concatenate([jnp.broadcast_to(token.astype(self.dtype).astype(x.dtype), (batch, 1, self.width)), x], axis=1)
        x = x + self._positions(tuple(grid), class_tokens)
        out["positions"] = x = Dropout(self.dropout)(x, train)
        x = PatchDropout(self.patch_dropout, keep_first=class_tokens)(x, train)

        if self.norm_before:
            x = final_norm(self, x, "norm_before")
        x, of_trunk = trunk(self, x, train=train)
        out.update(of_trunk)
        out["tokens"] = x[:, class_tokens:]

        if self.pool == "map":
            x = AttentionPooling(self.num_heads, self.mlp_dim, self.activation, self.norm_eps, softmax_dtype=self.softmax_dtype, name="pooling",
                                 **self.options)(x)
        else:
            x = pool(x, self.pool)
        out["pooled"] = x
        return projected(self, x, self.width ** -0.5), out

    def _positions(self, grid: tuple[int, int], class_tokens: int) -> Float[Array, "N D"]:
        if self.positions == "sincos2d":
            return jnp.concatenate([jnp.zeros((class_tokens, self.width)), sincos2d(*grid, self.width)])
        made_for = self.grid()
        shape = (class_tokens + made_for[0] * made_for[1], self.width)
        table = self.param("position_embedding", initializer(self.width ** -0.5), shape, jnp.dtype(self.param_dtype))
        return resample_positions(table.astype(self.dtype).astype(wide(self.dtype)), made_for, grid, keep_first=class_tokens, method=self.resample)

    def _check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 4 or shape[3] != self.channels:
            raise ConfigError(f"Vit: images have shape {shape}; give [batch, height, width, {self.channels}].")
        if min(*shape[1:3], *self.input_shape()[:2]) < self.patch_size:
            raise ConfigError(f"Vit: an image of {shape[1]} x {shape[2]} holds no patch of {self.patch_size}; enlarge it or choose smaller patches.")
        if self.pool not in POOLINGS[:3] + ("none",):
            raise ConfigError(f'Vit.pool: "{self.pool}" is not for images; choose "map", "gap", "cls" or "none".')
        if self.positions not in POSITIONS:
            raise ConfigError(f'Vit.positions: "{self.positions}" is unknown; choose one of {", ".join(POSITIONS)}.')
        check_projection("Vit", self.projection, self.embed_dim)


def extract_patches(image: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w P P C"]:
    """Cuts an image into whole patches, from the top left corner; a product with a [P, P, C, D] kernel then equals a convolution with stride P."""
    batch, height, width, channels = image.shape
    down, across = height // size, width // size
    image = image[:, :down * size, :across * size]
    return image.reshape(batch, down, size, across, size, channels).transpose(0, 1, 3, 2, 4, 5)

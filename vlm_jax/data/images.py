"""Image operations. Between decoding and `value_range` a picture is a PIL image of mode RGB or a uint8 array [H, W, 3]; after it, float32 [H, W, 3].

Sizes are one number (a square) or [height, width]. Resizing is Pillow's: antialiased, pixel centres at half integers. The random operations take
their deterministic form when called without an rng, so one list serves training and evaluation.
"""
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from jaxtyping import Float
import numpy as np
from PIL import Image

from vlm_jax.data import decode as decoding
from vlm_jax.data.operations import register
from vlm_jax.data.problems import problem
from vlm_jax.errors import ConfigError
from vlm_jax.settings import choose

METHODS = {"nearest": Image.Resampling.NEAREST, "box": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR,
           "hamming": Image.Resampling.HAMMING, "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Pixels = Image.Image | np.ndarray


def as_image(value: Any) -> Image.Image:
    """Returns pixels as a PIL image of mode RGB; encoded pictures are decoded.

    Raises:
      ConfigError: for float pixels, which come after value_range.
    """
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        raise ConfigError("this operation works on 8-bit pixels; list it before value_range.")
    if not (isinstance(value, Image.Image) and value.mode == "RGB"):
        value = decoding.decode(value)
    return value if isinstance(value, Image.Image) else Image.fromarray(value)


def as_array(value: Any) -> np.ndarray:
    """Returns pixels as an array [H, W, 3], uint8 or float32; encoded pictures are decoded."""
    if isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] == 3:
        return value
    return np.asarray(as_image(value))


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) of a `size` setting."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in pair):
        raise ConfigError(f"size must be a positive number or [height, width], got {size!r}.")
    return pair


def _resize(image: Image.Image, height: int, width: int, method: str) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), METHODS[method])


def _crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


def _room(image: Image.Image, height: int, width: int) -> tuple[int, int]:
    """Returns the rows and columns that a crop leaves over."""
    if image.height < height or image.width < width:
        raise problem("image_too_small", f"image: {image.width} x {image.height} pixels are too few for a crop of {width} x {height}; "
                                         "list resize_shortest before the crop.")
    return image.height - height, image.width - width


@register("image", "decode")
@dataclasses.dataclass(frozen=True)
class Decode:
    """Bytes, a path, a PIL image or an array become RGB pixels: see `vlm_jax.data.decode`."""
    max_pixels: int = decoding.MAX_PIXELS
    max_bytes: int = decoding.MAX_BYTES
    min_size: int | None = None

    def __call__(self, value: Any, rng: np.random.Generator | None = None) -> Pixels:
        return decoding.decode(value, max_pixels=self.max_pixels, max_bytes=self.max_bytes, min_size=self.min_size)


@register("image", "resize")
@dataclasses.dataclass(frozen=True)
class Resize:
    """Resizes to exactly `size`, whatever the aspect ratio: SigLIP's preprocessing (bicubic there)."""
    size: int | Sequence[int]
    method: str = "bilinear"

    def __post_init__(self):
        _pair(self.size), choose(METHODS, self.method, "method")

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Pixels:
        height, width = _pair(self.size)
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == (height, width, 3):
            return image
        return _resize(as_image(image), height, width, self.method)


@register("image", "resize_shortest")
@dataclasses.dataclass(frozen=True)
class ResizeShortest:
    """Resizes the shorter side to `size` and keeps the aspect ratio; the longer side is rounded down."""
    size: int
    method: str = "bicubic"

    def __post_init__(self):
        if not isinstance(self.size, int):
            raise ConfigError(f"size must be one positive number, got {self.size!r}.")
        _pair(self.size), choose(METHODS, self.method, "method")

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Image.Image:
        image = as_image(image)
        width, height = image.size
        shorter = min(width, height)
        longer = self.size * max(width, height) // shorter
        if max(longer, self.size) * self.size > decoding.MAX_PIXELS:
            raise problem("image_too_long", f"image: {width} x {height} pixels are too long a strip to resize_shortest to {self.size}; drop it.")
        return _resize(image, *((longer, self.size) if width < height else (self.size, longer)), self.method)


@register("image", "center_crop")
@dataclasses.dataclass(frozen=True)
class CenterCrop:
    """Cuts `size` from the middle; an odd rest leaves the extra row below and the extra column right."""
    size: int | Sequence[int]

    def __post_init__(self):
        _pair(self.size)

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Image.Image:
        image, (height, width) = as_image(image), _pair(self.size)
        rows, columns = _room(image, height, width)
        return _crop(image, rows // 2, columns // 2, height, width)


@register("image", "random_crop")
@dataclasses.dataclass(frozen=True)
class RandomCrop(CenterCrop):
    """Cuts `size` from a uniformly random place; without an rng, from the middle."""

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Image.Image:
        if rng is None:
            return super().__call__(image)
        image, (height, width) = as_image(image), _pair(self.size)
        rows, columns = _room(image, height, width)
        return _crop(image, int(rng.integers(rows + 1)), int(rng.integers(columns + 1)), height, width)


@register("image", "random_resized_crop")
@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """The Inception crop: a random part of the picture resized to `size`. Without an rng the whole picture is resized.

    Szegedy et al., "Going Deeper with Convolutions" (2015), section 6. The part has a share of the area uniform in `area` and an aspect ratio
    log-uniform in `ratio`; after ten draws that do not fit, the largest central part whose aspect ratio is allowed.
    """
    size: int | Sequence[int]
    area: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    method: str = "bilinear"

    def __post_init__(self):
        _pair(self.size), choose(METHODS, self.method, "method")
        if len(self.area) != 2 or not 0 < self.area[0] <= self.area[1] <= 1:
            raise ConfigError(f"area must be [smallest, largest] within (0, 1], got {list(self.area)}.")
        if len(self.ratio) != 2 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ConfigError(f"ratio must be [smallest, largest], positive, got {list(self.ratio)}.")

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Image.Image:
        image = as_image(image)
        if rng is not None:
            image = image.crop(self.box(image.width, image.height, rng))
        return _resize(image, *_pair(self.size), self.method)

    def box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Returns the part's (left, top, right, bottom)."""
        for _ in range(10):
            area = rng.uniform(*self.area) * width * height
            ratio = math.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 1 <= w <= width and 1 <= h <= height:
                left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
                return left, top, left + w, top + h
        w = min(width, max(1, round(height * self.ratio[1])))
        h = min(height, max(1, round(width / self.ratio[0])))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h


@register("image", "flip_left_right")
@dataclasses.dataclass(frozen=True)
class FlipLeftRight:
    """Mirrors the picture with `probability`; never without an rng. Mind captions that say left or right."""
    probability: float = 0.5

    def __post_init__(self):
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"probability must lie in [0, 1], got {self.probability}.")

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Pixels:
        if rng is None or rng.random() >= self.probability:
            return image
        if isinstance(image, np.ndarray):
            return image[:, ::-1]
        return as_image(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@register("image", "pad_to_square")
@dataclasses.dataclass(frozen=True)
class PadToSquare:
    """Puts the picture in the middle of a square of `color` as long as its longer side."""
    color: Sequence[int] = (255, 255, 255)

    def __post_init__(self):
        if len(self.color) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in self.color):
            raise ConfigError(f"color must be [red, green, blue] of 0 to 255, got {list(self.color)}.")

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Image.Image:
        image = as_image(image)
        width, height = image.size
        if width == height:
            return image
        side = max(width, height)
        if side * side > decoding.MAX_PIXELS:
            raise problem("image_too_long", f"image: {width} x {height} pixels are too long a strip for pad_to_square; leave it out.")
        square = Image.new("RGB", (side, side), tuple(self.color))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square


@register("image", "value_range")
@dataclasses.dataclass(frozen=True)
class ValueRange:
    """8-bit pixels become float32, black at `low` and white at `high`: SigLIP uses (-1, 1); (-2, 0) puts a white background at zero."""
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self):
        if not self.low < self.high:
            raise ConfigError(f"low must be less than high, got {self.low} and {self.high}.")

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Float[np.ndarray, "H W 3"]:
        image = as_array(image)
        if image.dtype != np.uint8:
            raise ConfigError("value_range works on 8-bit pixels; list it once.")
        values = np.multiply(image, np.float32((self.high - self.low) / 255), dtype=np.float32)
        values += np.float32(self.low)
        return values


@register("image", "blank")
@dataclasses.dataclass(frozen=True)
class Blank:
    """Every picture becomes zeros: what a baseline sees that has to answer from the text alone. List it last."""

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Float[np.ndarray, "..."]:
        return np.zeros(np.shape(as_array(image) if not isinstance(image, np.ndarray) else image), np.float32)


@register("image", "normalize")
@dataclasses.dataclass(frozen=True)
class Normalize:
    """Subtracts `mean` and divides by `std`, per channel, from float pixels: list it after value_range(0, 1)."""
    mean: Sequence[float] = CLIP_MEAN
    std: Sequence[float] = CLIP_STD

    def __post_init__(self):
        if len(self.mean) != 3 or len(self.std) != 3 or not all(s > 0 for s in self.std):
            raise ConfigError(f"mean and std must have three numbers each, std positive, got {list(self.mean)} and {list(self.std)}.")

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Float[np.ndarray, "H W 3"]:
        if not (isinstance(image, np.ndarray) and image.dtype == np.float32):
            raise ConfigError("normalize works on float pixels; list value_range with low=0, high=1 before it.")
        return (image - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


@register("image", "siglip")
@dataclasses.dataclass(frozen=True)
class SiglipPreprocessing:
    """SigLIP's preprocessing in one: a bicubic resize to the square, values in [-1, 1]."""
    size: int = 224
    method: str = "bicubic"

    def __post_init__(self):
        Resize(self.size, self.method)

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Float[np.ndarray, "H W 3"]:
        return ValueRange(-1, 1)(Resize(self.size, self.method)(image))


@register("image", "clip")
@dataclasses.dataclass(frozen=True)
class ClipPreprocessing:
    """CLIP's preprocessing in one: the shorter side bicubic to `size`, the middle square, normalised by CLIP's mean and deviation."""
    size: int = 224

    def __post_init__(self):
        ResizeShortest(self.size)

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Float[np.ndarray, "H W 3"]:
        image = CenterCrop(self.size)(ResizeShortest(self.size, "bicubic")(image))
        return Normalize()(ValueRange(0, 1)(image))


@register("image", "flexible_patches")
@dataclasses.dataclass(frozen=True)
class FlexiblePatches:
    """Pix2Struct's preprocessing: as many whole patches as `max_patches` allow, in the picture's own aspect ratio.

    Lee et al., "Pix2Struct" (2023), section 2.1. The picture is standardised by its own mean and deviation (at least 1 / sqrt(number of values)), resized
    to rows x columns patches with rows * columns <= max_patches, and cut. A row of the result is [row, column, patch_size^2 * 3 values]; rows and columns
    count from 1, and what is left over is filled with zeros.
    """
    max_patches: int = 2048
    patch_size: int = 16

    def __post_init__(self):
        for name, value in (("max_patches", self.max_patches), ("patch_size", self.patch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}.")

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of a picture of that many pixels."""
        scale = (self.max_patches * (self.patch_size / height) * (self.patch_size / width)) ** 0.5
        rows, columns = (max(min(int(scale * side / self.patch_size), self.max_patches), 1) for side in (height, width))
        return rows, columns

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Float[np.ndarray, "P 2+K"]:
        values = as_array(image).astype(np.float32)
        rows, columns = self.grid(*values.shape[:2])
        values = (values - values.mean(dtype=np.float64)) / max(values.std(dtype=np.float64), 1 / math.sqrt(values.size))
        size = (columns * self.patch_size, rows * self.patch_size)
        # Pillow resizes 32-bit float pictures of one channel without rounding.
        planes = [np.asarray(Image.fromarray(np.ascontiguousarray(plane, np.float32)).resize(size, Image.Resampling.BILINEAR))
                  for plane in np.moveaxis(values, 2, 0)]
        cut = np.stack(planes, -1).reshape(rows, self.patch_size, columns, self.patch_size, 3).swapaxes(1, 2)
        result = np.zeros((self.max_patches, 2 + self.patch_size ** 2 * 3), np.float32)
        filled = result[:rows * columns]
        filled[:, 0], filled[:, 1] = np.repeat(np.arange(rows), columns) + 1, np.tile(np.arange(columns), rows) + 1
        filled[:, 2:] = cut.reshape(rows * columns, -1)
        return result


@register("image", "naflex_patches")
@dataclasses.dataclass(frozen=True)
class NaflexPatches:
    """SigLIP 2's preprocessing for native aspect ratios: at most `max_patches` whole patches, the aspect ratio kept up to one patch.

    Tschannen et al., "SigLIP 2" (2025), section 2.4.2. The sides are multiples of `patch_size`, each rounded up from one common scale, the largest that
    keeps to the number of patches. Pixels are scaled to [0, 1] and normalised. A row of the result is [row, column, patch_size^2 * 3 values]; rows and
    columns count from 1, and what is left over is filled with zeros.
    """
    max_patches: int = 256
    patch_size: int = 16
    method: str = "bilinear"
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)

    def __post_init__(self):
        FlexiblePatches(self.max_patches, self.patch_size), choose(METHODS, self.method, "method"), Normalize(self.mean, self.std)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of a picture of that many pixels: by bisection, as the released preprocessing finds them."""
        def sides(scale: float) -> tuple[int, int]:
            return max(math.ceil(height * scale / self.patch_size), 1), max(math.ceil(width * scale / self.patch_size), 1)
        low, high = 1e-6, 100.0
        while high - low >= 1e-5:
            scale = (low + high) / 2
            rows, columns = sides(scale)
            low, high = (scale, high) if rows * columns <= self.max_patches else (low, scale)
        return sides(low)

    def __call__(self, image: Pixels, rng: np.random.Generator | None = None) -> Float[np.ndarray, "P 2+K"]:
        image = as_image(image)
        rows, columns = self.grid(image.height, image.width)
        if rows * columns > self.max_patches:
            raise problem("image_too_long", f"image: {image.width} x {image.height} pixels are too long a strip for {self.max_patches} patches; drop it.")
        values = ValueRange(0, 1)(_resize(image, rows * self.patch_size, columns * self.patch_size, self.method))
        values = Normalize(self.mean, self.std)(values)
        cut = values.reshape(rows, self.patch_size, columns, self.patch_size, 3).swapaxes(1, 2)
        result = np.zeros((self.max_patches, 2 + self.patch_size ** 2 * 3), np.float32)
        filled = result[:rows * columns]
        filled[:, 0], filled[:, 1] = np.repeat(np.arange(rows), columns) + 1, np.tile(np.arange(columns), rows) + 1
        filled[:, 2:] = cut.reshape(rows * columns, -1)
        return result

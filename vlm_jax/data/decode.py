"""From encoded bytes, a path, a PIL image or an array to RGB pixels, safely.

One function for the whole library, because every default of an image decoder is a trap for training: transparency turns black, 16-bit pictures
turn white, phone pictures lie on their side, a file of ten kilobytes fills the memory. The rules:

- the header is checked before any pixel is decoded: format, number of bytes, number of pixels;
- the orientation of EXIF is applied; colour profiles (ICC) are ignored;
- transparency (alpha, palette, key colour) is composited onto white;
- 16-bit and 32-bit integers are scaled to 8 bits; floats in [0, 1] are scaled by 255, floats in [0, 255] kept, others stretched from their
  minimum to their maximum;
- of an animation, or of a file of several pages, the first picture counts;
- a truncated or damaged file is an error, never a picture that is partly grey.
"""
import io
import os
import stat
from typing import Any

from jaxtyping import UInt8
import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm_jax.data.problems import problem
from vlm_jax.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 32_000_000
MAX_BYTES = 64 * 2 ** 20

_MAGIC = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
_ORIENTATION = 0x0112
_HOLDS_ORIENTATION = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
_UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def decode_image(value: Any, name: str = "image", *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES,
                 min_size: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the RGB pixels of `value`; the array may be read-only and may share memory with `value`.

    Args:
      value: encoded bytes, a path, a PIL image of any mode, or a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (alpha).
      name: what an error message calls the picture.
      max_pixels, max_bytes: limits that are checked before decoding.
      min_size: lets the JPEG decoder work at a half, quarter or eighth of the size as long as both sides stay at least this long. Much faster for
        large photographs; the pixels then differ slightly from those of the full decoding.
    Raises:
      DataError: with a `reason`: image_missing, image_wrong_type, image_not_found, image_unreadable, image_empty, image_too_many_bytes,
        image_too_many_pixels, image_unknown_format, image_truncated or image_corrupt.
    """
    value = decode(value, name, max_pixels=max_pixels, max_bytes=max_bytes, min_size=min_size)
    return value if isinstance(value, np.ndarray) else np.asarray(value)


def decode(value: Any, name: str = "image", *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES,
           min_size: int | None = None) -> Image.Image | UInt8[np.ndarray, "H W 3"]:
    """As `decode_image`, but encoded pictures stay PIL images of mode RGB: resizing them next needs no conversion. Arrays stay arrays."""
    if isinstance(value, np.ndarray):
        return _from_array(value, name, max_pixels)
    if isinstance(value, Image.Image):
        _check_pixels(value.size, name, max_pixels)
        return _guarded(name, b"", _finish, value)
    if value is None:
        raise problem("image_missing", f"{name}: there is no image; give the record one or leave it out.")
    if isinstance(value, (str, os.PathLike)):
        value = _read(value, name, max_bytes)
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise problem("image_wrong_type", f"{name}: an image cannot be a {type(value).__name__}; give bytes, a path, a PIL image or a uint8 array.")
    if len(value) == 0:
        raise problem("image_empty", f"{name}: the image has zero bytes; fetch the file again.")
    if len(value) > max_bytes:
        raise problem("image_too_many_bytes", f"{name}: the image has {len(value):,} bytes, the limit is {max_bytes:,}; shrink it.")
    image = _guarded(name, value, Image.open, io.BytesIO(value), formats=FORMATS)
    with image:
        _check_pixels(image.size, name, max_pixels)
        if min_size is not None:
            _guarded(name, value, image.draft, "RGB", (min_size, min_size))
        _guarded(name, value, image.load)
        return _guarded(name, value, _finish, image)


def _read(path: str | os.PathLike, name: str, max_bytes: int) -> bytes:
    """Returns the bytes of a regular file; its size is checked before it is read, and a device or pipe is never opened."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise problem("image_not_found", f"{name}: {os.fspath(path)} is no regular file; give the path of a picture.")
        if status.st_size > max_bytes:
            raise problem("image_too_many_bytes", f"{name}: {os.fspath(path)} has {status.st_size:,} bytes, the limit is {max_bytes:,}; "
                                                  "shrink it or raise max_bytes.")
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise problem("image_not_found", f"{name}: there is no file {os.fspath(path)}; correct the path.") from None
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise problem("image_unreadable", f"{name}: {os.fspath(path)!r} cannot be read ({_one_line(error)}); check its permissions.") from None


def _guarded(name: str, data: bytes, function, *arguments, **settings):
    """Calls into Pillow and turns whatever it raises into a DataError: its decoders raise far more than OSError (SyntaxError, struct.error, ...)."""
    try:
        return function(*arguments, **settings)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise problem("image_too_many_pixels", f"{name}: the image is too large to be decoded safely ({_one_line(error)}); shrink it.") from None
    except UnidentifiedImageError:
        if bytes(data[:4]).startswith(_MAGIC):
            raise problem("image_corrupt", f"{name}: the header of the image is damaged or cut off; fetch the file again.") from None
        raise problem("image_unknown_format", f"{name}: the bytes are no image of a known format ({', '.join(FORMATS)}); convert it.") from None
    except Exception as error:  # any other failure of a decoder is a failure of the file
        text = _one_line(error)
        if "truncated" in text.lower() or "broken data stream" in text or isinstance(error, EOFError) or _riff_is_cut(data):
            raise problem("image_truncated", f"{name}: the image is cut off ({text}); fetch the file again.") from None
        raise problem("image_corrupt", f"{name}: the image is damaged ({text}); fetch the file again.") from None


def _riff_is_cut(data: bytes) -> bool:
    """Whether a WebP file promises more bytes than there are."""
    return bytes(data[:4]) == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:160] if text else type(error).__name__


def _check_pixels(size: tuple[int, int], name: str, max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise problem("image_empty", f"{name}: the image is {width} x {height} pixels; leave it out.")
    if width * height > max_pixels:
        raise problem("image_too_many_pixels", f"{name}: the image has {width} x {height} pixels, the limit is {max_pixels:,}; "
                                               "shrink it or raise max_pixels.")


def _finish(image: Image.Image) -> Image.Image:
    """Returns the image upright, opaque, in RGB."""
    image.load()
    image = _to_rgb(image) if image.mode != "RGB" or "transparency" in image.info else image
    turn = _UPRIGHT.get(_orientation(image))
    if turn is not None:
        return image.transpose(turn)
    return image


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 where there is none. A damaged EXIF block says nothing about the pixels: it counts as absent."""
    if not any(key in image.info for key in _HOLDS_ORIENTATION):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the parser raises whatever its struct and type conversions raise
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    mode, info = image.mode, image.info
    if mode.startswith("I") or mode == "F":
        values = np.asarray(image)
        wide = mode != "F" and (mode != "I" or bool(values.min() >= 0 and values.max() <= 65535))
        result = Image.fromarray(_to_eight_bits(values, wide)).convert("RGB")
    elif mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in info:
        if mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        result = Image.new("RGB", image.size, (255, 255, 255))
        result.paste(image, mask=image.getchannel("A"))
    else:
        result = image.convert("RGB")
    # The orientation is read after the conversion, and not every conversion hands the metadata on.
    result.info = {key: value for key, value in info.items() if key != "transparency"}
    return result


def _to_eight_bits(values: np.ndarray, wide: bool) -> UInt8[np.ndarray, "H W"]:
    """Scales one channel of wide integers or floats to 0 ... 255; `wide` says that the format fixes the range 0 ... 65535."""
    values = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    if not np.isfinite(values).all():
        raise ValueError("pixel values that are not finite")
    low, high = float(values.min()), float(values.max())
    if wide:
        low, high = 0.0, 65535.0
    elif low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    return np.rint((values - low) * (255.0 / max(high - low, 1e-30))).astype(np.uint8)


def _from_array(value: np.ndarray, name: str, max_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    shape = value.shape
    if value.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))):
        raise problem("image_wrong_type", f"{name}: an image array must be uint8 [height, width, 3], got {value.dtype} {list(shape)}; convert it.")
    _check_pixels((shape[1], shape[0]), name, max_pixels)
    if len(shape) == 2 or shape[2] == 1:
        return np.repeat(value.reshape(*shape[:2], 1), 3, axis=2)
    if shape[2] == 4:
        return np.asarray(_to_rgb(Image.fromarray(np.ascontiguousarray(value))))
    return value

"""decode_image: pixels of every mode, an error with a reason for everything else."""
import io
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
from PIL import Image, ImageFile
import pytest

from vlm_jax.data.decode import decode, decode_image
from vlm_jax.errors import DataError

RED, GREEN = (255, 0, 0), (0, 128, 0)


def encode(image, kind="PNG", **settings):
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def png(width, height, mode="RGB", color=RED):
    return encode(Image.new(mode, (width, height), color))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def forged_png(width, height, bits, color_type, rows):
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def gradient(dtype, scale):
    return (np.linspace(0, 1, 12).reshape(3, 4) * scale).astype(dtype)


def half_transparent(mode):
    """Two pixels: the left one opaque green (or its grey), the right one fully transparent."""
    image = Image.new("RGBA", (2, 1), (*GREEN, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    return image.convert(mode)


def palette_with_transparency(kind):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([*GREEN, 0, 0, 0] + [9] * 762)
    image.putpixel((1, 0), 1)
    return encode(image, kind, transparency=1)


EXPECTED = {
    "L": (png(2, 2, "L", 77), (77, 77, 77)),
    "1": (png(2, 2, "1", 1), (255, 255, 255)),
    "P": (encode(Image.new("RGB", (2, 2), GREEN).quantize(4)), GREEN),
    "RGB png": (png(2, 2, "RGB", GREEN), GREEN),
    "RGB bmp": (encode(Image.new("RGB", (2, 2), GREEN), "BMP"), GREEN),
    "RGB webp": (encode(Image.new("RGB", (2, 2), GREEN), "WEBP", lossless=True), GREEN),
    "RGB ppm": (encode(Image.new("RGB", (2, 2), GREEN), "PPM"), GREEN),
    "CMYK tiff": (encode(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF"), RED),
    "16 bit png, white": (encode(Image.fromarray(np.full((2, 2), 65535, np.uint16))), (255, 255, 255)),
    "16 bit png, grey": (encode(Image.fromarray(np.full((2, 2), 128 * 257, np.uint16))), (128, 128, 128)),
    "16 bit tiff, dark": (encode(Image.fromarray(np.full((2, 2), 300, np.uint16)), "TIFF"), (1, 1, 1)),
    "32 bit integers within 16 bits": (encode(Image.fromarray(np.full((2, 2), 128 * 257, np.int32)), "TIFF"), (128, 128, 128)),
    "float in 0 to 1": (encode(Image.fromarray(np.full((2, 2), 0.5, np.float32)), "TIFF"), (128, 128, 128)),
    "float in 0 to 255": (encode(Image.fromarray(np.full((2, 2), 200.4, np.float32)), "TIFF"), (200, 200, 200)),
    "16 bit RGB png": (forged_png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 65535, 128 * 257, 0)), (255, 128, 0)),
    "RGBA half": (png(2, 2, "RGBA", (0, 0, 0, 128)), (127, 127, 127)),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_every_mode_gives_its_pixels(case):
    data, pixel = EXPECTED[case]
    pixels = decode_image(data)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.uint8(pixel), pixels.shape))


def test_cmyk_jpeg_is_not_inverted():
    pixels = decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)).astype(int)
    assert np.abs(pixels - np.array(RED)).max() <= 6


@pytest.mark.parametrize("data, expected", [
    (encode(half_transparent("RGBA")), GREEN), (encode(half_transparent("RGBA"), "WEBP", lossless=True), GREEN),
    (encode(half_transparent("LA")), (75, 75, 75)), (palette_with_transparency("PNG"), GREEN), (palette_with_transparency("GIF"), GREEN)])
def test_transparency_turns_white(data, expected):
    pixels = decode_image(data)
    assert pixels.shape == (1, 2, 3)
    np.testing.assert_array_equal(pixels[0], [expected, (255, 255, 255)])


def test_key_colour_turns_white():
    image = Image.new("RGB", (2, 1), GREEN)
    image.putpixel((1, 0), (1, 2, 3))
    np.testing.assert_array_equal(decode_image(encode(image, transparency=(1, 2, 3)))[0], [GREEN, (255, 255, 255)])


def test_premultiplied_modes():
    np.testing.assert_array_equal(decode_image(half_transparent("RGBA").convert("RGBa"))[0, 1], [255, 255, 255])
    np.testing.assert_array_equal(decode_image(half_transparent("LA").convert("La"))[0, 1], [255, 255, 255])


@pytest.mark.parametrize("dtype, scale", [(np.uint16, 65535), (np.float32, 1), (np.float32, 255), (np.int32, 65535), (np.int32, 2_000_000)])
def test_wide_values_are_scaled_and_not_clipped(dtype, scale):
    pixels = decode_image(Image.fromarray(gradient(dtype, scale)))
    assert np.abs(pixels[..., 0].astype(int) - np.linspace(0, 255, 12).reshape(3, 4)).max() <= 1
    assert len(np.unique(pixels)) == 12


def test_floats_beyond_eight_bits_are_stretched_and_nan_is_an_error():
    pixels = decode_image(Image.fromarray(np.array([[-1.0, 0.0, 1.0]], np.float32)))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 128, 255])
    with pytest.raises(DataError, match="finite") as error:
        decode_image(encode(Image.fromarray(np.array([[np.nan, 1.0]], np.float32)), "TIFF"))
    assert error.value.reason == "image_corrupt"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind, orientation):
    upright = Image.new("RGB", (32, 16), (0, 0, 255))
    upright.paste(RED, (0, 0, 16, 8))
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}          # the inverse of each turn, in Pillow's numbering
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_image(encode(stored, kind, exif=exif)).astype(int)
    assert pixels.shape == (16, 32, 3)
    assert np.abs(pixels[3, 6] - RED).max() < 30
    assert np.abs(pixels[[3, 12, 12], [25, 6, 25]] - [0, 0, 255]).max() < 30


def test_a_grey_picture_with_orientation_and_a_damaged_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode_image(encode(Image.new("L", (5, 3)), "JPEG", exif=exif)).shape == (5, 3, 3)
    assert decode_image(encode(Image.new("RGB", (5, 3)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).shape == (3, 5, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, GREEN, (0, 0, 255))]
    pixels = decode_image(encode(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})))
    np.testing.assert_array_equal(pixels, np.broadcast_to(np.uint8(RED), (4, 4, 3)))


def test_values_other_than_bytes(tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(png(3, 2))
    for value in (path, str(path), bytearray(png(3, 2)), memoryview(png(3, 2)), Image.new("RGB", (3, 2), RED), Image.open(path)):
        np.testing.assert_array_equal(decode_image(value), np.broadcast_to(np.uint8(RED), (2, 3, 3)))
    array = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    assert decode_image(array) is array
    np.testing.assert_array_equal(decode_image(array[..., 0]), np.repeat(array[..., :1], 3, axis=2))
    np.testing.assert_array_equal(decode_image(array[..., :1]), np.repeat(array[..., :1], 3, axis=2))
    np.testing.assert_array_equal(decode_image(np.zeros((1, 1, 4), np.uint8)), [[[255, 255, 255]]])
    assert isinstance(decode(png(3, 2)), Image.Image)


def test_min_size_reduces_a_large_jpeg():
    data = encode(Image.new("RGB", (640, 480), RED), "JPEG")
    assert decode_image(data).shape == (480, 640, 3)
    assert decode_image(data, min_size=100).shape == (120, 160, 3)
    assert decode_image(data, min_size=500).shape == (480, 640, 3)
    assert decode_image(png(64, 48), min_size=5).shape == (48, 64, 3)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("value, reason", [
    (None, "image_missing"), (3, "image_wrong_type"), (np.zeros((2, 2, 3)), "image_wrong_type"), (np.zeros((2, 2, 5), np.uint8), "image_wrong_type"),
    (np.zeros((0, 4, 3), np.uint8), "image_empty"), (b"", "image_empty"), (b"hello, world", "image_unknown_format"),
    (b"%PDF-1.7", "image_unknown_format"),
    ("no/such/file.jpg", "image_not_found"), (".", "image_not_found"), ("a\0b", "image_unreadable"), (b"\xff\xd8\xff", "image_corrupt"),
    (encode(NOISE, "JPEG")[:-200], "image_truncated"), (encode(NOISE)[:-900], "image_truncated"), (encode(NOISE, "WEBP")[:-90], "image_truncated"),
    (encode(NOISE, "GIF")[:-500], "image_truncated"), (encode(NOISE, "BMP")[:-500], "image_truncated"),
    (encode(NOISE, "TIFF")[:900], "image_truncated"),
    (forged_png(30_000, 30_000, 8, 2, b"\0" * 100), "image_too_many_pixels"), (forged_png(9000, 9000, 1, 0, b""), "image_too_many_pixels"),
    (np.broadcast_to(np.uint8(0), (30_000, 30_000, 3)), "image_too_many_pixels"), (encode(Image.new("L", (4, 4)), "ICO"), "image_unknown_format"),
])
def test_failures_have_a_reason_and_one_line(value, reason):
    with pytest.raises(DataError) as error:
        decode_image(value, "emoji[7]")
    assert error.value.reason == reason
    message = str(error.value)
    assert message.startswith("emoji[7]: ") and "\n" not in message and message.endswith(".") and ";" in message


def test_limits(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png(10, 10))
    for value in (path, png(10, 10)):
        with pytest.raises(DataError) as error:
            decode_image(value, max_bytes=20)
        assert error.value.reason == "image_too_many_bytes"
    for value in (path, Image.new("RGB", (10, 10)), np.zeros((10, 10, 3), np.uint8)):
        with pytest.raises(DataError) as error:
            decode_image(value, max_pixels=99)
        assert error.value.reason == "image_too_many_pixels"
        assert decode_image(value, max_pixels=100).shape == (10, 10, 3)


def test_no_truncated_picture_is_ever_let_through():
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    data = encode(NOISE, "JPEG", quality=90)
    for cut in range(2, len(data) - 2, 97):
        with pytest.raises(DataError):
            decode_image(data[:cut])


BOMB = """
import resource, sys, zlib
from vlm_jax.data.decode import decode_image
from vlm_jax.errors import DataError
decode_image(open(sys.argv[1], "rb").read())                # a good picture first: the decoders are loaded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[2:]:
    try:
        decode_image(path, "bomb")
    except DataError as error:
        assert error.reason == "image_too_many_pixels", error
    else:
        raise SystemExit("decoded")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_bombs_do_not_fill_the_memory(tmp_path):
    """81 megapixels pass Pillow's own limit; 900 exceed it; both as files whose pixels are really there."""
    (tmp_path / "good.png").write_bytes(png(8, 8))
    (tmp_path / "81.png").write_bytes(forged_png(9000, 9000, 1, 0, bytes(9000 * 1126)))
    (tmp_path / "900.png").write_bytes(forged_png(30_000, 30_000, 1, 0, bytes(30_000 * 3751)))
    webp = bytearray(encode(Image.new("RGBA", (2, 2), (1, 2, 3, 4)), "WEBP", save_all=True, append_images=[Image.new("RGBA", (2, 2))]))
    webp[24:30] = (16_382).to_bytes(3, "little") * 2            # the canvas of an animation: 16,383 x 16,383
    (tmp_path / "canvas.webp").write_bytes(webp)
    paths = [str(tmp_path / name) for name in ("good.png", "81.png", "900.png", "canvas.webp")]
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", BOMB, *paths], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 60_000          # kilobytes; decoding the smaller one would take 240,000


@pytest.mark.filterwarnings("ignore")
def test_fuzz_ten_thousand_mutated_files():
    """Flipped, cut, repeated and spliced bytes: pixels or a DataError with a reason, and nothing else."""
    small = NOISE.crop((0, 0, 16, 16))
    animation = [small.quantize(16), Image.new("P", (16, 16))]
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [encode(small, "JPEG", exif=exif), encode(small, "JPEG", progressive=True), encode(small.convert("CMYK"), "JPEG"), encode(small),
             encode(small.convert("RGBA")), encode(small.quantize(16)), encode(small, "WEBP"), encode(small, "WEBP", lossless=True),
             encode(animation[0], "GIF", save_all=True, append_images=animation[1:]), encode(small, "BMP"), encode(small, "TIFF"),
             encode(small, "TIFF", compression="tiff_lzw"), encode(small, "PPM"), encode(Image.fromarray(gradient(np.uint16, 65535)))]
    rng = random.Random(0)
    outcomes = {}
    for i in range(10_000):
        data = bytearray(seeds[i % len(seeds)])
        for _ in range(rng.randrange(1, 5)):
            kind, at = rng.randrange(5), rng.randrange(len(data))
            if kind <= 1:
                data[at] = rng.randrange(256) if kind else data[at] ^ (1 << rng.randrange(8))
            elif kind == 2:
                del data[at:at + rng.randrange(1, 40)]
            elif kind == 3:
                data[at:at] = data[rng.randrange(len(data)):][:rng.randrange(40)]
            else:
                data[at:at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"])
            data = data or bytearray(b"\0")
        try:
            pixels = decode_image(bytes(data), max_pixels=100_000)
        except DataError as error:
            outcomes[error.reason] = outcomes.get(error.reason, 0) + 1
            assert "\n" not in str(error)
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
            outcomes["decoded"] = outcomes.get("decoded", 0) + 1
    assert set(outcomes) <= {"decoded", "image_corrupt", "image_truncated", "image_too_many_pixels", "image_unknown_format", "image_empty"}
    assert all(outcomes.get(kind, 0) > 100 for kind in ("decoded", "image_corrupt", "image_truncated"))

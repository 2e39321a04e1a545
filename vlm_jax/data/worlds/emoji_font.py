"""Pictures of emoji: a colour emoji font, drawn by Pillow at its native size and averaged down onto white.

Emoji joined by zero-width joiners (a woman, a skin tone, a rocket: an astronaut) are one glyph only after complex text layout, which Pillow
leaves to raqm with libfribidi. Without it they would silently fall apart into several glyphs, so nothing is drawn then.
"""
from collections.abc import Iterator
from functools import cache
import hashlib
import os
from pathlib import Path

import numpy as np

from vlm_jax.errors import DataError

FONT_VARIABLE = "VLM_JAX_EMOJI_FONT"
INSTALL = "apt-get install fonts-noto-color-emoji libfribidi0"
# The one size at which Noto Color Emoji, a bitmap font, has pictures ("strike").
STRIKE = 109
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/Library/Fonts", "~/Library/Fonts")
FONT_NAMES = ("NotoColorEmoji.ttf", "NotoColorEmoji-Regular.ttf")
REFERENCE = "\U0001F600"
_JOINED = "\U0001F469\U0001F3FD\u200d\U0001F680"
_MISSING = "\U0010FFFD"


def find_font() -> Path:
    """Returns the colour emoji font: the file that VLM_JAX_EMOJI_FONT names, else Noto Color Emoji in the usual font folders.

    Raises:
      DataError: if there is none; the message says how to install it.
    """
    named = os.environ.get(FONT_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise DataError(f"{FONT_VARIABLE}={named}: no such file; name a colour emoji .ttf file, or unset it and run `{INSTALL}`.")
        return path
    for folder in FONT_FOLDERS:
        root = Path(folder).expanduser()
        if root.is_dir():
            found = sorted(path for name in FONT_NAMES for path in root.rglob(name))
            if found:
                return found[0]
    raise DataError(f"emoji: no colour emoji font on this machine; run `{INSTALL}`, or set {FONT_VARIABLE} to a colour emoji .ttf file.")


def check_layout() -> None:
    """Raises a DataError unless Pillow can join emoji sequences (raqm with libfribidi)."""
    from PIL import features
    missing = [name for name in ("raqm", "fribidi") if not features.check(name)]
    if missing:
        raise DataError(f"emoji: Pillow lacks {' and '.join(missing)}, so joined emoji would fall apart into several glyphs; run `{INSTALL}`.")


def emoji_ready() -> str | None:
    """Returns None if emoji can be drawn on this machine, else one line that says what is missing and how to get it."""
    try:
        load_font()
    except DataError as error:
        return str(error)
    return None


def load_font():
    """Returns the Pillow font at its native strike.

    Raises:
      DataError: if the font, raqm or libfribidi is missing, or the font has no colour pictures that Pillow can draw.
    """
    from PIL import ImageFont
    path = find_font()
    check_layout()
    try:
        font = ImageFont.truetype(str(path), STRIKE, layout_engine=ImageFont.Layout.RAQM)
        picture = _draw(font, REFERENCE)
    except OSError as error:
        raise DataError(f"{path}: not a bitmap colour emoji font at size {STRIKE} ({error}); run `{INSTALL}`, or set {FONT_VARIABLE}.") from error
    if np.ptp(picture.astype(int), axis=-1).max() < 64:
        raise DataError(f"{path}: draws emoji without colour; run `{INSTALL}`, or set {FONT_VARIABLE} to a bitmap colour emoji font.")
    if width_in_glyphs(font, _JOINED) > 1.01:
        raise DataError(f"{path}: joined emoji fall apart into several glyphs; run `{INSTALL}`, or set {FONT_VARIABLE} to a newer font.")
    return font


def font_sha256() -> str:
    """Returns the SHA-256 of the font file in hexadecimal."""
    path = find_font()
    return _sha256(str(path), path.stat().st_mtime_ns)


@cache
def _sha256(path: str, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def width_in_glyphs(font, emoji: str) -> float:
    """Returns the advance of `emoji` in units of one glyph: 1.0 for a sequence that the font joins."""
    return font.getlength(emoji) / font.getlength(REFERENCE)


def draw_native(font, emoji: str) -> np.ndarray | None:
    """Draws one emoji at the strike, centred on a white square.

    Returns:
      uint8 [S, S, 3] (S = 136 for Noto), or None if the font has no glyph for it or draws it as a strip of several glyphs.
    """
    if width_in_glyphs(font, emoji) > 1.01:
        return None
    picture = _draw(font, emoji)
    blank = (picture == 255).all() or np.array_equal(picture, _draw(font, _MISSING))
    return None if blank else picture


def shrink(picture: np.ndarray, size: int) -> np.ndarray:
    """Averages a native picture over boxes down (or up) to uint8 [size, size, 3]."""
    from PIL import Image
    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BOX))


def draw_emoji(emoji: str, size: int = 72) -> np.ndarray:
    """Draws one emoji as uint8 [size, size, 3] on white.

    Raises:
      DataError: if nothing can be drawn here, or the font has no single glyph for it.
    """
    picture = draw_native(load_font(), emoji)
    if picture is None:
        raise DataError(f"emoji {emoji!r}: {find_font().name} has no single glyph for it; use a newer font or another emoji.")
    return shrink(picture, size)


def draw_all(sequences: list[str], size: int) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yields (position, SHA-256 of the native pixels, uint8 [size, size, 3]) of every sequence for which the font has one glyph."""
    font = load_font()
    for position, emoji in enumerate(sequences):
        picture = draw_native(font, emoji)
        if picture is not None:
            yield position, hashlib.sha256(picture.tobytes()).hexdigest(), shrink(picture, size)


def _draw(font, text: str) -> np.ndarray:
    from PIL import Image, ImageDraw
    left, top, right, bottom = font.getbbox(REFERENCE)
    side = max(right - left, bottom - top)
    image = Image.new("RGB", (side, side), "white")
    corner = ((side - (right - left)) // 2 - left, (side - (bottom - top)) // 2 - top)
    ImageDraw.Draw(image).text(corner, text, font=font, embedded_color=True)
    return np.asarray(image)

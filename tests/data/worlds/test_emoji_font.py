"""The font is found, joined sequences are one glyph, and what is missing is said."""
import os

import numpy as np
from PIL import Image, features
import pytest

from vlm_jax.data.worlds import emoji_font
from vlm_jax.errors import DataError

needs_font = pytest.mark.skipif(emoji_font.emoji_ready() is not None, reason=str(emoji_font.emoji_ready()))
ASTRONAUT = "\U0001F469\U0001F3FD\u200d\U0001F680"
SCOTLAND = "\U0001F3F4\U000E0067\U000E0062\U000E0073\U000E0063\U000E0074\U000E007F"


@needs_font
@pytest.mark.parametrize("emoji", [ASTRONAUT, "\U0001F1E9\U0001F1EA", "\u2764\ufe0f", "1\ufe0f\u20e3", SCOTLAND])
def test_sequence_is_one_glyph(emoji):
    font = emoji_font.load_font()
    assert emoji_font.width_in_glyphs(font, emoji) == pytest.approx(1.0)
    picture = emoji_font.draw_emoji(emoji, 40)
    assert picture.shape == (40, 40, 3) and picture.dtype == np.uint8
    assert (picture[0] == 255).all() and (picture[-1] == 255).all()
    assert (picture < 200).any(-1).mean() > 0.05


@needs_font
def test_unjoined_and_missing_sequences_are_dropped():
    font = emoji_font.load_font()
    strip = "\U0001F680\u200d\U0001F680"
    assert emoji_font.width_in_glyphs(font, strip) > 1.5 and emoji_font.draw_native(font, strip) is None
    assert emoji_font.draw_native(font, "\U0010FFF0") is None
    with pytest.raises(DataError, match="no single glyph"):
        emoji_font.draw_emoji(strip)


@needs_font
def test_shrinking_averages_boxes():
    native = emoji_font.draw_native(emoji_font.load_font(), ASTRONAUT)
    side = native.shape[0]
    half = emoji_font.shrink(native, side // 2)
    expected = native.reshape(side // 2, 2, side // 2, 2, 3).astype(float).mean((1, 3))
    np.testing.assert_allclose(half, expected, atol=1.0)


@needs_font
def test_digest_is_the_files():
    import hashlib
    assert emoji_font.font_sha256() == hashlib.sha256(emoji_font.find_font().read_bytes()).hexdigest()


def test_missing_font_says_how_to_install(monkeypatch, tmp_path):
    monkeypatch.delenv(emoji_font.FONT_VARIABLE, raising=False)
    monkeypatch.setattr(emoji_font, "FONT_FOLDERS", (str(tmp_path),))
    assert "apt-get install fonts-noto-color-emoji libfribidi0" in emoji_font.emoji_ready()
    with pytest.raises(DataError, match="no colour emoji font"):
        emoji_font.find_font()


def test_variable_names_the_font(monkeypatch, tmp_path):
    monkeypatch.setenv(emoji_font.FONT_VARIABLE, str(tmp_path / "absent.ttf"))
    assert "no such file" in emoji_font.emoji_ready()
    (tmp_path / "broken.ttf").write_bytes(b"not a font")
    monkeypatch.setenv(emoji_font.FONT_VARIABLE, str(tmp_path / "broken.ttf"))
    assert emoji_font.find_font() == tmp_path / "broken.ttf"
    assert "not a bitmap colour emoji font" in (emoji_font.emoji_ready() or "") or "lacks" in emoji_font.emoji_ready()


@pytest.mark.parametrize("absent", ["raqm", "fribidi"])
def test_refuses_to_draw_without_layout(monkeypatch, tmp_path, absent):
    (tmp_path / "font.ttf").write_bytes(b"")
    monkeypatch.setenv(emoji_font.FONT_VARIABLE, str(tmp_path / "font.ttf"))
    monkeypatch.setattr(features, "check", lambda name: name != absent)
    reason = emoji_font.emoji_ready()
    assert f"Pillow lacks {absent}" in reason and "libfribidi0" in reason and "\n" not in reason


@needs_font
def test_monochrome_drawing_is_refused(monkeypatch):
    monkeypatch.setattr(emoji_font, "_draw", lambda font, text: np.asarray(Image.new("RGB", (8, 8), "gray")))
    assert "without colour" in emoji_font.emoji_ready()


@needs_font
def test_falling_apart_is_noticed(monkeypatch):
    # Pillow's basic layout is what a machine without libfribidi would silently use.
    from PIL import ImageFont
    truetype = ImageFont.truetype
    monkeypatch.setattr(ImageFont, "truetype", lambda path, size, layout_engine: truetype(path, size, layout_engine=ImageFont.Layout.BASIC))
    assert "fall apart" in emoji_font.emoji_ready()


def test_ready_or_reason():
    reason = emoji_font.emoji_ready()
    assert reason is None or ("\n" not in reason and os.path.basename(reason))

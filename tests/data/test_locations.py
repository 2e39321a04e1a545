"""Boxes as text and back."""
from hypothesis import given, strategies as st
import numpy as np

from vlm_jax.data.locations import TOKENS, box_tokens, detection_text, parse_detections, parse_screen_numbers, screen_numbers
from vlm_jax.data.tokenizers import expand_tokens

SHARES = st.floats(0, 1)


@given(SHARES, SHARES, SHARES, SHARES, st.integers(8, 4000), st.integers(8, 4000))
def test_boxes_come_back_within_a_bin(left, top, right, bottom, height, width):
    box = np.array([left * width, top * height, right * width, bottom * height])
    sides = np.array([width, height, width, height])
    (found, name), = parse_detections(f"{box_tokens(box, height, width)} red circle", height, width)
    assert name == "red circle" and (np.abs(found - box) / sides <= 1 / 1024 + 1e-6).all()
    assert (np.abs(parse_screen_numbers(screen_numbers(box, height, width), height, width) - box) / sides <= 1 / 1000 + 1e-6).all()


def test_the_order_is_paligemmas():
    assert box_tokens((1, 2, 3, 4), 8, 4) == "<loc0256><loc0256><loc0512><loc0768>" and box_tokens((0, 0, 4, 8), 8, 4).endswith("<loc1023><loc1023>")
    assert screen_numbers((1, 2, 4, 8), 8, 4) == "250 999 250 999"
    assert set(expand_tokens([TOKENS])) >= {"<loc0000>", "<loc0256>", "<loc1023>"} and len(expand_tokens([TOKENS])) == 1024


def test_several_boxes_and_nonsense():
    text = detection_text([(0, 0, 4, 4), (1, 1, 2, 2)], ["a", "blue star"], 8, 8)
    assert [name for _, name in parse_detections(text, 8, 8)] == ["a", "blue star"]
    for text in ("", "<loc0001><loc0002><loc0003> a", "<loc9999><loc0001><loc0001><loc0001> a", "red <loc1><loc2><loc3><loc4>"):
        assert parse_detections(text, 8, 8) == []
    assert parse_screen_numbers("click 1 2 3", 8, 8) is None and parse_screen_numbers("click 1000 2 3 4", 8, 8) is None

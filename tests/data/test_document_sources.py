"""Pairs as documents in either order, and the texts of documents."""
import numpy as np
import pytest

from tests.data.test_interleaved import TOKENIZER, Listed, document, picture, processor
from vlm_jax.data.document_sources import order_source, texts_source
from vlm_jax.data.sources import build_source, texts_of
from vlm_jax.errors import ConfigError, DataError


def test_pictures_stand_before_or_after_their_text_and_are_read_in_either_order():
    pairs = Listed([{"image": picture(k), "texts": ["a dog", "a cat"], "label": k} for k in range(80)])
    source, made = order_source(pairs, seed=1), processor()
    first = spaced = 0
    chosen = set()
    for i in range(80):
        record, arrays = source[i], made(source[i])
        kinds = [segment["kind"] for segment in record["segments"]]
        text = record["segments"][kinds.index("text")]["text"]
        assert sorted(kinds) == ["image", "text"] and record["label"] == i and text.strip() in ("a dog", "a cat")
        first, spaced, chosen = first + (kinds[0] == "text"), spaced + (text[0] == " "), chosen | {text.strip()}
        counted = (arrays["loss_weights"] > 0) & ~np.isin(arrays["tokens"], [1, TOKENIZER.token_id("<|endofchunk|>")])
        assert (arrays["media_index"][counted] == 0).all() and counted.any()          # every word reads the picture
    assert 25 < first < 55 and 25 < spaced < 55 and len(chosen) == 2
    assert texts_of(source, 3) == ["a dog", "a cat"] and source.describe(3) == "pages.jsonl:4"
    always = order_source(pairs, text_first=1.0, space=0.0)
    assert [segment["kind"] for segment in always[0]["segments"]] == ["text", "image"]
    clip = order_source(Listed([{"frames": np.zeros((2, 5, 5, 3), np.uint8), "texts": ["it moves"]}]))
    assert processor(frames=2)(clip[0])["images"].shape == (3, 2, 4, 4, 3)
    for record, reason in (({"texts": ["a"]}, "image_missing"), ({"image": picture(1)}, "caption_missing"),
                           ({"image": picture(1), "texts": [""]}, "caption_empty")):
        with pytest.raises(DataError, match="pages.jsonl:1") as error:
            order_source(Listed([record]))[0]
        assert error.value.reason == reason
    for wrong in (dict(text_first=2), dict(space=True)):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            order_source(pairs, **wrong)
    assert len(build_source({"name": "image_text_order", "source": {"name": "shapes", "count": 3, "size": 8}})) == 3


def test_the_texts_of_documents():
    pages = texts_source(Listed([document("a ", 1, "", " b"), document(1), {"texts": ["a"]}]))
    assert pages[0] == {"prompt": "", "texts": ["a b"], "text_only": True} and pages.texts_at(0) == ["a b"]
    for index, reason in ((1, "caption_empty"), (2, "document_wrong_type")):
        with pytest.raises(DataError, match="pages.jsonl") as error:
            pages[index]
        assert error.value.reason == reason
    built = build_source({"name": "document_texts", "source": {"name": "shapes_episodes", "count": 4, "images": "described", "shots": 2}, "separator": "\n"})
    assert built[0]["texts"][0].count("\n") >= 8

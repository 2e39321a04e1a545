"""Multilingual captions of emoji."""
import pickle

import numpy as np

from vlm_jax.data.sources import Source, build_source, prompt_of
from vlm_jax.data.worlds.emoji import emoji_source
from vlm_jax.data.worlds.emoji_names import LANGUAGES


def test_each_picture_comes_once_for_every_language_that_names_it(emoji_cache):
    source = build_source({"name": "emoji_captions", "split": "validation", "size": 24, "cache": emoji_cache})
    emojis = emoji_source("validation", LANGUAGES, 24, emoji_cache)
    assert isinstance(source, Source) and len(source) == sum(len(emojis.names_at(i)) for i in range(len(emojis))) > 3 * len(emojis)
    assert {prompt_of(source, i).removeprefix("caption ") for i in range(len(source))} == set(LANGUAGES)
    again = pickle.loads(pickle.dumps(source))  # noqa: S301  (our own bytes)
    for i in (0, 1, 15, len(source) - 1):
        record = source[i]
        assert record["prompt"] == f"caption {record['language']}"
        assert record["texts"] == [record["texts_by_language"][record["language"]]] == source.texts_at(i)
        assert again[i]["texts"] == record["texts"] and source.describe(i).endswith(f", {record['language']})")
        np.testing.assert_array_equal(again[i]["image"], record["image"])
    assert source.details["records"] == len(source) and source.details["pictures"] == len(emojis)


def test_languages_are_chosen(emoji_cache):
    source = build_source({"name": "emoji_captions", "languages": ["de"], "size": 24, "cache": emoji_cache, "limit": 5})
    assert [source.prompt_at(i) for i in range(5)] == ["caption de"] * 5

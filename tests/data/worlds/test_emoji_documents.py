"""Documents of emoji with names in one or several languages."""
import pickle

import numpy as np
import pytest

from vlm_jax.data.documents import check_segments
from vlm_jax.data.sources import Source, build_source
from vlm_jax.data.worlds.emoji import emoji_source
from vlm_jax.errors import ConfigError


def test_documents_name_their_pictures(emoji_cache):
    settings = dict(name="emoji_documents", split="validation", languages=["en", "de", "ja"], size=24, cache=emoji_cache, pictures=[2, 4])
    source = build_source({**settings, "text_first": 0.5})
    emojis = emoji_source("validation", ("en", "de", "ja"), 24, emoji_cache)
    names = {emojis[row]["emoji"]: emojis.names_at(row) for row in range(len(emojis))}
    pictures = {emojis[row]["emoji"]: emojis[row]["image"] for row in range(len(emojis))}
    mixed, first, sizes = 0, 0, set()
    for i in range(40):
        record = source[i]
        shown, step = record["id"].split(" "), -1 if record.get("next_image") else 1
        assert isinstance(source, Source) and len(check_segments(record["segments"], "<image>")) == 2 * len(shown)
        for k, (one, language) in enumerate(zip(shown, record["languages"])):
            picture, text = record["segments"][2 * k:2 * k + 2][::step]
            assert text["text"] == names[one][language] and np.array_equal(picture["image"], pictures[one])
        assert record["texts"] == [names[shown[-1]][record["language"]]] == source.texts_at(i) and len(record["support"]) == len(shown) - 1
        mixed, first, sizes = mixed + (len(set(record["languages"])) > 1), first + (step < 0), sizes | {len(shown)}
    assert 5 < mixed < 35 and 8 < first < 32 and sizes == {2, 3, 4}
    again = pickle.loads(pickle.dumps(source))  # noqa: S301  (our own bytes)
    assert again[3]["id"] == source[3]["id"] and source.details["mixed"] == 0.5 and source.describe(3) == "emoji_documents/validation[3]"
    one = build_source({**settings, "mixed": 0, "images": False})
    assert all(len(set(one[i]["languages"])) == 1 and one[i]["text_only"] and "image" not in one[i] for i in range(9))
    for wrong in (dict(pictures=0), dict(pictures=[3, 2]), dict(mixed=2), dict(count=0), dict(text_first="no")):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            build_source({**settings, **wrong})

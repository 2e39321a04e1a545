"""The emoji source: records, splits by picture, and a cache that mends itself."""
import hashlib
import pickle

import numpy as np
import pytest

from vlm_jax.data.sources import Source, build_source
from vlm_jax.data.worlds import emoji, emoji_font
from vlm_jax.data.worlds.emoji import cache_path, emoji_source
from vlm_jax.data.worlds.emoji_names import LANGUAGES
from vlm_jax.data.worlds.emoji_splits import SPLITS, parse
from vlm_jax.errors import ConfigError

SIZE = 24


@pytest.fixture(scope="module")
def splits(emoji_cache):
    return {split: emoji_source(split, size=SIZE, cache=emoji_cache) for split in SPLITS}


def test_records(splits):
    source = splits["train"]
    record = source[7]
    assert isinstance(source, Source) and source.name == "emoji/train"
    assert record["image"].shape == (SIZE, SIZE, 3) and record["image"].dtype == np.uint8
    assert record["texts"] == source.texts_at(7) == list(record["texts_by_language"].values())
    assert set(record["attributes"]) == {"tone", "person", "concept"} and record["concept"] == parse(record["emoji"]).concept
    assert type(record["group"]) is int and source.describe(7).startswith("emoji/train[7] (")
    with pytest.raises(IndexError):
        source[len(source)]


def test_galleries_are_large(splits):
    lengths = {name: len(source) for name, source in splits.items()}
    assert lengths["train"] > 2000 and lengths["heldout_attributes"] >= 500
    assert lengths["validation"] >= 100 and lengths["heldout_concepts"] >= 200
    assert len({splits["heldout_attributes"][i]["group"] for i in range(lengths["heldout_attributes"])}) >= 500


def test_splits_share_no_sequence_and_no_picture(splits, emoji_cache):
    sequences, pictures = {}, {}
    for name, source in splits.items():
        for i in range(len(source)):
            record = source[i]
            assert record["emoji"] not in sequences
            sequences[record["emoji"]] = name
            assert pictures.setdefault(hashlib.sha256(record["image"].tobytes()).hexdigest(), name) == name
    everything = emoji_source("all", size=SIZE, cache=emoji_cache)
    assert {everything[i]["emoji"] for i in range(len(everything))} == set(sequences)


def test_equal_pictures_are_one_group(splits):
    groups, pictures = {}, {}
    for source in splits.values():
        for i in range(len(source)):
            record = source[i]
            groups.setdefault(record["group"], set()).add(record["image"].tobytes())
            pictures.setdefault(record["image"].tobytes(), []).append(record["emoji"])
    assert all(len(images) == 1 for images in groups.values())
    # The snowboarder looks the same in all six tones.
    snowboarders = [emojis for emojis in pictures.values() if "\U0001F3C2" in emojis]
    assert len(snowboarders) == 1 and len(snowboarders[0]) in (1, 6)


def test_languages(emoji_cache):
    source = emoji_source("heldout_attributes", languages=LANGUAGES, size=SIZE, cache=emoji_cache)
    record = source[0]
    assert tuple(record["texts_by_language"]) == LANGUAGES and len(record["texts"]) == 14
    english = emoji_source("heldout_attributes", size=SIZE, cache=emoji_cache)
    assert english.texts_at(0) == [record["texts_by_language"]["en"]] and len(english) == len(source)


def test_a_prefix_is_a_fair_sample(emoji_cache):
    source = build_source({"name": "emoji", "split": "heldout_attributes", "size": SIZE, "cache": emoji_cache, "limit": 60})
    assert len(source) == 60
    assert len({source[i]["attributes"]["tone"] for i in range(60)}) >= 5 and len({source[i]["concept"] for i in range(60)}) > 20


def test_details_name_the_font(splits):
    details = splits["validation"].details
    assert details["font_sha256"] == emoji_font.font_sha256() and details["records"] == len(splits["validation"])


def test_pickles_without_pictures(splits):
    data = pickle.dumps(splits["train"])
    assert len(data) < 2000
    copied = pickle.loads(data)  # noqa: S301  (our own bytes: what worker processes do)
    np.testing.assert_array_equal(copied[3]["image"], splits["train"][3]["image"])


def test_pictures_are_read_only(splits):
    with pytest.raises(ValueError, match="read-only"):
        splits["train"][0]["image"][:] = 0


@pytest.fixture
def few(monkeypatch, tmp_path, emoji_cache):
    """Few emoji, so that drawing takes no time; counts how often they are drawn."""
    sequences = tuple(sorted(["\U0001F600", "\U0001F680", "\U0001F44D", "\U0001F44D\U0001F3FF", "\U0010FFF0"]))
    calls = []
    draw = emoji_font.draw_all

    def counted(*arguments):
        calls.append(1)
        return draw(*arguments)

    monkeypatch.setattr(emoji.emoji_names, "sequences", lambda: sequences)
    monkeypatch.setattr(emoji_font, "draw_all", counted)
    emoji._load.cache_clear()
    yield tmp_path / "cache", calls
    emoji._load.cache_clear()


def _read_again(folder):
    emoji._load.cache_clear()
    return emoji_source("all", size=SIZE, cache=str(folder))


def test_drawn_once_and_kept(few):
    folder, calls = few
    first = _read_again(folder)
    second = _read_again(folder)
    assert len(calls) == 1 and len(first) == len(second) == 4
    np.testing.assert_array_equal(first[2]["image"], second[2]["image"])
    assert [path.name for path in folder.iterdir()] == [cache_path(SIZE, str(folder)).name]


def _flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1:]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:len(data) // 2], lambda data: b"garbage" * 50, _flip])
def test_damaged_cache_is_drawn_again(few, damage, caplog):
    folder, calls = few
    before = _read_again(folder)[1]["image"].copy()
    path = cache_path(SIZE, str(folder))
    path.write_bytes(damage(path.read_bytes()))
    np.testing.assert_array_equal(_read_again(folder)[1]["image"], before)
    assert len(calls) == 2 and "drawing the emoji again" in caplog.text
    _read_again(folder)
    assert len(calls) == 2


def test_cache_with_pickles_or_other_contents_is_not_used(few):
    folder, calls = few
    _read_again(folder)
    path = cache_path(SIZE, str(folder))
    for content in (dict(emojis=np.array(["\U0001F600", 3], object), images=np.zeros((2, SIZE, SIZE, 3), np.uint8), groups=np.zeros(2, int)),
                    dict(emojis=np.array(["a", "b"]), images=np.zeros((2, SIZE, SIZE, 3), np.uint8), groups=np.zeros(2, int)),
                    dict(emojis=np.array(["\U0001F600"]), images=np.zeros((1, 8, 8, 3), np.uint8), groups=np.zeros(1, int))):
        calls.clear()
        with open(path, "wb") as file:
            np.savez(file, **content)
        assert len(_read_again(folder)) == 4 and len(calls) == 1


def test_unwritable_cache_only_warns(few, caplog):
    folder, _ = few
    folder.parent.mkdir(exist_ok=True)
    folder.write_text("a file where the folder should be")
    assert len(_read_again(folder)) == 4
    assert "could not be kept" in caplog.text


def test_cache_folder_follows_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv(emoji.CACHE_VARIABLE, str(tmp_path))
    assert emoji.cache_folder() == tmp_path and emoji.cache_folder("elsewhere").name == "elsewhere"
    monkeypatch.delenv(emoji.CACHE_VARIABLE)
    assert emoji.cache_folder().parts[-2:] == (".cache", "vlm_jax")


@pytest.mark.parametrize("settings, message", [
    (dict(split="heldout_atributes"), "heldout_attributes"), (dict(size=0), "emoji.size"), (dict(size=True), "emoji.size"),
    (dict(languages=["xx"]), "xx"),
])
def test_wrong_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        emoji_source(**settings)

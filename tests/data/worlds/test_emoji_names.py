"""Names become captions in 14 languages."""
import pytest

from vlm_jax.data.worlds import emoji_names
from vlm_jax.errors import ConfigError

ASTRONAUT = "\U0001F469\U0001F3FD\u200d\U0001F680"
GERMANY = "\U0001F1E9\U0001F1EA"


@pytest.mark.parametrize("language, expected", [
    ("en", "woman astronaut medium skin tone"), ("de", "astronautin mittlere hautfarbe"), ("ja", "女性宇宙飛行士 中間の肌色"),
    ("ar", "رائدة فضاء بشرة بلون معتدل"),
])
def test_captions(language, expected):
    assert emoji_names.caption(ASTRONAUT, language) == expected


def test_flags_are_called_flags():
    assert emoji_names.captions(GERMANY, ("en", "zh", "es")) == {"en": "flag of Germany", "zh": "旗 德国", "es": "bandera alemania"}
    assert emoji_names.caption("\U0001F3F4\u200d\u2620\ufe0f") == "pirate flag"


def test_every_sequence_has_a_clean_name_in_every_language():
    sequences = emoji_names.sequences()
    assert len(sequences) > 3600 and len(set(sequences)) == len(sequences)
    for sequence in sequences[::37]:
        names = emoji_names.captions(sequence, emoji_names.LANGUAGES)
        assert tuple(names) == emoji_names.LANGUAGES
        assert all(name == name.strip() and "_" not in name and not name.startswith(":") for name in names.values())


def test_only_fully_qualified_sequences():
    assert "\u2764\ufe0f" in emoji_names.sequences()
    assert "\u2764" not in emoji_names.sequences() and "\U0001F3FD" not in emoji_names.sequences()


def test_unknown_sequence_has_no_name():
    assert emoji_names.caption("no emoji") is None and emoji_names.captions("no emoji", ("en", "de")) == {}


@pytest.mark.parametrize("languages, message", [(("en", "dee"), "dee.*unknown"), ((), "at least one"), (("en", "en"), "once")])
def test_wrong_languages(languages, message):
    with pytest.raises(ConfigError, match=message):
        emoji_names.check_languages(languages)


def test_one_language_as_a_string():
    assert emoji_names.check_languages("de") == ("de",) and emoji_names.check_languages(["de", "en"]) == ("de", "en")
    assert set(emoji_names.LANGUAGE_NAMES) == set(emoji_names.LANGUAGES)

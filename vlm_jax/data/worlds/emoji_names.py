"""Names of emoji in 14 languages: the Unicode CLDR short names that the `emoji` package carries, as captions.

`:woman_astronaut_medium_skin_tone:` becomes "woman astronaut medium skin tone". Only fully-qualified sequences count: the others are
spellings of the same picture. The Russian names have lost the breve of some letters in the package itself; they are kept as they are.
"""
from functools import cache
import unicodedata

from vlm_jax.errors import ConfigError, did_you_mean

LANGUAGES = ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
LANGUAGE_NAMES = {
    "en": "English", "es": "Spanish", "ja": "Japanese", "ko": "Korean", "pt": "Portuguese", "it": "Italian", "fr": "French",
    "de": "German", "fa": "Persian", "id": "Indonesian", "zh": "Chinese", "ru": "Russian", "tr": "Turkish", "ar": "Arabic",
}
# CLDR says "flag: Germany" in every language; the package drops the word in these two.
_FLAG = {"en": "flag of {}", "zh": "旗 {}"}
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)


def check_languages(languages) -> tuple[str, ...]:
    """Returns `languages` as a tuple; raises a ConfigError for an unknown, repeated or missing one."""
    languages = (languages,) if isinstance(languages, str) else tuple(languages)
    for language in languages:
        if language not in LANGUAGES:
            raise ConfigError(f'emoji.languages: "{language}" is unknown.{did_you_mean(language, LANGUAGES)}')
    if not languages or len(set(languages)) != len(languages):
        raise ConfigError(f"emoji.languages: {list(languages)} must name each language once, and at least one; known: {', '.join(LANGUAGES)}.")
    return languages


@cache
def sequences() -> tuple[str, ...]:
    """Returns every fully-qualified emoji sequence that the `emoji` package knows, in the order of their code points."""
    import emoji
    qualified = emoji.STATUS["fully_qualified"]
    return tuple(sorted(sequence for sequence, entry in emoji.EMOJI_DATA.items() if entry["status"] == qualified))


def emoji_version() -> str:
    """Returns the version of the `emoji` package: which sequences and names there are."""
    import emoji
    return emoji.__version__


def caption(sequence: str, language: str = "en") -> str | None:
    """Returns the name of an emoji as a caption, or None if the package has no name for it in `language`."""
    import emoji
    if language != "en":
        emoji.config.load_language(language)
    entry = emoji.EMOJI_DATA.get(sequence, {})
    return _caption(entry[language], sequence, language) if language in entry else None


def captions(sequence: str, languages: tuple[str, ...]) -> dict[str, str]:
    """Returns {language: caption} for every one of `languages` that has a name for this emoji, in their order."""
    found = {language: caption(sequence, language) for language in languages}
    return {language: text for language, text in found.items() if text}


def _caption(name: str, sequence: str, language: str) -> str:
    words = unicodedata.normalize("NFC", name).strip(":").replace("_", " ")
    words = " ".join(words.split())
    if language in _FLAG and len(sequence) == 2 and all(ord(c) in _REGIONAL_INDICATORS for c in sequence):
        return _FLAG[language].format(words)
    return words

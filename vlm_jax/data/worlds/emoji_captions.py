"""Multilingual captioning on the emoji world: each picture once for every language that has a name for it.

    source = emoji_captions_source("heldout_attributes", languages=("en", "de"))
    source[1] -> {"image": ..., "prompt": "caption de", "texts": ["astronautin mittlere hautfarbe"], "language": "de", ...}
"""
from collections.abc import Sequence
from typing import Any

from vlm_jax.data.sources import check_index
from vlm_jax.data.worlds.emoji import EmojiSource, emoji_source
from vlm_jax.data.worlds.emoji_names import LANGUAGES


class EmojiCaptionsSource:
    """Records of one split: those of `EmojiSource` with `prompt` "caption LANGUAGE", one text in that language, and `language`."""

    def __init__(self, emojis: EmojiSource):
        self._emojis, self.split, self.languages = emojis, emojis.split, emojis.languages
        self.name = f"emoji_captions/{emojis.split}"
        names = [emojis.names_at(i) for i in range(len(emojis))]
        self._places = [(i, language) for i, known in enumerate(names) for language in known]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, language = self._place(index)
        record = self._emojis[row]
        return {**record, "prompt": f"caption {language}", "texts": [record["texts_by_language"][language]], "language": language, "task": "caption"}

    def texts_at(self, index: int) -> list[str]:
        """Returns the caption of record `index` without touching its picture."""
        row, language = self._place(index)
        return [self._emojis.names_at(row)[language]]

    def prompt_at(self, index: int) -> str:
        """Returns the prompt of record `index`."""
        return f"caption {self._place(index)[1]}"

    def describe(self, index: int) -> str:
        """Names record `index` in messages: `emoji_captions/train[12] (1F469-200D-1F680, de)`."""
        row, language = self._place(index)
        return f"{self.name}[{index}] ({self._emojis.describe(row).split('(')[-1].rstrip(')')}, {language})"

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these records."""
        return {**self._emojis.details, "pictures": len(self._emojis), "records": len(self), "task": "emoji_captions"}

    def _place(self, index: int) -> tuple[int, str]:
        return self._places[check_index(index, len(self), self.name)]

    def __reduce__(self):
        return EmojiCaptionsSource, (self._emojis,)


def emoji_captions_source(split: str = "train", languages: Sequence[str] = LANGUAGES, size: int = 72, cache: str | None = None) -> EmojiCaptionsSource:
    """Returns one split; arguments and errors as of `emoji_source`, with all 14 languages by default."""
    return EmojiCaptionsSource(emoji_source(split, languages, size, cache))

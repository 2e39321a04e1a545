"""Interleaved documents of emoji with their names, in one language or in several: records of segments (data/documents.py).

    source = emoji_documents_source("train", languages=("en", "de"), pictures=(2, 4))
    source[0]["segments"]     picture "woman astronaut"  picture "roter Kreis" ...

Record i is a pure function of (settings, i). The last picture is the query of an episode whose language the examples before it show.
"""
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data.documents import image_segment, text_segment
from vlm_jax.data.sources import check_index
from vlm_jax.data.worlds.emoji import EmojiSource, emoji_source
from vlm_jax.data.worlds.emoji_names import LANGUAGES
from vlm_jax.data.worlds.emoji_splits import SPLITS
from vlm_jax.errors import ConfigError

_DRAW = 401
COUNTS = {"train": 50_000}
_COUNT = 2_000


class EmojiDocuments:
    """Documents of one split.

    A record has `segments`; `support`, `query` and `texts` as of `shape_episodes`; `language` (of the last name), `languages` of all names; `id`, the emoji;
    and `next_image` True where names stand before their pictures.
    """

    def __init__(self, emojis: EmojiSource, count: int, pictures: tuple[int, int], seed: int, mixed: float, text_first: float, images: bool):
        self._emojis, self.split, self.name = emojis, emojis.split, f"emoji_documents/{emojis.split}"
        self._count, self._pictures, self._seed, self._mixed, self._text_first, self._images = count, pictures, seed, mixed, text_first, images
        known: dict[str, list[int]] = {language: [] for language in emojis.languages}
        for row in range(len(emojis)):
            for language in emojis.names_at(row):
                known[language].append(row)
        self._known = {language: rows for language, rows in known.items() if rows}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        names, first = self._draw(index)
        records = [self._emojis[row] for row, _, _ in names]
        shown = [[image_segment(record["image"])] if self._images else [] for record in records]
        said = [text_segment(name) for _, _, name in names]
        examples = [[text, *picture] if first else [*picture, text] for picture, text in zip(shown, said)]
        return {"segments": [segment for example in examples for segment in example], "support": examples[:-1], "query": shown[-1], "prompt": "",
                "texts": [names[-1][2]], "language": names[-1][1], "languages": [language for _, language, _ in names], "task": "caption",
                "id": " ".join(record["emoji"] for record in records), **({"next_image": True} if first else {}),
                **({"image": records[-1]["image"]} if self._images else {"text_only": True})}

    def texts_at(self, index: int) -> list[str]:
        """Returns the last name of record `index` without touching its pictures."""
        return [self._draw(index)[0][-1][2]]

    def describe(self, index: int) -> str:
        """Names record `index` in messages."""
        return f"{self.name}[{index}]"

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these records."""
        return {**self._emojis.details, "emoji": len(self._emojis), "records": self._count, "pictures": list(self._pictures), "seed": self._seed,
                "mixed": self._mixed, "text_first": self._text_first, "task": "emoji_documents"}

    def _draw(self, index: int) -> tuple[list[tuple[int, str, str]], bool]:
        """Returns (row, language, name) of each picture, and whether names come first."""
        split = SPLITS.index(self.split) if self.split in SPLITS else len(SPLITS)
        rng = np.random.default_rng((self._seed, split, check_index(index, self._count, self.name), _DRAW))
        languages, number = list(self._known), int(rng.integers(self._pictures[0], self._pictures[1] + 1))
        mixed, first = bool(rng.random() < self._mixed), bool(rng.random() < self._text_first)
        one = languages[int(rng.integers(len(languages)))]
        names = []
        for _ in range(number):
            language = languages[int(rng.integers(len(languages)))] if mixed else one
            row = self._known[language][int(rng.integers(len(self._known[language])))]
            names.append((row, language, self._emojis.names_at(row)[language]))
        return names, first

    def __reduce__(self):
        return EmojiDocuments, (self._emojis, self._count, self._pictures, self._seed, self._mixed, self._text_first, self._images)


def emoji_documents_source(split: str = "train", languages: Sequence[str] = LANGUAGES, size: int = 72, cache: str | None = None, count: int | None = None,
                           pictures: Any = (2, 5), seed: int = 0, mixed: float = 0.5, text_first: float = 0.0, images: bool = True) -> EmojiDocuments:
    """Returns the documents of one split.

    Args:
      split, languages, size, cache: as of `emoji_source`.
      count: number of documents; None is 50,000 for training and 2,000 otherwise.
      pictures: of a document: a number, or (fewest, most).
      mixed: how often every name of a document is in a language of its own; else they are all in one.
      text_first: how often names stand before their pictures.
      images: whether there are pictures; without, records are names alone (`text_only`).
    Raises:
      ConfigError: for numbers out of range, and what `emoji_source` refuses.
    """
    count = COUNTS.get(split, _COUNT) if count is None else count
    for name, value, low in (("count", count, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ConfigError(f"emoji_documents.{name} is {value!r}; give an integer of at least {low}.")
    numbers = (pictures, pictures) if isinstance(pictures, int) else tuple(pictures) if isinstance(pictures, (list, tuple)) else ()
    if len(numbers) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers) or not 1 <= numbers[0] <= numbers[1]:
        raise ConfigError(f"emoji_documents.pictures is {pictures!r}; give a number of at least 1, or [fewest, most] of them.")
    for name, value in (("mixed", mixed), ("text_first", text_first)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError(f"emoji_documents.{name} is {value!r}; give a probability from 0 to 1.")
    return EmojiDocuments(emoji_source(split, languages, size, cache), count, numbers, seed, float(mixed), float(text_first), bool(images))

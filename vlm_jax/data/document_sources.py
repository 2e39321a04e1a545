"""Sources over other sources: pairs as documents with the picture before or after its text, and the texts of documents alone."""
from typing import Any

import numpy as np

from vlm_jax.data.documents import image_segment, segment_texts, text_segment, video_segment
from vlm_jax.data.problems import problem
from vlm_jax.data.sources import Source, build_source, check_index, check_texts, texts_of
from vlm_jax.errors import ConfigError

_DRAW = 601


class OrderSource:
    """Pairs (image or frames, texts) as documents of two segments in a random order.

    Where the text comes first it reads the next picture (`next_image` True), so that it is about its picture in either order. Which order, whether a space
    leads, and which of several texts is taken are pure functions of (seed, index).
    """

    def __init__(self, source: Source, text_first: float, space: float, seed: int):
        self.name, self._source, self._text_first, self._space, self._seed = f"image_text_order({source.name})", source, text_first, space, seed

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, len(self), self.name)
        record, item = self._source[index], self.describe(index)
        rng = np.random.default_rng((self._seed, index, _DRAW))
        first, space = bool(rng.random() < self._text_first), bool(rng.random() < self._space)
        texts = check_texts(record.get("texts"), item)
        chosen = texts[int(rng.integers(len(texts)))]
        if record.get("frames") is not None:
            picture = video_segment(record["frames"])
        elif record.get("image") is not None:
            picture = image_segment(record["image"])
        else:
            raise problem("image_missing", f"{item}: there is no image to put before or after its text; give the record one or leave it out.")
        text = text_segment(f" {chosen}" if space else chosen)
        return {**record, "segments": [text, picture] if first else [picture, text], "next_image": first}

    def texts_at(self, index: int) -> list[str]:
        return texts_of(self._source, check_index(index, len(self), self.name))

    def describe(self, index: int) -> str:
        return self._source.describe(index)

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these records."""
        return {**getattr(self._source, "details", {"source": self._source.name}), "text_first": self._text_first, "space": self._space}


class TextsSource:
    """The texts of documents as plain records {prompt "", texts [text], text_only True}: what a language model is trained on before it sees pictures."""

    def __init__(self, source: Source, separator: str):
        self.name, self._source, self._separator = f"document_texts({source.name})", source, separator

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, len(self), self.name)
        segments = self._source[index].get("segments")
        if not isinstance(segments, (list, tuple)):
            raise problem("document_wrong_type", f"{self.describe(index)}: the record has no segments; use a source of documents.")
        text = self._separator.join(text.strip() for text in segment_texts(segments) if text.strip())
        return {"prompt": "", "texts": check_texts(text, lambda: self.describe(index)), "text_only": True}

    def texts_at(self, index: int) -> list[str]:
        return self[index]["texts"]

    def describe(self, index: int) -> str:
        return self._source.describe(index)


def order_source(source: Any, text_first: float = 0.5, space: float = 0.5, seed: int = 0) -> OrderSource:
    """Returns the pairs of a source as documents, Flamingo's random placement (Alayrac et al. 2022, appendix A.3).

    Args:
      source: the section of a source, or a source.
      text_first: how often the picture stands after its text.
      space: how often a space leads the text (where the tokenizer keeps it).
    Raises:
      ConfigError: for numbers that are no probability.
    """
    for name, value in (("text_first", text_first), ("space", space)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError(f"image_text_order.{name} is {value!r}; give a probability from 0 to 1.")
    return OrderSource(_built(source, "image_text_order"), float(text_first), float(space), seed)


def texts_source(source: Any, separator: str = " ") -> TextsSource:
    """Returns the texts of the documents of a source (its section, or the source), their segments joined by `separator`."""
    return TextsSource(_built(source, "document_texts"), separator)


def _built(source: Any, where: str) -> Source:
    return build_source(source, f"{where}.source") if hasattr(source, "items") else source

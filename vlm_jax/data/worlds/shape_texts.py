"""The text side of the shapes world: plain texts on which a small language model is trained before it sees any picture.

    description   what scenes show, one sentence after the other
    question      a scene in words, a question about it and its answer
    episode       a few-shot episode (`shape_episodes`) whose pictures are descriptions
    names         an episode without any picture: what the invented words mean cannot be known, how such texts go can

Nothing of the splits for evaluation (pairs, words, caption styles, concepts) is in the texts of training.
"""
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_jax.data.documents import segment_texts
from vlm_jax.data.sources import check_index
from vlm_jax.data.worlds.invented_words import SPLITS
from vlm_jax.data.worlds.shape_episodes import ANSWERS, ATTRIBUTES, COUNTS, PAIRS, ShapeEpisodes, described, episodes_source
from vlm_jax.data.worlds.shape_scenes import draw_scene, scene_captions
from vlm_jax.errors import ConfigError, did_you_mean
from vlm_jax.settings import call

KINDS = ("description", "question", "episode", "names")
_DRAW = 501


class ShapeTexts:
    """Texts of one split, drawn on demand; a record has `prompt` "", `texts` [the text], `text_only` True and `task`, the kind."""

    def __init__(self, split: str, count: int, seed: int, kinds: tuple[str, ...], described_episodes: ShapeEpisodes, plain_episodes: ShapeEpisodes):
        self.name, self.split, self.seed, self._count, self._kinds = f"shapes_texts/{split}", split, seed, count, kinds
        self._episodes = {"episode": described_episodes, "names": plain_episodes}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, self._count, self.name)
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index, _DRAW))
        kind = self._kinds[int(rng.integers(len(self._kinds)))]
        return {"prompt": "", "texts": [self._text(kind, index, rng)], "text_only": True, "task": kind}

    def texts_at(self, index: int) -> list[str]:
        """Returns the text of record `index`."""
        return self[index]["texts"]

    def describe(self, index: int) -> str:
        """Names record `index` in messages."""
        return f"{self.name}[{index}]"

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these texts."""
        return {"split": self.split, "records": self._count, "seed": self.seed, "kinds": list(self._kinds), "episodes": self._episodes["episode"].details}

    def _text(self, kind: str, index: int, rng: np.random.Generator) -> str:
        if kind in self._episodes:
            return document_text(self._episodes[kind][index]["segments"])
        scenes = [draw_scene(rng, PAIRS[self.split], (1, 1), True)[0] for _ in range(int(rng.integers(1, 5)))]
        if kind == "description":
            said = [scene_captions([thing], True) for thing in scenes]
            return ". ".join(captions[int(rng.integers(len(captions)))] for captions in said) + "."
        asked = [ATTRIBUTES[int(rng.integers(len(ANSWERS)))] for _ in scenes]
        return " ".join(f"{described(thing)}: what {name} is it? {getattr(thing, name)}" for thing, name in zip(scenes, asked))


def document_text(segments: Sequence[dict[str, Any]], separator: str = " ") -> str:
    """Returns the texts of a document, its pictures left out."""
    return separator.join(text.strip() for text in segment_texts(segments))


def texts_source(split: str = "train", count: int | None = None, seed: int = 0, kinds: Sequence[str] = KINDS, episodes: Any = None) -> ShapeTexts:
    """Returns the texts of one split.

    Args:
      split, count, seed: as of `episodes_source`.
      kinds: which of "description", "question", "episode" and "names", equally often.
      episodes: settings of `episodes_source` for the last two: {"kinds": ["binding"], "shots": [2, 8], "ways": [2, 4]}.
    Raises:
      ConfigError: for an unknown name or a number out of range.
    """
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    for name, value, known in (("split", split, SPLITS), *(("kinds", kind, KINDS) for kind in kinds)):
        if value not in known:
            raise ConfigError(f"shapes_texts.{name}: {value!r} is unknown.{did_you_mean(value, known)}")
    if not kinds:
        raise ConfigError(f"shapes_texts.kinds is empty; name at least one of {', '.join(KINDS)}.")
    settings = dict((episodes or {}).items())
    for name in ("split", "count", "seed", "images"):
        if name in settings:
            raise ConfigError(f"shapes_texts.episodes.{name} is that of the texts; leave it out.")
    count = COUNTS[split] if count is None else count
    common = dict(split=split, count=count, seed=seed)
    described_episodes, plain_episodes = (call(episodes_source, settings, "shapes_texts.episodes", **common, images=images) for images in ("described", False))
    return ShapeTexts(split, count, seed, kinds, described_episodes, plain_episodes)

"""The emoji world: about 3,800 real pictures with their Unicode names in 14 languages, on any machine that has the font.

    source = emoji_source("heldout_attributes", languages=("en", "de"))
    source[0] -> {"image": uint8 [72, 72, 3], "texts": ["woman astronaut medium skin tone", "astronautin mittlere hautfarbe"], ...}

The pictures are drawn once (seconds) and kept in one npz file per font, emoji version and size, in the folder that VLM_JAX_CACHE names
(default ~/.cache/vlm_jax). The splits are those of `emoji_splits`.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
import hashlib
import logging
import os
from pathlib import Path
import tempfile
from typing import Any

import numpy as np

from vlm_jax.data.worlds import emoji_font, emoji_names
from vlm_jax.data.worlds.emoji_splits import SPLITS, Attributes, assign_splits, code_points, parse
from vlm_jax.errors import ConfigError, DataError, did_you_mean

CACHE_VARIABLE = "VLM_JAX_CACHE"
# Part of the cache's file name: raise it when what is drawn changes.
DRAWING_VERSION = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Drawn:
    """Every emoji that the font draws as one glyph: sequences, pictures uint8 [N, size, size, 3], and for each the group of its picture."""
    emojis: tuple[str, ...]
    images: np.ndarray
    groups: np.ndarray


class EmojiSource:
    """Records of one split, in an order given by the hash of their code points, so that any first N are a fair sample.

    A record has `image` uint8 [size, size, 3]; `texts`, its names in the requested languages in their order; `texts_by_language`;
    `attributes` {tone, person, concept}; `concept`; `group` (int; equal for identical pictures); `emoji`, the sequence itself.
    """

    def __init__(self, split: str, languages: tuple[str, ...], size: int, cache: str | None):
        self._arguments = (split, languages, size, cache)
        self._drawn = _load(emoji_font.font_sha256(), size, str(cache_folder(cache)))
        self.split, self.languages, self.size = split, languages, size
        self.name = f"emoji/{split}"
        splits = _splits(self._drawn.emojis, tuple(self._drawn.groups.tolist()))
        names = {i: emoji_names.captions(self._drawn.emojis[i], languages) for i, s in enumerate(splits) if split in (s, "all")}
        self._rows = sorted((i for i in names if names[i]), key=lambda i: _order(self._drawn.emojis[i]))
        self._names = [names[i] for i in self._rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[index]
        emoji = self._drawn.emojis[row]
        names, attributes = self._names[index], parse(emoji)
        return {
            "image": self._drawn.images[row], "texts": list(names.values()), "texts_by_language": dict(names), "attributes": _as_dict(attributes),
            "concept": attributes.concept, "group": int(self._drawn.groups[row]), "emoji": emoji,
        }

    def texts_at(self, index: int) -> list[str]:
        """Returns the captions of record `index` without touching its picture."""
        return list(self._names[index].values())

    def names_at(self, index: int) -> dict[str, str]:
        """Returns {language: name} of record `index` without touching its picture."""
        return dict(self._names[index])

    def describe(self, index: int) -> str:
        """Names record `index` in messages: `emoji/train[12] (1F469-200D-1F680)`."""
        return f"{self.name}[{index}] ({code_points(self._drawn.emojis[self._rows[index]])})"

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these pictures."""
        return {
            "font": emoji_font.find_font().name, "font_sha256": emoji_font.font_sha256(), "emoji_version": emoji_names.emoji_version(),
            "split": self.split, "languages": list(self.languages), "size": self.size, "records": len(self),
        }

    def __reduce__(self):
        # Worker processes read the cache again instead of receiving the pictures through a pipe.
        return EmojiSource, self._arguments


def emoji_source(split: str = "train", languages: Sequence[str] = ("en",), size: int = 72, cache: str | None = None) -> EmojiSource:
    """Returns one split of the emoji world.

    Args:
      split: "train", "validation", "heldout_attributes", "heldout_concepts", or "all".
      languages: whose names become captions (`emoji_names.LANGUAGES`); an emoji with a name in none of them is left out.
      size: side of the pictures in pixels; the font's own are 136.
      cache: folder of the drawn pictures; None is the one of VLM_JAX_CACHE, else ~/.cache/vlm_jax.
    Raises:
      ConfigError: for an unknown split or language, or a size that is not a positive integer.
      DataError: if emoji cannot be drawn here; the message says what to install.
    """
    if split not in (*SPLITS, "all"):
        raise ConfigError(f'emoji.split: "{split}" is unknown.{did_you_mean(split, (*SPLITS, "all"))}')
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"emoji.size is {size!r}; give a positive integer.")
    return EmojiSource(split, emoji_names.check_languages(languages), size, cache)


def cache_folder(cache: str | None = None) -> Path:
    """Returns the folder of cached files: `cache`, else VLM_JAX_CACHE, else ~/.cache/vlm_jax."""
    return Path(cache or os.environ.get(CACHE_VARIABLE) or "~/.cache/vlm_jax").expanduser()


def cache_path(size: int = 72, cache: str | None = None) -> Path:
    """Returns the npz file that holds (or will hold) the pictures of this font, emoji version and size."""
    return _cache_path(emoji_font.font_sha256(), size, str(cache_folder(cache)))


def _cache_path(font_sha256: str, size: int, folder: str) -> Path:
    return Path(folder) / f"emoji_{size}px_font{font_sha256[:16]}_names{emoji_names.emoji_version()}_v{DRAWING_VERSION}.npz"


# Two sizes at a time: the splits of one run share their pictures in memory.
@lru_cache(maxsize=2)
def _load(font_sha256: str, size: int, folder: str) -> Drawn:
    path = _cache_path(font_sha256, size, folder)
    drawn = _read(path, size)
    if drawn is None:
        drawn = _draw(size)
        _write(path, drawn)
    drawn.images.flags.writeable = False
    return drawn


def _draw(size: int) -> Drawn:
    sequences = emoji_names.sequences()
    kept, images, groups, first = [], [], [], {}
    for position, digest, image in emoji_font.draw_all(list(sequences), size):
        kept.append(sequences[position])
        images.append(image)
        groups.append(first.setdefault(digest, len(first)))
    if not kept:
        raise DataError(f"emoji: {emoji_font.find_font()} draws none of the known emoji; run `{emoji_font.INSTALL}`.")
    return Drawn(tuple(kept), np.stack(images), np.asarray(groups, np.int32))


def _read(path: Path, size: int) -> Drawn | None:
    """Reads a cache file, or returns None if it is missing or damaged."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            # Read whole, so that the checksums of the zip members are compared.
            emojis, images, groups = file["emojis"], file["images"], file["groups"]
        count = len(emojis)
        good = (count > 0 and images.dtype == np.uint8 and images.shape == (count, size, size, 3) and groups.shape == (count,)
                and set(emojis.tolist()) <= set(emoji_names.sequences()))
    except Exception as error:
        # Whatever is wrong with a cached file (zip, checksum, header, types), drawing again mends it.
        _log.warning("%s is damaged (%s); drawing the emoji again.", path, error)
        return None
    if not good:
        _log.warning("%s does not hold what its name says; drawing the emoji again.", path)
        return None
    return Drawn(tuple(emojis.tolist()), images, groups.astype(np.int32))


def _write(path: Path, drawn: Drawn) -> None:
    """Writes the cache file through a temporary one; a folder that cannot be written only costs the next run its time."""
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
            temporary = file.name
            np.savez_compressed(file, emojis=np.asarray(drawn.emojis), images=drawn.images, groups=drawn.groups)
        os.replace(temporary, path)
    except OSError as error:
        _log.warning("%s: the drawn emoji could not be kept (%s); they are drawn again next time. Set %s to a writable folder.",
                     path, error, CACHE_VARIABLE)
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


@lru_cache(maxsize=4)
def _splits(emojis: tuple[str, ...], groups: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(assign_splits(emojis, groups))


@lru_cache(maxsize=8192)
def _order(emoji: str) -> bytes:
    return hashlib.sha256(("order " + code_points(emoji)).encode()).digest()


def _as_dict(attributes: Attributes) -> dict[str, str]:
    return {"tone": attributes.tone, "person": attributes.person, "concept": attributes.concept}

"""Invented words ("dax", "zupo"): a large pool in three splits, so that the words of evaluation are never in training.

Tsimpoukelli et al., "Multimodal Few-Shot Learning with Frozen Language Models" (2021), section 4.2, bind such words to pictures.
"""
from functools import cache
import hashlib

from vlm_jax.data.worlds.shape_scenes import COLORS, SHAPES

SPLITS = ("train", "validation", "heldout")
SHARES = {"train": 0.8, "validation": 0.05, "heldout": 0.15}
_ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z", "bl", "dr", "fl", "kr", "pl", "sk", "st", "tr")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("b", "d", "g", "k", "l", "m", "n", "p", "s", "t", "x", "z")
# Words that a syllable could make and that the texts of the worlds, or common prompts, hold.
_KNOWN = frozenset(("red", "top", "left", "not", "dot", "big", "bag", "bed", "man", "pen", "pet", "sun", "sad", "bad", "bus", "cup", "dog", "map", "box", "fox",
                    "six", "ten", "leg", "let", "get", "set", "sit", "tin", "tan", "net", *COLORS, *SHAPES))


@cache
def words(split: str, syllables: int = 1) -> tuple[str, ...]:
    """Returns the words of a split in alphabetical order.

    Args:
      split: "train", "validation" or "heldout"; a hash of the word decides.
      syllables: 1 gives about 1,300 words ("dax") in all, 2 about 150,000 ("zupodax").
    """
    closed = [onset + vowel + coda for onset in _ONSETS for vowel in _VOWELS for coda in _CODAS]
    every = closed if syllables == 1 else [onset + vowel + last for onset in _ONSETS for vowel in _VOWELS for last in closed]
    return tuple(sorted(word for word in set(every) - _KNOWN if _split(word) == split))


def _split(word: str) -> str:
    place = int.from_bytes(hashlib.sha256(f"vlm_jax words 1 {word}".encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        place -= share
        if place < 0:
            return split
    return SPLITS[-1]

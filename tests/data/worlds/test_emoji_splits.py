"""Attributes read from code points, and splits that hold out what they say."""
from collections import Counter

import pytest

from vlm_jax.data.worlds.emoji_names import LANGUAGES, sequences
from vlm_jax.data.worlds.emoji_splits import HELDOUT_LANGUAGES, SPLITS, TRAIN_LANGUAGES, assign_splits, code_points, parse

WOMAN, MAN, PERSON, MEDIUM, DARK, LIGHT, JOIN = "\U0001F469", "\U0001F468", "\U0001F9D1", "\U0001F3FD", "\U0001F3FF", "\U0001F3FB", "\u200d"
ROCKET, RUNNER, FEMALE, MALE = "\U0001F680", "\U0001F3C3", "\u2640\ufe0f", "\u2642\ufe0f"


@pytest.mark.parametrize("emoji, concept, person, tone", [
    (WOMAN + MEDIUM + JOIN + ROCKET, "1F9D1-200D-1F680", "woman", "medium"),
    (PERSON + JOIN + ROCKET, "1F9D1-200D-1F680", "person", "none"),
    (RUNNER + DARK + JOIN + FEMALE, "1F3C3", "woman", "dark"),
    (RUNNER, "1F3C3", "none", "none"),
    (RUNNER + JOIN + MALE + JOIN + "\u27a1\ufe0f", "1F3C3-200D-27A1", "man", "none"),
    ("\U0001F46B" + DARK, "1F9D1-200D-1F91D-200D-1F9D1", "woman+man", "dark"),
    (WOMAN + LIGHT + JOIN + "\U0001F91D" + JOIN + MAN + DARK, "1F9D1-200D-1F91D-200D-1F9D1", "woman+man", "light+dark"),
    (WOMAN + JOIN + "\u2764\ufe0f" + JOIN + MAN, "1F9D1-200D-2764-200D-1F9D1", "woman+man", "none"),
    ("\U0001F44D" + LIGHT, "1F44D", "none", "light"),
    ("\U0001F936", "1F9D1-200D-1F384", "woman", "none"),
    ("\u2764\ufe0f", "2764", "none", "none"),
    ("\u2640\ufe0f", "2640", "none", "none"),
])
def test_parse(emoji, concept, person, tone):
    attributes = parse(emoji)
    assert (attributes.concept, attributes.person, attributes.tone) == (concept, person, tone)


def test_code_points():
    assert code_points(WOMAN + MEDIUM + JOIN + ROCKET) == "1F469-1F3FD-200D-1F680"


def test_splits_of_every_sequence():
    emojis = sequences()
    splits = assign_splits(emojis, list(range(len(emojis))))
    assert set(splits) == set(SPLITS)
    seen = {part for emoji, split in zip(emojis, splits) if split == "train" for part in parse(emoji).parts}
    concepts = {name: {parse(e).concept for e, s in zip(emojis, splits) if s == name} for name in SPLITS}
    for emoji, split in zip(emojis, splits):
        if split in ("heldout_attributes", "validation"):
            assert seen.issuperset(parse(emoji).parts), emoji
            assert (parse(emoji).person, parse(emoji).tone) != ("none", "none")
    assert not concepts["heldout_concepts"] & (concepts["train"] | concepts["validation"] | concepts["heldout_attributes"])
    # No held-out combination is in training under another spelling.
    combinations = {name: {parse(e).parts for e, s in zip(emojis, splits) if s == name} for name in SPLITS}
    assert not combinations["heldout_attributes"] & combinations["train"]


def test_order_does_not_matter():
    emojis = list(sequences())
    first = dict(zip(emojis, assign_splits(emojis, list(range(len(emojis))))))
    backwards = emojis[::-1]
    assert dict(zip(backwards, assign_splits(backwards, list(range(len(emojis)))))) == first


def test_identical_pictures_stay_together():
    emojis = list(sequences())
    # Every five neighbours look alike: far more than any font does.
    groups = [i // 5 for i in range(len(emojis))]
    splits = assign_splits(emojis, groups)
    together = {}
    for group, split in zip(groups, splits):
        assert together.setdefault(group, split) == split


def test_languages_are_parted():
    assert not set(TRAIN_LANGUAGES) & set(HELDOUT_LANGUAGES)
    assert Counter(TRAIN_LANGUAGES + HELDOUT_LANGUAGES) == Counter(LANGUAGES) and "en" in TRAIN_LANGUAGES

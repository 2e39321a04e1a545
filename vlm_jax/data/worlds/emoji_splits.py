"""What an emoji shows, read from its code points, and which split it belongs to.

An emoji is a concept (what is left without tone and gender: a role, an activity, a gesture, a thing), a person (woman, man, person, and pairs of
them) and a skin tone. Splits:

  train               everything else
  validation          combinations held out for tuning, chosen like the next one
  heldout_attributes  combinations (tone x person x concept) whose parts are all seen in training, but never together
  heldout_concepts    whole concepts, in all their tones and persons

The choice is a hash of code points, so it does not depend on order, machine or library versions. Sequences that the font draws identically (a
snowboarder in six tones, the flags of Norway and Svalbard) share a group and never straddle a split: such a picture does not show its attributes,
so it is never a held-out combination, and concepts that share a picture are held out together.
"""
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
import hashlib

SPLITS = ("train", "validation", "heldout_attributes", "heldout_concepts")

# Languages of the multilingual config. The held-out ones are written in scripts that training sees (Latin, Latin, Arabic).
HELDOUT_LANGUAGES = ("id", "tr", "fa")
TRAIN_LANGUAGES = ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "zh", "ru", "ar")

TONES = {0x1F3FB: "light", 0x1F3FC: "medium-light", 0x1F3FD: "medium", 0x1F3FE: "medium-dark", 0x1F3FF: "dark"}
_JOINER, _VARIATION = 0x200D, 0xFE0F
_SIGNS = {0x2640: "woman", 0x2642: "man"}
_PERSON = 0x1F9D1
# code point -> (the concept's code points, the persons)
_PEOPLE = {
    0x1F9D1: ((_PERSON,), ("person",)), 0x1F468: ((_PERSON,), ("man",)), 0x1F469: ((_PERSON,), ("woman",)),
    0x1F9D2: ((0x1F9D2,), ("child",)), 0x1F466: ((0x1F9D2,), ("boy",)), 0x1F467: ((0x1F9D2,), ("girl",)),
    0x1F9D3: ((0x1F9D3,), ("person",)), 0x1F474: ((0x1F9D3,), ("man",)), 0x1F475: ((0x1F9D3,), ("woman",)),
    0x1FAC5: ((0x1FAC5,), ("person",)), 0x1F934: ((0x1FAC5,), ("man",)), 0x1F478: ((0x1FAC5,), ("woman",)),
    0x1F385: ((_PERSON, _JOINER, 0x1F384), ("man",)), 0x1F936: ((_PERSON, _JOINER, 0x1F384), ("woman",)),
    0x1F46B: ((_PERSON, _JOINER, 0x1F91D, _JOINER, _PERSON), ("woman", "man")),
    0x1F46C: ((_PERSON, _JOINER, 0x1F91D, _JOINER, _PERSON), ("man", "man")),
    0x1F46D: ((_PERSON, _JOINER, 0x1F91D, _JOINER, _PERSON), ("woman", "woman")),
    0x1F48F: ((_PERSON, _JOINER, 0x2764, _JOINER, 0x1F48B, _JOINER, _PERSON), ("person", "person")),
    0x1F491: ((_PERSON, _JOINER, 0x2764, _JOINER, _PERSON), ("person", "person")),
}
# Shares of the combinations, and of the concepts, that are held out; the salt makes the choice.
_HELDOUT_COMBINATIONS, _VALIDATION_COMBINATIONS, _HELDOUT_CONCEPTS = 0.30, 0.08, 0.10
_SALT = "vlm_jax emoji 1"


@dataclass(frozen=True)
class Attributes:
    """The parts of an emoji: `concept` in hexadecimal code points ("1F9D1-200D-1F680"), `person` ("woman", "woman+man", "none") and
    `tone` ("dark", "light+dark", "none")."""
    concept: str
    person: str
    tone: str

    @property
    def parts(self) -> tuple[tuple[str, str], ...]:
        """The three parts, each of which a held-out combination shares with some training picture."""
        return ("concept", self.concept), ("person", self.person), ("tone", self.tone)


def code_points(emoji: str) -> str:
    """Returns the code points as "1F469-1F3FD-200D-1F680"."""
    return "-".join(f"{ord(c):X}" for c in emoji)


def parse(emoji: str) -> Attributes:
    """Reads the attributes off the code points of a sequence."""
    points = [ord(c) for c in emoji]
    tones = [TONES[p] for p in points if p in TONES]
    concept, persons = [], []
    for point in points:
        if point in TONES or point == _VARIATION:
            continue
        if point in _SIGNS and concept[-1:] == [_JOINER]:
            concept.pop()
            persons.append(_SIGNS[point])
        elif point in _PEOPLE:
            concept.extend(_PEOPLE[point][0])
            persons.extend(_PEOPLE[point][1])
        else:
            concept.append(point)
    return Attributes("-".join(f"{p:X}" for p in concept), "+".join(persons) or "none", "+".join(tones) or "none")


def assign_splits(emojis: Sequence[str], groups: Sequence) -> list[str]:
    """Returns the split of every emoji.

    Args:
      emojis: the sequences, each once.
      groups: for each, what identifies its picture (equal pictures, equal groups).
    """
    attributes = [parse(emoji) for emoji in emojis]
    held_concepts = _heldout_concepts(attributes, groups)
    group_sizes, variants = Counter(groups), Counter(a.concept for a in attributes)

    split, rank = {}, {}
    for emoji, parts, group in zip(emojis, attributes, groups, strict=True):
        rank[emoji] = _fraction("combination", code_points(emoji))
        if parts.concept in held_concepts:
            split[emoji] = "heldout_concepts"
        elif variants[parts.concept] < 3 or group_sizes[group] > 1 or (parts.person == "none" and parts.tone == "none"):
            split[emoji] = "train"
        elif rank[emoji] < _HELDOUT_COMBINATIONS:
            split[emoji] = "heldout_attributes"
        elif rank[emoji] < _HELDOUT_COMBINATIONS + _VALIDATION_COMBINATIONS:
            split[emoji] = "validation"
        else:
            split[emoji] = "train"

    # A part that training would never see brings its combinations back into training.
    seen = {part for emoji, a in zip(emojis, attributes, strict=True) if split[emoji] == "train" for part in a.parts}
    for emoji, parts in sorted(zip(emojis, attributes, strict=True), key=lambda pair: rank[pair[0]]):
        if split[emoji] in ("heldout_attributes", "validation") and not seen.issuperset(parts.parts):
            split[emoji] = "train"
            seen.update(parts.parts)
    return [split[emoji] for emoji in emojis]


def _heldout_concepts(attributes: Sequence[Attributes], groups: Sequence) -> set[str]:
    """Concepts chosen by the hash of their cluster: concepts connected by identical pictures are one cluster."""
    parent = {a.concept: a.concept for a in attributes}

    def root(concept: str) -> str:
        while parent[concept] != concept:
            concept = parent[concept]
        return concept

    by_group = defaultdict(list)
    for a, group in zip(attributes, groups, strict=True):
        by_group[group].append(a.concept)
    for concepts in by_group.values():
        for concept in concepts[1:]:
            first, second = sorted((root(concepts[0]), root(concept)))
            parent[second] = first
    return {concept for concept in parent if _fraction("concept", root(concept)) < _HELDOUT_CONCEPTS}


def _fraction(kind: str, text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.sha256(f"{_SALT} {kind} {text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

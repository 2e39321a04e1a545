"""Few-shot episodes on the shapes world: what is asked for is said by examples alone. Each record is an interleaved document (data/documents.py).

    source = episodes_source("heldout", kinds=("binding",), shots=4, ways=2)
    source[0]["segments"]     picture "this is a" "dax"  picture "this is a" "plim"  ...  picture "this is a" "dax"

    binding   an invented word stands for a concept (a colour and shape, a colour, or a shape) in this episode: open-ended fast binding of Tsimpoukelli et al.,
              "Multimodal Few-Shot Learning with Frozen Language Models" (2021), section 4.2; n-way, with inner shots and repeats
    vqa       one question, "what is it?"; the examples show whether colour, shape, place or size is meant
    caption   one prompt; the examples show which words of a caption, in which order and with which separator

Words, concepts and caption styles of "validation" and "heldout" are never in training: a concept is never bound to a word there, and pairs of the other
splits are in no picture. Record i is a pure function of (settings, i); with another number of shots the query stays and the examples are longer or shorter
lists of the same.
"""
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
import hashlib
from itertools import permutations
from typing import Any

import numpy as np

from vlm_jax.data.documents import Segment, image_segment, text_segment
from vlm_jax.data.sources import check_index
from vlm_jax.data.worlds.invented_words import SPLITS, words
from vlm_jax.data.worlds.shape_scenes import COLORS, SHAPES, Thing, draw_scene, paint_scene, pair_name
from vlm_jax.data.worlds.shapes import HELDOUT_PAIRS, TRAIN_PAIRS
from vlm_jax.errors import ConfigError, did_you_mean

KINDS = ("binding", "vqa", "caption")
LEVELS = ("pair", "color", "shape")
CONTROLS = ("permuted", "others")
LOSSES = ("answers", "query", "all")
COUNTS = {"train": 100_000, "validation": 2_000, "heldout": 2_000}
PROMPTS = {"binding": "this is a", "vqa": "what is it?", "caption": "caption:"}
ATTRIBUTES = ("color", "shape", "place", "size")
PLACES = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
ANSWERS = {"color": tuple(COLORS), "shape": SHAPES, "place": PLACES, "size": ("small", "large")}
_VALIDATION_DIAGONAL = 5
_VALIDATION_PAIRS = tuple(pair for pair in TRAIN_PAIRS if (pair[1] - pair[0]) % len(SHAPES) == _VALIDATION_DIAGONAL)
PAIRS = {"train": tuple(pair for pair in TRAIN_PAIRS if pair not in _VALIDATION_PAIRS), "validation": _VALIDATION_PAIRS, "heldout": HELDOUT_PAIRS}
_HELD = {"validation": (("brown", "gray"), ("cross", "diamond")), "heldout": (("purple", "turquoise"), ("heart", "arrow"))}
# Separates the random draws of one episode.
_PLAN_DRAW, _SHOTS_DRAW, _CONTROL_DRAW, _ROUND_DRAW, _EXAMPLE_DRAW, _QUERY_DRAW, _BANK_DRAW = 201, 202, 203, 204, 205, 206, 207


def concepts(split: str, level: str) -> tuple[str, ...]:
    """Returns the concepts of a split, those that a word may stand for: "red star" (level "pair"), "red" or "star"."""
    if level == "pair":
        return tuple(pair_name(*pair) for pair in PAIRS[split])
    which, every = (0, tuple(COLORS)) if level == "color" else (1, SHAPES)
    held = {name: part for part, names in _HELD.items() for name in names[which]}
    return tuple(name for name in every if held.get(name, "train") == split)


@cache
def caption_styles(split: str) -> tuple[tuple[tuple[str, ...], str], ...]:
    """Returns the caption styles of a split, (attributes in their order, separator); a hash decides, about a quarter are held out."""
    every = [(order, mark) for number in (2, 3) for order in permutations(ATTRIBUTES, number) for mark in (" ", ", ", " / ")]
    return tuple(style for style in every if _style_split(style) == split)


def _style_split(style: tuple[tuple[str, ...], str]) -> str:
    place = hashlib.sha256(f"vlm_jax styles 1 {style}".encode()).digest()[0] / 256
    return "heldout" if place < 0.17 else "validation" if place < 0.25 else "train"


@dataclass(frozen=True)
class Example:
    """A picture's thing, and what is said of it; `banked` says which picture of the bank it is."""
    thing: Thing
    answer: str
    banked: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """An episode before it is painted: its examples and query, every answer that could be meant, and the style or level that they show."""
    task: str
    support: tuple[Example, ...]
    query: Example
    candidates: tuple[str, ...]
    style: str


class ShapeEpisodes:
    """Episodes of one split, drawn on demand.

    A record has `segments`, the whole document; its parts `opening` (segments, mostly none), `support`, a list of examples, each a list of segments, and
    `query`, the segments of the picture that is asked about, without its answer; `prompt`, `image` (of the query) and `texts` [answer]; `candidates`, every
    answer that could be meant; `task`; `style` (the level of the concept, the attribute asked for, the caption's style); `concept` and `attributes` {color,
    shape, place, size} of the query.
    Without pictures it has `text_only` True and no `image`.
    """

    def __init__(self, split: str, count: int, size: int, seed: int, kinds: tuple[str, ...], shots: tuple[int, int], ways: tuple[int, int],
                 levels: tuple[str, ...], repeats: int, induction: bool, loss: str, control: str | None, images: bool | str, syllables: int, bank: int | None):
        self.name, self.split, self.size, self.seed = f"shapes_episodes/{split}", split, size, seed
        self._count, self._kinds, self._shots, self._ways, self._levels = count, kinds, shots, ways, levels
        self._repeats, self._induction, self._loss, self._control, self._images, self._syllables = repeats, induction, loss, control, images, syllables
        self._bank = bank
        self._pairs = {level: {name: [pair for pair in PAIRS[split] if name in _names(pair)] for name in concepts(split, level)} for level in LEVELS}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._record(index, self._picture)

    def outline_at(self, index: int) -> dict[str, Any]:
        """Returns record `index` with names in the place of its pictures, which are not painted."""
        return self._record(index, lambda one, *place: [image_segment(one.thing.name)] if self._images is True else self._picture(one, *place))

    def _record(self, index: int, picture: Callable[[Example, int, int, int], list[Segment]]) -> dict[str, Any]:
        index = check_index(index, self._count, self.name)
        plan = self.plan(index)
        prompt = text_segment(PROMPTS[plan.task], self._loss == "all")
        support = [[*picture(example, index, _EXAMPLE_DRAW, number), prompt, text_segment(example.answer, self._loss != "query")]
                   for number, example in enumerate(plan.support)]
        query = [*picture(plan.query, index, _QUERY_DRAW, 0), prompt]
        opening = [text_segment(f"answer with {' or '.join(plan.candidates)}.", False)] if self._induction and plan.task == "binding" else []
        segments = [*opening, *(segment for example in support for _ in range(self._repeats) for segment in example), *query, text_segment(plan.query.answer)]
        thing, image = plan.query.thing, {"image": query[0]["image"]} if self._images is True else {"text_only": True}
        return {"segments": segments, "opening": opening, "support": support, "query": query, "prompt": PROMPTS[plan.task], **image,
                "texts": [plan.query.answer], "candidates": list(plan.candidates), "task": plan.task, "style": plan.style, "concept": thing.name,
                "attributes": {name: getattr(thing, name) for name in ATTRIBUTES}}

    def texts_at(self, index: int) -> list[str]:
        """Returns the answer of record `index` without painting it."""
        return [self.plan(check_index(index, self._count, self.name)).query.answer]

    def prompt_at(self, index: int) -> str:
        """Returns the prompt of record `index` without painting it."""
        return PROMPTS[self.plan(check_index(index, self._count, self.name)).task]

    def describe(self, index: int) -> str:
        """Names record `index` in messages."""
        return f"{self.name}[{index}]"

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these records."""
        return {"split": self.split, "records": self._count, "size": self.size, "seed": self.seed, "kinds": list(self._kinds), "shots": list(self._shots),
                "ways": list(self._ways), "levels": list(self._levels), "repeats": self._repeats, "induction": self._induction, "control": self._control,
                "images": self._images, "bank": self._bank}

    def plan(self, index: int) -> Plan:
        """Returns what record `index` shows and asks."""
        low, high = self._shots
        number = int(self._rng(index, _SHOTS_DRAW).integers(low, high + 1))
        rng = self._rng(index, _PLAN_DRAW)
        plan = getattr(self, f"_{_drawn(self._kinds, rng)}")(index, rng, number)
        if self._control is None or not number:
            return plan
        rng = self._rng(index, _CONTROL_DRAW)
        if self._control == "permuted":
            # Along one random cycle: with two examples or more every picture leaves its place.
            order = rng.permutation(number)
            shown = {int(to): plan.support[int(of)] for to, of in zip(order, np.roll(order, 1))}
        else:
            detailed = plan.task != "binding"
            shown = {place: self._show(rng, PAIRS[self.split], detailed) for place in range(number)}
        return replace(plan, support=tuple(replace(shown[place], answer=example.answer) for place, example in enumerate(plan.support)))

    def _binding(self, index: int, rng: np.random.Generator, number: int) -> Plan:
        level = _drawn(self._levels, rng)
        known = concepts(self.split, level)
        ways = int(rng.integers(self._ways[0], self._ways[1] + 1))
        chosen = [known[int(place)] for place in rng.choice(len(known), ways, replace=False)]
        pool = words(self.split, self._syllables)
        names = [pool[int(place)] for place in rng.choice(len(pool), ways, replace=False)]
        asked = int(rng.integers(ways))
        # Every concept once, in a random order, before any comes again.
        order = [int(way) for turn in range(-(-number // ways)) for way in self._rng(index, _ROUND_DRAW, turn).permutation(ways)][:number]
        draws = [(way, self._rng(index, _EXAMPLE_DRAW, place)) for place, way in enumerate(order)] + [(asked, self._rng(index, _QUERY_DRAW, 0))]
        examples = [self._show(draw, self._pairs[level][chosen[way]], False, names[way]) for way, draw in draws]
        return Plan("binding", tuple(examples[:-1]), examples[-1], tuple(names), level)

    def _vqa(self, index: int, rng: np.random.Generator, number: int) -> Plan:
        asked = _drawn(ATTRIBUTES, rng)
        examples = [replace(one, answer=getattr(one.thing, asked)) for one in self._shown(index, number)]
        return Plan("vqa", tuple(examples[:-1]), examples[-1], tuple(answer for name in ATTRIBUTES for answer in ANSWERS[name]), asked)

    def _caption(self, index: int, rng: np.random.Generator, number: int) -> Plan:
        styles = caption_styles(self.split)
        order = rng.permutation(len(styles))
        style, *others = (styles[int(place)] for place in order[:8])
        examples = [replace(one, answer=_styled(one.thing, style)) for one in self._shown(index, number)]
        wrong = [draw_scene(rng, PAIRS[self.split], (1, 1), True)[0] for _ in range(4)]
        named = [examples[-1].answer, *(_styled(examples[-1].thing, other) for other in others), *(_styled(thing, style) for thing in wrong)]
        return Plan("caption", tuple(examples[:-1]), examples[-1], tuple(dict.fromkeys(named)), style[1].join(style[0]))

    def _shown(self, index: int, number: int) -> list[Example]:
        """Returns what the examples and, last, the query of questions and captions show."""
        draws = [*(self._rng(index, _EXAMPLE_DRAW, place) for place in range(number)), self._rng(index, _QUERY_DRAW, 0)]
        return [self._show(draw, PAIRS[self.split], True) for draw in draws]

    def _show(self, rng: np.random.Generator, pairs: Sequence[tuple[int, int]], detailed: bool, answer: str = "") -> Example:
        """Draws what a picture shows."""
        if self._bank is None:
            return Example(draw_scene(rng, pairs, (1, 1), detailed)[0], answer)
        banked = (self.seed, SPLITS.index(self.split), *_drawn(pairs, rng), int(detailed), int(rng.integers(self._bank)))
        return Example(_banked(self.size, *banked)[0], answer, banked)

    def _picture(self, example: Example, index: int, draw: int, number: int) -> list[Segment]:
        """Returns the segments that show a thing: its picture, its description, or none."""
        if self._images is True:
            if example.banked is not None:
                return [image_segment(_banked(self.size, *example.banked)[1])]
            return [image_segment(paint_scene(self._rng(index, draw, number, 1), [example.thing], self.size)[0])]
        return [text_segment(f"{described(example.thing)}:", self._loss == "all")] if self._images == "described" else []

    def _rng(self, index: int, *draw: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, SPLITS.index(self.split), index, *draw))


class ShapeWords:
    """Pictures with the words of one lexicon: concept k of the split is called by word k in all records, so that any of them may be an example for any other.

    A record has `image`, `prompt` "this is a", `texts` [word], `candidates` (the words of the lexicon), `concept`, `label` (its number) and `attributes`.
    """

    def __init__(self, split: str, count: int, size: int, seed: int, lexicon: int, level: str, ways: int | None, syllables: int):
        self.name, self.split, self.size, self.seed, self._count, self._level = f"shapes_words/{split}", split, size, seed, count, level
        rng = np.random.default_rng((lexicon, SPLITS.index(split), _PLAN_DRAW))
        known, pool = concepts(split, level), words(split, syllables)
        self.class_names = [known[int(place)] for place in rng.permutation(len(known))[:ways]]
        self.words = [pool[int(place)] for place in rng.choice(len(pool), len(self.class_names), replace=False)]
        self._pairs = [[pair for pair in PAIRS[split] if name in _names(pair)] for name in self.class_names]
        self._lexicon = lexicon

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        label, thing, rng = self._draw(index)
        image, _ = paint_scene(rng, [thing], self.size)
        return {"image": image, "prompt": PROMPTS["binding"], "texts": [self.words[label]], "candidates": list(self.words), "label": label,
                "concept": self.class_names[label], "attributes": {"color": thing.color, "shape": thing.shape}, "task": "binding"}

    def texts_at(self, index: int) -> list[str]:
        """Returns the word of record `index` without painting it."""
        return [self.words[self._draw(index)[0]]]

    def prompt_at(self, index: int) -> str:
        """Returns the prompt of record `index`."""
        return PROMPTS["binding"]

    def describe(self, index: int) -> str:
        """Names record `index` in messages."""
        return f"{self.name}[{index}]"

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these records."""
        return {"split": self.split, "records": self._count, "size": self.size, "seed": self.seed, "lexicon": self._lexicon, "level": self._level,
                "words": len(self.words)}

    def _draw(self, index: int) -> tuple[int, Thing, np.random.Generator]:
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), check_index(index, self._count, self.name), _QUERY_DRAW))
        label = int(rng.integers(len(self.words)))
        return label, draw_scene(rng, self._pairs[label], (1, 1), False)[0], rng


def described(thing: Thing) -> str:
    """Returns what a picture of one thing shows in words: "red star", or with size and place "small red star, top left"."""
    return f"{thing.size} {thing.name}, {thing.place}" if thing.size else thing.name


def episodes_source(split: str = "train", count: int | None = None, size: int = 32, seed: int = 0, kinds: Sequence[str] = KINDS, shots: Any = (0, 8),
                    ways: Any = 2, levels: Sequence[str] = ("pair",), repeats: int = 1, induction: bool = False, loss: str = "answers",
                    control: str | None = None, images: bool | str = True, syllables: int = 1, bank: int | None = None) -> ShapeEpisodes:
    """Returns the episodes of one split.

    Args:
      split: "train", "validation" or "heldout".
      count: number of episodes; None is 100,000 for training and 2,000 otherwise.
      size: side of the pictures in pixels.
      kinds: which of "binding", "vqa" and "caption", equally often.
      shots: examples of an episode: a number, or (fewest, most) of a uniform draw.
      ways: concepts of a binding episode, likewise.
      levels: what words stand for: "pair", "color", "shape", equally often.
      repeats: how often each example comes in the document, one after the other (`support` holds it once).
      induction: whether a binding episode opens with "answer with dax or plim." (Frozen's task induction).
      loss: which texts are targets: "answers" of all examples and the query, of the "query" alone, or "all" texts.
      control: None, or what breaks the tie of pictures and answers in the examples: "permuted" pictures among themselves, pictures of "others": other
        things of the split.
      images: True; False leaves the pictures out; "described" puts what they show in words in their place: the text side of the same world.
      syllables: of the invented words, 1 or 2.
      bank: how many pictures there are of each pair of colour and shape, kept in memory once they are painted; None paints a new one for every example.
    Raises:
      ConfigError: for an unknown name, a number out of range, or more ways than the split has concepts.
    """
    kinds, levels = _listed(kinds, KINDS, "kinds"), _listed(levels, LEVELS, "levels")
    for name, value, known in (("split", split, SPLITS), ("loss", loss, LOSSES), ("control", control, (None, *CONTROLS)), ("syllables", syllables, (1, 2)),
                               ("images", images, (True, False, "described")), ("induction", induction, (True, False))):
        if value not in known:
            raise ConfigError(f"shapes_episodes.{name}: {value!r} is unknown.{did_you_mean(value, known)}")
    count = COUNTS[split] if count is None else count
    for name, value, low in (("count", count, 1), ("size", size, 8), ("seed", seed, 0), ("repeats", repeats, 1), ("bank", 1 if bank is None else bank, 1)):
        _check_number("shapes_episodes", name, value, low)
    shots, ways = _range(shots, "shots", 0), _range(ways, "ways", 2)
    most = min(len(concepts(split, level)) for level in levels)
    if "binding" in kinds and ways[1] > most:
        raise ConfigError(f"shapes_episodes.ways is {ways[1]}, but split {split!r} has {most} concepts of the levels {', '.join(levels)}; lower it.")
    return ShapeEpisodes(split, count, size, seed, kinds, shots, ways, levels, repeats, induction, loss, control, images, syllables, bank)


def words_source(split: str = "heldout", count: int | None = None, size: int = 32, seed: int = 0, lexicon: int = 0, level: str = "pair",
                 ways: int | None = None, syllables: int = 1) -> ShapeWords:
    """Returns pictures named by one lexicon: queries, and the examples to choose theirs from, are two of these with different seeds.

    Args:
      split, count, size, syllables: as of `episodes_source`.
      seed: of the pictures; lexicon: of the words and which concepts they stand for.
      level: what words stand for; ways: how many concepts there are (None: all of the split).
    """
    for name, value, known in (("split", split, SPLITS), ("level", level, LEVELS), ("syllables", syllables, (1, 2))):
        if value not in known:
            raise ConfigError(f"shapes_words.{name}: {value!r} is unknown.{did_you_mean(value, known)}")
    count, most = COUNTS[split] if count is None else count, len(concepts(split, level))
    for name, value, low in (("count", count, 1), ("size", size, 8), ("seed", seed, 0), ("lexicon", lexicon, 0), ("ways", most if ways is None else ways, 2)):
        _check_number("shapes_words", name, value, low)
    if ways is not None and ways > most:
        raise ConfigError(f"shapes_words.ways is {ways}, but split {split!r} has {most} concepts of level {level}; lower it.")
    return ShapeWords(split, count, size, seed, lexicon, level, ways, syllables)


@lru_cache(maxsize=20_000)
def _banked(size: int, seed: int, split: int, color: int, shape: int, detailed: int, number: int) -> tuple[Thing, np.ndarray]:
    """Returns what picture `number` of a pair shows, and the picture."""
    rng = np.random.default_rng((seed, split, color, shape, detailed, number, _BANK_DRAW))
    thing = draw_scene(rng, [(color, shape)], (1, 1), bool(detailed))[0]
    image, _ = paint_scene(rng, [thing], size)
    image.flags.writeable = False
    return thing, image


def _styled(thing: Thing, style: tuple[tuple[str, ...], str]) -> str:
    return style[1].join(getattr(thing, name) for name in style[0])


def _names(pair: tuple[int, int]) -> tuple[str, str, str]:
    return pair_name(*pair), list(COLORS)[pair[0]], SHAPES[pair[1]]


def _drawn(things: Sequence[Any], rng: np.random.Generator) -> Any:
    return things[int(rng.integers(len(things)))]


def _listed(value: Any, known: Sequence[str], name: str) -> tuple[str, ...]:
    value = (value,) if isinstance(value, str) else tuple(value)
    for one in value:
        if one not in known:
            raise ConfigError(f"shapes_episodes.{name}: {one!r} is unknown.{did_you_mean(one, known)}")
    if not value:
        raise ConfigError(f"shapes_episodes.{name} is empty; name at least one of {', '.join(known)}.")
    return value


def _range(value: Any, name: str, low: int) -> tuple[int, int]:
    numbers = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(numbers) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers) or not low <= numbers[0] <= numbers[1]:
        raise ConfigError(f"shapes_episodes.{name} is {value!r}; give a number of at least {low}, or [fewest, most] of them.")
    return numbers


def _check_number(where: str, name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{where}.{name} is {value!r}; give an integer of at least {low}.")

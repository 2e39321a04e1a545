"""Objectives: records become the tasks that PaLI and its relatives are trained on, all of them "image + text -> text".

    {"name": "objective", "objective": "split_caption", "source": {"name": "shapes"}}
    {"name": "pali_mixture", "sources": {"split_caption": {"name": "emoji"}, "object_aware": {"name": "shapes_captions", "objects": [1, 3]}}}

Chen et al., "PaLI: A Jointly-Scaled Multilingual Language-Image Model" (2022), section 3.2: the wording of the prompts is ours where the paper's is not
known. Every objective is a pure function of (record, seed, index).

What the successors change (facts; of the shares of their mixtures none are published). PaLI-X: 2.2 billion examples of the whole mixture at 224 px with the
ViT frozen, with split OCR, episodic captions, four-pair VQA, screen layout, video captions and detection by pseudo-labels; then OCR tasks and
detection alone at 448, 672 and 756 px. PaLI-3: the ViT frozen at 224 px, then all weights in a short curriculum up to 812 and 1064 px. ScreenAI: screen
annotation, question answering, navigation and summaries (the tasks of the source `screens`), weighted by their sizes with a cap for each.
"""
from collections.abc import Callable, Mapping, Sequence
import inspect
import re
from typing import Any

import numpy as np

from vlm_jax.data.decode import decode_image
from vlm_jax.data.locations import detection_text
from vlm_jax.data.problems import problem
from vlm_jax.data.sources import MixtureSource, Source, build_source, check_index
from vlm_jax.errors import ConfigError, did_you_mean
from vlm_jax.settings import call, choose

# Millions of examples of PaLI's pre-training, 1,566 in all (section 3.2; the split adds up to the paper's total; its parts await a check).
PALI_MIXTURE = {
    "split_caption": 1000,          # WebLI alt-texts
    "span_corruption": 100,         # text alone, mC4
    "ocr": 100,                     # WebLI
    "caption": 100,                 # CC3M in 35 languages
    "vqa": 100,                     # VQ2A on CC3M, English and cross-lingual
    "question_generation": 100,     # the same pairs
    "object_aware": 50,             # English
    "detection": 16,
}
SENTINELS = 100
NOISE_RATE, MEAN_SPAN = 0.15, 3.0
_SENTINEL = re.compile(r"<extra_id_(\d+)>")


def caption(record: Mapping[str, Any], rng: np.random.Generator, *, language: str | None = None) -> dict[str, Any]:
    """Captioning with the language in the prompt. A record with `texts_by_language` is told in one of them, drawn where `language` is None."""
    texts, language = _told(record, rng, language)
    return {"prompt": f"Generate the alt_text in {language}:", "texts": texts, "language": language}


def split_caption(record: Mapping[str, Any], rng: np.random.Generator, *, language: str | None = None) -> dict[str, Any]:
    """Split captioning: a caption is cut at a random word; the first part is in the prompt, the second is the target."""
    texts, language = _told(record, rng, language)
    first, second, place = split_text(texts[int(rng.integers(len(texts)))], rng)
    return {"prompt": f"Generate the alt_text in {language} at {place}: {first}".rstrip(), "texts": [second], "language": language}


def span_corruption(record: Mapping[str, Any], rng: np.random.Generator, *, rate: float = NOISE_RATE, mean_length: float = MEAN_SPAN) -> dict[str, Any]:
    """Span corruption of a text alone (T5, Raffel et al. 2020, section 3.1.4), over words rather than tokens; the picture is left out."""
    texts = _texts(record)
    prompt, target = corrupt_text(texts[int(rng.integers(len(texts)))], rng, rate, mean_length)
    return {"prompt": prompt, "texts": [target], "image": None, "text_only": True}


def ocr(record: Mapping[str, Any], rng: np.random.Generator, *, language: str = "en") -> dict[str, Any]:
    """Reading: the target is what is written in the picture, the record's `ocr` (a list of str), in its order."""
    words = _needed(record, "ocr", list)
    if not words:
        raise problem("objective_missing", "ocr: there is no text in the picture; leave the record out.")
    return {"prompt": f"Generate the ocr_text in {language}:", "texts": [" ".join(words)], "language": language}


def vqa(record: Mapping[str, Any], rng: np.random.Generator, *, language: str = "en") -> dict[str, Any]:
    """Question answering: the record's `prompt` is the question, its texts are the answers."""
    return {"prompt": f"Answer in {language}: {_needed(record, 'prompt', str)}", "texts": _texts(record), "language": language}


def question_generation(record: Mapping[str, Any], rng: np.random.Generator, *, language: str = "en") -> dict[str, Any]:
    """The question to an answer: the record's `prompt` is the target, one of its texts is in the prompt."""
    texts = _texts(record)
    answer = texts[int(rng.integers(len(texts)))]
    return {"prompt": f"Generate a question in {language} for {answer}:", "texts": [_needed(record, "prompt", str)], "language": language}


def object_aware(record: Mapping[str, Any], rng: np.random.Generator, *, language: str = "en", candidates: Sequence[str] = (),
                 list_share: float = 0.5) -> dict[str, Any]:
    """Object-aware questions about the record's `objects` (a list of names): list them, or say of one whether it is there.

    Args:
      candidates: names of which those that are not in the picture are asked about too, half of the times; without them every object is listed.
      list_share: how often objects are listed.
    """
    objects = _needed(record, "objects", list)
    if not objects:
        raise problem("objective_missing", "object_aware: the record names no object; leave it out.")
    absent = [name for name in candidates if name not in objects]
    if not absent or rng.random() < list_share:
        return {"prompt": f"List the objects present, in {language}:", "texts": [", ".join(objects)], "language": language}
    there = rng.random() < 0.5
    pool = objects if there else absent
    return {"prompt": f"Is there a {pool[int(rng.integers(len(pool)))]} in the image? Answer in {language}:", "texts": ["yes" if there else "no"],
            "language": language}


def detection(record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Detection as text: the boxes of the record's `objects` as location tokens, in a random order (Pix2Seq; PaliGemma's spelling)."""
    objects, boxes = _needed(record, "objects", list), np.asarray(_needed(record, "boxes", object), np.float64)
    if boxes.shape != (len(objects), 4) or not objects:
        raise problem("objective_missing", f"detection: {len(objects)} objects and boxes of shape {boxes.shape}; "
                                           "give each object a box [left, top, right, bottom].")
    height, width = decode_image(_needed(record, "image", object)).shape[:2]
    order = rng.permutation(len(objects))
    names = list(dict.fromkeys(objects))
    return {"prompt": f"detect {' ; '.join(names)}", "texts": [detection_text(boxes[order], [objects[int(i)] for i in order], height, width)]}


OBJECTIVES: dict[str, Callable[..., dict[str, Any]]] = {
    "caption": caption, "split_caption": split_caption, "span_corruption": span_corruption, "ocr": ocr, "vqa": vqa,
    "question_generation": question_generation, "object_aware": object_aware, "detection": detection,
}


def split_text(text: str, rng: np.random.Generator) -> tuple[str, str, int]:
    """Returns (first part, second part, words in the first): the second is never empty; joined by one space they are the text with single spaces."""
    words = text.split()
    place = int(rng.integers(len(words))) if words else 0
    return " ".join(words[:place]), " ".join(words[place:]), place


def noise_mask(length: int, rng: np.random.Generator, rate: float = NOISE_RATE, mean_length: float = MEAN_SPAN) -> np.ndarray:
    """Returns bool [length], True where a span is corrupted: round(rate * length) items, at least one, in spans of `mean_length` on average.

    As T5's: the spans and what lies between them are random partitions. The whole is then turned by a random number of items (T5's random_roll):
    without, a text with one span would always lose its end.
    """
    if length < 2:
        return np.ones(length, bool)
    noise = int(np.clip(round(length * rate), 1, length - 1))
    spans = int(np.clip(round(noise / mean_length), 1, min(noise, length - noise)))
    mask = np.zeros(length, bool)
    place = 0
    for kept, lost in zip(_partition(length - noise, spans, rng), _partition(noise, spans, rng)):
        mask[place + kept:place + kept + lost] = True
        place += kept + lost
    return np.roll(mask, int(rng.integers(length)))


def corrupt(items: Sequence[Any], mask: Sequence[bool], sentinels: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Returns (input, target): each run of masked items is one sentinel in the input; the target is each sentinel, its items, and a last sentinel.

    Raises:
      DataError: if there are more spans than sentinels.
    """
    inputs, target, used = [], [], 0
    for place, (item, lost) in enumerate(zip(items, mask, strict=True)):
        if lost and (place == 0 or not mask[place - 1]):
            if used + 1 >= len(sentinels):
                raise problem("text_too_long", f"span_corruption: more than {len(sentinels) - 1} spans, which is all the sentinels; "
                                               "shorten the text or lower rate.")
            inputs.append(sentinels[used])
            target.append(sentinels[used])
            used += 1
        (target if lost else inputs).append(item)
    return inputs, [*target, sentinels[used]]


def restore(inputs: Sequence[Any], target: Sequence[Any], sentinels: Sequence[Any]) -> list[Any]:
    """Returns the items that `corrupt` made (input, target) of."""
    spans: dict[Any, list[Any]] = {}
    known, span = set(sentinels), []
    for item in target:
        if item in known:
            span = spans.setdefault(item, [])
        else:
            span.append(item)
    return [item for entry in inputs for item in (spans.get(entry, []) if entry in known else [entry])]


def corrupt_text(text: str, rng: np.random.Generator, rate: float = NOISE_RATE, mean_length: float = MEAN_SPAN) -> tuple[str, str]:
    """Returns (input, target) of a text with `<extra_id_0>`, `<extra_id_1>`, ... in the place of spans of words.

    A text of one word (also one in a script without spaces) is corrupted by characters.
    """
    words, between = _units(_SENTINEL.sub(" ", text))
    if not words:
        raise problem("caption_empty", "span_corruption: nothing is left of the text; leave the record out.")
    sentinels = [f"<extra_id_{k}>" for k in range(SENTINELS)]
    inputs, target = corrupt(words, noise_mask(len(words), rng, rate, mean_length), sentinels)
    return between.join(inputs), between.join(target)


def restore_text(inputs: str, target: str) -> str:
    """Returns the text, with single spaces, that `corrupt_text` made (input, target) of."""
    spaced = " " in target
    return (" " if spaced else "").join(restore(_parts(inputs, spaced), _parts(target, spaced), [f"<extra_id_{k}>" for k in range(SENTINELS)]))


class ObjectiveSource:
    """The records of a source under an objective, which says prompt and texts; what else a record holds stays.

    `texts_at` and `prompt_at` read the record, as an objective may need all of it.
    """

    def __init__(self, source: Source, objective: str, settings: Mapping[str, Any] | None = None, seed: int = 0):
        self._source, self.objective, self._settings, self._seed = source, objective, dict(settings or {}), seed
        self.name = f"{objective}({source.name})"
        self._function = choose(OBJECTIVES, objective, "objective")

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, len(self), self.name)
        record = self._source[index]
        rng = np.random.default_rng((self._seed, list(OBJECTIVES).index(self.objective), index))
        return {**record, **call(self._function, self._settings, f"objective {self.objective}", record=record, rng=rng), "objective": self.objective}

    def texts_at(self, index: int) -> list[str]:
        return self[index]["texts"]

    def prompt_at(self, index: int) -> str:
        return self[index]["prompt"]

    def describe(self, index: int) -> str:
        return f"{self.objective} of {self._source.describe(index)}"

    @property
    def details(self) -> dict[str, Any]:
        """What a results.json says about these records."""
        return {**getattr(self._source, "details", {"source": self._source.name}), "objective": self.objective, **self._settings}


def objective_source(source: Any, objective: str, settings: Mapping[str, Any] | None = None, seed: int = 0) -> ObjectiveSource:
    """Returns a source under an objective.

    Args:
      source: the section of a source, or a source.
      objective: a name of `OBJECTIVES`.
      settings: the objective's: {"language": "de"}, {"rate": 0.15}, ...
      seed: another seed splits, hides and asks elsewhere.
    Raises:
      ConfigError: for an unknown objective or setting.
    """
    choose(OBJECTIVES, objective, "objective.objective")
    settings = dict((settings or {}).items())
    _check_settings(objective, settings)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"objective.seed is {seed!r}; give a number of at least 0.")
    return ObjectiveSource(build_source(source, "objective.source") if hasattr(source, "items") else source, objective, settings, seed)


def pali_mixture(sources: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]] | None = None, seed: int = 0,
                 length: int | None = None) -> MixtureSource:
    """Returns PaLI's pre-training mixture over sources of one's own: each objective with its published share of `PALI_MIXTURE`.

    Args:
      sources: {objective: section of its source}; an objective without a source is left out, and the others keep their proportions.
      settings: {objective: its settings}.
      length: records of one pass, see `MixtureSource`.
    Raises:
      ConfigError: for no objective, or an unknown one.
    """
    sources, settings = dict(sources.items()), dict((settings or {}).items())
    for name in (*sources, *settings):
        choose(PALI_MIXTURE, name, "pali_mixture.sources" if name in sources else "pali_mixture.settings")
    if not sources:
        raise ConfigError(f"pali_mixture.sources is empty; give sources for some of {', '.join(PALI_MIXTURE)}.")
    names = [name for name in PALI_MIXTURE if name in sources]
    parts = [objective_source(sources[name], name, settings.get(name), seed) for name in names]
    return MixtureSource(parts, [PALI_MIXTURE[name] for name in names], length, "pali_mixture")


def _check_settings(objective: str, settings: Mapping[str, Any]) -> None:
    """Raises a ConfigError for a setting that an objective does not take."""
    known = [name for name, parameter in inspect.signature(OBJECTIVES[objective]).parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]
    for name in settings:
        if name not in known:
            raise ConfigError(f"objective.settings.{name}: {objective} takes no such setting.{did_you_mean(name, known)}")


def _told(record: Mapping[str, Any], rng: np.random.Generator, language: str | None) -> tuple[list[str], str]:
    """Returns (texts, language): in the language asked for, or in one that is drawn of those that the record has."""
    known = record.get("texts_by_language")
    if not known:
        return _texts(record), language or record.get("language", "en")
    if language is None:
        language = list(known)[int(rng.integers(len(known)))]
    if language not in known:
        raise problem("objective_missing", f"there is no caption in {language!r}, only in {', '.join(known)}; leave the record out or add it.")
    return [known[language]], language


def _texts(record: Mapping[str, Any]) -> list[str]:
    texts = record.get("texts")
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise problem("caption_missing", f"the record's texts are {texts!r:.60}, but the objective needs texts; give it some or leave it out.")
    return list(texts)


def _needed(record: Mapping[str, Any], key: str, kind: type) -> Any:
    value = record.get(key)
    if value is None or not isinstance(value, kind):
        raise problem("objective_missing", f"the record's {key} is {value!r:.40}, which the objective needs; choose a source that has it.")
    return value


def _partition(total: int, parts: int, rng: np.random.Generator) -> list[int]:
    """Returns `parts` positive whole numbers of that sum, every such list equally likely."""
    cuts = np.sort(rng.permutation(total - 1)[:parts - 1] + 1) if parts > 1 else np.zeros(0, int)
    return np.diff(np.concatenate([[0], cuts, [total]])).astype(int).tolist()


def _units(text: str) -> tuple[list[str], str]:
    words = text.split()
    return (words, " ") if len(words) > 1 else (list("".join(words)), "")


def _parts(text: str, spaced: bool) -> list[str]:
    if spaced:
        return _SENTINEL.sub(r" \g<0> ", text).split()     # tokenizers lose the space before a sentinel
    return [part for place, piece in enumerate(re.split(r"(<extra_id_\d+>)", text)) for part in ([piece] if place % 2 else list(piece))]

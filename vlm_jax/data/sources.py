"""Sources: index-addressed records behind one small interface, built from config sections by name.

A record is a dict: `image` (encoded bytes, a uint8 array [H, W, 3] or a PIL image), `texts` (list of str, any of which is right), for models that write
text `prompt` (str), and optional extras (`label` int, `attributes`, `boxes`, `concept`, `group`). What is wrong with one record is raised when that record
is read, as a DataError with a `reason`; what is wrong with the whole is raised when the source is built.
"""
import bisect
from collections.abc import Callable, Mapping, Sequence
import importlib
import math
from typing import Any, Protocol, runtime_checkable

from vlm_jax.data.documents import segment_texts
from vlm_jax.data.problems import problem
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.settings import call, choose

SOURCES = {
    "emoji": "vlm_jax.data.worlds.emoji:emoji_source",
    "shapes": "vlm_jax.data.worlds.shapes:shapes_source",
    "digits": "vlm_jax.data.worlds.digits:digits_source",
    "shapes_captions": "vlm_jax.data.worlds.shape_tasks:captions_source",
    "shapes_questions": "vlm_jax.data.worlds.shape_tasks:questions_source",
    "shapes_boxes": "vlm_jax.data.worlds.shape_tasks:boxes_source",
    "emoji_captions": "vlm_jax.data.worlds.emoji_captions:emoji_captions_source",
    "shapes_episodes": "vlm_jax.data.worlds.shape_episodes:episodes_source",
    "shapes_words": "vlm_jax.data.worlds.shape_episodes:words_source",
    "shapes_videos": "vlm_jax.data.worlds.shape_videos:videos_source",
    "shapes_texts": "vlm_jax.data.worlds.shape_texts:texts_source",
    "emoji_documents": "vlm_jax.data.worlds.emoji_documents:emoji_documents_source",
    "screens": "vlm_jax.data.worlds.screens:screens_source",
    "arrays": "vlm_jax.data.sources:ArraySource",
    "table": "vlm_jax.data.tables:TableSource",
    "tar": "vlm_jax.data.tar_shards:TarSource",
    "parquet": "vlm_jax.data.parquet_source:ParquetSource",
    "tfds": "vlm_jax.data.tfds_source:tfds_source",
    "array_record": "vlm_jax.data.tfds_source:folder_source",
    "interleaved": "vlm_jax.data.interleaved_source:InterleavedSource",
    "image_text_order": "vlm_jax.data.document_sources:order_source",
    "document_texts": "vlm_jax.data.document_sources:texts_source",
    "packed": "vlm_jax.data.packing:packed_source",
    "mixture": "vlm_jax.data.sources:mixture_source",
    "objective": "vlm_jax.data.objectives:objective_source",
    "pali_mixture": "vlm_jax.data.objectives:pali_mixture",
}
TEXT_NAMES = ("texts", "captions", "caption", "text")
MIXTURE_RESOLUTION = 1000


@runtime_checkable
class Source(Protocol):
    """Records by index. Sources are read by many threads at once and are pickled into worker processes.

    A source may also have `texts_at(i)` and `prompt_at(i)`, texts and prompt of record i without its image: `texts_of` and `prompt_of` use them.
    """
    name: str

    def __len__(self) -> int:
        """Returns the number of records."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns record `index`; raises a DataError with a `reason` for a record that cannot be used."""

    def describe(self, index: int) -> str:
        """Returns what an error message calls record `index`: a file and line, a member of a shard."""


def build_source(settings: Mapping[str, Any], where: str = "source") -> Source:
    """Builds the source of a config section `{"name": ..., **settings}`.

    Two settings are common to all sources: `subset=[start, stop]` (as a Python slice: negative counts from the end, None is open) and `limit=N`,
    which keeps the first N records of what is left.
    Raises:
      ConfigError: for an unknown name or setting, or an empty subset.
    """
    if not hasattr(settings, "items"):
        raise ConfigError(f'{where} is {settings!r}, but a source is a section such as {{"name": "shapes"}}.')
    settings = dict(settings.items())
    if "name" not in settings:
        raise ConfigError(f'{where}.name is missing: add the name of a source ({", ".join(sorted(SOURCES))}).')
    name, bounds, limit = settings.pop("name"), settings.pop("subset", None), settings.pop("limit", None)
    module, function = choose(SOURCES, name, f"{where}.name").split(":")
    source = call(getattr(importlib.import_module(module), function), settings, where)
    if bounds is not None:
        if isinstance(bounds, str) or not isinstance(bounds, Sequence) or len(bounds) != 2:
            raise ConfigError(f"{where}.subset is {bounds!r}, but it must be [start, stop].")
        source = subset(source, *bounds, where=f"{where}.subset")
    if limit is not None:
        if not isinstance(limit, int) or limit < 1:
            raise ConfigError(f"{where}.limit is {limit!r}, but it must be a number of records, at least 1.")
        source = subset(source, 0, limit, where=f"{where}.limit")
    return source


def texts_of(source: Source, index: int) -> list[str]:
    """Returns the texts of record `index`, without reading its image where the source can; of a document without `texts` those of its segments."""
    read = getattr(source, "texts_at", None)
    if read is not None:
        return list(read(index))
    record = source[index]
    return segment_texts(record["segments"]) if "segments" in record and "texts" not in record else list(record["texts"])


def prompt_of(source: Source, index: int) -> str:
    """Returns the prompt of record `index` where the source can say it without reading the image, else ""."""
    read = getattr(source, "prompt_at", None)
    return read(index) if read is not None else ""


def check_texts(value: Any, item: str | Callable[[], str]) -> list[str]:
    """Returns a caption or a list of captions as a list of non-empty strings.

    Args:
      item: what an error message calls the record, or a function that finds it out, where that takes reading.
    Raises:
      DataError: with reason caption_missing, caption_not_text or caption_empty, naming the item.
    """
    texts = [value] if isinstance(value, (str, bytes)) else value
    if texts is None or (isinstance(texts, (list, tuple)) and not texts):
        raise problem("caption_missing", f"{_named(item)}: it has no caption; add one or remove the record.")
    for text in texts if isinstance(texts, (list, tuple)) else [value]:
        if not isinstance(text, str):
            raise problem("caption_not_text", f"{_named(item)}: the caption is {_short(text)}, not a string; write it as text.")
        if not text.strip():
            raise problem("caption_empty", f"{_named(item)}: a caption is empty; fill it in or remove the record.")
    return list(texts)


def class_text(label: Any, class_names: Sequence[str] | None, item: str | Callable[[], str]) -> tuple[int | None, str]:
    """Returns (label, text) of a class given by number, by a number written out or by name; the label is None for a name without a number.

    Raises:
      DataError: with reason label_unknown for a number without a name, a name that is not in `class_names`, or another type.
    """
    if isinstance(label, str):
        text = label.strip()
        if class_names is not None and text in class_names:
            return list(class_names).index(text), text
        if text.isascii() and text.isdigit() and len(text) < 10:
            label = int(text)
        elif text and class_names is None:
            return None, text
    if isinstance(label, (bool, str)) or not hasattr(label, "__index__"):
        raise problem("label_unknown", f"{_named(item)}: the label {_short(label)} is neither a class number nor one of the class names; correct it.")
    label = int(label)
    if class_names is None:
        return label, str(label)
    if not 0 <= label < len(class_names):
        raise problem("label_unknown", f"{_named(item)}: label {label} has no name among {len(class_names)} class names; correct either.")
    return label, class_names[label]


def check_index(index: int, length: int, name: str) -> int:
    """Returns `index` counted from the start; raises IndexError outside of the source, so that `for record in source` ends."""
    if not -length <= index < length:
        raise IndexError(f"{name} has {length} records, so there is no record {index}.")
    return int(index) % length


class ArraySource:
    """Records from memory.

    Args:
      images: array [N, H, W, 3] of uint8, or a sequence of arrays, PIL images or encoded bytes.
      texts: for each image a caption or a list of captions; without it the texts are the class names of `labels`.
      labels: class numbers, or class names.
      class_names: the name of every class number.
      extras: {key: sequence}, further fields of the records.
    Raises:
      DataError: if the lengths differ, or neither texts nor labels are given.
    """

    def __init__(self, images: Sequence[Any], texts: Sequence[Any] | None = None, labels: Sequence[Any] | None = None, *,
                 class_names: Sequence[str] | None = None, extras: Mapping[str, Sequence[Any]] | None = None, title: str = "arrays"):
        self.name = title
        self._images, self._texts, self._labels, self._class_names = images, texts, labels, class_names
        self._extras = dict(extras or {})
        columns = {"images": images, "texts": texts, "labels": labels, **self._extras}
        lengths = {key: len(column) for key, column in columns.items() if column is not None}
        if len(set(lengths.values())) != 1:
            raise DataError(f"{title}: lengths differ ({', '.join(f'{key} {n}' for key, n in lengths.items())}); give one entry for each image.")
        if not len(images):
            raise DataError(f"{title}: there are no images; give at least one.")
        if texts is None and labels is None:
            raise DataError(f"{title}: neither texts nor labels are given; give captions, or labels with class_names.")

    def __len__(self) -> int:
        return len(self._images)

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def texts_at(self, index: int) -> list[str]:
        return self._words(check_index(index, len(self), self.name))["texts"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = check_index(index, len(self), self.name)
        extras = {key: column[index] for key, column in self._extras.items()}
        return {"image": self._images[index], **self._words(index), **extras}

    def _words(self, index: int) -> dict[str, Any]:
        words = {}
        item = self.describe(index)
        if self._labels is not None:
            label, text = class_text(self._labels[index], self._class_names, item)
            words["texts"] = [text]
            if label is not None:
                words["label"] = label
        if self._texts is not None:
            words["texts"] = check_texts(self._texts[index], item)
        return words


class SubsetSource:
    """Records start ... stop - 1 of another source."""

    def __init__(self, source: Source, start: int, stop: int):
        self.name, self._source, self._start, self._length = source.name, source, start, stop - start

    def __len__(self) -> int:
        return self._length

    def describe(self, index: int) -> str:
        return self._source.describe(self._start + index)

    def texts_at(self, index: int) -> list[str]:
        return texts_of(self._source, self._start + check_index(index, self._length, self.name))

    def prompt_at(self, index: int) -> str:
        return prompt_of(self._source, self._start + check_index(index, self._length, self.name))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[self._start + check_index(index, self._length, self.name)]

    def __getattr__(self, key: str) -> Any:
        # What a source has besides the interface (class_names, splits) still holds for a part of it.
        if key.startswith("_"):
            raise AttributeError(key)
        return getattr(self._source, key)


def subset(source: Source, start: int | None = None, stop: int | None = None, where: str = "subset") -> Source:
    """Returns the records `source[start:stop]` as a source.

    Raises:
      ConfigError: if none are left.
    """
    first, last, _ = slice(start, stop).indices(len(source))
    if first >= last:
        raise ConfigError(f"{where}: [{start}, {stop}] of {source.name} with {len(source)} records is empty; choose other bounds.")
    return source if (first, last) == (0, len(source)) else SubsetSource(source, first, last)


class MixtureSource:
    """Several sources interleaved in fixed proportions, evenly spread; which record stands at index i is a pure function of i.

    Weights that are in a proportion of small whole numbers are kept exactly, others to a part in a thousand; they make a pattern that repeats.
    A source that is used up starts again, so within one pass a small source with a large weight repeats. Shuffling is the loader's work.

    Args:
      sources: the sources.
      weights: their shares, of any sum; by default in proportion to their lengths.
      length: records of one pass; by default as many as it takes for every record of every source to come at least once.
    Raises:
      ConfigError: for no sources, weights of another number, or weights that are not positive.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None, length: int | None = None, title: str = "mixture"):
        self.name, self._sources = title, list(sources)
        weights = [len(source) for source in self._sources] if weights is None else [float(weight) for weight in weights]
        if not self._sources or len(weights) != len(self._sources):
            raise ConfigError(f"{title}.weights: {len(weights)} weights for {len(self._sources)} sources; give one for each of at least one.")
        if not all(math.isfinite(weight) and weight > 0 for weight in weights):
            raise ConfigError(f"{title}.weights: {list(weights)} must be positive numbers; leave a source out instead of giving it 0.")
        self._parts = _whole_parts(weights)
        # Part j of p comes at place (j + 1/2) / p of the pattern: every source is spread evenly.
        places = sorted(((j + 0.5) / part, s, j) for s, part in enumerate(self._parts) for j in range(part))
        self._pattern = [(s, j) for _, s, j in places]
        passes = [-(-len(source) // part) for source, part in zip(self._sources, self._parts)]
        self._length = int(length) if length is not None else max(passes) * len(self._pattern)
        if self._length < 1:
            raise ConfigError(f"{title}.length is {length}, but it must be at least 1.")

    def __len__(self) -> int:
        return self._length

    def locate(self, index: int) -> tuple[int, int]:
        """Returns (number of the source, index of the record in it)."""
        block, place = divmod(check_index(index, self._length, self.name), len(self._pattern))
        source, ordinal = self._pattern[place]
        return source, (block * self._parts[source] + ordinal) % len(self._sources[source])

    def describe(self, index: int) -> str:
        source, record = self.locate(index)
        return self._sources[source].describe(record)

    def texts_at(self, index: int) -> list[str]:
        source, record = self.locate(index)
        return texts_of(self._sources[source], record)

    def prompt_at(self, index: int) -> str:
        source, record = self.locate(index)
        return prompt_of(self._sources[source], record)

    def __getitem__(self, index: int) -> dict[str, Any]:
        source, record = self.locate(index)
        return self._sources[source][record]


def mixture_source(sources: Any, weights: Any = None, length: int | None = None) -> MixtureSource:
    """Builds a mixture from config sections.

    Args:
      sources: a list of source sections, or {name of my choice: source section}.
      weights: a list, or {the same names: weight}; by default in proportion to the lengths.
      length: records of one pass, see `MixtureSource`.
    """
    if hasattr(sources, "items"):
        names = list(sources.keys())
        if weights is not None:
            if not hasattr(weights, "items") or set(weights.keys()) != set(names):
                raise ConfigError(f"mixture.weights must name the sources {names}, each with its weight.")
            weights = [weights[name] for name in names]
        sections = {name: sources[name] for name in names}
    else:
        sections = dict(enumerate(sources))
    return MixtureSource([build_source(section, f"mixture.sources[{key}]") for key, section in sections.items()], weights, length)


def _whole_parts(weights: Sequence[float]) -> list[int]:
    """Returns weights as whole numbers of a small sum, in the same proportion or close to it."""
    exact = all(float(weight).is_integer() for weight in weights)
    parts = [int(weight) for weight in weights] if exact else [max(1, round(MIXTURE_RESOLUTION * weight / sum(weights))) for weight in weights]
    parts = [part // math.gcd(*parts) for part in parts]
    if sum(parts) > 2 * MIXTURE_RESOLUTION:
        parts = [max(1, round(MIXTURE_RESOLUTION * part / sum(parts))) for part in parts]
        parts = [part // math.gcd(*parts) for part in parts]
    return parts


def offsets_of(lengths: Sequence[int]) -> list[int]:
    """Returns the first index of every part, then the total: [0, n0, n0 + n1, ...]."""
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + int(length))
    return offsets


def locate_part(offsets: Sequence[int], index: int) -> tuple[int, int]:
    """Returns (part, index within it) of `index`, given `offsets_of` the parts; empty parts are passed over."""
    part = bisect.bisect_right(offsets, index) - 1
    return part, index - offsets[part]


def _named(item: str | Callable[[], str]) -> str:
    return item() if callable(item) else item


def _short(value: Any, length: int = 40) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= length else text[:length] + '...'}"

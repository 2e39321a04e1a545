"""The processor: everything between a record and the arrays that a model sees, in training, evaluation and use alike.

It is a list of named operations for images and one for texts (see `operations.py`), saved next to the weights as `processor.json` with the
tokenizer's model inside, so that a trained model always sees what it was trained on.
"""
from collections.abc import Mapping, Sequence
import hashlib
import json
import os
from typing import Any

from jaxtyping import Float, Int32
import numpy as np
from PIL import Image

from vlm_jax import storage
from vlm_jax.data import operations
from vlm_jax.data.documents import Segment, frames_of, image_segment, marked_segments, plain_segments
from vlm_jax.data.formats import KINDS, Format, prepared
from vlm_jax.data.interleaved import InterleavedFormat, Row
from vlm_jax.data.problems import Account, problem, reason_of
from vlm_jax.data.text import Tokenize
from vlm_jax.data.tokenizers import Tokenizer
from vlm_jax.errors import ConfigError, DataError, did_you_mean
from vlm_jax.settings import call, choose, plain

FORMAT_VERSION = 1
FORMATS = {**dict.fromkeys(KINDS, Format), "interleaved": InterleavedFormat}


class Processor:
    """Turns records into arrays.

    Args:
      image: the image operations, [[name, {settings}], ...]; they must end in float32 pictures of one size. Empty: records need no image.
      text: the text operations; they must end in `tokenize`. Empty: records need no texts.
      format: how picture, prompt and target become the arrays of a generating model: the settings of `formats.Format` that a user sets, `kind`,
        `length`, `image_tokens`, ..., or of `interleaved.InterleavedFormat` (kind "interleaved": documents of texts and pictures). The text operations
        before `tokenize` apply to prompt and target; of `tokenize` tokenizer and padding are used.
    Attributes:
      image_size: (height, width), None without image operations.
      length, vocab_size, tokenizer: of the tokens, None without text operations; with a format its length.
      format: the `Format` or `InterleavedFormat`, None without one.
      digest: SHA-256 of operations, settings and tokenizer: two processors of one digest give the same arrays.
    Raises:
      ConfigError: for operations that do not exist, do not fit together, or do not end in arrays of one shape.
    """

    def __init__(self, image: Sequence[Any] = (), text: Sequence[Any] = (), format: Mapping[str, Any] | None = None):
        images = operations.parse(image, "processor.image")
        if images and images[0][0] != "decode":
            images.insert(0, ("decode", {}))
        texts = operations.parse(text, "processor.text")
        places = [i for i, (name, _) in enumerate(texts) if name == "tokenize"]
        if texts and places != [len(texts) - 1]:
            raise ConfigError('processor.text must end in ["tokenize", {"tokenizer": ..., "length": ...}], and hold it once.')
        form = plain(format) if format is not None else None
        if form is not None:
            if not texts or not isinstance(form, dict):
                raise ConfigError('processor.format must be a section such as {"kind": "prefix_lm", "length": 64}, with a tokenizer in processor.text.')
            texts[-1] = ("tokenize", {"length": 1, **texts[-1][1]})     # the format has the length that counts
        self._image = operations.build("image", images, "processor.image")
        self._text = operations.build("text", texts, "processor.text")
        self.tokenizer: Tokenizer | None = None
        self.length = self.vocab_size = self.image_size = None
        if texts:
            tokenize: Tokenize = self._text[-1]
            self.tokenizer, self.length, self.vocab_size = tokenize.tokenizer, tokenize.length, tokenize.tokenizer.vocab_size
            texts[-1] = ("tokenize", {**texts[-1][1], "tokenizer": self.tokenizer.to_dict()})
        self._image_shape = shape = self._probe() if images else None
        self.image_size = shape[:2] if shape is not None and len(shape) == 3 else None
        self.format: Format | InterleavedFormat | None = None
        if form is not None:
            if tokenize.bos or tokenize.eos != "none":
                raise ConfigError("processor.text: with a format, marks are set by format.begin and format.end; leave bos and eos of tokenize out.")
            maker = choose(FORMATS, str(form.get("kind", KINDS[0])), "processor.format.kind")
            self.format = call(maker, form, "processor.format", tokenizer=self.tokenizer, pad_id=tokenize.pad_id, image_shape=shape)
            self.length = self.format.length
        # Settings are kept as plain data (JSON has no tuples and no numpy numbers): what is saved is what was built.
        self._settings = {"format_version": FORMAT_VERSION, "image": plain(images), "text": plain(texts)}
        if form is not None:     # without one the digest is that of processors which know no formats
            self._settings["format"] = form
        try:
            serial = json.dumps(self._settings, sort_keys=True)
        except TypeError as error:
            raise ConfigError(f"processor: its settings cannot be saved as JSON ({error}); use numbers, strings and lists.") from None
        self.digest = hashlib.sha256(serial.encode()).hexdigest()

    def _probe(self) -> tuple[int, ...]:
        """Returns the shape that the image operations give; grey pictures of two shapes show whether it is always the same."""
        shapes = set()
        for size in ((640, 480), (411, 907)):
            try:
                result = self.image(Image.new("RGB", size, (128, 128, 128)))
            except DataError as error:
                raise ConfigError(f"processor.image fails on a picture of {size[0]} x {size[1]} pixels: {error}") from error
            if not isinstance(result, np.ndarray) or result.dtype != np.float32 or result.ndim not in (2, 3):
                raise ConfigError('processor.image must end in float32 pictures; list ["value_range", {"low": -1, "high": 1}] last.')
            shapes.add(result.shape)
        if len(shapes) > 1:
            raise ConfigError(f"processor.image gives pictures of differing shapes {sorted(shapes)}; list resize or center_crop.")
        return shapes.pop()

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None, name: str = "") -> dict[str, np.ndarray]:
        """Returns {"image": float32 [H, W, 3], "tokens": int32 [T]} of a record, each if the processor has operations for it.

        With an rng a caption is drawn from `texts` and the random operations are random; without, the first caption and the deterministic forms.
        `name` is put in front of error messages.

        With a format the arrays are those of `formats.Format.example`, made of `image`, `prompt` (a str, "" if missing) and a target out of `texts`; a
        record with `text_only` True needs no image. With an interleaved one a record holds `segments` (data/documents.py; `next_image` True or False may say
        which picture its text reads), or `documents`, a list of such records for one row.

        Raises:
          DataError: with a `reason`: those of `decode_image`, image_too_small, image_too_long, caption_missing, caption_not_text,
            caption_empty, token_out_of_vocabulary; of a format also prompt_not_text and those of `Format.example`.
        """
        if isinstance(self.format, InterleavedFormat):
            return self._documents(record, rng, name, strict=True)[0]
        if self.format is not None:
            return self._example(record, rng, name)
        result = {}
        if self._image:
            if record.get("image") is None:
                raise problem("image_missing", f"{name or 'record'}: there is no image; give the record one or leave it out.")
            result["image"] = _named(name, operations.apply, self._image, record["image"], rng)
        if self._text:
            result["tokens"] = _named(name, operations.apply, self._text, self.caption(record, rng, name), rng)
        return result

    def _example(self, record: Mapping[str, Any], rng: np.random.Generator | None, name: str) -> dict[str, np.ndarray]:
        """Returns the arrays of a record under the format."""
        image, prompt = None, record.get("prompt", "")
        if not isinstance(prompt, str):
            raise problem("prompt_not_text", f"{name or 'record'}: the prompt must be a string, got {prompt!r:.60}; correct the record.")
        if self._image and not record.get("text_only"):
            if record.get("image") is None:
                raise problem("image_missing", f"{name or 'record'}: there is no image; give the record one, mark it text_only, or leave it out.")
            image = _named(name, operations.apply, self._image, record["image"], rng)
        target = _named(name, prepared, self._text[:-1], self.caption(record, rng, name), rng)
        return _named(name, self.format.example, image, _named(name, prepared, self._text[:-1], prompt, rng), target)

    def accounted(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> tuple[dict[str, np.ndarray], Account]:
        """As `__call__`, with what there is to count: what was cut off, and the bad ones among several documents of one row, which are left out of it."""
        if isinstance(self.format, InterleavedFormat):
            return self._documents(record, rng, "", strict=False)
        return self(record, rng), Account()

    def _documents(self, record: Mapping[str, Any], rng: np.random.Generator | None, name: str, strict: bool) -> tuple[dict[str, np.ndarray], Account]:
        """Returns the arrays of the documents of a record in one row; `strict`: a bad one is raised also if others are good."""
        documents = record.get("documents", (record,)) if isinstance(record, Mapping) else (record,)
        if not isinstance(documents, (list, tuple)) or not documents:
            raise problem("document_wrong_type", f"{name or 'record'}: documents is {documents!r:.60}; give a list of at least one record.")
        rows, pictures, bad = [], [], []
        for place, document in enumerate(documents):
            try:
                row, shown = _named(name, self._read_document, document, rng)
                rows.append(row)
                pictures += shown
            except DataError as error:
                if strict or len(documents) == 1:
                    raise
                item = record["name_of"](place) if "name_of" in record else f"document {place}"
                bad.append(problem(reason_of(error), f"{item}: {str(error).removeprefix(f'{item}: ')}"))
        if not rows:
            raise bad[0]
        problems = tuple((reason_of(error), str(error)) for error in bad)
        return _named(name, self.format.example, rows, pictures), Account(len(documents), problems, tuple(note for row in rows for note in row.notes))

    def _read_document(self, record: Any, rng: np.random.Generator | None) -> tuple[Row, list[np.ndarray]]:
        """Returns the tokens and pictures of a document, or raises the error that stands in its place."""
        if isinstance(record, DataError):
            raise record
        row = self._row(record, rng)
        return row, [self._pixels(picture, number, rng) for number, picture in enumerate(row.pictures)]

    def _row(self, record: Mapping[str, Any], rng: np.random.Generator | None) -> Row:
        """Returns the tokens of a document."""
        segments, following = self.segments(record, rng), record.get("next_image")
        if following is not None and not isinstance(following, (bool, np.bool_)):
            raise problem("document_wrong_type", f"record: next_image is {following!r:.40}; it says True or False, or is left out.")
        return self.format.row(segments, rng, following)

    def segments(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> list[Segment]:
        """Returns the segments of a record, its texts after the text operations: those of `segments`, or of a plain record picture, prompt and target."""
        if not isinstance(record, Mapping):
            raise problem("document_wrong_type", f"a document is a {type(record).__name__}, not a record; write {{\"segments\": [...]}}.")
        if "segments" in record:
            return self._prepared(record["segments"], rng)
        marker = self.format.image_marker
        if marker and isinstance(record.get("text"), str) and isinstance(record.get("images"), (list, tuple)):
            return self._prepared(marked_segments(record["text"], [image_segment(image) for image in record["images"]], marker), rng)
        if self._image and not record.get("text_only") and record.get("image") is None and record.get("frames") is None:
            raise problem("image_missing", "record: there is no image; give the record one, mark it text_only, or leave it out.")
        return self._prepared(plain_segments(record if self._image else {**record, "text_only": True}, self.caption(record, rng), marker), rng)

    def _prepared(self, segments: Any, rng: np.random.Generator | None = None) -> Any:
        """Returns segments with their texts after the text operations; what is no segment stays, for the format to refuse."""
        if not isinstance(segments, (list, tuple)):
            return segments
        return [{**segment, "text": prepared(self._text[:-1], segment["text"], rng)}
                if isinstance(segment, Mapping) and isinstance(segment.get("text"), str) else segment for segment in segments]

    def _pixels(self, picture: Segment, number: int, rng: np.random.Generator | None = None) -> np.ndarray:
        """Returns picture `number` of a document: [H, W, 3], or [F, H, W, 3], whose frames share all random draws."""
        seed = None if rng is None else int(rng.integers(2**63))
        try:
            frames = [operations.apply(self._image, frame, None if seed is None else np.random.default_rng(seed))
                      for frame in frames_of(picture, self.format.frames)]
        except DataError as error:
            raise problem(reason_of(error), f"picture {number} of the document: {error}") from None
        return frames[0] if self.format.frames is None else np.stack(frames)

    def document(self, segments: Sequence[Segment], begin: bool = True) -> dict[str, np.ndarray]:
        """Returns the inputs, without a batch axis, of a document of texts and pictures that a model goes on from (`InterleavedFormat.prompt`).

        `begin` False leaves out the begin mark: segments that go on behind others which end in a `chunk_end`.
        """
        if not isinstance(self.format, InterleavedFormat):
            raise ConfigError('this processor reads no documents; give it processor.format with kind="interleaved".')
        row = self.format.prompt(self._prepared(segments), begin)
        return self.format.inputs(row, [self._pixels(picture, number) for number, picture in enumerate(row.pictures)])

    def documents(self, documents: Sequence[Sequence[Segment]]) -> dict[str, np.ndarray]:
        """Returns the inputs of several documents as one batch, padded on the right to the longest; `images` holds as many pictures as the one of most."""
        rows = [self.document(segments) for segments in documents]
        if self.format is None:
            raise ConfigError('this processor reads no documents; give it processor.format with kind="interleaved".')
        return self.format.batch(rows)

    def prompt(self, image: Any = None, prompt: str = "") -> dict[str, np.ndarray]:
        """Returns the inputs, without a batch axis, from which a model answers `prompt` about `image` (None: a text alone); it is not padded."""
        if self.format is None:
            raise ConfigError("this processor has no format, so it makes no prompts; give it processor.format.")
        if not isinstance(prompt, str):
            raise problem("prompt_not_text", f"the prompt must be a string, got {prompt!r:.60}; correct it.")
        if image is not None and not self._image:
            raise ConfigError("this processor has no image operations; list some under processor.image, or ask without an image.")
        if isinstance(self.format, InterleavedFormat):
            return self.document(plain_segments({"image": image, "prompt": prompt}, None, self.format.image_marker))
        picture = None if image is None else operations.apply(self._image, image)
        return self.format.inputs(picture, prepared(self._text[:-1], prompt))

    def conversation(self, images: Sequence[Any], text: str, marker: str) -> dict[str, np.ndarray]:
        """Returns the inputs, without a batch axis, of a text that a chat template wrote, `marker` standing in it for each picture (`Format.conversation`)."""
        if self.format is None or not self._image:
            raise ConfigError("this model's conversations are text only; leave the pictures out.")
        if isinstance(self.format, InterleavedFormat):
            row = self.format.conversation(text, [image_segment(image) for image in images], marker)
            return self.format.inputs(row, [self._pixels(picture, number) for number, picture in enumerate(row.pictures)])
        return self.format.conversation([operations.apply(self._image, image) for image in images], text, marker)

    def prompts(self, images: Sequence[Any] | None, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the inputs of several prompts as one batch, padded on the right to the longest.

        Args:
          images: one for each prompt, or None: texts alone.
        """
        if images is not None and len(images) != len(prompts):
            raise ConfigError(f"prompts: {len(images)} images for {len(prompts)} prompts; give one image for each.")
        rows = [self.prompt(None if images is None else images[i], prompt) for i, prompt in enumerate(prompts)]
        if self.format is None:
            raise ConfigError("this processor has no format, so it makes no prompts; give it processor.format.")
        return self.format.batch(rows)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids: with a format up to its end mark; special tokens give nothing."""
        if self.tokenizer is None:
            raise ConfigError("this processor has no text operations; list some under processor.text.")
        return self.tokenizer.decode(ids) if self.format is None else self.format.decode(ids)

    def caption(self, record: Mapping[str, Any], rng: np.random.Generator | None = None, name: str = "") -> str:
        """Returns the caption that the record is trained on: one of its texts by the rng, or the first."""
        name = name or "record"
        texts = record.get("texts")
        if texts is None or (isinstance(texts, (list, tuple)) and not texts):
            raise problem("caption_missing", f"{name}: there are no captions; give the record texts or leave it out.")
        if not isinstance(texts, (list, tuple)):
            raise problem("caption_not_text", f"{name}: texts must be a list of strings, got a {type(texts).__name__}; correct the record.")
        return _check_caption(texts[int(rng.integers(len(texts)))] if rng is not None and len(texts) > 1 else texts[0], name)

    def image(self, image: Any) -> Float[np.ndarray, "H W 3"]:
        """Returns one picture (bytes, path, PIL image, uint8 array) as the model sees it in evaluation."""
        if not self._image:
            raise ConfigError("this processor has no image operations; list some under processor.image.")
        return operations.apply(self._image, image)

    def text(self, text: str) -> Int32[np.ndarray, "T"]:
        """Returns the tokens of one text."""
        if not self._text:
            raise ConfigError("this processor has no text operations; list some under processor.text.")
        return operations.apply(self._text, _check_caption(text, "text"))

    def texts(self, texts: Sequence[str]) -> Int32[np.ndarray, "N T"]:
        """Returns the tokens of several texts."""
        rows = [self.text(text) for text in texts]
        return np.stack(rows) if rows else np.zeros((0, self.length or 0), np.int32)

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of one example: {"image": (H, W, 3), "tokens": (T,)}, each if the processor makes it; with a format the format's."""
        if self.format is not None:
            return self.format.shapes()
        return {**({"image": self._image_shape} if self._image else {}), **({"tokens": (self.length,)} if self._text else {})}

    def input_dtypes(self) -> dict[str, np.dtype]:
        """Returns the dtypes of the arrays of `input_shapes`."""
        if self.format is not None:
            return self.format.dtypes()
        return {key: np.dtype(np.float32 if key == "image" else np.int32) for key in self.input_shapes()}

    def to_dict(self) -> dict[str, Any]:
        """Returns the processor as JSON can hold it, the tokenizer's model included."""
        return json.loads(json.dumps(self._settings))

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: str = "the processor") -> "Processor":
        """Builds a processor from what `to_dict` returned.

        Raises:
          DataError: if it was written by a newer version, or is damaged.
        """
        settings = plain(settings)
        version = settings.get("format_version") if isinstance(settings, dict) else None
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise DataError(f"{where} has format version {version!r}, this program reads up to {FORMAT_VERSION}; update vlm_jax or save it again.")
        for key in settings:
            if key not in ("format_version", "image", "text", "format"):
                raise DataError(f"{where}: {key} is unknown.{did_you_mean(key, ('image', 'text', 'format'))}")
        try:
            return cls(settings.get("image", ()), settings.get("text", ()), settings.get("format"))
        except ConfigError as error:
            raise DataError(f"{where} cannot be built: {error}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes processor.json, all of it or nothing."""
        storage.write_whole(path, (json.dumps(self._settings, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Processor":
        """Reads processor.json.

        Raises:
          DataError: if the file is missing or damaged.
        """
        try:
            content = storage.read(path)
            if content is None:
                raise DataError(f"{path}: there is no such processor file; point to a workdir's processor.json.")
            settings = json.loads(content)
        except DataError:
            raise
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: this is no processor.json ({error}); restore it from the run that wrote it.") from None
        return cls.from_dict(settings, str(path))

    def __repr__(self):
        def names(listed):
            return [name for name, _ in listed]
        return f"Processor(image={names(self._settings['image'])}, text={names(self._settings['text'])}, digest={self.digest[:12]})"


def _check_caption(text: Any, name: str) -> str:
    if not isinstance(text, str):
        raise problem("caption_not_text", f"{name}: a caption must be a string, got {text!r:.60}; correct the record.")
    if not text or text.isspace():
        raise problem("caption_empty", f"{name}: a caption is empty; give it words or leave the record out.")
    return text


def _named(name: str, function, *arguments):
    """Calls `function`; a DataError from it gets the record's name in front."""
    if not name:
        return function(*arguments)
    try:
        return function(*arguments)
    except DataError as error:
        if hasattr(error, "reason"):
            raise problem(error.reason, f"{name}: {str(error).removeprefix('record: ')}") from None
        raise DataError(f"{name}: {error}") from None

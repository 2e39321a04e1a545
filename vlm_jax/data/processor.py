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
from vlm_jax.data.problems import problem
from vlm_jax.data.text import Tokenize
from vlm_jax.data.tokenizers import Tokenizer
from vlm_jax.errors import ConfigError, DataError, did_you_mean
from vlm_jax.settings import plain

FORMAT_VERSION = 1


class Processor:
    """Turns records into arrays.

    Args:
      image: the image operations, [[name, {settings}], ...]; they must end in float32 pictures of one size. Empty: records need no image.
      text: the text operations; they must end in `tokenize`. Empty: records need no texts.
    Attributes:
      image_size: (height, width), None without image operations.
      length, vocab_size, tokenizer: of the tokens, None without text operations.
      digest: SHA-256 of operations, settings and tokenizer: two processors of one digest give the same arrays.
    Raises:
      ConfigError: for operations that do not exist, do not fit together, or do not end in arrays of one shape.
    """

    def __init__(self, image: Sequence[Any] = (), text: Sequence[Any] = ()):
        images = operations.parse(image, "processor.image")
        if images and images[0][0] != "decode":
            images.insert(0, ("decode", {}))
        texts = operations.parse(text, "processor.text")
        places = [i for i, (name, _) in enumerate(texts) if name == "tokenize"]
        if texts and places != [len(texts) - 1]:
            raise ConfigError('processor.text must end in ["tokenize", {"tokenizer": ..., "length": ...}], and hold it once.')
        self._image = operations.build("image", images, "processor.image")
        self._text = operations.build("text", texts, "processor.text")
        self.tokenizer: Tokenizer | None = None
        self.length = self.vocab_size = self.image_size = None
        if texts:
            tokenize: Tokenize = self._text[-1]
            self.tokenizer, self.length, self.vocab_size = tokenize.tokenizer, tokenize.length, tokenize.tokenizer.vocab_size
            texts[-1] = ("tokenize", {**texts[-1][1], "tokenizer": self.tokenizer.to_dict()})
        if images:
            self.image_size = self._probe()
        # Settings are kept as plain data (JSON has no tuples and no numpy numbers): what is saved is what was built.
        self._settings = {"format_version": FORMAT_VERSION, "image": plain(images), "text": plain(texts)}
        try:
            serial = json.dumps(self._settings, sort_keys=True)
        except TypeError as error:
            raise ConfigError(f"processor: its settings cannot be saved as JSON ({error}); use numbers, strings and lists.") from None
        self.digest = hashlib.sha256(serial.encode()).hexdigest()

    def _probe(self) -> tuple[int, int]:
        """Returns the (height, width) that the image operations give; grey pictures of two shapes show whether it is always the same."""
        shapes = set()
        for size in ((640, 480), (411, 907)):
            try:
                result = self.image(Image.new("RGB", size, (128, 128, 128)))
            except DataError as error:
                raise ConfigError(f"processor.image fails on a picture of {size[0]} x {size[1]} pixels: {error}") from error
            if not isinstance(result, np.ndarray) or result.dtype != np.float32 or result.ndim != 3:
                raise ConfigError('processor.image must end in float32 pictures; list ["value_range", {"low": -1, "high": 1}] last.')
            shapes.add(result.shape)
        if len(shapes) > 1:
            raise ConfigError(f"processor.image gives pictures of differing shapes {sorted(shapes)}; list resize or center_crop.")
        height, width, _ = shapes.pop()
        return height, width

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None, name: str = "") -> dict[str, np.ndarray]:
        """Returns {"image": float32 [H, W, 3], "tokens": int32 [T]} of a record, each if the processor has operations for it.

        With an rng a caption is drawn from `texts` and the random operations are random; without, the first caption and the deterministic forms.
        `name` is put in front of error messages.

        Raises:
          DataError: with a `reason`: those of `decode_image`, image_too_small, image_too_long, caption_missing, caption_not_text,
            caption_empty, token_out_of_vocabulary.
        """
        result = {}
        if self._image:
            if record.get("image") is None:
                raise problem("image_missing", f"{name or 'record'}: there is no image; give the record one or leave it out.")
            result["image"] = _named(name, operations.apply, self._image, record["image"], rng)
        if self._text:
            result["tokens"] = _named(name, operations.apply, self._text, self.caption(record, rng, name), rng)
        return result

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
        """Returns the shapes of one example: {"image": (H, W, 3), "tokens": (T,)}, each if the processor makes it."""
        return {**({"image": (*self.image_size, 3)} if self._image else {}), **({"tokens": (self.length,)} if self._text else {})}

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
            if key not in ("format_version", "image", "text"):
                raise DataError(f"{where}: {key} is unknown.{did_you_mean(key, ('image', 'text'))}")
        try:
            return cls(settings.get("image", ()), settings.get("text", ()))
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
            raise problem(error.reason, f"{name}: {error}") from None
        raise DataError(f"{name}: {error}") from None

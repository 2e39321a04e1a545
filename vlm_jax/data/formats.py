"""Formats of text generation: a picture, a prompt and a target become the token arrays of a decoder or of an encoder-decoder.

    prefix_lm         [image tokens] begin prompt separator | target end     image and prompt see each other (PaliGemma, arXiv 2407.07726, section 3.2)
    causal            the same sequence, every token sees what stands before it
    encoder_decoder   encoder: [image tokens] begin prompt separator; decoder: target end (T5, PaLI)

The loss counts target and end mark. Nothing is cut off, replaced or left out without being asked for.
"""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtyping import Int32
import numpy as np

from vlm_jax.data.problems import problem
from vlm_jax.data.tokenizers import Tokenizer, check_vocabulary
from vlm_jax.errors import ConfigError
from vlm_jax.settings import choose

KINDS = ("prefix_lm", "causal", "encoder_decoder")
_DTYPES = {"tokens": np.int32, "valid": np.bool_, "prefix": np.bool_, "loss_weights": np.float32, "slots": np.int32, "targets": np.int32,
           "images": np.float32, "patches": np.float32}


class Format:
    """Builds the arrays of one record.

    Args:
      tokenizer: of prompts and targets.
      pad_id: what fills the rest, and stands where image tokens go.
      image_shape: [H, W, 3] of the pictures, [P, D] of flexible patches (the key `patches`; unfilled ones are not valid), None without pictures.
      kind: "prefix_lm", "causal" or "encoder_decoder".
      length: tokens T of the sequence, of an encoder-decoder those of its encoder; image tokens count.
      target_length: tokens T' of the decoder of an encoder-decoder.
      image_tokens: how many tokens the model makes of a picture; with flexible patches their number, or 0 for a model whose encoder reads them alone
        (Pix2Struct; with `length` 0 there are no text tokens, and a prompt is an error).
      begin: what the text begins with: True is the tokenizer's begin mark, a string or number another token, False nothing. By default True for
        decoders, False for encoder-decoders.
      separator: what stands between prompt and target: a text, a token's number, True for the end mark, False or "" for nothing. By default a newline
        for "prefix_lm" (PaliGemma), nothing for "causal", the end mark for "encoder_decoder" (T5).
      end: what the target ends with, as `begin`; by default the end mark.
      image_marker: a text that says in each prompt where its picture stands ("<image>"); without it image tokens come first.
      truncate_target: whether a target that is too long is cut off, and then has no end mark; else it is an error.
      vocab_size: tokens that the model knows, at most the tokenizer's where None.
    Attributes:
      begin, separator, end: lists of ids; the separator is None where it is encoded together with the prompt.
    Raises:
      ConfigError: for settings that cannot work together.
    """

    def __init__(self, kind: str, length: int, *, tokenizer: Tokenizer, pad_id: int, image_shape: tuple[int, ...] | None,
                 target_length: int | None = None, image_tokens: int = 0, begin: Any = None, separator: Any = None, end: Any = True,
                 image_marker: str | None = None, truncate_target: bool = False, vocab_size: int | None = None):
        choose(dict.fromkeys(KINDS), kind, "processor.format.kind")
        self.kind, self.length, self.target_length, self.image_tokens = kind, length, target_length, image_tokens
        self.tokenizer, self.pad_id, self.image_shape = tokenizer, pad_id, image_shape
        self.image_marker, self.truncate_target = image_marker, bool(truncate_target)
        self.encodes = kind == "encoder_decoder"
        self._patches = image_shape is not None and len(image_shape) == 2
        alone = self.encodes and self._patches and image_tokens == 0
        numbers = {"length": (length, 0 if alone else 2), "image_tokens": (image_tokens, 0)}
        if self.encodes:
            numbers["target_length"] = (target_length, 1)
        elif target_length is not None:
            raise ConfigError(f'processor.format.target_length is of encoder-decoders; "{kind}" has one sequence: count the target in length.')
        for name, (value, low) in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"processor.format.{name} is {value!r}; give a number of at least {low}.")
        if (image_shape is None) != (image_tokens == 0) and not alone:
            raise ConfigError(f"processor.format.image_tokens is {image_tokens}, but there are {'no' if image_shape is None else 'some'} image operations; "
                              "give the number of tokens that the model makes of a picture, 0 without pictures.")
        if self._patches and image_tokens not in (0, image_shape[0]):
            raise ConfigError(f"processor.format.image_tokens is {image_tokens}, but there are {image_shape[0]} patches; set it to {image_shape[0]}.")
        if image_marker is not None and (not isinstance(image_marker, str) or not image_marker.strip()):
            raise ConfigError(f'processor.format.image_marker is {image_marker!r}; give a text such as "<image>".')
        self.vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
        check_vocabulary(tokenizer, self.vocab_size, "processor.format.vocab_size")
        self.begin = self._mark("begin", not self.encodes if begin is None else begin, tokenizer.bos_id)
        self.end = self._mark("end", end, tokenizer.eos_id)
        self._separator_text = ""
        self.separator = self._read_separator({"prefix_lm": "\n", "causal": False, "encoder_decoder": True}[kind] if separator is None else separator)
        if length == 0:
            self.begin, self.separator = [], []
        least = image_tokens + len(self.begin) + len(self.separator or ()) + (0 if self.encodes else 1 + len(self.end))
        if least > length:
            raise ConfigError(f"processor.format.length is {length}, but {image_tokens} image tokens, the marks and a target need at least {least}; raise it.")

    def _mark(self, name: str, value: Any, default: int | None) -> list[int]:
        """Returns the ids of a mark: True is the tokenizer's own, a string the token of that name."""
        if value is False or value is None:
            return []
        number = default if value is True else self.tokenizer.token_id(value) if isinstance(value, str) else value
        if number is None:
            which = f"no {'begin' if name == 'begin' else 'end'} mark" if value is True else f"no token {value!r}"
            raise ConfigError(f"processor.format.{name}: the tokenizer has {which}; name a token that it has, add one (tokenizer.added), or set it to False.")
        if not isinstance(number, (int, np.integer)) or not 0 <= number < self.vocab_size:
            raise ConfigError(f"processor.format.{name}: token {number!r} is outside the vocabulary of {self.vocab_size}; choose one inside it.")
        return [int(number)]

    def _read_separator(self, value: Any) -> list[int] | None:
        if not isinstance(value, str):
            return self._mark("separator", value, self.tokenizer.eos_id)
        if not value:
            return []
        if self.tokenizer.token_id(value) is not None:
            return self._mark("separator", value, None)
        if self.tokenizer.encode(f"a{value}") == self.tokenizer.encode("a"):
            raise ConfigError(f"processor.format.separator: the tokenizer makes nothing of {value!r}; add it to tokenizer.added, or set another one.")
        self._separator_text = value
        return None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of one example."""
        text, target = (self.length,), (self.target_length if self.encodes else self.length,)
        shapes = {"tokens": text, "valid": text} if self.length else {}
        shapes |= {"slots": text} if self.image_tokens else {}
        shapes |= {"targets": target} if self.encodes else {"prefix": text}
        shapes["loss_weights"] = target
        if self.image_shape is not None:
            shapes["patches" if self._patches else "images"] = self.image_shape if self._patches else (1, *self.image_shape)
        return shapes

    def dtypes(self) -> dict[str, np.dtype]:
        """Returns the dtypes of one example."""
        return {key: np.dtype(_DTYPES[key]) for key in self.shapes()}

    def check_model(self, vocab_size: int | None = None, image_tokens: int | None = None, where: str = "processor.format") -> None:
        """Raises a ConfigError where a model has fewer embeddings than there are tokens, or makes another number of tokens of a picture."""
        if vocab_size is not None:
            check_vocabulary(self.tokenizer, vocab_size, where)
        if image_tokens is not None and image_tokens != self.image_tokens:
            raise ConfigError(f"{where}.image_tokens is {self.image_tokens}, but the model makes {image_tokens} tokens of a picture; "
                              f"set it to {image_tokens}, or change the size of the pictures.")

    def example(self, image: np.ndarray | None, prompt: str, target: str) -> dict[str, np.ndarray]:
        """Returns the arrays of a training example: exactly the keys of `shapes`.

        Args:
          image: float32 [H, W, 3] or [P, D]; None for a record without picture: its image is zeros and no token refers to it.
        Raises:
          DataError: with reason prompt_too_long, target_too_long, target_empty, image_tokens_mismatch or token_out_of_vocabulary.
        """
        head, slots = self._prompt_ids(image is not None, prompt)
        room = self.target_length if self.encodes else self.length - len(head)
        self._check_prompt(head, slots, prompt, 0 if self.encodes else 1 + len(self.end))
        ids = self._encode(target, "target")
        if not ids:
            raise problem("target_empty", f"target {target[:40]!r}: no token is left of it; give the record a target or leave it out.")
        tail = [*ids, *self.end]
        if len(tail) > room:
            if not self.truncate_target:
                name, more = ("target_length", len(tail)) if self.encodes else ("length", len(head) + len(tail))
                raise problem("target_too_long", f"target {target[:40]!r}: {len(tail)} tokens, but there is room for {room}; "
                                                 f"raise format.{name} to {more} or set truncate_target.")
            tail = tail[:room]
        if self.encodes:
            result = {**self._place(head, slots), "targets": _filled(self.target_length, self.pad_id, np.int32, tail),
                      "loss_weights": _filled(self.target_length, 0, np.float32, [1] * len(tail))}
        else:
            result = self._place([*head, *tail], slots)
            result["prefix"] = _filled(self.length, False, np.bool_, [self.kind == "prefix_lm"] * len(head))
            result["loss_weights"] = _filled(self.length, 0, np.float32, [*[0] * len(head), *[1] * len(tail)])
        return self._with_image(result, image)

    def inputs(self, image: np.ndarray | None, prompt: str) -> dict[str, np.ndarray]:
        """Returns what a model generates from: the arrays of a prompt, as long as it is: tokens, valid, prefix of decoders, slots and images.

        Raises:
          DataError: with reason prompt_too_long, image_tokens_mismatch or token_out_of_vocabulary.
        """
        head, slots = self._prompt_ids(image is not None, prompt)
        self._check_prompt(head, slots, prompt, 0 if self.encodes else 1)
        if not head and self.length:
            raise problem("prompt_empty", "prompt: no token is left of it, so there is nothing to begin from; give it words or set format.begin.")
        result = self._place(head, slots, len(head))
        if not self.encodes:
            result["prefix"] = np.full(len(head), self.kind == "prefix_lm")
        return self._with_image(result, image)

    def conversation(self, images: Sequence[np.ndarray], text: str, marker: str) -> dict[str, np.ndarray]:
        """Returns what a model goes on from where a chat template has written the text, marks and all: as `inputs`, with any number of pictures.

        Args:
          images: float32 [H, W, 3], in the order in which `marker` stands in the text, each in the place of one.
        Raises:
          ConfigError: for a format without pictures in its decoder.
          DataError: with reason image_tokens_mismatch or token_out_of_vocabulary.
        """
        if not self.image_tokens or self._patches or self.encodes:
            raise ConfigError("this model's conversations are text only; leave the pictures out.")
        number = self.tokenizer.token_id(marker)
        if number is None:
            pieces = [self._encode(part, "conversation") if part else [] for part in text.split(marker)]
        else:
            ids = self._encode(text, "conversation")
            borders = [-1, *(place for place, one in enumerate(ids) if one == number), len(ids)]
            pieces = [ids[begin + 1:end] for begin, end in zip(borders, borders[1:])]
        if len(pieces) - 1 != len(images):
            raise problem("image_tokens_mismatch", f"conversation: {len(pieces) - 1} {marker} markers but {len(images)} images; "
                                                   "give one image for each marker.")
        head, slots = list(pieces[0]), [-1] * len(pieces[0])
        for place, piece in enumerate(pieces[1:]):
            head += [self.pad_id] * self.image_tokens + piece
            slots += [*range(place * self.image_tokens, (place + 1) * self.image_tokens), *[-1] * len(piece)]
        result = {"tokens": np.asarray(head, np.int32), "valid": np.ones(len(head), bool), "prefix": np.full(len(head), self.kind == "prefix_lm")}
        return {**result, "slots": np.asarray(slots, np.int32), "images": np.stack(images)} if len(images) else result

    def batch(self, rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Returns several `inputs` as one batch, padded on the right to the longest."""
        if not rows:
            raise ConfigError("prompts: there are none; give at least one.")
        longest = max(len(row["tokens"]) for row in rows) if self.length else 0
        fill = {"tokens": self.pad_id, "slots": -1}
        return {key: np.stack([row[key] if key in ("images", "patches") else _filled(longest, fill.get(key, 0), row[key].dtype, row[key]) for row in rows])
                for key in rows[0]}

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of generated ids up to the end mark, without special tokens.

        Tables of models are often padded beyond the tokenizer's entries; such an id, which only an untrained model writes, gives nothing.
        """
        ids = [int(number) for number in ids]
        if self.end and self.end[0] in ids:
            ids = ids[:ids.index(self.end[0])]
        return self.tokenizer.decode([number for number in ids if number < self.tokenizer.vocab_size])

    def _prompt_ids(self, has_image: bool, prompt: str) -> tuple[list[int], list[int]]:
        """Returns (ids, slots) of everything before the target."""
        before, after = "", prompt
        if self.image_marker is not None:
            markers = prompt.count(self.image_marker)
            if markers != has_image:
                raise problem("image_tokens_mismatch", f"prompt {prompt[:40]!r}: {markers} {self.image_marker} markers but {int(has_image)} images; "
                                                       "write one marker for the image, none without.")
            before, _, after = prompt.rpartition(self.image_marker)
        if self.separator is None:
            ids = self._encode(after + self._separator_text, "prompt")
        else:
            ids = [*(self._encode(after, "prompt") if after else []), *self.separator]
        picture = [self.pad_id] * (self.image_tokens if has_image else 0)
        first = [*self.begin, *(self._encode(before, "prompt") if before else [])]
        first, rest = (first, ids) if self.image_marker is not None else ([], [*first, *ids])
        return [*first, *picture, *rest], [*[-1] * len(first), *range(len(picture)), *[-1] * len(rest)]

    def _check_prompt(self, head: list[int], slots: list[int], prompt: str, more: int) -> None:
        if len(head) + more > self.length:
            pictures = sum(slot >= 0 for slot in slots)
            raise problem("prompt_too_long", f"prompt {prompt[:40]!r}: {len(head)} tokens ({pictures} of the image)"
                                             f"{f' and {more} of a target' if more else ''}, but format.length is {self.length}; "
                                             f"raise it to {len(head) + more} or shorten the prompt.")

    def _encode(self, text: str, what: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        wrong = next((number for number in ids if not 0 <= number < self.vocab_size), None)
        if wrong is not None:
            raise problem("token_out_of_vocabulary", f"{what} {text[:40]!r}: token {wrong} is outside the model's vocabulary of {self.vocab_size}; "
                                                     "use the tokenizer that belongs to the weights.")
        return ids

    def _place(self, ids: list[int], slots: list[int], length: int | None = None) -> dict[str, np.ndarray]:
        if not self.length:
            return {}
        length = self.length if length is None else length
        result = {"tokens": _filled(length, self.pad_id, np.int32, ids), "valid": _filled(length, False, np.bool_, [True] * len(ids))}
        return {**result, "slots": _filled(length, -1, np.int32, slots)} if self.image_tokens else result

    def _with_image(self, result: dict[str, np.ndarray], image: np.ndarray | None) -> dict[str, np.ndarray]:
        if self.image_shape is None:
            return result
        image = np.zeros(self.image_shape, np.float32) if image is None else image
        if not self._patches:
            return {**result, "images": image[None]}
        if self.image_tokens:
            # Rows of patches count from 1: a 0 is what is left of the budget.
            empty = np.flatnonzero(image[:, 0] == 0)
            result["valid"] &= ~np.isin(result["slots"], empty)
        return {**result, "patches": image}


def _filled(length: int, fill: Any, dtype: Any, values: Sequence[Any]) -> Int32[np.ndarray, "T"]:
    array = np.full(length, fill, dtype)
    array[:len(values)] = values
    return array


def prepared(operations: Sequence[Callable], text: str, rng: np.random.Generator | None = None) -> str:
    """Returns a prompt or target after the text operations that come before `tokenize`; an empty prompt stays empty."""
    for operation in operations:
        text = operation(text, rng) if text else text
    return text

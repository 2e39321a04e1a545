"""Tokenizers: SentencePiece models and CLIP's byte pairs, loaded from files or trained on the captions of a source.

Train one:  python -m vlm_jax.data.tokenizers train --source '{"name": "emoji"}' --vocab_size 2048 --output emoji.model
"""
import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
import hashlib
import os
from pathlib import Path
from typing import Any, Protocol

from vlm_jax.data.problems import problem
from vlm_jax.errors import ConfigError, did_you_mean

MAX_MODEL_BYTES = 256 * 2 ** 20


class Tokenizer(Protocol):
    """What the processor asks of a tokenizer. The special ids are None where the vocabulary has no such token."""
    vocab_size: int
    pad_id: int | None
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


class SentencePieceTokenizer:
    """A SentencePiece model. Kudo and Richardson, "SentencePiece: A simple and language independent subword tokenizer" (2018).

    Attributes:
      vocab_size; pad_id, bos_id, eos_id, unk_id (None where absent); model: the bytes; sha256: of the bytes.
    Raises:
      DataError: if the file is missing, is no SentencePiece model, or is an empty one.
    """

    def __init__(self, model: str | os.PathLike | bytes):
        name = "the SentencePiece model" if isinstance(model, bytes) else str(os.fspath(model))
        self.model = model if isinstance(model, bytes) else read_file(model)
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        import sentencepiece
        if sentencepiece.__version__ == "0.2.1":
            raise ConfigError("sentencepiece 0.2.1 crashes in this use; install another version.")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model) if self.model else None
        except (RuntimeError, ValueError, TypeError) as error:
            text = " ".join(str(error).split())[:120]
            raise problem("tokenizer_corrupt", f"{name}: this is no SentencePiece model ({text}); fetch or train it again.") from None
        self.vocab_size = self._processor.get_piece_size() if self._processor else 0
        if self.vocab_size < 1:
            raise problem("tokenizer_empty", f"{name}: the SentencePiece model has no pieces; fetch or train it again.")
        for mark in ("pad", "bos", "eos", "unk"):
            number = getattr(self._processor, f"{mark}_id")()
            if number >= self.vocab_size:
                raise problem("tokenizer_corrupt", f"{name}: its {mark} id {number} is outside its {self.vocab_size} pieces; fetch it again.")
            setattr(self, f"{mark}_id", number if number >= 0 else None)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without begin and end marks."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of every text."""
        return self._processor.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; padding, begin and end marks give nothing.

        Raises:
          DataError: for an id outside the vocabulary.
        """
        return self._processor.decode([number for number in check_ids(ids, self.vocab_size) if number not in (self.pad_id, self.bos_id, self.eos_id)])

    def piece(self, number: int) -> str:
        """Returns the piece of one id."""
        return self._processor.id_to_piece(check_ids([number], self.vocab_size)[0])

    def to_dict(self) -> dict[str, Any]:
        """Returns what `load_tokenizer` needs to build this tokenizer without any file."""
        return {"sentencepiece": base64.b64encode(self.model).decode("ascii"), "sha256": self.sha256}

    def __getstate__(self):
        return {"model": self.model}

    def __setstate__(self, state):
        self.__init__(state["model"])

    def __repr__(self):
        return f"SentencePieceTokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"


def check_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Returns `ids` as a list of ints; a DataError names the first that is outside the vocabulary."""
    ids = [int(number) for number in ids]
    for number in ids:
        if not 0 <= number < vocab_size:
            raise problem("token_out_of_vocabulary", f"token {number} is outside the vocabulary of {vocab_size}; use the tokenizer that made it.")
    return ids


def read_file(path: str | os.PathLike, limit: int = MAX_MODEL_BYTES) -> bytes:
    """Returns the bytes of a tokenizer's file; a DataError says why it cannot be read."""
    path = Path(path).expanduser()
    try:
        if path.stat().st_size > limit:
            raise problem("tokenizer_corrupt", f"{path}: {path.stat().st_size:,} bytes are too many for a tokenizer; check the path.")
        return path.read_bytes()
    except FileNotFoundError:
        raise problem("tokenizer_missing", f"{path}: there is no such tokenizer file; correct the path or train one "
                                           "(python -m vlm_jax.data.tokenizers train).") from None
    except (OSError, ValueError) as error:
        raise problem("tokenizer_missing", f"{path}: the tokenizer file cannot be read ({error}); check path and permissions.") from None


def load_tokenizer(settings: Mapping[str, Any] | str, *, prepare: Sequence[Callable] = ()) -> Tokenizer:
    """Returns the tokenizer that `settings` describe.

    Args:
      settings: one of
        {"path": "c4.model", "sha256": optional}: a SentencePiece model file (a plain string means the same);
        {"train_on": source settings, "vocab_size": n, ...}: trained on a source's captions or taken from the cache, see `tokenizer_training`;
        {"clip": folder with vocab.json and merges.txt}: CLIP's byte pairs;
        {"sentencepiece": base64, "sha256": ...} or {"byte_pairs": {...}, "sha256": ...}: what `to_dict` of a tokenizer gives.
      prepare: text operations that a training's captions go through first.
    Raises:
      ConfigError: for settings of another form.
      DataError: for a file that is missing, damaged or not the one that sha256 names.
    """
    settings = {"path": settings} if isinstance(settings, str) else dict(settings)
    kinds = ("path", "train_on", "clip", "sentencepiece", "byte_pairs")
    chosen = [kind for kind in kinds if kind in settings]
    if len(chosen) != 1:
        raise ConfigError(f"tokenizer must have exactly one of {', '.join(kinds)}, got {sorted(settings)}.")
    kind = chosen[0]
    if kind == "train_on":
        from vlm_jax.data import tokenizer_training
        from vlm_jax.settings import call
        source = settings.pop("train_on")
        return call(tokenizer_training.train_tokenizer, settings, "tokenizer", source=source, prepare=prepare)
    extra = set(settings) - {kind, "sha256"}
    if extra:
        name = sorted(extra)[0]
        raise ConfigError(f"tokenizer.{name}: a tokenizer from {kind} takes no such setting.{did_you_mean(name, (kind, 'sha256'))}")
    if kind == "path":
        tokenizer, name = SentencePieceTokenizer(settings["path"]), settings["path"]
    elif kind == "sentencepiece":
        try:
            model = base64.b64decode(settings["sentencepiece"], validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise problem("tokenizer_corrupt", "the embedded SentencePiece model is no base64; save the processor again.") from None
        tokenizer, name = SentencePieceTokenizer(model), "the embedded SentencePiece model"
    else:
        from vlm_jax.data.byte_pair import ClipTokenizer
        tokenizer = ClipTokenizer.from_files(settings["clip"]) if kind == "clip" else ClipTokenizer.from_dict(settings["byte_pairs"])
        name = settings["clip"] if kind == "clip" else "the embedded byte pairs"
    expected = settings.get("sha256")
    if expected is not None and expected != tokenizer.sha256:
        raise problem("tokenizer_corrupt", f"{name}: its SHA-256 is {tokenizer.sha256[:12]}..., expected {str(expected)[:12]}; fetch the right file.")
    return tokenizer


if __name__ == "__main__":
    import sys

    from vlm_jax.data.tokenizer_training import main
    sys.exit(main())

"""Tokenizers: SentencePiece models, `tokenizer.json`, CLIP's byte pairs: loaded from files and Hugging Face folders, or trained on a source's captions.

Train one:  python -m vlm_jax.data.tokenizers train --source '{"name": "emoji"}' --vocab_size 2048 --output emoji.model
"""
import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
import hashlib
import os
from pathlib import Path
import re
from typing import Any, Protocol

from vlm_jax.data.problems import problem
from vlm_jax.errors import ConfigError, did_you_mean

MAX_MODEL_BYTES = 256 * 2 ** 20
MAX_ADDED = 65_536
MARKS = ("pad", "bos", "eos", "unk")
_RANGE = re.compile(r"(.*?)(\d+)\.\.(\d+)(\D*)", re.DOTALL)


class Tokenizer(Protocol):
    """What the processor asks of a tokenizer. The special ids are None where the vocabulary has no such token."""
    vocab_size: int
    pad_id: int | None
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def to_dict(self) -> dict[str, Any]: ...


class SentencePieceTokenizer:
    """A SentencePiece model. Kudo and Richardson, "SentencePiece: A simple and language independent subword tokenizer" (2018).

    Tokens of our own may follow the model's pieces: `added=["<loc0000..1023>", "<extra_id_99..0>"]` (see `expand_tokens`). They are found in a text
    before anything else, the longest first; what lies between them is encoded piece by piece.

    Args:
      model: a file or its bytes.
      added: tokens that get the ids after the model's, or {token: id}.
      special: those of the added tokens that `decode` leaves out.
      marks: {"pad" | "bos" | "eos" | "unk": token}, in the place of the model's own.
    Attributes:
      vocab_size; pad_id, bos_id, eos_id, unk_id (None where absent); model: the bytes; sha256: of the bytes.
    Raises:
      DataError: if the file is missing, is no SentencePiece model, or is an empty one.
      ConfigError: for added tokens or marks that cannot be.
    """

    def __init__(self, model: str | os.PathLike | bytes, added: Sequence[str] | Mapping[str, int] = (), special: Sequence[str] = (),
                 marks: Mapping[str, str] | None = None):
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
        self.pieces = self._processor.get_piece_size() if self._processor else 0
        if self.pieces < 1:
            raise problem("tokenizer_empty", f"{name}: the SentencePiece model has no pieces; fetch or train it again.")
        for mark in MARKS:
            number = getattr(self._processor, f"{mark}_id")()
            if number >= self.pieces:
                raise problem("tokenizer_corrupt", f"{name}: its {mark} id {number} is outside its {self.pieces} pieces; fetch it again.")
            setattr(self, f"{mark}_id", number if number >= 0 else None)
        self._extras = tokenizer_extras(added, special, marks)
        self._added = added_ids(added, self.pieces)
        self._tokens = {number: token for token, number in self._added.items()}
        self.vocab_size = max(self.pieces, *(number + 1 for number in self._tokens), 0)
        unknown = [token for token in special if token not in self._added]
        if unknown:
            raise ConfigError(f"tokenizer.special: {unknown[0]!r} is not among the added tokens; add it or leave it out.")
        set_marks(self, marks)
        hidden = {self.pad_id, self.bos_id, self.eos_id, *(self._added[token] for token in special)}
        self._hidden = frozenset(number for number in hidden if number is not None)
        longest_first = sorted(self._added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without begin and end marks.

        Raises:
          DataError: for a text that is no Unicode (a lone surrogate).
        """
        ids: list[int] = []
        try:
            for place, part in enumerate([text] if self._split is None else self._split.split(text)):
                if place % 2:
                    ids.append(self._added[part])
                elif part:
                    ids.extend(self._processor.encode(part))
        except (TypeError, ValueError, RuntimeError):
            if is_unicode(text):
                raise
            raise problem("caption_not_text", f"{text!r:.60} cannot be encoded: it holds half a character (a lone surrogate); correct the text.") from None
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of `ids`; padding, begin and end marks and special tokens give nothing, unless `skip_special` is False: then their names.

        Raises:
          DataError: for an id outside the vocabulary.
        """
        shown = [number for number in check_ids(ids, self.vocab_size) if not (skip_special and number in self._hidden)]
        marks = () if skip_special else self._hidden
        text, run = "", []
        for number in [*shown, None]:
            if number is not None and number not in self._tokens and number not in marks:
                if number >= self.pieces:
                    raise problem("token_out_of_vocabulary", f"token {number} lies between the {self.pieces} pieces and the added tokens; it has no text.")
                run.append(number)
                continue
            if run:
                piece = self._processor.decode(run)
                opens = self._processor.id_to_piece(run[0]).startswith("\u2581")
                text += (" " if text and opens and not piece.startswith(" ") else "") + piece
                run = []
            if number is not None:
                text += self.piece(number)
        return text

    def token_id(self, token: str) -> int | None:
        """Returns the id of one token by its name, None where there is none."""
        if token in self._added:
            return self._added[token]
        if not is_unicode(token):
            return None
        number = self._processor.piece_to_id(token)
        return number if self._processor.id_to_piece(number) == token else None

    def piece(self, number: int) -> str:
        """Returns the piece of one id."""
        number = check_ids([number], self.vocab_size)[0]
        return self._tokens[number] if number in self._tokens else self._processor.id_to_piece(number)

    def to_dict(self) -> dict[str, Any]:
        """Returns what `load_tokenizer` needs to build this tokenizer without any file."""
        return {"sentencepiece": base64.b64encode(self.model).decode("ascii"), "sha256": self.sha256, **self._extras}

    def __getstate__(self):
        return {"model": self.model, **self._extras}

    def __setstate__(self, state):
        self.__init__(**state)

    def __repr__(self):
        return f"SentencePieceTokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"


def expand_tokens(listed: Sequence[str]) -> list[str]:
    """Returns the tokens that a list of names and ranges means: "<loc0000..1023>" is <loc0000>, <loc0001>, ..., "<extra_id_99..0>" counts down.

    Raises:
      ConfigError: for something else than non-empty strings, a token that comes twice, or too many.
    """
    if isinstance(listed, str) or not all(isinstance(token, str) and token for token in listed):
        raise ConfigError(f'tokenizer.added must be a list of non-empty strings, got {listed!r:.60}; for example ["<loc0000..1023>"].')
    tokens: list[str] = []
    for token in listed:
        found = _RANGE.fullmatch(token)
        if found is None:
            tokens.append(token)
            continue
        before, first, last, after = found.groups()
        if max(len(first), len(last)) > 6 or abs(int(last) - int(first)) >= MAX_ADDED:
            raise ConfigError(f"tokenizer.added: {token!r} are more than {MAX_ADDED:,} tokens; shorten the range.")
        width, step = len(first) if len(first) == len(last) or first.startswith("0") else 0, 1 if int(last) >= int(first) else -1
        tokens += [f"{before}{number:0{width}d}{after}" for number in range(int(first), int(last) + step, step)]
    if len(tokens) > MAX_ADDED:
        raise ConfigError(f"tokenizer.added are {len(tokens):,} tokens, more than {MAX_ADDED:,}; shorten the list.")
    if len(set(tokens)) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise ConfigError(f"tokenizer.added: {twice!r} comes twice; list every token once.")
    return tokens


def added_ids(added: Sequence[str] | Mapping[str, int], first: int) -> dict[str, int]:
    """Returns {token: id} of added tokens: a list gets the ids `first`, `first + 1`, ..., a mapping says its own."""
    if not hasattr(added, "items"):
        return {token: first + place for place, token in enumerate(expand_tokens(added))}
    ids = dict(added.items())
    for token, number in ids.items():
        if not isinstance(token, str) or not token or isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < 2 ** 24:
            raise problem("tokenizer_corrupt", f"the added token {token!r:.40} has the id {number!r:.40}, which cannot be; fetch the tokenizer's files again.")
    if len(set(ids.values())) != len(ids) or len(ids) > MAX_ADDED:
        raise problem("tokenizer_corrupt", f"the {len(ids)} added tokens share ids or are too many; fetch the tokenizer's files again.")
    return ids


def tokenizer_extras(added: Any, special: Sequence[str], marks: Mapping[str, str] | None) -> dict[str, Any]:
    """Returns those of the three settings that say anything, as JSON can hold them."""
    kept = {"added": dict(added.items()) if hasattr(added, "items") else list(added), "special": list(special), "marks": dict(marks or {})}
    kept = {key: value for key, value in kept.items() if value}
    if not all(is_unicode(text) for value in kept.values() for text in (*value, *getattr(value, "values", list)())):
        raise ConfigError("tokenizer: added tokens and marks hold half a character (a lone surrogate); correct them.")
    return kept


def is_unicode(text: Any) -> bool:
    """Whether a text can be encoded: a lone surrogate cannot. What is no text has other checks."""
    try:
        return not isinstance(text, str) or bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def set_marks(tokenizer: Any, marks: Mapping[str, str] | None) -> None:
    """Sets pad_id, bos_id, eos_id, unk_id to the tokens that `marks` names."""
    for mark, token in (marks or {}).items():
        if mark not in MARKS:
            raise ConfigError(f"tokenizer.marks.{mark} is unknown.{did_you_mean(mark, MARKS)}")
        number = tokenizer.token_id(token) if isinstance(token, str) else None
        if number is None:
            raise ConfigError(f"tokenizer.marks.{mark}: the tokenizer has no token {token!r:.40}; name one that it has or list it under added.")
        setattr(tokenizer, f"{mark}_id", number)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str = "tokenizer") -> None:
    """Raises a ConfigError naming both numbers where the tokenizer has tokens that a model with `vocab_size` embeddings does not."""
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"{where}: it has {tokenizer.vocab_size} tokens, the model's vocabulary {vocab_size}; "
                          "use the tokenizer that belongs to the weights, or enlarge vocab_size.")


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


def load_tokenizer(settings: Mapping[str, Any] | str | os.PathLike, *, vocab_size: int | None = None, prepare: Sequence[Callable] = ()) -> Tokenizer:
    """Returns the tokenizer that `settings` describe.

    Args:
      settings: one of
        {"path": a SentencePiece model file, a `tokenizer.json`, or a Hugging Face folder} (a plain string means the same);
        {"train_on": source settings, "vocab_size": n, ...}: trained on a source's captions or taken from the cache, see `tokenizer_training`;
        {"clip": folder with vocab.json and merges.txt}: CLIP's byte pairs;
        {"sentencepiece": base64}, {"tokenizer_json": base64} or {"byte_pairs": {...}}: what `to_dict` of a tokenizer gives;
        with, where wanted, "sha256" (of the file), and "added", "special", "marks", see `SentencePieceTokenizer`.
      vocab_size: embeddings of the model that will read the tokens; None is not compared.
      prepare: text operations that a training's captions go through first.
    Raises:
      ConfigError: for settings of another form, or more tokens than `vocab_size`.
      DataError: for a file that is missing, damaged or not the one that sha256 names.
    """
    settings = {"path": str(os.fspath(settings))} if isinstance(settings, (str, os.PathLike)) else dict(settings)
    kinds = ("path", "train_on", "clip", "sentencepiece", "tokenizer_json", "byte_pairs")
    chosen = [kind for kind in kinds if kind in settings]
    if len(chosen) != 1:
        raise ConfigError(f"tokenizer must have exactly one of {', '.join(kinds)}, got {sorted(settings)}.")
    kind = chosen[0]
    extras = {key: settings.pop(key) for key in ("added", "special", "marks", "clean_up") if key in settings}
    if kind == "train_on":
        from vlm_jax.data import tokenizer_training
        from vlm_jax.settings import call
        source = settings.pop("train_on")
        tokenizer = call(tokenizer_training.train_tokenizer, settings, "tokenizer", source=source, prepare=prepare)
        tokenizer = _build(SentencePieceTokenizer, tokenizer.model, extras) if extras else tokenizer
    else:
        extra = set(settings) - {kind, "sha256"}
        if extra:
            name = sorted(extra)[0]
            raise ConfigError(f"tokenizer.{name}: a tokenizer from {kind} takes no such setting.{did_you_mean(name, (kind, 'sha256', 'added', 'marks'))}")
        tokenizer, name = _load(kind, settings[kind], extras)
        expected = settings.get("sha256")
        if expected is not None and expected != tokenizer.sha256:
            raise problem("tokenizer_corrupt", f"{name}: its SHA-256 is {tokenizer.sha256[:12]}..., expected {str(expected)[:12]}; fetch the right file.")
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size, "tokenizer" if kind != "path" else str(settings["path"]))
    return tokenizer


def _load(kind: str, value: Any, extras: Mapping[str, Any]) -> tuple[Tokenizer, str]:
    """Returns the tokenizer of one kind of settings, and what messages call it."""
    if kind in ("clip", "byte_pairs"):
        from vlm_jax.data.byte_pair import ClipTokenizer
        if extras:
            raise ConfigError(f"tokenizer.{sorted(extras)[0]}: CLIP's byte pairs take no further tokens; leave it out.")
        return (ClipTokenizer.from_files(value), str(value)) if kind == "clip" else (ClipTokenizer.from_dict(value), "the embedded byte pairs")
    from vlm_jax.data.json_tokenizer import JsonTokenizer
    if kind != "path":
        name = {"sentencepiece": "the embedded SentencePiece model", "tokenizer_json": "the embedded tokenizer.json"}[kind]
        try:
            model = base64.b64decode(value, validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise problem("tokenizer_corrupt", f"{name} is no base64; save the processor again.") from None
        return _build(SentencePieceTokenizer if kind == "sentencepiece" else JsonTokenizer, model, extras), name
    path = Path(value).expanduser()
    if path.is_dir():
        from vlm_jax.data.tokenizer_folders import load_folder
        return load_folder(path, extras), str(value)
    return _build(JsonTokenizer if path.suffix == ".json" else SentencePieceTokenizer, value, extras), str(value)


def _build(kind: Callable, model: Any, extras: Mapping[str, Any]) -> Tokenizer:
    from vlm_jax.settings import call
    return call(kind, extras, "tokenizer", model=model)


if __name__ == "__main__":
    import sys

    from vlm_jax.data.tokenizer_training import main
    sys.exit(main())

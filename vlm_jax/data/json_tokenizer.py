"""`tokenizer.json`, the format of the `tokenizers` library, behind the same interface as the SentencePiece models.

    tokenizer = JsonTokenizer("tokenizer.json", marks={"eos": "</s>", "pad": "<pad>"})
    tokenizer.decode(tokenizer.encode("a red circle")) -> "a red circle"

Texts are encoded as transformers' PreTrainedTokenizerFast does without special tokens: no marks are put around them (the processor's format does
that), nothing is cut off or padded, and a special token written out in a text is that token.
"""
import base64
from collections.abc import Mapping, Sequence
import hashlib
import json
import os
from typing import Any

from vlm_jax.data.problems import problem
from vlm_jax.data.tokenizers import check_ids, expand_tokens, is_unicode, read_file, set_marks, tokenizer_extras
from vlm_jax.errors import ConfigError

# What a word-piece decoder leaves apart and English writes together; PreTrainedTokenizerFast mends it where clean_up_tokenization_spaces is set.
_APART = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))
_LARGEST_ID = 2 ** 24


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library. Arguments and attributes as of `SentencePieceTokenizer`.

    Args:
      model: a file or its bytes.
      added: tokens that get the ids after those of the file (names and ranges, see `expand_tokens`), or {token: id} that must come out so.
      special: tokens, known or new, that `decode` leaves out besides those that the file calls special.
      marks: {"pad" | "bos" | "eos" | "unk": token}; a tokenizer.json alone does not say which they are. One that is missing is added.
      clean_up: whether `decode` closes the gaps before punctuation (BERT's word pieces; byte pairs are left as they are).
    Raises:
      DataError: if the file is missing, truncated, no JSON, or no tokenizer.
    """

    def __init__(self, model: str | os.PathLike | bytes, added: Sequence[str] | Mapping[str, int] = (), special: Sequence[str] = (),
                 marks: Mapping[str, str] | None = None, clean_up: bool = False):
        name = "the tokenizer.json" if isinstance(model, bytes) else str(os.fspath(model))
        self.model = model if isinstance(model, bytes) else read_file(model)
        self.sha256 = hashlib.sha256(self.model).hexdigest()
        self._extras = {**tokenizer_extras(added, special, marks), **({"clean_up": True} if clean_up else {})}
        self._tokenizer = _parse(self.model, name)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._add(added, special, marks, name)
        numbers = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(numbers, default=-1) + 1
        if not 0 < self.vocab_size <= _LARGEST_ID:
            raise problem("tokenizer_empty" if not self.vocab_size else "tokenizer_corrupt",
                          f"{name}: its largest token id is {self.vocab_size - 1}; fetch it again.")
        self.pad_id = self.bos_id = self.eos_id = self.unk_id = None
        set_marks(self, marks)
        self._clean_up = clean_up and type(self._tokenizer.model).__name__ != "BPE"

    def _add(self, added: Sequence[str] | Mapping[str, int], special: Sequence[str], marks: Mapping[str, str] | None, name: str) -> None:
        from tokenizers import AddedToken
        tokens = [token for token, _ in sorted(added.items(), key=lambda item: item[1])] if hasattr(added, "items") else expand_tokens(added)
        hidden = {*special, *(token for token in (marks or {}).values() if isinstance(token, str))}
        known = {token.content: token for token in self._tokenizer.get_added_tokens_decoder().values()}
        first = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        clash = None if hasattr(added, "items") else next((token for token in tokens if self._tokenizer.token_to_id(token) is not None), None)
        if clash is not None:
            raise ConfigError(f"tokenizer.added: {name} has the token {clash!r} already; leave it out.")
        # Transformers adds what is missing in this order, which says their ids.
        named = [(marks or {}).get(mark) for mark in ("bos", "eos", "unk", "pad")]
        for token in [*tokens, *(token for token in dict.fromkeys([*named, *special]) if token not in tokens)]:
            if not isinstance(token, str) or (token in known and (known[token].special or token not in hidden)):
                continue
            if token in hidden:
                self._tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            else:
                self._tokenizer.add_tokens([AddedToken(token, normalized=False)])
        wanted = dict(added.items()) if hasattr(added, "items") else {token: first + place for place, token in enumerate(tokens)}
        for token, number in wanted.items():
            if self._tokenizer.token_to_id(token) != number:
                raise problem("tokenizer_corrupt", f"{name}: the added token {token!r} gets the id {self._tokenizer.token_to_id(token)}, not {number}; "
                                                   "tokenizer.json and its added tokens do not belong together.")

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without begin and end marks.

        Raises:
          DataError: for a text that is no Unicode (a lone surrogate).
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, ValueError):
            raise problem("caption_not_text", f"{text!r:.60} cannot be encoded: it holds half a character (a lone surrogate); correct the text.") from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of every text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of `ids`, without special tokens unless `skip_special` is False.

        Raises:
          DataError: for an id outside the vocabulary.
        """
        text = self._tokenizer.decode(check_ids(ids, self.vocab_size), skip_special_tokens=skip_special)
        for apart, together in _APART if self._clean_up else ():
            text = text.replace(apart, together)
        return text

    def token_id(self, token: str) -> int | None:
        """Returns the id of one token by its name, None where there is none."""
        return self._tokenizer.token_to_id(token) if is_unicode(token) else None

    def piece(self, number: int) -> str:
        """Returns the token of one id, "" for a gap in the vocabulary."""
        return self._tokenizer.id_to_token(check_ids([number], self.vocab_size)[0]) or ""

    def to_dict(self) -> dict[str, Any]:
        """Returns what `load_tokenizer` needs to build this tokenizer without any file."""
        return {"tokenizer_json": base64.b64encode(self.model).decode("ascii"), "sha256": self.sha256, **self._extras}

    def __getstate__(self):
        return {"model": self.model, **self._extras}

    def __setstate__(self, state):
        self.__init__(**state)

    def __repr__(self):
        return f"JsonTokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"


def _parse(model: bytes, name: str) -> Any:
    """Returns the library's tokenizer; what is no tokenizer is one clear DataError, whatever the library does with it."""
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(f"{name}: a tokenizer.json needs the library tokenizers; run: pip install 'vlm_jax[hf]'.") from None
    try:
        content = json.loads(model)
    except (ValueError, RecursionError) as error:
        cause = "it is truncated or no JSON" if isinstance(error, ValueError) else "it is nested too deeply"
        raise problem("tokenizer_corrupt", f"{name}: {cause} ({' '.join(str(error).split())[:100]}); fetch it again.") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise problem("tokenizer_corrupt", f"{name}: the JSON has no model of a tokenizer; point to the file tokenizer.json.")
    try:
        return tokenizers.Tokenizer.from_str(model.decode("utf-8"))
    except BaseException as error:    # a panic in the library's Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise problem("tokenizer_corrupt", f"{name}: this is no tokenizer of the tokenizers library ({' '.join(str(error).split())[:120]}); "
                                           "fetch it again or update the library.") from None


def byte_level_model(vocabulary: Mapping[str, Any], merges: str, add_prefix_space: bool, name: str) -> bytes:
    """Returns the tokenizer.json of byte pairs as GPT-2's, out of the contents of vocab.json and merges.txt."""
    pairs = [line.split(" ") for line in merges.split("\n") if line.strip() and not line.startswith("#version")]
    if not vocabulary or not all(isinstance(number, int) and not isinstance(number, bool) for number in vocabulary.values()):
        raise problem("tokenizer_corrupt", f"{name}/vocab.json must map pieces to numbers; fetch it again.")
    wrong = next((pair for pair in pairs if len(pair) != 2 or "".join(pair) not in vocabulary), None)
    if wrong is not None:
        raise problem("tokenizer_corrupt", f"{name}/merges.txt: the merge {' '.join(wrong)!r:.60} gives no piece of vocab.json; "
                                           "take both files of one release.")
    spaces = {"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": True, "use_regex": True}
    return _write({"type": "BPE", "vocab": dict(vocabulary), "merges": pairs}, None, spaces, spaces)


def word_piece_model(words: Sequence[str], config: Mapping[str, Any], name: str) -> bytes:
    """Returns the tokenizer.json of word pieces as BERT's, out of the lines of vocab.txt and tokenizer_config.json."""
    if len(set(words)) != len(words) or "[UNK]" not in words:
        raise problem("tokenizer_corrupt", f"{name}/vocab.txt must hold every word once, and [UNK]; fetch it again.")
    accents = config.get("strip_accents")
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": bool(config.get("tokenize_chinese_chars", True)),
                  "strip_accents": None if accents is None else bool(accents), "lowercase": bool(config.get("do_lower_case", True))}
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
             "vocab": {word: number for number, word in enumerate(words)}}
    return _write(model, normalizer, {"type": "BertPreTokenizer"}, {"type": "WordPiece", "prefix": "##", "cleanup": True})


def _write(model: dict[str, Any], normalizer: Any, pre_tokenizer: Any, decoder: Any) -> bytes:
    return json.dumps({"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
                       "post_processor": None, "decoder": decoder, "model": model}).encode()

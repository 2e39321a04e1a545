"""CLIP's tokenizer: byte-level byte pair encoding, read from the published `vocab.json` and `merges.txt`.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4; Sennrich et al., "Neural Machine
Translation of Rare Words with Subword Units" (2016). Text is NFC-normalised and lower-cased, split into words, single digits and runs of other
signs; each piece, as UTF-8 bytes, is merged by the pair of lowest rank until none is left.

Differs from the first release: no repair of broken encodings and no unescaping of HTML; the marks written out in a caption are ordinary text.
"""
from collections.abc import Mapping, Sequence
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any
import unicodedata

from vlm_jax.data.problems import problem
from vlm_jax.data.tokenizers import check_ids, read_file

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_WHITESPACE = frozenset("\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200b))))


@functools.cache
def byte_letters() -> tuple[str, ...]:
    """Returns the printable character that stands for each byte: itself for printable Latin-1, otherwise the next one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, free = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in printable else free))
        free += byte not in printable
    return tuple(letters)


def split_words(text: str) -> list[str]:
    """Splits lower-case text into contractions ('s, 're, ...), words, single digits and runs of other signs; white space goes."""
    words, i = [], 0
    kinds = [_kind(character) for character in text]
    while i < len(text):
        kind, end = kinds[i], i + 1
        contraction = next((c for c in _CONTRACTIONS if text.startswith(c, i)), None) if text[i] == "'" else None
        if contraction:
            end = i + len(contraction)
        elif kind in "LO":
            while end < len(text) and kinds[end] == kind:
                end += 1
        if kind != " ":
            words.append(text[i:end])
        i = end
    return words


def _kind(character: str) -> str:
    """Returns L for a letter, N for a number, a space for white space, O for any other sign."""
    if character in _WHITESPACE:
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


class ClipTokenizer:
    """CLIP's byte pairs. Attributes as of `SentencePieceTokenizer`; padding is token 0 as in the first release.

    Args:
      vocabulary: piece -> id; the ids must be 0, 1, 2, ... and contain the begin and end marks.
      merges: pairs of pieces, the first merged first.
    Raises:
      DataError: if vocabulary and merges are not those of such a tokenizer.
    """

    def __init__(self, vocabulary: Mapping[str, int], merges: Sequence[Sequence[str]]):
        if sorted(vocabulary.values()) != list(range(len(vocabulary))) or BEGIN not in vocabulary or END not in vocabulary:
            raise problem("tokenizer_corrupt", f"the vocabulary of {len(vocabulary)} pieces must have ids 0, 1, 2, ... and hold {BEGIN} and {END}; "
                                               "use CLIP's vocab.json.")
        self.vocabulary = dict(vocabulary)
        self.merges = [tuple(pair) for pair in merges]
        wrong = next((pair for pair in self.merges if len(pair) != 2 or pair[0] + pair[1] not in self.vocabulary), None)
        if wrong is not None:
            raise problem("tokenizer_corrupt", f"the merge {' '.join(wrong)!r} gives no piece of the vocabulary; "
                                               "use the vocab.json and merges.txt of one release.")
        self.ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self.vocab_size = len(self.vocabulary)
        self.bos_id, self.eos_id = self.vocabulary[BEGIN], self.vocabulary[END]
        self.pad_id, self.unk_id = 0, self.eos_id
        self.sha256 = hashlib.sha256(json.dumps([sorted(self.vocabulary.items()), self.merges]).encode()).hexdigest()
        self._known: dict[str, list[int]] = {}

    @classmethod
    def from_files(cls, folder: str | os.PathLike) -> "ClipTokenizer":
        """Reads `vocab.json` and `merges.txt` of a folder."""
        folder = Path(folder).expanduser()
        try:
            vocabulary = json.loads(read_file(folder / "vocab.json"))
            lines = read_file(folder / "merges.txt").decode("utf-8").split("\n")
        except UnicodeDecodeError:
            raise problem("tokenizer_corrupt", f"{folder}: vocab.json or merges.txt is no UTF-8 text; fetch it again.") from None
        except json.JSONDecodeError as error:
            raise problem("tokenizer_corrupt", f"{folder}/vocab.json is no JSON ({error}); fetch it again.") from None
        if not isinstance(vocabulary, dict) or not all(isinstance(number, int) for number in vocabulary.values()):
            raise problem("tokenizer_corrupt", f"{folder}/vocab.json must map pieces to numbers; use CLIP's vocab.json.")
        return cls(vocabulary, [line.split() for line in lines if line.strip() and not line.startswith("#version")])

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "ClipTokenizer":
        """Builds the tokenizer from the `byte_pairs` of `to_dict`."""
        try:
            vocabulary = {piece: number for number, piece in enumerate(settings["pieces"])}
            return cls(vocabulary, [pair.split(" ") for pair in settings["merges"]])
        except (KeyError, TypeError, AttributeError):
            raise problem("tokenizer_corrupt", "the embedded byte pairs lack pieces or merges; save the processor again.") from None

    def to_dict(self) -> dict[str, Any]:
        """Returns what `load_tokenizer` needs to build this tokenizer without any file."""
        return {"byte_pairs": {"pieces": sorted(self.vocabulary, key=self.vocabulary.get), "merges": [" ".join(pair) for pair in self.merges]},
                "sha256": self.sha256}

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without begin and end marks."""
        text = "".join(character.lower() for character in unicodedata.normalize("NFC", text))
        return [number for word in split_words(text) for number in self._encode_word(word)]

    def _encode_word(self, word: str) -> list[int]:
        ids = self._known.get(word)
        if ids is None:
            letters = byte_letters()
            pieces = [letters[byte] for byte in word.encode("utf-8", "replace")]
            pieces[-1] += _WORD_END
            ids = [self.vocabulary.get(piece, self.unk_id) for piece in self._merge(pieces)]
            if len(self._known) < 50_000:
                self._known[word] = ids
        return ids

    def _merge(self, pieces: list[str]) -> list[str]:
        """Merges all occurrences of the pair of lowest rank, from left to right, until no pair is in the table."""
        while len(pieces) > 1:
            best = min(zip(pieces, pieces[1:]), key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(pieces):
                pair = i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == best
                merged.append(pieces[i] + pieces[i + 1] if pair else pieces[i])
                i += 2 if pair else 1
            pieces = merged
        return pieces

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of every text."""
        return [self.encode(text) for text in texts]

    def token_id(self, token: str) -> int | None:
        """Returns the id of one token by its name, None where there is none."""
        return self.vocabulary.get(token)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Returns the text of `ids` up to the end mark, words separated by single spaces; with `skip_special` False all of it, marks included.

        Raises:
          DataError: for an id outside the vocabulary.
        """
        ids = check_ids(ids, self.vocab_size)
        if skip_special and self.eos_id in ids:
            ids = ids[:ids.index(self.eos_id)]
        bytes_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        text = "".join(self._pieces[number] for number in ids if not skip_special or number != self.bos_id).replace(_WORD_END, " ")
        return bytes(bytes_of.get(letter, 32) for letter in text).decode("utf-8", "replace").strip()

    @functools.cached_property
    def _pieces(self) -> list[str]:
        return sorted(self.vocabulary, key=self.vocabulary.get)

    def __repr__(self):
        return f"ClipTokenizer(vocab_size={self.vocab_size}, sha256={self.sha256[:12]})"

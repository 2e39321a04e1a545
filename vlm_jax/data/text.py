"""Text operations. Strings go through them one after the other; `tokenize`, the last, makes int32 tokens of a fixed length."""
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import re
import string
from typing import Any
import unicodedata

from jaxtyping import Int32
import numpy as np

from vlm_jax.data.operations import register
from vlm_jax.data.problems import problem
from vlm_jax.data.tokenizers import load_tokenizer
from vlm_jax.errors import ConfigError
from vlm_jax.settings import choose

EOS = ("none", "append", "sticky")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_WHITESPACE = re.compile(r"\s+")


@register("text", "lowercase")
@dataclasses.dataclass(frozen=True)
class Lowercase:
    """Lower-cases every letter of every script."""

    def __call__(self, text: str, rng: np.random.Generator | None = None) -> str:
        return text.lower()


@register("text", "strip")
@dataclasses.dataclass(frozen=True)
class Strip:
    """Drops white space at both ends, or of it `characters` only."""
    characters: str | None = None

    def __call__(self, text: str, rng: np.random.Generator | None = None) -> str:
        return text.strip(self.characters)


@register("text", "nfkc")
@dataclasses.dataclass(frozen=True)
class NFKC:
    """Unicode's compatibility composition: full-width letters, ligatures and combining accents become the ordinary characters."""

    def __call__(self, text: str, rng: np.random.Generator | None = None) -> str:
        return unicodedata.normalize("NFKC", text)


@register("text", "canonicalize")
@dataclasses.dataclass(frozen=True)
class Canonicalize:
    """SigLIP's canonical form: lower-case, without ASCII punctuation, runs of white space one space, none at the ends.

    Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023), with the prompt engineering of LiT. Punctuation of other scripts stays.
    """

    def __call__(self, text: str, rng: np.random.Generator | None = None) -> str:
        return _WHITESPACE.sub(" ", text.lower().translate(_NO_PUNCTUATION)).strip()


@register("text", "prompt")
@dataclasses.dataclass(frozen=True)
class Prompt:
    """Puts the text into `template` in place of {}: "a photo of {}"."""
    template: str

    def __post_init__(self):
        if not isinstance(self.template, str) or self.template.count("{}") != 1:
            raise ConfigError(f'template must contain {{}} once, got {self.template!r}; for example "a photo of {{}}".')

    def __call__(self, text: str, rng: np.random.Generator | None = None) -> str:
        return self.template.replace("{}", text)


@register("text", "tokenize")
@dataclasses.dataclass(frozen=True)
class Tokenize:
    """A string becomes `length` tokens, cut off or padded.

    Args:
      tokenizer: where it comes from, see `vlm_jax.data.tokenizers.load_tokenizer`: {"path": ...}, {"train_on": source settings, "vocab_size": ...},
        {"clip": folder}; or a tokenizer object.
      length: number of tokens T.
      bos: whether the first token is the tokenizer's begin mark.
      eos: "none"; "append": the end mark follows the text and is lost when the text is cut off; "sticky": a text that is cut off ends in it.
      pad_id: what fills the rest; the tokenizer's own padding id if None. SigLIP pads with its end mark.
      prepare: operations that texts go through before a tokenizer is trained on them (the program sets it).
    """
    tokenizer: Any
    length: int
    bos: bool = False
    eos: str = "none"
    pad_id: int | None = None
    prepare: Sequence[Callable] = dataclasses.field(default=(), repr=False, compare=False)
    needs_prepare = True

    def __post_init__(self):
        choose(dict.fromkeys(EOS), self.eos, "eos")
        if isinstance(self.tokenizer, (Mapping, str)):
            object.__setattr__(self, "tokenizer", load_tokenizer(self.tokenizer, prepare=self.prepare))
        object.__setattr__(self, "prepare", ())
        if self.pad_id is None:
            object.__setattr__(self, "pad_id", self.tokenizer.pad_id)
        marks = int(self.bos) + (self.eos != "none")
        if not isinstance(self.length, int) or isinstance(self.length, bool) or self.length <= marks:
            raise ConfigError(f"length must be a number greater than {marks}, got {self.length!r}.")
        known = self.tokenizer
        for name, number, used in (("pad_id", self.pad_id, True), ("bos", known.bos_id, self.bos), ("eos", known.eos_id, self.eos != "none")):
            if not used:
                continue
            if number is None:
                raise ConfigError(f"{name}: the tokenizer has no such token; " + ("set pad_id to a number." if name == "pad_id" else "leave it out."))
            if not 0 <= number < self.tokenizer.vocab_size:
                raise ConfigError(f"{name}: token {number} is outside the vocabulary of {self.tokenizer.vocab_size}; choose one inside it.")

    def __call__(self, text: str, rng: np.random.Generator | None = None) -> Int32[np.ndarray, "T"]:
        if not text or text.isspace():
            raise problem("caption_empty", "caption: nothing is left of it to tokenize; give it words or leave the record out.")
        ids = self.tokenizer.encode(text)
        if self.bos:
            ids = [self.tokenizer.bos_id, *ids]
        if self.eos == "append":
            ids = [*ids, self.tokenizer.eos_id]
        elif self.eos == "sticky":
            ids = [*ids[:self.length - 1], self.tokenizer.eos_id]
        ids = ids[:self.length]
        tokens = np.full(self.length, self.pad_id, np.int32)
        tokens[:len(ids)] = ids
        if tokens.max() >= self.tokenizer.vocab_size or tokens.min() < 0:
            raise problem("token_out_of_vocabulary", f"caption {text[:60]!r}: token {tokens.max()} is outside the vocabulary of "
                                                     f"{self.tokenizer.vocab_size}; the tokenizer's files do not belong together.")
        return tokens

"""Trains SentencePiece models on captions: the same captions and settings give the same bytes, and a model is trained once per cache."""
import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
import hashlib
import io
import json
import logging
import os
from pathlib import Path
import sys
from typing import Any

from vlm_jax import storage
from vlm_jax.data.sources import prompt_of, texts_of
from vlm_jax.data.tokenizers import SentencePieceTokenizer, load_tokenizer
from vlm_jax.errors import ConfigError, DataError, VlmError
from vlm_jax.settings import choose, plain

logger = logging.getLogger(__name__)
MODEL_TYPES = ("unigram", "bpe")
FORMAT = 1  # part of every cache key: raise it when training changes


def cache_folder() -> Path:
    """Returns the folder of what can be computed again: $VLM_JAX_CACHE, else ~/.cache/vlm_jax."""
    return Path(os.environ.get("VLM_JAX_CACHE") or Path.home() / ".cache" / "vlm_jax")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader finds all of it or nothing; creates its folder where missing."""
    storage.write_whole(path, content)


def captions_of(source: Any, prepare: Sequence[Callable] = (), max_captions: int = 1_000_000) -> list[str]:
    """Returns the captions of a source, and its prompts, after the operations `prepare`, in the source's order, without empty ones.

    A source with `texts_at(i)` (and `prompt_at(i)`) is not asked for its pictures. Of a source with more records than `max_captions`, evenly spaced
    records are read.
    """
    step = max(1, -(-len(source) // max_captions))
    captions = []
    for i in range(0, len(source), step):
        try:
            texts = [*texts_of(source, i), prompt_of(source, i)]
        except (DataError, KeyError, TypeError):
            continue  # a record that cannot be read is counted by the loader, which meets it as well
        for text in texts:
            if isinstance(text, str):
                for operation in prepare:
                    text = operation(text, None)
                text = " ".join(text.replace("\0", " ").split())
                if text:
                    captions.append(text)
        if len(captions) >= max_captions:
            break
    return captions[:max_captions]


def train_sentencepiece(texts: Iterable[str], vocab_size: int, *, model_type: str = "unigram", character_coverage: float = 0.9995) -> bytes:
    """Returns the bytes of a SentencePiece model with padding 0, end 1, unknown 2 (the ids of T5 and SigLIP) and a fallback to bytes.

    Args:
      vocab_size: the largest size; few captions give a smaller vocabulary.
      character_coverage: the share of characters that get a piece; the others are spelled in bytes.
    Raises:
      ConfigError: if the vocabulary is too small for the characters, or a setting is no good.
      DataError: if there are no captions.
    """
    import sentencepiece
    choose(dict.fromkeys(MODEL_TYPES), model_type, "tokenizer.model_type")
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        raise ConfigError(f"tokenizer.vocab_size must be a positive number, got {vocab_size!r}.")
    if not 0.9 <= character_coverage <= 1:
        raise ConfigError(f"tokenizer.character_coverage must lie in [0.9, 1], got {character_coverage}.")
    texts = list(texts)
    if not texts:
        raise DataError("tokenizer: the source has no captions to train on; choose a source whose records have texts.")
    sentencepiece.set_random_generator_seed(0)
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=buffer, vocab_size=vocab_size, model_type=model_type,
            character_coverage=character_coverage, hard_vocab_limit=False,
            byte_fallback=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, max_sentence_length=65536, minloglevel=2)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "smaller than required_chars" in text:
            need = text.split("required_chars.")[-1].split("vs")[-1].strip().split()[0].rstrip(".")
            raise ConfigError(f"tokenizer.vocab_size={vocab_size} is too small: bytes and characters alone need {need}; raise it.") from None
        raise ConfigError(f"tokenizer: SentencePiece cannot train on these {len(texts)} captions ({text[-120:]}); change vocab_size.") from None
    return buffer.getvalue()


def train_tokenizer(source: Any, vocab_size: int, *, model_type: str = "unigram", character_coverage: float = 0.9995,
                    max_captions: int = 1_000_000, prepare: Sequence[Callable] = (), cache: bool = True) -> SentencePieceTokenizer:
    """Returns a tokenizer trained on the captions of a source, from the cache if these captions and settings were met before.

    Args:
      source: settings of `vlm_jax.data.sources.build_source`, or a source object.
      prepare: text operations that the captions go through first; a processor gives those that it lists before `tokenize`.
      cache: whether to look into and write to `cache_folder()`.
    """
    import sentencepiece
    if isinstance(source, Mapping) or hasattr(source, "items"):
        from vlm_jax.data.sources import build_source
        source = build_source(plain(source))
    texts = captions_of(source, prepare, max_captions)
    settings = {"vocab_size": vocab_size, "model_type": model_type, "character_coverage": character_coverage}
    key = hashlib.sha256(json.dumps([FORMAT, sentencepiece.__version__, settings, len(texts)], sort_keys=True).encode())
    for text in texts:
        key.update(text.encode("utf-8", "surrogatepass") + b"\n")
    path = cache_folder() / "tokenizers" / f"{key.hexdigest()[:32]}.json"
    if cache and path.is_file():
        try:
            return load_tokenizer(json.loads(path.read_bytes()))
        except (VlmError, OSError, ValueError, TypeError) as error:
            logger.warning("%s: the cached tokenizer cannot be used (%s); training it again.", path, error)
    tokenizer = SentencePieceTokenizer(train_sentencepiece(texts, **settings))
    if cache:
        try:
            cache_folder().mkdir(mode=0o700, parents=True, exist_ok=True)  # what lies there is trusted: for this user alone
            write_atomically(path, json.dumps(tokenizer.to_dict()).encode())
        except OSError as error:
            logger.warning("%s: the tokenizer is not cached (%s); set VLM_JAX_CACHE to a writable folder.", path, error)
    return tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """The command `python -m vlm_jax.data.tokenizers`; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlm_jax.data.tokenizers", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a SentencePiece model on the captions of a source")
    train.add_argument("--source", required=True, help='settings of the source as JSON: {"name": "emoji"}')
    train.add_argument("--vocab_size", type=int, required=True)
    train.add_argument("--output", type=Path, required=True, help="the .model file to write")
    train.add_argument("--model_type", default="unigram", help="unigram or bpe")
    train.add_argument("--text", default="[]", help='text operations before training, as JSON: [["lowercase"]]')
    options = parser.parse_args(arguments)
    try:
        from vlm_jax.data.operations import build
        source, text = _json(options.source, "--source", dict), _json(options.text, "--text", list)
        tokenizer = train_tokenizer(source, options.vocab_size, model_type=options.model_type, prepare=build("text", text, "--text"))
        try:
            write_atomically(options.output, tokenizer.model)
        except OSError as error:
            raise ConfigError(f"--output {options.output} cannot be written ({error.strerror}); choose another path.") from None
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.output}: {tokenizer.vocab_size} pieces, sha256 {tokenizer.sha256}")
    return 0


def _json(value: str, name: str, kind: type) -> Any:
    try:
        parsed = json.loads(value)
    except ValueError as error:
        raise ConfigError(f"{name} is no JSON ({error}); quote it as '{{\"name\": \"shapes\"}}'.") from None
    if not isinstance(parsed, kind):
        raise ConfigError(f"{name} must be a JSON {'object' if kind is dict else 'list'}, got {value}.")
    return parsed

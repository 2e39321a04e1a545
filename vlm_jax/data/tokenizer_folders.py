"""Tokenizers of Hugging Face folders: `tokenizer.json`, else a SentencePiece model, with what tokenizer_config.json says about tokens and marks."""
from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

from vlm_jax.data.problems import problem, reason_of
from vlm_jax.data.tokenizers import MARKS, SentencePieceTokenizer, Tokenizer, added_ids, read_file
from vlm_jax.errors import ConfigError, DataError

SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")
MAX_CONFIG_BYTES = 32 * 2 ** 20
_FURTHER = ("sep_token", "cls_token", "mask_token", "image_token", "boi_token", "eoi_token")
_T5_SENTINELS = 100


def load_folder(folder: Path, extras: Mapping[str, Any] | None = None) -> Tokenizer:
    """Returns the tokenizer of a Hugging Face folder.

    `tokenizer.json` is preferred, then a SentencePiece model (`tokenizer.model`, `spiece.model`, ...), then `vocab.json` and `merges.txt` (byte pairs of
    CLIP, or of GPT-2 and OPT), then BERT's `vocab.txt`.
    Which tokens are marks and which are special is read from tokenizer_config.json, added_tokens.json and special_tokens_map.json.

    Args:
      extras: `added`, `special`, `marks` of the user, on top of the folder's.
    Raises:
      DataError: if there is no tokenizer in the folder, or one of its files is damaged.
      ConfigError: for extras that do not go with it.
    """
    from vlm_jax.data.json_tokenizer import JsonTokenizer
    folder, extras = Path(folder), dict(extras or {})
    config = read_config(folder)
    marks = {mark: _content(config.get(f"{mark}_token")) for mark in MARKS}
    marks = {**{mark: token for mark, token in marks.items() if token}, **(extras.get("marks") or {})}
    added, special = _added_tokens(folder, config)
    special += [token for token in extras.get("special", ()) if token not in special]
    users = extras.get("added", ())
    if (folder / "tokenizer.json").is_file():
        model = read_file(folder / "tokenizer.json")
        every = _joined(added, users, JsonTokenizer(model).vocab_size) if users else added
        try:
            return JsonTokenizer(model, every, special, marks, bool(config.get("clean_up_tokenization_spaces")))
        except DataError as error:
            raise problem(reason_of(error), str(error).replace("the tokenizer.json", str(folder / "tokenizer.json"))) from None
    path = next((folder / name for name in SENTENCEPIECE_FILES if (folder / name).is_file()), None)
    if path is not None:
        base = SentencePieceTokenizer(path)
        if not added and str(config.get("tokenizer_class", "")).startswith("T5"):
            count = config.get("extra_ids", _T5_SENTINELS)
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= 4096:
                raise problem("tokenizer_corrupt", f"{folder}/tokenizer_config.json: extra_ids is {count!r:.40}; it must be a small number.")
            added = {f"<extra_id_{k}>": base.pieces + count - 1 - k for k in range(count)}
            special = [*added]
        for token in [*special, *marks.values()]:
            if token not in added and base.token_id(token) is None:
                added[token] = max([base.pieces - 1, *added.values()]) + 1
        # A token of the model that the config calls special is found in texts before the model sees them, as the added ones are.
        for token in special:
            added.setdefault(token, base.token_id(token))
        return SentencePieceTokenizer(base.model, _joined(added, users, base.pieces), special, marks)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        from vlm_jax.data.byte_pair import BEGIN, ClipTokenizer
        vocabulary = read_json(folder / "vocab.json")
        if BEGIN in vocabulary:
            if users or extras:
                raise ConfigError(f"{folder}: CLIP's byte pairs take no further tokens; leave added, special and marks out.")
            return ClipTokenizer.from_files(folder)
        from vlm_jax.data.json_tokenizer import byte_level_model
        model = byte_level_model(vocabulary, _text(folder / "merges.txt"), bool(config.get("add_prefix_space")), str(folder))
        ends = {mark: "<|endoftext|>" for mark in ("bos", "eos", "unk") if "<|endoftext|>" in vocabulary}
        return JsonTokenizer(model, _joined(added, users, len(vocabulary)), special, {**ends, **marks})
    if (folder / "vocab.txt").is_file():
        from vlm_jax.data.json_tokenizer import word_piece_model
        words = _text(folder / "vocab.txt").split("\n")
        words = words[:-1] if words and not words[-1] else words
        model = word_piece_model(words, config, str(folder))
        named = {"pad": "[PAD]", "unk": "[UNK]"}
        marks = {**{mark: token for mark, token in named.items() if token in words}, **marks}
        special += [token for token in ("[CLS]", "[SEP]", "[MASK]") if token in words and token not in special]
        return JsonTokenizer(model, _joined(added, users, len(words)), special, marks, bool(config.get("clean_up_tokenization_spaces")))
    raise problem("tokenizer_missing", f"{folder}: the folder holds no tokenizer (tokenizer.json, {', '.join(SENTENCEPIECE_FILES[:2])}); "
                                       "fetch the tokenizer's files too.")


def read_config(folder: Path) -> dict[str, Any]:
    """Returns tokenizer_config.json over special_tokens_map.json; missing files are empty."""
    return {**read_json(Path(folder) / "special_tokens_map.json"), **read_json(Path(folder) / "tokenizer_config.json")}


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a small file, {} where there is no such file.

    Raises:
      DataError: if it is too large, truncated, or no JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_file(path, MAX_CONFIG_BYTES))
        json.dumps(content, ensure_ascii=False).encode()     # fails for half a character
    except (ValueError, RecursionError) as error:
        if hasattr(error, "exit_code"):
            raise
        raise problem("tokenizer_corrupt", f"{path}: it is truncated or no JSON ({' '.join(str(error).split())[:100]}); fetch it again.") from None
    if not isinstance(content, dict):
        raise problem("tokenizer_corrupt", f"{path}: it must hold a JSON object, not a {type(content).__name__}; fetch it again.")
    return content


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    """Returns ({token: id}, special tokens) of a folder's config files."""
    added, special = {}, []
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise problem("tokenizer_corrupt", f"{folder}/tokenizer_config.json: added_tokens_decoder must map ids to tokens; fetch it again.")
    for number, token in decoder.items():
        content = _content(token)
        if content is None or not (number.isascii() and number.isdigit() and len(number) < 9):
            raise problem("tokenizer_corrupt", f"{folder}/tokenizer_config.json: the added token {number!r:.20} has no name or no id; fetch it again.")
        added[content] = int(number)
        if isinstance(token, dict) and token.get("special"):
            special.append(content)
    for token, number in read_json(folder / "added_tokens.json").items():
        added.setdefault(token, number)
    added = added_ids(added, 0)
    named = config.get("additional_special_tokens") or config.get("extra_special_tokens") or ()
    named = list(named.values()) if isinstance(named, dict) else list(named) if isinstance(named, (list, tuple)) else []
    for token in [*named, *(config.get(key) for key in _FURTHER)]:
        content = _content(token)
        if content is not None and content not in special:
            special.append(content)
    return added, special


def _joined(added: dict[str, int], users: Any, first: int) -> Any:
    """Returns the folder's added tokens with the user's after them."""
    if not added:
        return users
    return {**added, **added_ids(users, max([first - 1, *added.values()]) + 1)}


def _text(path: Path) -> str:
    try:
        return read_file(path).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise problem("tokenizer_corrupt", f"{path}: it is no UTF-8 text; fetch it again.") from None


def _content(token: Any) -> str | None:
    """Returns the name of a token, which a config may give as a string or as {"content": ...}."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None

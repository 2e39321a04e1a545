"""Tokenizers of Hugging Face folders."""
import json

import pytest

from tests.data.tokenizer_samples import byte_level, gemma_model, odd_strings, sentencepiece_model
from vlm_jax.data.tokenizer_folders import load_folder
from vlm_jax.data.tokenizers import SentencePieceTokenizer, load_tokenizer
from vlm_jax.errors import ConfigError, DataError


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        name = name.replace("__", ".")
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def test_tokenizer_json_with_its_config(tmp_path):
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
              "pad_token": "<|pad|>", "extra_special_tokens": ["<image>"]}
    folder = write(tmp_path / "model", tokenizer__json=byte_level().to_str().encode(), tokenizer_config__json=config)
    ours, theirs = load_tokenizer(str(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.eos_id, ours.pad_id, ours.token_id("<image>"), ours.bos_id) == (theirs.eos_token_id, theirs.pad_token_id,
                                                                               theirs.convert_tokens_to_ids("<image>"), None)
    for text in [*odd_strings(300, seed=2), "x <image> y<|pad|>"]:
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"] and ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_what_transformers_writes_is_read(tmp_path):
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|endoftext|>", pad_token="<pad>")  # noqa: S106
    theirs.add_tokens(["<loc0000>", "<loc0001>"])
    theirs.save_pretrained(tmp_path)
    ours = load_folder(tmp_path)
    text = "a red circle <loc0001><loc0000>"
    assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"] and ours.vocab_size == len(theirs)
    assert ours.decode(ours.encode(text)) == text and ours.pad_id == theirs.pad_token_id


@pytest.mark.parametrize("name", ["tokenizer.model", "spiece.model"])
def test_a_sentencepiece_model_with_its_config(tmp_path, name):
    model = gemma_model()
    base = SentencePieceTokenizer(model)
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
              "added_tokens_decoder": {str(base.pieces + 1): {"content": "<image>", "special": True}, "2": {"content": "<s>", "special": True}}}
    folder = write(tmp_path / "model", **{name.replace(".", "__"): model}, tokenizer_config__json=config, special_tokens_map__json={"bos_token": "?"})
    tokenizer = load_tokenizer({"path": str(folder), "added": ["<loc0000..0009>"]})
    assert tokenizer.bos_id == 2 and tokenizer.token_id("<image>") == base.pieces + 1 and tokenizer.token_id("<loc0000>") == base.pieces + 2
    assert tokenizer.vocab_size == base.pieces + 12
    ids = tokenizer.encode("<s><image>a red\n<loc0009>")
    assert ids[:2] == [2, base.pieces + 1] and ids[-1] == base.pieces + 11 and tokenizer.decode(ids) == "a red\n<loc0009>"
    with pytest.raises(DataError, match="between the"):
        tokenizer.decode([base.pieces])
    assert load_tokenizer(tokenizer.to_dict()).encode("<s><image>a red\n<loc0009>") == ids


def test_t5_sentinels_count_down_from_the_end(tmp_path):
    folder = write(tmp_path / "model", spiece__model=sentencepiece_model(), tokenizer_config__json={"tokenizer_class": "T5Tokenizer", "extra_ids": 5})
    tokenizer = load_folder(folder)
    assert tokenizer.token_id("<extra_id_0>") == tokenizer.vocab_size - 1 and tokenizer.token_id("<extra_id_4>") == tokenizer.pieces


def test_errors(tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer") as error:
        load_tokenizer(str(write(tmp_path / "empty")))
    assert error.value.reason == "tokenizer_missing"
    model = gemma_model()
    for content, message in ((b"{\"eos", "truncated or no JSON"), (b"[]", "must hold a JSON object"), ({"added_tokens_decoder": []}, None),
                             ({"added_tokens_decoder": {"x": {"content": "a"}}}, "no name or no id"), ({"added_tokens_decoder": {"3": {}}}, "no name"),
                             ({"added_tokens_decoder": [1]}, "must map"), ({"tokenizer_class": "T5Tokenizer", "extra_ids": 10 ** 9}, "extra_ids"),
                             ({"added_tokens_decoder": {"9": "a", "09": "b"}}, "share ids")):
        folder = write(tmp_path / "damaged", tokenizer__model=model, tokenizer_config__json=content)
        if message is None:
            assert load_folder(folder).vocab_size
            continue
        with pytest.raises(DataError, match=message):
            load_folder(folder)
    folder = write(tmp_path / "clip", vocab__json=b"{}", merges__txt=b"")
    with pytest.raises(ConfigError, match="no further tokens"):
        load_tokenizer({"path": str(folder), "added": ["x"]})
    (tmp_path / "clip" / "vocab.json").write_bytes(b" " * 10)
    with pytest.raises(DataError, match="no JSON"):
        load_folder(folder)

"""Tokenizers of Hugging Face folders."""
import json
import random

import pytest

from tests.data.tokenizer_samples import byte_level, gemma_model, odd_strings, sentencepiece_model, word_piece
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


def test_vocabularies_without_a_tokenizer_json(tmp_path):
    pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    for name, trained, kind in (("gpt2", byte_level(), "GPT2Tokenizer"), ("bert", word_piece(), "BertTokenizer")):
        folder = tmp_path / name
        folder.mkdir()
        model = json.loads(trained.to_str())["model"]
        if name == "gpt2":
            (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
            (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]))
            theirs = getattr(transformers, kind)(str(folder / "vocab.json"), str(folder / "merges.txt"))
        else:
            (folder / "vocab.txt").write_text("\n".join(sorted(model["vocab"], key=model["vocab"].get)) + "\n")
            theirs = getattr(transformers, kind)(str(folder / "vocab.txt"))
        ours = load_folder(folder)
        assert len(theirs) == ours.vocab_size and ours.unk_id == theirs.unk_token_id and ours.eos_id == theirs.eos_token_id
        for text in odd_strings(400, seed=5):
            ids = ours.encode(text)
            assert ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)
        assert load_tokenizer(ours.to_dict()).encode("a red circle") == ours.encode("a red circle")
    (tmp_path / "gpt2" / "merges.txt").write_text("a b c\n")
    with pytest.raises(DataError, match="gives no piece"):
        load_folder(tmp_path / "gpt2")
    (tmp_path / "bert" / "vocab.txt").write_text("a\na\n")
    with pytest.raises(DataError, match="every word once"):
        load_folder(tmp_path / "bert")


def test_mutated_configs_are_clear_errors(tmp_path):
    rng, model = random.Random(0), gemma_model()
    base = SentencePieceTokenizer(model).pieces
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>", "additional_special_tokens": ["<a>"], "extra_ids": 5,
              "added_tokens_decoder": {str(base): {"content": "<image>", "special": True}, "2": {"content": "<s>", "special": True}}}
    values = (None, 3, -1, 10 ** 9, 1.5, True, "", "x", [], {}, [1], {"a": 1}, "\ud800", {"content": 5}, [[["a"]]], "</s>")

    def mutated(value):
        if isinstance(value, dict) and value and rng.random() < 0.7:
            key = rng.choice(list(value))
            return {**value, key: mutated(value[key])} if rng.random() < 0.8 else {**value, rng.choice(("-5", "x", "999999999", "1e5", "٣")): value[key]}
        return rng.choice(values)
    outcomes = [0, 0]
    for _ in range(200):
        text = json.dumps(mutated(mutated(config)))
        if rng.random() < 0.3:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(("", "{", '"', "9" * 30, "[" * 3000)) + text[at + rng.randrange(3):]
        folder = write(tmp_path / "model", tokenizer__model=model, tokenizer_config__json=text.encode())
        write(folder, added_tokens__json={"<z>": base + 1} if rng.random() < 0.8 else mutated({"<z>": base + 1}))
        try:
            tokenizer = load_folder(folder)
            tokenizer.decode(tokenizer.encode("a red <image> 🦊"))
            outcomes[0] += 1
        except DataError as error:
            assert error.reason.startswith("tokenizer_") and "\n" not in str(error) and len(str(error)) < 500
            outcomes[1] += 1
    assert min(outcomes) > 20, outcomes


def test_errors(tmp_path):
    with pytest.raises(DataError, match="holds no tokenizer") as error:
        load_tokenizer(str(write(tmp_path / "empty")))
    assert error.value.reason == "tokenizer_missing"
    model = gemma_model()
    for content, message in ((b"{\"eos", "truncated or no JSON"), (b"[]", "must hold a JSON object"), ({"added_tokens_decoder": []}, None),
                             ({"added_tokens_decoder": {"x": {"content": "a"}}}, "no name or no id"), ({"added_tokens_decoder": {"3": {}}}, "no name"),
                             ({"added_tokens_decoder": [1]}, "must map"), ({"tokenizer_class": "T5Tokenizer", "extra_ids": 10 ** 9}, "extra_ids"),
                             ({"added_tokens_decoder": {"9": "a", "09": "b"}}, "share ids"), ({"bos_token": 3, "extra_special_tokens": [3, {}]}, None)):
        folder = write(tmp_path / "damaged", tokenizer__model=model, tokenizer_config__json=content)
        if message is None:
            assert load_folder(folder).vocab_size
            continue
        with pytest.raises(DataError, match=message):
            load_folder(folder)
    folder = write(tmp_path / "clip", vocab__json={"<|startoftext|>": 0}, merges__txt=b"")
    with pytest.raises(ConfigError, match="no further tokens"):
        load_tokenizer({"path": str(folder), "added": ["x"]})
    (tmp_path / "clip" / "vocab.json").write_bytes(b" " * 10)
    with pytest.raises(DataError, match="no JSON"):
        load_folder(folder)

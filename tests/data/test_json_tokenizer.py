"""tokenizer.json equals transformers on odd strings; damage is a clear error."""
import json
import pickle
import random

import pytest

pytest.importorskip("tokenizers")

from tests.data.tokenizer_samples import byte_level, metaspace, odd_strings, word_piece
from vlm_jax.data.json_tokenizer import JsonTokenizer
from vlm_jax.data.tokenizers import check_vocabulary, load_tokenizer
from vlm_jax.errors import ConfigError, DataError

MAKERS = {"byte_level": byte_level, "metaspace": metaspace, "word_piece": word_piece}
MARKS = {"byte_level": {"eos": "<|endoftext|>", "bos": "<|endoftext|>"}, "metaspace": {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"},
         "word_piece": {"pad": "[PAD]", "unk": "[UNK]"}}


@pytest.fixture(scope="module")
def models():
    return {name: make().to_str().encode() for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_equals_transformers_on_odd_strings(models, name, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "tokenizer.json"
    path.write_bytes(models[name])
    clean = name == "word_piece"
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=clean,
                                                  **{f"{mark}_token": token for mark, token in MARKS[name].items()})
    ours = JsonTokenizer(path, marks=MARKS[name], clean_up=clean)
    for text in odd_strings(2500):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)
        assert ours.decode(ids, skip_special=False) == theirs.decode(ids), repr(text)
    assert (ours.eos_id, ours.pad_id, ours.vocab_size) == (theirs.eos_token_id, theirs.pad_token_id, len(theirs))


def test_bytes_come_back(models):
    tokenizer = JsonTokenizer(models["byte_level"])
    for text in odd_strings(400, seed=1):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert tokenizer.decode(tokenizer.encode("a<|user|>b")) == "ab"


def test_it_travels_as_data(models):
    tokenizer = JsonTokenizer(models["byte_level"], added=["<loc0000..0003>", "<pad>"], special=["<pad>"], marks={"pad": "<pad>"})
    first = JsonTokenizer(models["byte_level"]).vocab_size
    assert tokenizer.vocab_size == first + 5 and tokenizer.token_id("<loc0002>") == first + 2 and tokenizer.pad_id == first + 4
    ids = tokenizer.encode("a <loc0003><loc0000> b")
    for copy in (load_tokenizer(json.loads(json.dumps(tokenizer.to_dict()))), pickle.loads(pickle.dumps(tokenizer))):  # noqa: S301  (our own bytes)
        assert copy.encode("a <loc0003><loc0000> b") == ids and copy.vocab_size == tokenizer.vocab_size and copy.pad_id == tokenizer.pad_id
        assert copy.decode([*ids, copy.pad_id]) == "a <loc0003><loc0000> b" and copy.piece(first) == "<loc0000>"


def test_a_missing_mark_is_added(models):
    tokenizer = JsonTokenizer(models["byte_level"], marks={"pad": "<|pad|>"})
    assert tokenizer.pad_id == tokenizer.vocab_size - 1 and tokenizer.decode([tokenizer.pad_id]) == ""


def test_truncation_and_padding_of_the_file_are_switched_off(models):
    tokenizer = byte_level()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=9)
    assert JsonTokenizer(tokenizer.to_str().encode()).encode("a small red circle") == JsonTokenizer(models["byte_level"]).encode("a small red circle")


def test_errors(models, tmp_path):
    model = models["byte_level"]
    for data, message in ((model[:-40], "truncated or no JSON"), (b"[1]", "no model of a tokenizer"), (b"{\"model\": {}}", "no tokenizer of"),
                          (b"\xff\xfe", "no JSON"), (b"[" * 100_000, "JSON|nested"), (b"", "no JSON")):
        with pytest.raises(DataError, match=message) as error:
            JsonTokenizer(data)
        assert error.value.reason == "tokenizer_corrupt" and "\n" not in str(error.value)
    with pytest.raises(DataError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "tokenizer.json")
    tokenizer = JsonTokenizer(model)
    with pytest.raises(DataError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(DataError, match="half a character"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ConfigError, match="has the token '<|user|>' already".replace("|", r"\|")):
        JsonTokenizer(model, added=["<|user|>"])
    with pytest.raises(ConfigError, match="marks.end is unknown"):
        JsonTokenizer(model, marks={"end": "<|endoftext|>"})
    with pytest.raises(DataError, match="do not belong together"):
        JsonTokenizer(model, added={"<new>": 9000})
    path = tmp_path / "tokenizer.json"
    path.write_bytes(model)
    with pytest.raises(ConfigError, match=f"tokenizer.json: it has {tokenizer.vocab_size} tokens, the model's vocabulary 300; "):
        load_tokenizer(path, vocab_size=300)
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    with pytest.raises(DataError, match="SHA-256"):
        load_tokenizer({"path": str(path), "sha256": "0" * 64})


def test_damaged_files_are_clear_errors(models):
    rng, model, good = random.Random(0), models["metaspace"], 0
    for _ in range(150):
        data = bytearray(model)
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(data))
            data[at:at + rng.choice([0, 1, 1, 9])] = rng.choice([b"", b"\xff", b"-", b"9999999999", b"{", bytes([rng.randrange(256)])])
        try:
            tokenizer = JsonTokenizer(bytes(data))
            tokenizer.decode(tokenizer.encode("a small red circle"))
            good += 1
        except DataError as error:
            assert error.reason in ("tokenizer_corrupt", "tokenizer_empty") and len(str(error)) < 600
    assert good < 150

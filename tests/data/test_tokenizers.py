"""SentencePiece and CLIP tokenizers: loading, training, caching, damage."""
import copy
import json
import os
import random
import stat
import subprocess
import sys

import numpy as np
import pytest

from vlm_jax.data import tokenizer_training
from vlm_jax.data.byte_pair import BEGIN, END, ClipTokenizer, byte_letters, split_words
from vlm_jax.data.tokenizer_training import captions_of, main, train_sentencepiece, train_tokenizer
from vlm_jax.data.tokenizers import SentencePieceTokenizer, load_tokenizer
from vlm_jax.errors import ConfigError, DataError

CAPTIONS = [f"a {size} {color} {shape}" for size in ("small", "large", "tiny") for color in ("red", "blue", "green", "yellow")
            for shape in ("circle", "square", "star", "Dreieck", "月")]


class Captions:
    """A source of two captions a record."""

    def __init__(self, captions=CAPTIONS):
        self.captions = captions

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, i):
        return {"texts": [self.captions[i], self.captions[i].upper()], "image": b""}


class Pictureless(Captions):
    def texts_at(self, i):
        if i == 3:
            raise DataError("record 3 is broken")
        return [self.captions[i], None, " "]

    def __getitem__(self, i):
        raise AssertionError("the image was asked for")


@pytest.fixture(scope="module")
def model():
    return train_sentencepiece(CAPTIONS, 330)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_loads_from_bytes_and_path(model, tmp_path):
    path = tmp_path / "x.model"
    path.write_bytes(model)
    for tokenizer in (SentencePieceTokenizer(model), SentencePieceTokenizer(path), load_tokenizer(str(path)), load_tokenizer({"path": str(path)}),
                      load_tokenizer(SentencePieceTokenizer(model).to_dict()), copy.deepcopy(SentencePieceTokenizer(model))):
        assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.bos_id) == (0, 1, 2, None)
        assert 259 < tokenizer.vocab_size <= 330
        ids = tokenizer.encode("a small red circle")
        assert all(isinstance(number, int) and 2 < number < tokenizer.vocab_size for number in ids) and len(ids) < 18
        assert tokenizer.decode([*ids, 1, 0, 0]) == "a small red circle"
        assert tokenizer.encode_batch(["a small red circle", "月"]) == [ids, tokenizer.encode("月")]
        assert tokenizer.sha256 == SentencePieceTokenizer(model).sha256
    assert tokenizer.piece(1) == "</s>"


@pytest.mark.parametrize("value", ["naïve ☃ 🦊", "日本語", "שלום عالم", "ab\u0000cd", "zzz"])
def test_bytes_spell_what_has_no_piece(model, value):
    tokenizer = SentencePieceTokenizer(model)
    ids = tokenizer.encode(value)
    assert ids and tokenizer.unk_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == value.replace(" ", "")


def test_ids_outside_the_vocabulary_are_an_error(model):
    tokenizer = SentencePieceTokenizer(model)
    for ids in ([tokenizer.vocab_size], [-1], np.array([3, 10 ** 6])):
        with pytest.raises(DataError, match="outside the vocabulary") as error:
            tokenizer.decode(ids)
        assert error.value.reason == "token_out_of_vocabulary"


def test_what_is_no_model_is_an_error(model, tmp_path):
    with pytest.raises(DataError, match="no pieces"):
        SentencePieceTokenizer(b"")
    for data in (b"hello", model[:1000], b"\0" * 50):
        with pytest.raises(DataError, match="SentencePiece model") as error:
            SentencePieceTokenizer(data)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="no such tokenizer file"):
        SentencePieceTokenizer(tmp_path / "none.model")
    with pytest.raises(DataError, match="cannot be read"):
        SentencePieceTokenizer(tmp_path)


FUZZ = """
import random, sys
from vlm_jax.data.tokenizers import SentencePieceTokenizer
from vlm_jax.errors import DataError
model, rng, outcomes = open(sys.argv[1], "rb").read(), random.Random(0), [0, 0]
for i in range(400):
    data = bytearray(model)
    for _ in range(rng.randrange(1, 6)):
        at = rng.randrange(5000 if i % 2 else len(data))        # half of them among the pieces, at the front
        data[at:at + rng.choice([0, 1, 1, 9])] = rng.choice([b"", b"\\xff", bytes([rng.randrange(256)])])
    try:
        tokenizer = SentencePieceTokenizer(bytes(data))
        ids = tokenizer.encode("a small red circle")
        assert all(0 <= number < tokenizer.vocab_size for number in ids)
        outcomes[0] += 1
    except DataError as error:
        assert error.reason in ("tokenizer_corrupt", "tokenizer_empty")
        outcomes[1] += 1
print(*outcomes)
"""


def test_damaged_models_load_or_raise(model, tmp_path):
    """In a process of its own: what is at stake is a crash."""
    path = tmp_path / "x.model"
    path.write_bytes(model)
    result = subprocess.run([sys.executable, "-c", FUZZ, str(path)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    good, bad = map(int, result.stdout.split())
    assert good + bad == 400 and bad > 50


def test_settings_of_a_tokenizer(model, tmp_path):
    path = tmp_path / "x.model"
    path.write_bytes(model)
    assert load_tokenizer({"path": str(path), "sha256": SentencePieceTokenizer(model).sha256}).vocab_size > 259
    with pytest.raises(DataError, match="SHA-256"):
        load_tokenizer({"path": str(path), "sha256": "0" * 64})
    for settings, message in (({}, "exactly one of"), ({"path": "x", "clip": "y"}, "exactly one of"),
                              ({"path": str(path), "sha265": ""}, "Did you mean"), ({"train_on": {"name": "x"}}, "vocab_size is missing"),
                              ({"train_on": {}, "vocab_sise": 3}, "Did you mean")):
        with pytest.raises(ConfigError, match=message):
            load_tokenizer(settings)
    with pytest.raises(DataError, match="base64"):
        load_tokenizer({"sentencepiece": "*"})


def test_training_is_deterministic_and_bounded(model):
    assert train_sentencepiece(iter(CAPTIONS), 330) == model
    assert SentencePieceTokenizer(train_sentencepiece(CAPTIONS, 50_000)).vocab_size < 1000
    assert SentencePieceTokenizer(train_sentencepiece(CAPTIONS, 50_000, model_type="bpe")).vocab_size < 1000
    with pytest.raises(ConfigError, match=r"vocab_size=100 is too small: .* alone need \d+; raise it"):
        train_sentencepiece(CAPTIONS, 100)
    for settings, message in ((dict(vocab_size=0), "positive number"), (dict(vocab_size=300, model_type="word2vec"), "unknown"),
                              (dict(vocab_size=300, character_coverage=0.1), "coverage")):
        with pytest.raises(ConfigError, match=message):
            train_sentencepiece(CAPTIONS, **settings)
    with pytest.raises(DataError, match="no captions"):
        train_sentencepiece([], 300)


def test_captions_of_a_source():
    assert captions_of(Captions(["A  b\n", "\0"])) == ["A b", "A B"]
    assert captions_of(Captions(["A b", "C"]), [lambda text, rng: text.lower()]) == ["a b", "a b", "c", "c"]
    assert captions_of(Pictureless()) == CAPTIONS[:3] + CAPTIONS[4:]
    assert captions_of(Captions(), max_captions=10) == [text for i in range(0, 60, 6) for text in (CAPTIONS[i], CAPTIONS[i].upper())][:10]


def test_the_cache_holds_what_was_trained(cache, monkeypatch):
    first = train_tokenizer(Captions(), 330)
    files = list((cache / "tokenizers").iterdir())
    assert len(files) == 1 and stat.S_IMODE(os.stat(cache).st_mode) == 0o700
    monkeypatch.setattr(tokenizer_training, "train_sentencepiece", lambda *a, **k: pytest.fail("trained again"))
    assert train_tokenizer(Captions(), 330).sha256 == first.sha256
    monkeypatch.undo()
    monkeypatch.setenv("VLM_JAX_CACHE", str(cache))
    assert train_tokenizer(Captions(), 300).sha256 != first.sha256
    assert train_tokenizer(Captions(CAPTIONS[:-1]), 330).sha256 != first.sha256
    assert len(list((cache / "tokenizers").iterdir())) == 3
    content = json.loads(files[0].read_bytes())
    for damage in (b"", b"{", json.dumps({**content, "sha256": "0"}).encode(), b"[]"):
        files[0].write_bytes(damage)
        assert train_tokenizer(Captions(), 330).sha256 == first.sha256
        assert json.loads(files[0].read_bytes()) == content


def test_an_unwritable_cache_is_no_obstacle(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / "file"))
    assert train_tokenizer(Captions(), 330).vocab_size > 259
    assert "not cached" in caplog.text


def test_the_command(cache, tmp_path, monkeypatch, capsys):
    from vlm_jax.data import sources
    monkeypatch.setattr(sources, "build_source", lambda settings: Captions())
    output = tmp_path / "new" / "x.model"
    arguments = ["train", "--source", '{"name": "x"}', "--vocab_size", "330", "--output", str(output), "--text", '[["lowercase"]]']
    assert main(arguments) == 0
    assert SentencePieceTokenizer(output).sha256 in capsys.readouterr().out
    assert SentencePieceTokenizer(output).sha256 == train_tokenizer(Captions([text.lower() for text in CAPTIONS]), 330,
                                                                    prepare=[lambda text, rng: text.lower()]).sha256
    (tmp_path / "file").write_text("")
    for change, code in ((["--source", "{"], 78), (["--source", "[]"], 78), (["--vocab_size", "3"], 78), (["--text", '["lowercas"]'], 78),
                         (["--output", str(tmp_path / "file" / "x.model")], 78)):
        assert main([*arguments, *change]) == code
        message = capsys.readouterr().err
        assert message.startswith("error: ") and message.count("\n") == 1


def test_the_module_runs_as_a_program():
    result = subprocess.run([sys.executable, "-m", "vlm_jax.data.tokenizers", "train", "--source", "{", "--vocab_size", "9", "--output", "x"],
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 78 and result.stderr.startswith("error: --source is no JSON")


# CLIP's byte pairs

def make_byte_pairs(words, count):
    """A vocabulary as CLIP's is laid out, with merges learned naively from `words`."""
    letters = byte_letters()
    order = sorted(letters)
    pieces = order + [letter + "</w>" for letter in order]
    split = [[letters[byte] for byte in word.encode()] for word in words]
    split = [[*word[:-1], word[-1] + "</w>"] for word in split]
    merges = []
    while len(merges) < count:
        pairs = {}
        for word in split:
            for pair in zip(word, word[1:]):
                pairs[pair] = pairs.get(pair, 0) + 1
        if not pairs:
            break
        best = max(sorted(pairs), key=pairs.get)
        merges.append(best)
        for word in split:
            i = 0
            while i + 1 < len(word):
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = ["".join(best)]
                i += 1
    pieces += ["".join(pair) for pair in merges] + [BEGIN, END]
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, merges


@pytest.fixture(scope="module")
def byte_pairs():
    words = [word for caption in CAPTIONS for word in split_words(caption.lower())]
    words += ["don't", "naïve", "日本", "photo", "photograph", "the", "then", "aaaa"]
    return make_byte_pairs(words, 150)


@pytest.fixture
def clip_folder(byte_pairs, tmp_path):
    vocabulary, merges = byte_pairs
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return tmp_path


def test_clip_tokens_match_transformers(byte_pairs, clip_folder):
    from transformers.models.clip.tokenization_clip import CLIPTokenizer
    reference = CLIPTokenizer(vocab=byte_pairs[0], merges=list(byte_pairs[1]))
    ours = load_tokenizer({"clip": str(clip_folder)})
    rng = random.Random(0)
    alphabet = list("abcdeéßİΣς .,'’!?-_/&#012٣²Ⅷ日本語한국어ไทย\u0301\t\n\u00a0\u2003\u200b\u200d🦊👩🏽") + ["'s", "n't", "'LL", " the ", "photo"]
    texts = CAPTIONS + ["", "Don't you'RE it's 'quoted' !'s", "aaaaaaa", "123 4th", "a photo of a cat.", "e\u0301 \u1e9b\u0323", "Ａ ﬁ"]
    texts += ["\x1c x\x85y"] + ["".join(rng.choice(alphabet) for _ in range(rng.randrange(25))) for _ in range(3000)]
    expected = reference(texts)["input_ids"]
    for text, ids in zip(texts, expected):
        assert [ours.bos_id, *ours.encode(text), ours.eos_id] == ids, text


def test_clip_decodes(clip_folder):
    tokenizer = ClipTokenizer.from_files(clip_folder)
    ids = tokenizer.encode("A small RED circle, isn't it? 日本 🦊")
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, 5, 6]) == "a small red circle , isn 't it ? 日本 🦊"
    with pytest.raises(DataError, match="outside the vocabulary"):
        tokenizer.decode([10 ** 6])


def test_marks_in_a_caption_are_text(clip_folder):
    tokenizer = ClipTokenizer.from_files(clip_folder)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(f"{BEGIN} a {END}"))


def test_clip_round_trip(clip_folder):
    tokenizer = ClipTokenizer.from_files(clip_folder)
    for again in (load_tokenizer(json.loads(json.dumps(tokenizer.to_dict()))), copy.deepcopy(tokenizer)):
        assert again.sha256 == tokenizer.sha256
        assert again.encode_batch(CAPTIONS) == tokenizer.encode_batch(CAPTIONS)


def test_clip_files_are_checked(clip_folder):
    def broken(name, content, message):
        path = clip_folder / name
        good = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            ClipTokenizer.from_files(clip_folder)
        path.write_bytes(good)
    broken("vocab.json", b"{", "no JSON")
    broken("vocab.json", b"[1]", "must map pieces")
    broken("vocab.json", b'{"a": 0, "b": 2}', "ids 0, 1, 2")
    broken("vocab.json", b'{"a": 0, "b": 1}', "ids 0, 1, 2")
    broken("merges.txt", b"q x\n", "gives no piece")
    broken("merges.txt", b"\xff\xfe", "UTF-8")
    (clip_folder / "merges.txt").unlink()
    with pytest.raises(DataError, match="no such tokenizer file"):
        ClipTokenizer.from_files(clip_folder)
    with pytest.raises(DataError, match="lack pieces"):
        load_tokenizer({"byte_pairs": {}})


def test_byte_letters():
    letters = byte_letters()
    assert len(set(letters)) == 256 and letters[ord("a")] == "a" and letters[0] == "Ā" and letters[32] == "Ġ" and letters[173] == "Ń"

"""Tokens of our own beyond a SentencePiece model's."""
import pickle

from hypothesis import given, strategies as st
import pytest

from tests.data.tokenizer_samples import WORDS, gemma_model, odd_strings, sentencepiece_model
from vlm_jax.data.tokenizers import SentencePieceTokenizer, expand_tokens, load_tokenizer
from vlm_jax.errors import ConfigError, DataError

ADDED = ["<loc0000..1023>", "<seg000..127>", "<extra_id_99..0>", "<loc", "\n"]
GEMMA = SentencePieceTokenizer(gemma_model(), added=["<loc0000..1023>", "<extra_id_99..0>"])
PLAIN = SentencePieceTokenizer(sentencepiece_model(), added=ADDED, special=["<seg000>"])


def test_ranges():
    assert expand_tokens(["<loc0008..0011>"]) == ["<loc0008>", "<loc0009>", "<loc0010>", "<loc0011>"]
    assert expand_tokens(["<x_2..0>", "a..b", "v1.5"]) == ["<x_2>", "<x_1>", "<x_0>", "a..b", "v1.5"]
    assert expand_tokens(["<x8..10>"]) == ["<x8>", "<x9>", "<x10>"]
    for wrong in (["a", "a"], [""], [3], "abc", ["<a0..9>", "<a5>"], ["<a0..9999999>"], ["<a0..65536>"], [f"<{i}_0..9999>" for i in range(9)]):
        with pytest.raises(ConfigError, match="tokenizer.added"):
            expand_tokens(wrong)


def test_ids_follow_the_model():
    assert PLAIN.token_id("<loc0000>") == PLAIN.pieces and PLAIN.token_id("<seg000>") == PLAIN.pieces + 1024
    assert PLAIN.token_id("<extra_id_0>") == PLAIN.pieces + 1024 + 128 + 99 and PLAIN.vocab_size == PLAIN.pieces + 1024 + 128 + 102
    assert PLAIN.piece(PLAIN.pieces + 5) == "<loc0005>" and PLAIN.token_id("<loc9999>") is None and PLAIN.token_id("</s>") == 1


def test_added_tokens_come_before_everything_and_the_longest_first():
    start = PLAIN.token_id("<loc0000>")
    plain = SentencePieceTokenizer(PLAIN.model)
    assert PLAIN.encode("<loc0003><loc0004> red") == [start + 3, start + 4, *plain.encode("red")]
    assert PLAIN.encode("<loc00") == [PLAIN.token_id("<loc"), *plain.encode("00")]
    assert PLAIN.decode(PLAIN.encode("<loc0003><loc0004> red circle")) == "<loc0003><loc0004> red circle"
    assert PLAIN.decode([PLAIN.token_id("<seg000>"), 1]) == "" and PLAIN.decode([PLAIN.token_id("<seg000>"), 1], skip_special=False) == "<seg000></s>"


@pytest.mark.parametrize("make", [lambda: sentencepiece_model("unigram"), lambda: sentencepiece_model("bpe"), gemma_model])
def test_equals_the_library_without_added_tokens(make):
    model = make()
    ours, with_added = SentencePieceTokenizer(model), SentencePieceTokenizer(model, added=["<extra_id_0>"])
    import sentencepiece
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in odd_strings(2500, seed=3):
        assert ours.encode(text) == theirs.encode(text)
        if "<extra_id_0>" not in text:
            assert with_added.encode(text) == ours.encode(text) and with_added.decode(ours.encode(text)) == ours.decode(ours.encode(text))


@given(st.lists(st.one_of(st.sampled_from([*WORDS, "<loc0000>", "<loc1023>", "<extra_id_7>", " ", "\n"]), st.text(max_size=8)), max_size=8))
def test_decode_inverts_encode_where_nothing_is_normalised(parts):
    text = "".join(parts).replace("\u2581", "").encode("utf-8", "ignore").decode()
    for mark in ("<pad>", "</s>", "<s>", "<unk>", "<0x"):
        text = text.replace(mark, "")
    assert GEMMA.decode(GEMMA.encode(text)) == text


@given(st.lists(st.sampled_from([*WORDS, "<loc0000>", "<seg001>", "<extra_id_7>", " ", "\n", "red"]), max_size=8))
def test_decoded_text_encodes_to_the_same_ids(parts):
    text = PLAIN.decode(PLAIN.encode("".join(parts)))
    assert PLAIN.decode(PLAIN.encode(text)) == text


def test_it_travels_as_data():
    for copy in (load_tokenizer(PLAIN.to_dict()), pickle.loads(pickle.dumps(PLAIN))):  # noqa: S301  (our own bytes)
        assert copy.vocab_size == PLAIN.vocab_size and copy.encode("a <loc0007>") == PLAIN.encode("a <loc0007>")
        assert copy.decode([copy.token_id("<seg000>")]) == ""
    assert set(SentencePieceTokenizer(PLAIN.model).to_dict()) == {"sentencepiece", "sha256"}


def test_half_a_character_is_an_error():
    for tokenizer in (PLAIN, SentencePieceTokenizer(PLAIN.model)):
        with pytest.raises(DataError, match="half a character") as error:
            tokenizer.encode("a\ud800")
        assert error.value.reason == "caption_not_text" and tokenizer.token_id("\ud800") is None
    for settings in (dict(added=["\ud800"]), dict(marks={"eos": "\ud800"})):
        with pytest.raises(ConfigError, match="half a character"):
            SentencePieceTokenizer(PLAIN.model, **settings)


def test_marks():
    tokenizer = SentencePieceTokenizer(PLAIN.model, added=["<|end|>"], marks={"eos": "<|end|>"})
    assert tokenizer.eos_id == tokenizer.pieces and tokenizer.decode([tokenizer.eos_id]) == ""
    for settings, message in ((dict(marks={"eos": "no"}), "no token 'no'"), (dict(marks={"stop": "</s>"}), "unknown"),
                              (dict(special=["x"]), "not among the added"), (dict(clean_up=True), "takes no such setting")):
        with pytest.raises(ConfigError, match=message):
            load_tokenizer({**SentencePieceTokenizer(PLAIN.model).to_dict(), **settings})
    with pytest.raises(DataError, match="cannot be"):
        SentencePieceTokenizer(PLAIN.model, added={"<a>": -1})


def test_training_with_added_tokens(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path))
    tokenizer = load_tokenizer({"train_on": {"name": "shapes", "count": 50, "size": 8}, "vocab_size": 320, "added": ["<loc0000..1023>"]})
    assert tokenizer.vocab_size == tokenizer.pieces + 1024 and tokenizer.token_id("<loc1023>") == tokenizer.vocab_size - 1

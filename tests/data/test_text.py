"""Text operations and the making of fixed-length tokens."""
from hypothesis import given, strategies
import numpy as np
import pytest

from vlm_jax.data import text
from vlm_jax.data.operations import apply, build
from vlm_jax.data.tokenizer_training import train_sentencepiece
from vlm_jax.errors import ConfigError, DataError


class Letters:
    """A tokenizer of lower-case letters: a is 3, b is 4, ..."""
    vocab_size, pad_id, bos_id, eos_id, unk_id = 29, 0, 1, 2, None

    def encode(self, value):
        return [ord(letter) - ord("a") + 3 for letter in value if letter != " "]

    def to_dict(self):
        return {}


def tokenize(value, **settings):
    settings = {"tokenizer": Letters(), "length": 5, **settings}
    return text.Tokenize(**settings)(value).tolist()


def test_simple_operations():
    assert text.Lowercase()("ÄÖ Straße ΣΑΣ") == "äö straße σας"
    assert text.Strip()(" \t a b\n") == "a b"
    assert text.NFKC()("ﬁＡ①e\u0301") == "fiA1é"
    assert text.Prompt("a photo of {}.")("a {} cat") == "a photo of a {} cat."


@pytest.mark.parametrize("value, expected", [
    ("A Red-Circle,  on   a BLUE square!", "a redcircle on a blue square"), ("  e-mail: x_y@z.org ", "email xyzorg"), ("¿Qué? — «Ça»", "¿qué — «ça»"),
    ("tab\there\u00a0nbsp\u3000wide", "tab here nbsp wide"), ("!!!", ""), ("İstanbul", "i̇stanbul")])
def test_canonicalize(value, expected):
    assert text.Canonicalize()(value) == expected


@pytest.fixture(scope="module")
def siglip_canonicalize():
    from transformers.models.siglip.tokenization_siglip import SiglipTokenizer
    tokenizer = SiglipTokenizer.__new__(SiglipTokenizer)        # the method needs no vocabulary, which no machine here has
    tokenizer.__dict__["do_lower_case"] = True
    return lambda value: SiglipTokenizer.canonicalize_text(tokenizer, value)


@given(value=strategies.text(max_size=9) | strategies.text(alphabet="aB _-'\"!?.,:#@(){}[]\\|`~^<>=+*/&$\t\n\r\x1c\x85\u00a0\u2003ÉßΣ", max_size=40))
def test_canonicalize_matches_transformers(siglip_canonicalize, value):
    assert text.Canonicalize()(value) == siglip_canonicalize(value)


@pytest.mark.parametrize("eos, short, exact, long", [
    ("none", [3, 4, 0, 0, 0], [3, 4, 5, 6, 7], [3, 4, 5, 6, 7]),
    ("append", [3, 4, 2, 0, 0], [3, 4, 5, 6, 7], [3, 4, 5, 6, 7]),
    ("sticky", [3, 4, 2, 0, 0], [3, 4, 5, 6, 2], [3, 4, 5, 6, 2])])
def test_end_marks(eos, short, exact, long):
    assert tokenize("ab", eos=eos) == short
    assert tokenize("abcde", eos=eos) == exact
    assert tokenize("abcdefgh", eos=eos) == long


def test_begin_mark_and_padding():
    assert tokenize("ab", bos=True, eos="sticky", pad_id=2) == [1, 3, 4, 2, 2]
    assert tokenize("abcdef", bos=True, eos="sticky") == [1, 3, 4, 5, 2]
    assert tokenize("abcdef", bos=True) == [1, 3, 4, 5, 6]
    tokens = text.Tokenize(Letters(), 3)("a")
    assert tokens.dtype == np.int32 and tokens.shape == (3,)


@pytest.mark.parametrize("value", ["", "  ", "\n\u3000"])
def test_nothing_to_tokenize_is_an_error(value):
    with pytest.raises(DataError, match="caption") as error:
        tokenize(value)
    assert error.value.reason == "caption_empty"
    with pytest.raises(DataError) as error:
        apply([text.Canonicalize(), text.Tokenize(Letters(), 4)], "...!")
    assert error.value.reason == "caption_empty"


@pytest.mark.parametrize("value", ["~", "A"])
def test_tokens_outside_the_vocabulary_are_an_error(value):
    with pytest.raises(DataError, match="vocabulary of 29") as error:
        tokenize(value)
    assert error.value.reason == "token_out_of_vocabulary"


@pytest.mark.parametrize("settings, message", [
    ({"eos": "apend"}, 'eos: "apend" is unknown. Did you mean "append"'), ({"length": 0}, "length must be a number greater than 0"),
    ({"length": 2, "eos": "sticky", "bos": True}, "greater than 2"), ({"length": 2.5}, "length"), ({"pad_id": 29}, "outside the vocabulary of 29"),
    ({"pad_id": -1}, "outside the vocabulary")])
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message):
        tokenize("a", **settings)


def test_tokens_match_the_siglip_tokenizer_of_transformers(tmp_path):
    from transformers.models.siglip.tokenization_siglip import SiglipTokenizer
    path = tmp_path / "x.model"
    captions = [f"a {color} {shape} on a {other} {shape}" for color in ("red", "blue") for other in ("grey", "black") for shape in ("circle", "star")]
    path.write_bytes(train_sentencepiece(captions, 300))
    reference = SiglipTokenizer(str(path), model_input_names=["input_ids"])
    settings = {"tokenizer": {"path": str(path)}, "length": 16, "eos": "sticky", "pad_id": 1}
    ours = build("text", [["canonicalize"], ["tokenize", settings]])
    for value in ("A red CIRCLE!", "x", "a blue star on a grey star, a red circle on a black star", "日本語 Übung", "  many   spaces "):
        expected = reference(value, padding="max_length", truncation=True, max_length=16)["input_ids"]
        assert apply(ours, value).tolist() == expected, value


def test_a_tokenizer_without_marks_says_so():
    class Bare(Letters):
        pad_id = bos_id = eos_id = None
    for settings, message in (({}, "set pad_id"), ({"pad_id": 0, "bos": True}, "bos"), ({"pad_id": 0, "eos": "append"}, "eos")):
        with pytest.raises(ConfigError, match=message):
            text.Tokenize(Bare(), 4, **settings)
    assert text.Tokenize(Bare(), 4, pad_id=0)("a").tolist() == [3, 0, 0, 0]


def test_operations_from_a_config():
    built = build("text", [["strip"], ["lowercase"], ["prompt", {"template": "b {}"}], ["tokenize", {"tokenizer": Letters(), "length": 3}]])
    assert apply(built, " A ").tolist() == [4, 3, 0]
    with pytest.raises(ConfigError, match=r"text\[0\] \(prompt\): template must contain {} once"):
        build("text", [["prompt", {"template": "a photo"}]])
    with pytest.raises(ConfigError, match='Did you mean "canonicalize"'):
        build("text", ["canonicalise"])
    with pytest.raises(ConfigError, match="prepare is set by the program"):
        build("text", [["tokenize", {"tokenizer": Letters(), "length": 3, "prepare": []}]])

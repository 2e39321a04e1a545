"""Text as it comes: whole characters, stop strings across token borders, the same tokens whatever the chunks."""
import numpy as np
import pytest

from tests.decoding.models import trigrams
from vlm_jax.decoding import Sampler, generate, pad_rows, stream
from vlm_jax.decoding.text import TextStream, held_back
from vlm_jax.errors import ConfigError

MODEL, PARAMS = trigrams(name="stream")
PROMPTS = [[3, 1, 4], [9]]


class Letters:
    """Token i is the i-th letter."""

    def decode(self, ids):
        return "".join("abcdefghijk"[number] for number in ids)


class Bytes:
    """Tokens are bytes."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("sampler", [Sampler(), Sampler(temperature=1.0)], ids=["greedy", "drawn"])
def test_the_pieces_are_the_text_of_generate(chunk, sampler):
    eos = 7
    wanted = generate(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=17, eos=eos, sampler=sampler, seed=2).answers()
    pieces = list(stream(MODEL, PARAMS, pad_rows(PROMPTS), tokenizer=Letters(), max_tokens=17, eos=eos, sampler=sampler, seed=2, chunk=chunk))
    assert ["".join(row) for row in zip(*pieces)] == [Letters().decode(ids) for ids in wanted]
    assert len(pieces) > 1 and all(len(piece) == 2 for piece in pieces)
    assert max(len(row) for piece in pieces for row in piece) <= chunk


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_stop_strings_end_a_row_and_are_not_given_out(chunk):
    texts = [Letters().decode(ids) for ids in generate(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=17).answers()]
    stop = texts[0][5:8]
    wanted = [text[:text.index(stop)] if stop in text else text for text in texts]
    pieces = stream(MODEL, PARAMS, pad_rows(PROMPTS), tokenizer=Letters(), max_tokens=17, stop=[stop, "zzz"], chunk=chunk)
    assert ["".join(row) for row in zip(*pieces)] == wanted


def test_settings_are_checked_before_the_first_piece():
    with pytest.raises(ConfigError, match="chunk is 0"):
        stream(MODEL, PARAMS, pad_rows(PROMPTS), tokenizer=Letters(), max_tokens=3, chunk=0)
    with pytest.raises(ConfigError, match="empty stop string"):
        stream(MODEL, PARAMS, pad_rows(PROMPTS), tokenizer=Letters(), max_tokens=3, stop=[""])


def test_no_half_characters():
    text = "né 日本 🙂!"
    row, pieces = TextStream(Bytes()), []
    for byte in text.encode():
        pieces.append(row.push([byte]))
    pieces.append(row.push([], last=True))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_broken_bytes_are_given_out_once_they_cannot_become_a_character():
    row = TextStream(Bytes())
    assert [row.push([0xe6]), row.push(b"ab"), row.push([0xf0]), row.push([], last=True)] == ["", "\ufffdab", "", "\ufffd"]


@pytest.mark.parametrize("cut", [1, 2, 3, 7])
@pytest.mark.parametrize("stop, wanted", [(["END"], "one ENtwo "), (["two", "one ENt"], "one EN"[:0]), (["x"], "one ENtwo END three"), ("two", "one EN")])
def test_stop_strings_wherever_tokens_are_cut(cut, stop, wanted):
    data = b"one ENtwo END three"
    row = TextStream(Bytes(), stop)
    pieces = [row.push(data[i:i + cut]) for i in range(0, len(data), cut)] + [row.push([], last=True)]
    assert "".join(pieces) == wanted == row.text
    assert row.stopped == (wanted != data.decode())


def test_what_might_become_a_stop_string_is_held_back():
    assert held_back("abc", ["cab"]) == 1 and held_back("abca", ["cab"]) == 2 and held_back("abcab", ["cab"]) == 0
    assert held_back("aaa", ["aab", "aaaa"]) == 3 and held_back("abc", []) == 0
    row = TextStream(Bytes(), ["</s>"])
    assert [row.push(b"a<"), row.push(b"/s"), row.push(b"x"), row.push(b"<"), row.push([], last=True)] == ["a", "", "</sx", "", "<"]


def test_a_decoder_that_changes_what_it_said_is_waited_for():
    class Tidy(Bytes):
        def decode(self, ids):
            return super().decode(ids).replace(" .", ".")
    row = TextStream(Tidy())
    pieces = [row.push(b"one "), row.push(b"."), row.push(b" two"), row.push([], last=True)]
    assert pieces[0] == "one " and "".join(pieces).endswith("two")


def test_random_texts_cuts_and_stops():
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytes(rng.choice(list(b"ab"), 12).tolist())
        stops = [bytes(rng.choice(list(b"ab"), rng.integers(1, 4)).tolist()).decode() for _ in range(2)]
        texts = set()
        for cut in (1, 3, 12):
            row = TextStream(Bytes(), stops)
            pieces = [row.push(data[i:i + cut]) for i in range(0, 12, cut)] + [row.push([], last=True)]
            texts.add("".join(pieces))
        assert len(texts) == 1 and not any(stop in next(iter(texts)) for stop in stops)

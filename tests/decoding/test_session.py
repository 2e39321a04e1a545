"""Conversations that go on from their cache: the answers of a model that reads everything, and how much is read."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.models import trigrams, walk
from vlm_jax import registry
from vlm_jax.decoding import Sampler, Session, generate, pad_rows, prefix_cache
from vlm_jax.errors import ConfigError
from vlm_jax.interop.abstract import abstract_params

MODEL, PARAMS = trigrams(name="session")


class Numbers:
    """Token i is written as its number."""

    def decode(self, ids):
        return "".join(f"{number} " for number in ids)


def said(session, inputs, **options):
    """The ids that a session answers with."""
    inputs = pad_rows([inputs]) if isinstance(inputs, list) else inputs
    return [int(number) for number in "".join(session.stream(inputs, **{"tokenizer": Numbers(), "max_tokens": 6, **options})).split()]


def drawn(model, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), abstract_params(model))


def test_a_turn_reads_what_is_new():
    session, text = Session(MODEL, PARAMS), [3, 1, 4, 1, 5]
    for reused, more in ((0, [9, 2]), (10, [6, 5]), (18, [3])):   # of each answer the model has not read the last token
        read = len(text) - reused
        answer = said(session, text)
        assert answer == walk(PARAMS, text, 6) and (session.reused, session.read) == (reused, read)
        text = [*text, *answer, *more]
    before = text[:9]
    changed = [*before, (text[9] + 1) % 11, 7]
    assert said(session, changed) == walk(PARAMS, changed, 6) and session.reused == 9
    assert said(session, changed) == walk(PARAMS, changed, 6) and session.read == 1
    session.clear()
    assert said(session, before) == walk(PARAMS, before, 6) and session.reused == 0
    assert said(session, [(before[0] + 1) % 11, *before[1:]])[0] == walk(PARAMS, before, 1)[0] and session.reused == 0


def test_stop_strings_ends_and_interruptions_leave_it_usable():
    text = [3, 1, 4, 1, 5]
    wanted = walk(PARAMS, text, 6)
    session = Session(MODEL, PARAMS)
    stopped = said(session, text, stop=[f"{wanted[2]} "], chunk=4)
    assert stopped == wanted[:wanted.index(wanted[2])]
    following = [*text, *stopped, 8]
    assert said(session, following) == walk(PARAMS, following, 6) and session.reused >= len(text)
    pieces = session.stream(pad_rows([following]), tokenizer=Numbers(), max_tokens=6, chunk=2)
    next(pieces)
    pieces.close()   # Ctrl-C between two pieces
    assert said(session, following) == walk(PARAMS, following, 6) and session.read == 1
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        said(session, following, max_tokens=0)
    assert said(session, following) == walk(PARAMS, following, 6) and session.reused == 0
    ended = said(session, text, eos=wanted[3])
    assert ended == wanted[:wanted.index(wanted[3])] and said(session, [*text, *ended, wanted[3], 2]) == walk(PARAMS, [*text, *ended, wanted[3], 2], 6)


def test_a_repetition_penalty_counts_what_the_prefix_holds():
    positive = {"table": PARAMS["table"] + 20.0}   # all logits above zero, so that the penalty divides
    sampler = Sampler(repetition_penalty=1e6)
    prefix = prefix_cache(MODEL, positive, pad_rows([[5, 2, 8]]))
    made = generate(MODEL, positive, pad_rows([[3, 1], [7]]), max_tokens=5, sampler=sampler, prefix=prefix)
    for row, prompt in enumerate(([5, 2, 8, 3, 1], [5, 2, 8, 7])):
        whole = generate(MODEL, positive, pad_rows([prompt]), max_tokens=5, sampler=sampler)
        assert made.tokens[row].tolist() == whole.tokens[0].tolist() and not set(prompt) & set(whole.tokens[0].tolist())
    session = Session(MODEL, positive)
    first = said(session, [5, 2], max_tokens=3, sampler=sampler)
    second = said(session, [5, 2, *first, 0, 1], max_tokens=3, sampler=sampler)
    assert session.reused and not {5, 2, 0, 1, *first} & set(second)
    with pytest.raises(ConfigError, match="give what prefix_cache returns"):
        generate(MODEL, positive, pad_rows([[3]]), max_tokens=2, sampler=sampler, prefix=prefix.cache)


def test_a_ring_of_slots_goes_on_or_begins_anew():
    model = registry.build("decoder", vocab_size=31, width=12, depth=1, mlp_dim=16, num_heads=2, window=17, scan=False)
    params = drawn(model)
    session, text = Session(model, params), list(range(1, 19))
    for reused in (0, 21):
        answer = said(session, text, max_tokens=4)
        assert answer == said(Session(model, params), text, max_tokens=4) and session.reused == reused
        text = [*text, *answer, 3]
    changed = [*text[:4], *text[5:]]
    assert said(session, changed, max_tokens=4) == said(Session(model, params), changed, max_tokens=4) and session.reused == 0


def pictured(parts, prefix=False):
    """The inputs of text (lists of ids) and pictures of four tokens (their numbers), one after the other."""
    pictures = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    tokens, slots, seen = [], [], []
    for part in parts:
        picture = isinstance(part, int)
        tokens += [0] * 4 if picture else part
        slots += range(4 * len(seen), 4 * len(seen) + 4) if picture else [-1] * len(part)
        seen += [part] if picture else []
    made = {"tokens": np.array([tokens], np.int32), "valid": np.ones((1, len(tokens)), bool), "prefix": np.full((1, len(tokens)), prefix)}
    return {**made, "slots": np.array([slots], np.int32), "images": pictures[seen][None]}


@pytest.mark.slow
def test_pictures_are_read_once_and_may_come_later():
    model = registry.build("paligemma", image=dict(image_size=8, patch_size=4, width=8, depth=1, mlp_dim=12, num_heads=2), scan=False,
                           language=dict(vocab_size=31, width=12, depth=1, mlp_dim=16, num_heads=2))
    params = drawn(model)
    session, first = Session(model, params), [[5], 0, [7, 8]]
    answer = said(session, pictured(first), max_tokens=4)
    second = [[5], 0, [7, 8, *answer, 9], 1, [4]]
    assert said(session, pictured(second), max_tokens=4) == said(Session(model, params), pictured(second), max_tokens=4)
    assert (session.reused, session.read) == (10, 7)
    third = [[5], 2, *second[2:]]
    assert said(session, pictured(third), max_tokens=4) == said(Session(model, params), pictured(third), max_tokens=4) and session.reused == 1


def test_tokens_that_see_what_comes_after_them_are_read_again():
    session = Session(MODEL, PARAMS)
    for text in ([3, 1, 4], [3, 1, 4, 1]):
        prefix = {**pad_rows([text]), "prefix": np.ones((1, len(text)), bool)}
        assert said(session, prefix) == walk(PARAMS, text, 6) and (session.reused, session.read) == (0, len(text))


def interleaved(parts):
    """The inputs of text (lists of ids) and pictures (their numbers), which a mark stands for and the text behind them reads."""
    pictures = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    tokens, index, seen = [], [], []
    for part in parts:
        seen += [part] if isinstance(part, int) else []
        tokens += [30] if isinstance(part, int) else part
        index += [len(seen) - 1] * (len(tokens) - len(index))
    return {"tokens": np.array([tokens], np.int32), "valid": np.ones((1, len(tokens)), bool), "media_index": np.array([index], np.int32),
            "images": pictures[seen][None] if seen else np.zeros((1, 1, 8, 8, 3), np.float32)}


def test_pictures_that_text_reads_through_attention_are_read_once():
    model = registry.build("flamingo", image=dict(image_size=8, patch_size=4, width=8, depth=1, mlp_dim=12, num_heads=2), scan=False,
                           language=dict(vocab_size=31, width=12, depth=2, mlp_dim=16, num_heads=2), gated=dict(num_heads=2, every=2),
                           resampler=dict(num_latents=3, depth=1, num_heads=2, head_dim=4))
    params = jax.tree.map(lambda leaf: 3 * leaf, drawn(model))
    session = Session(model, params)

    def turn(*parts):
        inputs = interleaved(parts)
        answer = said(session, inputs, max_tokens=3)
        assert answer == generate(model, params, inputs, max_tokens=3).answers()[0]
        return answer

    first = [[5, 6]]
    first += [turn(*first)]
    assert session.reused == 0
    second = [*first, [9], 0, [7, 8]]                       # the first picture comes later, behind a text that reads none
    second += [turn(*second)]
    assert (session.reused, session.read) == (4, 5) and session._cache.encoded[2].shape == (1, 3)
    third = [*second, [2]]                                  # text alone goes on reading the picture that was read last
    third += [turn(*third)]
    assert (session.reused, session.read) == (11, 2)
    fourth = [*third, 1, [4], 2, [3]]
    turn(*fourth)
    assert (session.reused, session.read) == (15, 5) and session._cache.encoded[2].shape == (1, 9)
    assert session._reads.tolist() == [-1] * 6 + [0] * 10 + [1, 1, 2, 2, 2, 2]
    changed = [*third, 1, [4], 3, [3, 1]]                   # another third picture: the two before it are kept, and no more
    turn(*changed)
    assert (session.reused, session.read) == (18, 3) and session._cache.encoded[2].shape == (1, 9)
    other = [*first, [9], 3, *second[3:]]
    turn(*other)
    assert session.reused == 6 and session._cache.encoded[2].shape == (1, 6)   # the new picture and the first one, behind it
    back = interleaved([*other, [1], 2, [3], 1, [6]])
    back["media_index"][0, -1] = 0                          # goes back to the first picture, which a cache cannot say
    assert said(session, back, max_tokens=3) == generate(model, params, back, max_tokens=3).answers()[0] and session.reused == 0

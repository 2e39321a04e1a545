"""Greedy decoding and sampling in one loop: values, lengths, buckets, prefixes, errors."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.models import TRACED, logprobs, trigrams, walk
from vlm_jax.decoding import Sampler, generate, pad_rows, prefix_cache
from vlm_jax.decoding.prompts import bucket
from vlm_jax.errors import ConfigError

MODEL, PARAMS = trigrams(name="generate")
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6]]


def test_greedy_takes_the_likeliest_token_until_the_row_ends():
    plain = [walk(PARAMS, prompt, 12) for prompt in PROMPTS]
    eos = (plain[0][3], plain[1][5])
    wanted = [walk(PARAMS, prompt, 12, eos) for prompt in PROMPTS]
    made = generate(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=12, eos=eos)
    assert len({len(row) for row in wanted}) > 1
    for row, (prompt, said) in enumerate(zip(PROMPTS, wanted)):
        assert made.tokens[row, :made.lengths[row]].tolist() == said
        assert not made.tokens[row, made.lengths[row]:].any() and not made.logprobs[row, made.lengths[row]:].any()
        assert made.finished[row] == (said[-1] in eos)
        np.testing.assert_allclose(made.logprobs[row, :len(said)], logprobs(PARAMS, prompt, said), rtol=1e-5)
    assert made.answers() == [said[:-1] if said[-1] in eos else said for said in wanted]


@pytest.mark.parametrize("where", ["left", "right", "between"])
def test_padding_may_stand_anywhere(where):
    valid = {"left": [0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0], "between": [1, 0, 1, 0, 1]}[where]
    tokens = np.full((2, 5), 7, np.int32)
    tokens[0, np.flatnonzero(valid)], tokens[1] = [3, 1, 4], [1, 2, 3, 4, 5]
    made = generate(MODEL, PARAMS, {"tokens": tokens, "valid": np.array([valid, [1] * 5], bool)}, max_tokens=12)
    assert made.tokens.tolist() == [walk(PARAMS, [3, 1, 4], 12), walk(PARAMS, [1, 2, 3, 4, 5], 12)]


def test_lengths_of_all_kinds_need_as_many_programs_as_there_are_buckets():
    model, params = trigrams(name="buckets")
    lengths = [1, 3, 16, 9, 17, 30, 5, 32, 40, 2, 63, 64, 18]
    for length in lengths:
        prompt = (np.arange(length) % 11).tolist()
        made = generate(model, params, pad_rows([prompt]), max_tokens=3)
        assert made.tokens[0].tolist() == walk(params, prompt, 3)
    traced = {key: count for key, count in TRACED.items() if key[0] == "buckets"}
    starts = {key[2]: count for key, count in traced.items() if key[1] == "start"}
    assert starts == {(1, size): 1 for size in {bucket(length) for length in lengths}}
    assert sum(count for key, count in traced.items() if key[1] == "extend") <= 2 * len(starts)   # a loop's body may be traced twice


def test_buckets_are_powers_of_two_or_given():
    assert [bucket(n) for n in (1, 16, 17, 33, 1024, 1025)] == [16, 16, 32, 64, 1024, 2048]
    assert [bucket(n, [10, 25]) for n in (1, 10, 11)] == [10, 10, 25]
    with pytest.raises(ConfigError, match="26 tokens is longer than the largest bucket, 25"):
        bucket(26, [10, 25])


def test_draws_do_not_depend_on_the_batch():
    sampler = Sampler(temperature=1.0, top_k=8)
    together = generate(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=12, sampler=sampler, seed=5)
    for row in (0, 2):
        alone = generate(MODEL, PARAMS, pad_rows([PROMPTS[row]]), max_tokens=12, sampler=sampler, seed=5, rows=[row])
        assert alone.tokens[0].tolist() == together.tokens[row].tolist()
    other = generate(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=12, sampler=sampler, seed=6)
    assert (other.tokens != together.tokens).any()
    again = generate(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=12, sampler=sampler, seed=5)
    assert (again.tokens == together.tokens).all()


def test_a_high_repetition_penalty_says_nothing_twice():
    positive = {"table": PARAMS["table"] + 20.0}   # all logits above zero, so that the penalty divides
    made = generate(MODEL, positive, pad_rows([[3, 1]]), max_tokens=9, sampler=Sampler(repetition_penalty=1e6))
    assert sorted([*made.tokens[0].tolist(), 3, 1]) == list(range(11))


def test_a_prefix_is_read_once_and_shared():
    system = [5, 2, 8]
    cache = prefix_cache(MODEL, PARAMS, pad_rows([system]))
    before = jax.tree.map(np.array, cache)
    for prompts in (PROMPTS, [[7]]):
        made = generate(MODEL, PARAMS, pad_rows(prompts), max_tokens=12, prefix=cache)
        assert made.tokens.tolist() == [walk(PARAMS, system + prompt, 12) for prompt in prompts]
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), before, cache)))
    with pytest.raises(ConfigError, match="the cache has 2 rows, the prompts 3"):
        generate(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=12, prefix=cache.rows(jnp.zeros(2, jnp.int32)))


def test_what_does_not_fit_is_refused_with_the_number_to_change():
    prompt = pad_rows([[1], [1] * 30])
    with pytest.raises(ConfigError, match="prompt 1 has 30 tokens .* max_tokens is 4, but cache_length is 33; raise cache_length to 34"):
        generate(MODEL, PARAMS, prompt, max_tokens=4, cache_length=33)
    assert generate(MODEL, PARAMS, prompt, max_tokens=4, cache_length=34).tokens[1].tolist() == walk(PARAMS, [1] * 30, 4)
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        generate(MODEL, PARAMS, prompt, max_tokens=0)
    with pytest.raises(ConfigError, match="prompt 1 is empty"):
        pad_rows([[1], []])
    with pytest.raises(ConfigError, match="prompt 0 has no valid token"):
        generate(MODEL, PARAMS, {"tokens": np.zeros((1, 3), np.int32), "valid": np.zeros((1, 3), bool)}, max_tokens=1)
    with pytest.raises(ConfigError, match="numbers of rows differ"):
        generate(MODEL, PARAMS, {"tokens": np.zeros((1, 3), np.int32), "valid": np.ones((2, 3), bool)}, max_tokens=1)
    with pytest.raises(ConfigError, match="eos: -1 is no token id"):
        generate(MODEL, PARAMS, prompt, max_tokens=1, eos=-1)


def test_a_loop_whose_rows_have_all_ended_ends():
    first = walk(PARAMS, [3], 1)[0]
    calls = []

    def counted(x):
        calls.append(1)
        return x

    class Counting(type(MODEL)):
        def extend(self, tokens, cache, valid=None):
            jax.debug.callback(lambda: counted(None))
            return super().extend(tokens, cache, valid)

    generate(Counting(11, "counting"), PARAMS, pad_rows([[3]]), max_tokens=50, eos=first)
    jax.effects_barrier()
    assert not calls

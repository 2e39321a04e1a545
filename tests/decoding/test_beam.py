"""Beam search: what it finds, by exhaustive search; its conventions are compared with transformers' in test_parity.py."""
import itertools

import numpy as np
import pytest

from tests.decoding.models import logprobs, trigrams
from vlm_jax.decoding import beam_search, generate, pad_rows, prefix_cache
from vlm_jax.errors import ConfigError

MODEL, PARAMS = trigrams(2, vocab_size=4, name="beam")
PROMPTS = [[3, 1, 2], [1]]


def all_answers(prompt, length, eos):
    """{answer: log-probability} of everything that can be said."""
    answers = {}
    for said in itertools.product(range(4), repeat=length):
        ends = [i for i, token in enumerate(said) if token == eos]
        said = said[:ends[0] + 1] if ends else said
        answers[said] = logprobs(PARAMS, prompt, said).sum()
    return answers


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_with_beams_enough_the_best_answers_of_all_are_found(penalty):
    made = beam_search(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=3, beams=40, returned=5, length_penalty=penalty, early_stopping="never", eos=0)
    for row, prompt in enumerate(PROMPTS):
        ranked = sorted(((score / len(said) ** penalty, said) for said, score in all_answers(prompt, 3, 0).items()), reverse=True)[:5]
        for rank, (score, said) in enumerate(ranked):
            assert tuple(made.tokens[row, rank, :made.lengths[row, rank]]) == said
            np.testing.assert_allclose(made.scores[row, rank], score, rtol=1e-5)
            assert made.finished[row, rank] == (said[-1] == 0)
        assert made.answers()[row] == [token for token in ranked[0][1] if token != 0]


def test_one_beam_is_greedy():
    made = beam_search(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=9, beams=1, eos=0)
    wanted = generate(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=9, eos=0)
    np.testing.assert_array_equal(made.tokens[:, 0], wanted.tokens)
    np.testing.assert_allclose(made.scores[:, 0], wanted.logprobs.sum(1) / wanted.lengths, rtol=1e-6)


def test_scores_are_those_of_the_tokens_and_rows_do_not_meet():
    made = beam_search(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=9, beams=3, returned=3, length_penalty=0.7, eos=0)
    for row, prompt in enumerate(PROMPTS):
        for tokens, length, score in zip(made.tokens[row], made.lengths[row], made.scores[row]):
            assert not tokens[length:].any()
            if length:
                np.testing.assert_allclose(score, logprobs(PARAMS, prompt, tokens[:length]).sum() / length ** 0.7, rtol=1e-5)
        alone = beam_search(MODEL, PARAMS, pad_rows([prompt]), max_tokens=9, beams=3, returned=3, length_penalty=0.7, eos=0, early_stopping=True)
        both = beam_search(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=9, beams=3, returned=3, length_penalty=0.7, eos=0, early_stopping=True)
        np.testing.assert_array_equal(alone.tokens[0, 0], both.tokens[row, 0])


def test_a_prefix_is_shared():
    made = beam_search(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=6, beams=3, prefix=prefix_cache(MODEL, PARAMS, pad_rows([[2, 3]])))
    wanted = beam_search(MODEL, PARAMS, pad_rows([[2, 3, *prompt] for prompt in PROMPTS]), max_tokens=6, beams=3)
    np.testing.assert_array_equal(made.tokens, wanted.tokens)


@pytest.mark.parametrize("settings, message", [(dict(beams=0), "beams is 0"), (dict(beams=2, returned=3), "returned 3"),
                                               (dict(early_stopping="sometimes"), "early_stopping is 'sometimes'")])
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        beam_search(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=3, **settings)

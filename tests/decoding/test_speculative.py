"""Speculative decoding says what the large model alone would say."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.models import logprobs, trigrams, walk
from vlm_jax.decoding import Sampler, generate, pad_rows, speculative
from vlm_jax.decoding.sampling import row_keys
from vlm_jax.decoding.speculative import verify
from vlm_jax.errors import ConfigError

MODEL, PARAMS = trigrams(name="target")
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6], [5, 5]]
# Drafts: the model itself, one that agrees now and then, and one that never does.
NOISE = np.random.default_rng(5).normal(scale=1.5, size=(11,) * 3).astype(np.float32)
DRAFTS = {"same": PARAMS, "similar": {"table": PARAMS["table"] + NOISE}, "opposite": {"table": -PARAMS["table"]}}


@pytest.mark.parametrize("draft, proposals", [("same", 4), ("similar", 4), ("opposite", 4), ("similar", 1)])
def test_greedy_equals_greedy(draft, proposals):
    eos = walk(PARAMS, PROMPTS[1], 9)[6]
    wanted = generate(MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=14, eos=eos)
    made = speculative(MODEL, PARAMS, MODEL, DRAFTS[draft], pad_rows(PROMPTS), max_tokens=14, eos=eos, proposals=proposals)
    for name in ("tokens", "lengths", "finished"):
        np.testing.assert_array_equal(getattr(made, name), getattr(wanted, name))
    np.testing.assert_allclose(made.logprobs, wanted.logprobs, atol=1e-5)
    assert (made.accepted <= made.proposed).all() and made.lengths.max() == 14
    if draft == "same":
        assert made.rounds.max() == 1 + -(-13 // (proposals + 1))
    if draft == "opposite":
        assert made.accepted.max() == 0 and (made.rounds == made.lengths).all()


def test_one_token_needs_no_proposals():
    made = speculative(MODEL, PARAMS, MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=1)
    assert made.tokens[:, 0].tolist() == [walk(PARAMS, prompt, 1)[0] for prompt in PROMPTS] and made.rounds.tolist() == [1] * 4


def test_drawn_tokens_have_the_log_probabilities_of_the_large_model():
    made = speculative(MODEL, PARAMS, MODEL, DRAFTS["similar"], pad_rows(PROMPTS), max_tokens=14, sampler=Sampler(temperature=0.8, top_k=6), seed=3)
    for prompt, said, found in zip(PROMPTS, made.tokens, made.logprobs):
        np.testing.assert_allclose(found, logprobs(PARAMS, prompt, said), atol=1e-5)
    assert 0 < made.accepted.sum() < made.proposed.sum()


@pytest.mark.parametrize("draft", ["similar", "opposite"])
def test_drawn_texts_are_distributed_as_the_large_model_alone_draws_them(draft):
    """3,000 answers of two tokens after one prompt: their counts against the exact probabilities, by a chi-square of 15 deviations."""
    rows, vocabulary = 3000, 4
    model, params = trigrams(3, vocabulary, "four")
    sampler = Sampler(temperature=1.3, top_k=3)
    other = {"table": params["table"] * (0.6 if draft == "similar" else -1.0)}
    made = speculative(model, params, model, other, pad_rows([[1, 2]] * rows), max_tokens=3, proposals=2, sampler=sampler, seed=1)
    table = np.asarray(jax.nn.softmax(sampler.rules().processed(params["table"])))
    wanted = np.einsum("a,ab,abc->abc", table[1, 2], table[2], table).reshape(-1)
    found = np.bincount(np.ravel_multi_index(made.tokens.T, (vocabulary,) * 3), minlength=vocabulary ** 3)
    possible = wanted > 0
    assert found[~possible].sum() == 0
    chi = ((found - rows * wanted)[possible] ** 2 / (rows * wanted[possible])).sum()
    freedom = possible.sum() - 1
    assert chi < freedom + 5 * np.sqrt(2 * freedom)


def test_the_rejection_scheme_draws_from_p_for_any_p_and_q():
    rng = np.random.default_rng(0)
    p, q = rng.normal(scale=2, size=(2, 5)).astype(np.float32)
    rows = 8000
    rules, keys = Sampler(temperature=1.0).rules(), row_keys(np.uint32(0), np.arange(rows))
    proposed = jax.random.categorical(jax.random.key(9), jnp.asarray(q), shape=(rows, 1)).astype(jnp.int32)
    logits = jnp.broadcast_to(p, (rows, 2, 5))
    said, kept = verify(logits, jnp.broadcast_to(q, (rows, 1, 5)), proposed, rules, keys, jnp.zeros(rows, jnp.int32))
    np.testing.assert_allclose(np.bincount(said[:, 0], minlength=5) / rows, jax.nn.softmax(p), atol=0.025)
    overlap = np.minimum(jax.nn.softmax(p), jax.nn.softmax(q)).sum()
    np.testing.assert_allclose(kept.mean(), overlap, atol=0.025)


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="repetition_penalty does not work with speculative"):
        speculative(MODEL, PARAMS, MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=3, sampler=Sampler(repetition_penalty=1.1))
    with pytest.raises(ConfigError, match="proposals is 0"):
        speculative(MODEL, PARAMS, MODEL, PARAMS, pad_rows(PROMPTS), max_tokens=3, proposals=0)
    with pytest.raises(ConfigError, match="draft_inputs: 1 rows"):
        speculative(MODEL, PARAMS, MODEL, PARAMS, pad_rows(PROMPTS), draft_inputs=pad_rows([[1]]), max_tokens=3)
    small, small_params = trigrams(vocab_size=7, name="small")
    with pytest.raises(ConfigError, match="vocabulary of 7 .* 11"):
        speculative(MODEL, PARAMS, small, small_params, pad_rows(PROMPTS), max_tokens=3)

"""The processors against transformers', and what a random draw depends on."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.decoding import sampling
from vlm_jax.decoding.sampling import Sampler, row_keys, row_numbers, step_keys
from vlm_jax.errors import ConfigError

LOGITS = np.random.default_rng(0).normal(scale=3, size=(5, 37)).astype(np.float32)
PROMPT = np.random.default_rng(1).integers(0, 37, (5, 7))


def seen_tokens():
    seen = np.zeros(LOGITS.shape, bool)
    seen[np.arange(5)[:, None], PROMPT] = True
    return jnp.asarray(seen)


PROCESSORS = [
    ("TemperatureLogitsWarper", dict(temperature=0.7), lambda x: sampling.apply_temperature(x, 0.7)),
    ("TopKLogitsWarper", dict(top_k=6), lambda x: sampling.apply_top_k(x, 6)),
    ("TopKLogitsWarper", dict(top_k=99), lambda x: sampling.apply_top_k(x, 99)),
    ("TopPLogitsWarper", dict(top_p=0.8), lambda x: sampling.apply_top_p(x, 0.8)),
    ("TopPLogitsWarper", dict(top_p=0.01), lambda x: sampling.apply_top_p(x, 0.01)),
    ("MinPLogitsWarper", dict(min_p=0.05), lambda x: sampling.apply_min_p(x, 0.05)),
    ("RepetitionPenaltyLogitsProcessor", dict(penalty=1.3), lambda x: sampling.apply_repetition_penalty(x, seen_tokens(), 1.3)),
]


@pytest.mark.parametrize("theirs, settings, ours", PROCESSORS, ids=[f"{name}-{list(settings.values())[0]}" for name, settings, _ in PROCESSORS])
def test_a_processor_equals_that_of_transformers(theirs, settings, ours):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    wanted = getattr(transformers, theirs)(**settings)(torch.tensor(PROMPT), torch.tensor(LOGITS)).numpy()
    np.testing.assert_allclose(ours(jnp.asarray(LOGITS)), wanted, rtol=1e-6)


def test_all_processors_together_equal_transformers():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    chain = transformers.LogitsProcessorList([
        transformers.RepetitionPenaltyLogitsProcessor(1.2), transformers.TemperatureLogitsWarper(1.5), transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.9), transformers.MinPLogitsWarper(0.02)])
    wanted = chain(torch.tensor(PROMPT), torch.tensor(LOGITS)).numpy()
    rules = Sampler(temperature=1.5, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.2).rules()
    got = jax.jit(rules.processed)(jnp.asarray(LOGITS), seen_tokens())
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert np.isfinite(wanted).sum() < 5 * 20


def test_temperature_zero_takes_the_likeliest_whatever_else_is_set():
    rules = Sampler(temperature=0.0, top_k=3, top_p=0.5).rules()
    assert rules == sampling.Rules()
    np.testing.assert_array_equal(rules.choose(jnp.asarray(LOGITS), None), LOGITS.argmax(1))


def test_another_temperature_compiles_nothing_again():
    draw = jax.jit(lambda rules, keys: rules.choose(jnp.asarray(LOGITS), keys))
    keys = row_keys(np.uint32(0), row_numbers(None, 5))
    for temperature in (0.5, 0.9, 2.0):
        draw(Sampler(temperature=temperature, top_p=0.9).rules(), keys)
    assert draw._cache_size() == 1


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.asarray([0.5, 0.3, 0.15, 0.05]))
    keys = row_keys(np.uint32(3), np.arange(4000))
    drawn = Sampler(temperature=1.0, top_p=0.9).rules().choose(jnp.broadcast_to(logits, (4000, 4)), keys)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / 4000, np.array([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_keys_depend_on_seed_row_and_step_alone():
    def bits(seed, rows, step):
        return jax.random.key_data(step_keys(row_keys(np.uint32(seed), row_numbers(rows, len(rows))), step))

    many, one = bits(0, [4, 7, 9], 5), bits(0, [7], 5)
    np.testing.assert_array_equal(many[1], one[0])
    distinct = {tuple(np.asarray(bits(seed, [row], step))[0]) for seed in (0, 1) for row in (0, 1) for step in (0, 1)}
    assert len(distinct) == 8


@pytest.mark.parametrize("settings", [dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=0), dict(top_p=0.0), dict(top_p=1.5), dict(min_p=2),
                                      dict(repetition_penalty=0)])
def test_a_value_out_of_range_is_named(settings):
    with pytest.raises(ConfigError, match=f"sampler.{next(iter(settings))} is .* must be"):
        Sampler(**settings)


def test_rows_must_be_one_a_row():
    with pytest.raises(ConfigError, match="2 numbers for a batch of 3"):
        row_numbers([1, 2], 3)

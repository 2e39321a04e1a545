"""Decoders: cached logits equal uncached ones wherever the padding is, scanned equal unrolled, packed equal separate ones."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.language.common import DECODERS, made, padded, relative, tokens_of
from vlm_jax import registry
from vlm_jax.errors import ConfigError

TOLERANCE = 1e-5


@functools.lru_cache(maxsize=64)
def compiled(model, method="__call__", static=()):
    if method == "start":
        return jax.jit(lambda params, inputs: model.apply({"params": params}, inputs, *static, method=method))
    if method == "extend":
        return jax.jit(lambda params, *arguments: model.apply({"params": params}, *arguments, method=method))
    return jax.jit(lambda params, inputs: model.apply({"params": params}, inputs)[0])


def continued(model, params, inputs, more, cache_length, chunks):
    """Logits after the prompt and after each of the tokens `more` [B, N], read in chunks."""
    logits, cache = compiled(model, "start", (cache_length,))(params, inputs)
    out, at = [logits[:, None]], 0
    for size in chunks:
        logits, cache = compiled(model, "extend")(params, more[:, at:at + size], cache)
        out.append(logits)
        at += size
    return np.concatenate(out, axis=1), cache


SLOW = ("gpt2", "phi", "neox", "mistral", "gemma2", "opt")   # what is theirs alone is tested below


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in DECODERS])
def test_cached_equals_uncached(name):
    model, params = made("decoder", name)
    chunks = (1, 1, 3) if name in ("llama", "gemma3") else (1, 1, 1)
    lengths, tokens = np.array([7, 4, 1, 6, 3]), tokens_of(5, 12)
    everything = jnp.ones((5, 12), bool)
    expected = np.asarray(compiled(model)(params, {"tokens": tokens, "valid": everything}))
    assert expected.dtype == np.float32 and expected.shape == (5, 12, 61)
    count = sum(chunks)
    more = jnp.stack([tokens[row, n:n + count] for row, n in enumerate(lengths)])
    wanted = np.stack([expected[row, n - 1:n + count] for row, n in enumerate(lengths)])
    for side in ("right", "left", "between"):
        prompt, valid = padded(tokens[:, :7], lengths, side)
        found, cache = continued(model, params, {"tokens": prompt, "valid": valid}, more, 14, chunks)
        assert relative(found, wanted) < TOLERANCE, side
        assert np.asarray(cache.next_position).tolist() == (lengths + count).tolist()
    # Uncached logits of valid tokens do not see the padding either.
    whole, valid = padded(tokens, lengths, "left")
    logits = np.asarray(compiled(model)(params, {"tokens": whole, "valid": valid}))
    assert relative(logits[:, -1], wanted[:, 0]) < TOLERANCE


def test_one_row():
    model, params = made("decoder", "neox")
    tokens = tokens_of(1, 9)
    found, _ = continued(model, params, {"tokens": tokens[:, :7]}, tokens[:, 7:], 12, (1, 1))
    assert relative(found, compiled(model)(params, {"tokens": tokens})[:, 6:]) < TOLERANCE


def test_rows_that_have_no_token_write_nothing():
    model, params = made("decoder", "llama")
    tokens = tokens_of(5, 7)
    _, cache = compiled(model, "start", (14,))(params, {"tokens": tokens, "valid": jnp.ones((5, 7), bool)})
    more, valid = jnp.full((5, 3), 1000), jnp.array([[False] * 3, [True, False, False], [False, True, True], [False] * 3, [True] * 3])
    more = jnp.where(valid, tokens_of(5, 3, 4), more)
    logits, cache = compiled(model, "extend")(params, more, cache, valid)
    expected = compiled(model)(params, {"tokens": jnp.concatenate([tokens, more], 1), "valid": jnp.concatenate([jnp.ones((5, 7), bool), valid], 1)})
    assert relative(logits[valid], expected[:, 7:][valid]) < TOLERANCE
    assert np.asarray(cache.index).tolist() == [7, 8, 9, 7, 10]


def test_a_ring_is_no_longer_than_the_window():
    model, params = made("decoder", "mistral")
    tokens = tokens_of(5, 15)
    expected = compiled(model)(params, {"tokens": tokens})
    found, cache = continued(model, params, {"tokens": tokens[:, :7]}, tokens[:, 7:], 4, (1, 1, 2, 1, 2, 1))
    assert cache.length == 4 and cache.ring
    assert relative(found, expected[:, 6:]) < TOLERANCE


def test_tokens_of_the_prefix_see_each_other():
    model, params = made("decoder", "llama")
    tokens = tokens_of(5, 12)
    prefix = jnp.arange(12)[None] < jnp.array([[5], [3], [1], [0], [7]])
    logits = compiled(model)(params, {"tokens": tokens, "prefix": prefix})
    changed = compiled(model)(params, {"tokens": tokens.at[:, 4].set((tokens[:, 4] + 1) % 61), "prefix": prefix})
    moved = np.abs(np.asarray(logits - changed)).max(-1) > 1e-6
    assert moved[0].all() and moved[4].all() and not moved[1:4, :4].any() and moved[1:4, 4:].all()
    found, _ = continued(model, params, {"tokens": tokens[:, :7], "prefix": prefix[:, :7]}, tokens[:, 7:9], 14, (1, 1))
    assert relative(found, logits[:, 6:9]) < TOLERANCE


def test_scanned_equals_unrolled():
    model, params = made("decoder", "gemma3", depth=2, windowed=(True, False))
    unrolled = model.clone(scan=False)
    tokens = tokens_of(2, 8)

    def loss(model, params):
        logits, _ = model.apply({"params": params}, {"tokens": tokens})
        return jnp.square(logits).mean(), logits

    models = (model, unrolled.clone(remat="minimal"))
    (gradient, one), (other, two) = (jax.jit(jax.grad(functools.partial(loss, each), has_aux=True))(params) for each in models)
    assert relative(one, two) < TOLERANCE
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(other), strict=True):
        assert np.abs(np.asarray(a)).max() > 0 and relative(a, b) < 1e-4
    found, cache = continued(unrolled, params, {"tokens": tokens[:, :6]}, tokens[:, 6:7], 9, (1,))
    assert relative(found, one[:, 5:7]) < TOLERANCE
    # Layers apart, as a decoding loop keeps them, give the same, whether scanned or not.
    for each in (unrolled, model):
        logits, apart = compiled(each, "extend")(params, tokens[:, 7:], cache.unstacked())
        assert isinstance(apart.key, tuple) and relative(logits, one[:, 7:]) < TOLERANCE


@pytest.mark.parametrize("name", ["gpt2", "mpt"])
def test_packed_rows_equal_separate_ones(name):
    model, params = made("decoder", name)
    tokens, segments = tokens_of(5, 12), jnp.array([0] * 3 + [1] * 5 + [2] * 4)
    together = compiled(model)(params, {"tokens": tokens, "segment_ids": jnp.broadcast_to(segments, (5, 12))})
    for start, stop in ((0, 3), (3, 8), (8, 12)):
        alone = jnp.roll(tokens, -start, axis=1)     # what comes after is not seen
        logits = compiled(model)(params, {"tokens": alone, "segment_ids": jnp.zeros((5, 12), jnp.int32)})
        assert relative(together[:, start:stop], logits[:, :stop - start]) < TOLERANCE


def test_embeddings_stand_for_tokens():
    model, params = made("decoder", "gemma2")
    tokens = tokens_of(5, 12)
    embedded = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, method="embed"))(params, tokens)
    found = compiled(model)(params, {"embeddings": embedded, "tokens": jnp.zeros_like(tokens), "valid": jnp.ones(tokens.shape, bool)})
    assert relative(found, compiled(model)(params, {"tokens": tokens, "valid": jnp.ones(tokens.shape, bool)})) < TOLERANCE


@pytest.mark.parametrize("name", ["gemma2", "opt", "phi"])
def test_the_head_gives_the_logits_of_hidden(name):
    model, params = made("decoder", name)
    logits, out = jax.jit(lambda params, tokens: model.apply({"params": params}, {"tokens": tokens}))(params, tokens_of(2, 5))
    head = model.head(params)
    again = out["hidden"] @ (head["kernel"].T if head["tied"] else head["kernel"])
    again = again if head["bias"] is None else again + head["bias"]
    again = again if head["soft_cap"] is None else head["soft_cap"] * jnp.tanh(again / head["soft_cap"])
    assert relative(again, logits) < TOLERANCE


def test_an_id_beyond_the_vocabulary_makes_its_row_nan():
    model, params = made("decoder", "llama")
    tokens = tokens_of(5, 12)
    for wrong in (61, -1):
        logits = np.asarray(compiled(model)(params, {"tokens": tokens.at[1, 3].set(wrong), "valid": jnp.ones(tokens.shape, bool)}))
        assert np.isnan(logits[1, 3:]).all() and np.isfinite(logits[[0, 2, 3, 4]]).all()


def test_dropout_needs_training_and_a_key():
    model, params = made("decoder", "llama")
    dropping, inputs = model.clone(dropout=0.3), {"tokens": tokens_of(2, 6)}
    run = jax.jit(lambda train, params, key: dropping.apply({"params": params}, inputs, train, rngs={"dropout": key})[0], static_argnums=0)
    plain = compiled(model)(params, inputs)
    assert relative(run(False, params, jax.random.key(0)), plain) < TOLERANCE and relative(run(True, params, jax.random.key(0)), plain) > 0.01


@pytest.mark.parametrize("settings, message", [
    (dict(num_kv_heads=4), "num_kv_heads: 4 do not divide the 6 heads"),
    (dict(norm_place="around"), 'norm_place: "around" is unknown'),
    (dict(parallel=True, norm_place="post"), "parallel: attention and MLP read the same x"),
    (dict(shared_norm=True), "shared_norm"),
    (dict(positions="rotary"), 'positions: "rotary" is unknown'),
    (dict(biases=("query", "kye")), 'biases: "kye" is unknown'),
    (dict(rope=dict(thta=3.0)), 'model.rope.thta: rope_settings takes no such setting. Did you mean "theta"'),
    (dict(window=0), "window: 0 of the layers"),
    (dict(width=25), "6 heads do not divide the width 25"),
    (dict(norms="rms"), "model.norms: Decoder takes no such setting"),
])
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        registry.build("decoder", **{**DECODERS["llama"], **settings})


@pytest.mark.parametrize("inputs, message", [
    (dict(), 'hold nothing; give "tokens"'),
    (dict(token=1), r'inputs\["token"\] is unknown; .*Did you mean "tokens"'),
    (dict(tokens=jnp.zeros((2, 3, 4), jnp.int32)), r"shape \(2, 3, 4\); give \[B, T\]"),
    (dict(embeddings=jnp.zeros((2, 3, 4))), r"give \[B, T, 24\]"),
    (dict(tokens=jnp.zeros((2, 3), jnp.int32), valid=jnp.ones((2, 4), bool)), r'inputs\["valid"\] has shape \(2, 4\)'),
])
def test_inputs_that_do_not_fit(inputs, message):
    model, params = made("decoder", "llama")
    with pytest.raises(ConfigError, match=message):
        model.apply({"params": params}, inputs)


def test_prompts_longer_than_the_cache_or_the_table():
    model, params = made("decoder", "gpt2")
    with pytest.raises(ConfigError, match="9 tokens do not fit into its 8 slots"):
        model.apply({"params": params}, {"tokens": tokens_of(1, 9)}, 8, method="start")
    with pytest.raises(ConfigError, match="41 tokens, but the model has 40 positions"):
        model.apply({"params": params}, {"tokens": tokens_of(1, 41)})

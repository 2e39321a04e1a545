"""BERT reads both ways, passes over padding, and has what it is asked for; that it is BERT is tested against the reference in tests/interop."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.language.common import drawn, relative, tokens_of
from vlm_jax import registry
from vlm_jax.errors import ConfigError


def test_padding_is_not_read_and_the_head_scores_what_it_says():
    model = registry.build("bert", "test", mlm_head=True)
    tokens, valid = tokens_of(3, 7), jnp.arange(7)[None] < jnp.array([[7], [4], [1]])
    inputs = {"tokens": tokens, "valid": valid, "types": (jnp.arange(7)[None] > jnp.array([[3], [2], [0]])).astype(jnp.int32)}
    params = drawn(jax.eval_shape(model.init, jax.random.key(0), inputs)["params"])
    run = jax.jit(lambda params, inputs: model.apply({"params": params}, inputs))
    logits, out = run(params, inputs)
    assert logits.shape == (3, 7, 61) and logits.dtype == jnp.float32 and out["pooled"].shape == (3, 24)
    other, _ = run(params, inputs | {"tokens": jnp.where(valid, tokens, 1000)})
    assert relative(np.asarray(other)[np.asarray(valid)], np.asarray(logits)[np.asarray(valid)]) < 1e-6
    head = model.head(params)
    assert relative(out["scored"] @ head["kernel"].T + head["bias"], logits) < 1e-5
    changed, _ = run(params, inputs | {"tokens": tokens.at[0, 6].set((tokens[0, 6] + 1) % 61)})
    moved = np.abs(np.asarray(changed - logits)).max(-1) > 1e-6
    assert moved[0].all() and not moved[1:].any()


def test_more_tokens_than_positions():
    model = registry.build("bert", "test", max_positions=6)
    with pytest.raises(ConfigError, match="7 tokens, but the model has 6 positions"):
        jax.eval_shape(model.init, jax.random.key(0), {"tokens": tokens_of(1, 7)})

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.encoders.text import TextTransformer, clip_init
from vlm_jax.errors import ConfigError

SIZES = dict(vocab_size=31, length=6, width=12, depth=2, mlp_dim=20, num_heads=3, embed_dim=5)
TOKENS = jnp.array([[3, 4, 5, 1, 1, 1], [7, 8, 9, 10, 11, 1]])


def test_siglip_reads_both_ways_and_clip_only_back():
    changed = TOKENS.at[:, 2].set(30)
    for settings, same_before in ((dict(), False), (dict(causal=True, pool="eot", eot_id=1, initialization="clip"), True)):
        tower = TextTransformer(**SIZES, **settings)
        variables = jax.jit(tower.init)(jax.random.key(0), TOKENS)
        apply = jax.jit(tower.apply)
        (pooled, out), (other, changed_out) = apply(variables, TOKENS), apply(variables, changed)
        assert pooled.shape == (2, 5) and out["tokens"].shape == (2, 6, 12) and out["blocks"]["output"].shape == (2, 2, 6, 12)
        assert np.array_equal(out["tokens"][:, :2], changed_out["tokens"][:, :2]) == same_before
        assert np.abs(pooled - other).max() > 1e-4


def test_padding_after_the_end_of_text_does_not_reach_clip():
    tower = TextTransformer(**SIZES, causal=True, pool="eot", eot_id=1)
    variables = jax.jit(tower.init)(jax.random.key(0), TOKENS)
    pooled = jax.jit(lambda tokens: tower.apply(variables, tokens)[0])
    np.testing.assert_array_equal(pooled(TOKENS)[0], pooled(TOKENS.at[0, 4:].set(20))[0])


def test_ids_beyond_the_vocabulary_give_nan():
    tower = TextTransformer(**SIZES)
    variables = jax.jit(tower.init)(jax.random.key(0), TOKENS)
    out = jax.jit(lambda tokens: tower.apply(variables, tokens)[1]["positions"])(TOKENS.at[0, 1].set(31))
    assert np.isnan(out[0, 1]).all() and np.isfinite(out[1]).all()


def test_clip_initialisation_scales_with_width_and_depth():
    init = clip_init(256, 8)
    assert (init.qkv, init.out, init.up, init.down) == pytest.approx((1 / 16, 1 / 64, 1 / 512 ** 0.5, 1 / 64))
    tower = TextTransformer(**{**SIZES, "vocab_size": 3000}, initialization="clip")
    params = jax.jit(tower.init)(jax.random.key(0), TOKENS)["params"]
    assert float(params["token_embedding"].std()) == pytest.approx(0.02, rel=0.05)
    assert float(params["blocks"]["mlp"]["up"]["kernel"].std()) == pytest.approx(24 ** -0.5, rel=0.2)
    assert not np.asarray(params["blocks"]["mlp"]["up"]["bias"]).any()


@pytest.mark.parametrize("settings, tokens, message", [
    (dict(), jnp.zeros((2, 7), int), "texts of 7 tokens, but the tower has 6 positions"),
    (dict(), jnp.zeros((6,), int), "give \\[batch, length\\]"),
    (dict(pool="cls"), TOKENS, '"cls" is not for texts'),
    (dict(pool="eot"), TOKENS, "needs token ids and eot_id"),
    (dict(initialization="torch"), TOKENS, '"torch" is unknown'),
])
def test_errors(settings, tokens, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(TextTransformer(**SIZES, **settings).init, jax.random.key(0), tokens)

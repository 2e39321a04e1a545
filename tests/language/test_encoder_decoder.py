"""Encoder-decoders: cached logits equal uncached ones wherever the padding is, scanned equal unrolled."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.language.common import ENCODER_DECODERS, made, padded, relative, tokens_of
from tests.language.test_decoder import TOLERANCE, compiled
from vlm_jax import registry
from vlm_jax.errors import ConfigError


@pytest.mark.parametrize("name", ["t5", "umt5", pytest.param("pix2struct", marks=pytest.mark.slow)])
def test_cached_equals_uncached(name):
    model, params = made("encoder_decoder", name)
    lengths, tokens, targets = np.array([7, 4, 1, 6, 3]), tokens_of(5, 7), tokens_of(5, 4, 2)
    found = []
    for side in ("right", "left", "between"):
        prompt, valid = padded(tokens, lengths, side)
        inputs = {"tokens": prompt, "valid": valid}
        expected = compiled(model)(params, {**inputs, "targets": targets, "target_valid": jnp.ones((5, 4), bool)})
        assert expected.shape == (5, 4, 61) and expected.dtype == jnp.float32
        logits, cache = compiled(model, "start", (6,))(params, inputs)
        out = [logits]
        for step in range(3):
            logits, cache = compiled(model, "extend")(params, targets[:, step:step + 1], cache)
            out.append(logits[:, 0])
        assert relative(np.stack(out, axis=1), expected) < TOLERANCE
        found.append(np.asarray(expected))
    assert relative(found[1], found[0]) < TOLERANCE and relative(found[2], found[0]) < TOLERANCE


def test_padding_of_targets_is_not_read():
    model, params = made("encoder_decoder", "t5")
    inputs, targets = {"tokens": tokens_of(5, 7), "valid": jnp.ones((5, 7), bool)}, tokens_of(5, 4, 2)
    expected = compiled(model)(params, {**inputs, "targets": targets, "target_valid": jnp.ones((5, 4), bool)})
    valid = jnp.arange(4)[None] < 3
    found = compiled(model)(params, {**inputs, "targets": jnp.where(valid, targets, 999), "target_valid": jnp.broadcast_to(valid, (5, 4))})
    assert relative(found[:, :3], expected[:, :3]) < TOLERANCE


@pytest.mark.slow
def test_scanned_equals_unrolled():
    model, params = made("encoder_decoder", "umt5", encoder_depth=2, decoder_depth=2)
    unrolled = model.clone(scan=False, remat="full")
    inputs = {"tokens": tokens_of(2, 5), "targets": tokens_of(2, 3)}

    def loss(model, params):
        logits, _ = model.apply({"params": params}, inputs)
        return jnp.square(logits).mean(), logits

    (gradient, one), (other, two) = (jax.jit(jax.grad(lambda params, each=each: loss(each, params), has_aux=True))(params) for each in (model, unrolled))
    assert relative(one, two) < TOLERANCE
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(other), strict=True):
        assert np.abs(np.asarray(a)).max() > 0 and relative(a, b) < 1e-4, path


def test_the_encoder_runs_once_and_its_keys_are_kept():
    model, params = made("encoder_decoder", "t5")
    prompt, valid = padded(tokens_of(5, 7), [7, 4, 1, 6, 3], "right")
    _, cache = compiled(model, "start", (6,))(params, {"tokens": prompt, "valid": valid})
    key, value, kept = cache.encoded
    assert key.shape == value.shape == (3, 5, 7, 3, 10) and (kept == valid).all()
    _, after = compiled(model, "extend")(params, tokens_of(5, 1), cache)
    assert (after.encoded[0] == key).all() and (after.encoded[2] == valid).all()
    without = jax.tree.map(lambda leaf: leaf, params) | {"encoder": {}, "token_embedding": params["token_embedding"]}
    jax.eval_shape(lambda params: model.apply({"params": params}, tokens_of(5, 1), cache, method="extend"), without)    # the encoder is not there


@pytest.mark.parametrize("name, paths", [
    ("t5", {"token_embedding", "encoder/relative_bias", "decoder/relative_bias", "decoder/blocks/cross_attention/query/kernel",
            "decoder/blocks/norm_cross/scale", "encoder/norm/scale"}),
    ("umt5", {"head/kernel", "decoder/blocks/mlp/gate/kernel", "encoder/relative_bias"}),
])
def test_parameter_paths(name, paths):
    _, params = made("encoder_decoder", name)
    found = {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert paths <= set(found) and not any(path.startswith("head") for path in found if name == "t5")
    assert found["encoder/relative_bias"] == ((8, 3) if name == "t5" else (2, 8, 3))
    _, without = made("encoder_decoder", "pix2struct")
    assert "relative_bias" not in without["encoder"] and "relative_bias" in without["decoder"]


@pytest.mark.parametrize("settings, message", [
    (dict(relative=dict(bucket=3)), 'model.relative.bucket: relative_settings takes no such setting. Did you mean "buckets"'),
    (dict(relative=dict(buckets=2)), "model.relative: 2 buckets"),
    (dict(activation="gleu"), 'activation: "gleu" is unknown'),
    (dict(norm="rmx"), 'norm: "rmx" is unknown'),
])
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        registry.build("encoder_decoder", **{**ENCODER_DECODERS["t5"], **settings})


def test_inputs_that_do_not_fit():
    model, params = made("encoder_decoder", "t5")
    with pytest.raises(ConfigError, match=r'inputs\["targets"\] \[B, T\] are missing'):
        model.apply({"params": params}, {"tokens": tokens_of(2, 3)})
    with pytest.raises(ConfigError, match="do not fit 2 rows"):
        jax.eval_shape(lambda: model.apply({"params": params}, {"tokens": tokens_of(2, 3), "targets": tokens_of(3, 3)}))

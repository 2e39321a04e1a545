import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import registry
from vlm_jax.errors import ConfigError
from vlm_jax.models.dual_encoder import DualEncoder, normalize, parameter_count

GOLDEN = Path(__file__).with_name("golden_parameters.txt")
TOWER = dict(width=12, depth=1, mlp_dim=20, num_heads=3)
IMAGE = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 12, 3)), jnp.float32)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 19, (3, 5)))


def make(**settings):
    towers = dict(image=dict(TOWER, image_size=(8, 12), patch_size=4), text=dict(TOWER, vocab_size=19, length=5))
    return DualEncoder(**{**towers, "embed_dim": 12, **settings})


def shapes_of(model):
    inputs = model.input_shapes()
    return jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, *inputs["image"])), jnp.zeros((2, *inputs["tokens"]), jnp.int32))


def test_outputs_methods_and_input_shapes():
    model = make()
    assert model.input_shapes() == {"image": (8, 12, 3), "tokens": (5,)}
    variables = jax.jit(model.init)(jax.random.key(0), IMAGE, TOKENS)
    ((image, text), out) = jax.jit(model.apply)(variables, IMAGE, TOKENS)
    assert image.shape == text.shape == (3, 12) and image.dtype == text.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(image, axis=1), 1, atol=1e-6)
    assert float(out["logit_scale"]) == pytest.approx(math.log(10)) and float(out["logit_bias"]) == -10
    alone, of_image = jax.jit(lambda v, x: model.apply(v, x, method="encode_image"))(variables, IMAGE)
    np.testing.assert_allclose(alone, image, atol=1e-6)
    assert of_image["pooled"].shape == (3, 12)
    alone, of_text = jax.jit(lambda v, x: model.apply(v, x, method="encode_text"))(variables, TOKENS)
    np.testing.assert_allclose(alone, text, atol=1e-6)
    assert of_text["tokens"].shape == (3, 5, 12)
    assert hash(model) == hash(make()) and model == make()


def test_softmax_has_no_bias_and_starts_at_its_temperature():
    (_, out), variables = jax.jit(make(loss="softmax").init_with_output)(jax.random.key(0), IMAGE, TOKENS)
    assert float(out["logit_scale"]) == pytest.approx(math.log(1 / 0.07)) and "logit_bias" not in out and "logit_bias" not in variables["params"]


def test_bfloat16_computes_but_does_not_store():
    ((image, _), out), variables = shapes_of(make(dtype="bfloat16"))
    # What products give is bfloat16, the stream to which blocks add and what comes of it float32.
    assert image.dtype == out["image"]["tokens"].dtype == out["text"]["blocks"]["output"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    (_, _), variables = shapes_of(make(param_dtype="bfloat16"))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables["params"]["image"])} == {"bfloat16"}


def test_normalize_survives_zeros():
    value, gradient = jax.value_and_grad(lambda x: normalize(x).sum())(jnp.zeros((1, 4)))
    assert float(value) == 0 and np.isfinite(gradient).all()


@pytest.mark.parametrize("settings, message", [
    (dict(embed_dim=13), r"model.image: its embeddings are 12 wide, the joint space is 13"),
    (dict(image=dict(TOWER, pach_size=4)), 'model.image.pach_size: Vit takes no such setting. Did you mean "patch_size"'),
    (dict(text=dict(variant="Bb")), 'variant: "Bb" is unknown'),
    (dict(loss="sigmod"), 'model.loss: "sigmod" is unknown. Did you mean "sigmoid"'),
    (dict(loss="softmax", logit_bias_init=-1.0), "the softmax loss has no bias"),
])
def test_errors(settings, message):
    with pytest.raises(ConfigError, match=message):
        shapes_of(make(**settings))


# Counted from transformers' classes built with the published sizes; those agree with the published checkpoints.
@pytest.mark.parametrize("family, preset, count", [
    ("siglip", "b16-224", 203_155_970), ("siglip", "so400m14-384", 877_960_498), ("siglip2", "b16-224", 375_187_970),
    ("siglip2", "g-opt16-256", 1_871_393_906), ("clip", "b32-224", 151_277_313), ("clip", "l14-224", 427_616_513),
])
def test_published_parameter_counts(family, preset, count):
    assert parameter_count(registry.build(family, preset)) == count


def listing() -> str:
    """Every parameter's path and shape: one preset of each kind that is published, and the tests' own."""
    lines = []
    for family, preset in (("siglip", "test"), ("siglip", "b16-224"), ("clip", "test"), ("clip", "b32-224"), ("lit", "test")):
        _, variables = shapes_of(registry.build(family, preset))
        lines.append(f"# {family} {preset}")
        for path, leaf in jax.tree_util.tree_flatten_with_path(variables["params"])[0]:
            lines.append("/".join(key.key for key in path) + " " + "x".join(map(str, leaf.shape)))
    return "\n".join(lines) + "\n"


def test_parameter_paths_are_golden():
    """Paths are an interface of checkpoints, rules and weight tables; after a wanted change run `python -m tests.models.test_dual_encoder`."""
    assert listing() == GOLDEN.read_text()


if __name__ == "__main__":
    GOLDEN.write_text(listing())


def test_a_convolutional_tower_learns_contrastively():
    """Flamingo's vision pre-training: means of both sides, projected to one width without biases."""
    image_settings = dict(widths=(8,), depths=(2,), strides=(1,), stem="pool", group_size=2)
    model = registry.build("nfnet_contrastive", "test", image=image_settings, text=dict(depth=1))
    assert model.input_shapes() == {"image": (24, 24, 3), "tokens": (16,)}
    rng = np.random.default_rng(0)
    image, tokens = rng.normal(size=(3, 24, 24, 3)).astype(np.float32), np.arange(48).reshape(3, 16)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), jax.eval_shape(model.init, jax.random.key(0), image, tokens)["params"])
    assert params["image"]["projection"]["kernel"].shape == (16, 48) and "bias" not in params["image"]["projection"] and "logit_bias" not in params

    def similarity(params):
        (a, b), out = model.apply({"params": params}, image, tokens, True)
        return (a * b).sum(), out["image"]["pooled"]
    gradient, pooled = jax.jit(jax.grad(similarity, has_aux=True))(params)
    assert pooled.shape == (3, 16)
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["image"]))
    full = registry.build("nfnet_contrastive", "f6")
    assert full.towers()[0].out_width == full.towers()[1].out_width == full.embed_dim == 1376

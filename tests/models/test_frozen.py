"""Frozen: pictures as a few embeddings of a convolutional tower, learned through a language model that does not move; towers by name."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.generative import abstract_inputs, parameter_count, parameter_shapes
from vlm_jax import registry
from vlm_jax.encoders.nfnet import NFNet
from vlm_jax.errors import ConfigError
from vlm_jax.models.prefix_lm import PrefixLM

IMAGE = dict(tower="nf_resnet", image_size=(9, 13), widths=(16,), depths=(2,), strides=(2,))
LANGUAGE = dict(vocab_size=31, width=16, depth=2, mlp_dim=24, num_heads=4, norm="layer", activation="gelu", gated=False)
MODEL = PrefixLM(IMAGE, LANGUAGE, projection="prefix", prefix_tokens=3)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def params():
    shapes = parameter_shapes(MODEL)
    return jax.tree.map(lambda leaf: (RNG.normal(size=leaf.shape) * 0.3).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(lambda params, inputs: MODEL.apply({"params": params}, inputs)[0])


def document():
    """Text, the first picture, text, the second, text: 13 tokens."""
    slots = np.concatenate([[-1, -1], np.arange(3), [-1, -1], np.arange(3, 6), [-1, -1, -1]])
    return dict(tokens=RNG.integers(0, 31, (2, 13)), slots=np.tile(slots, (2, 1)), images=RNG.normal(size=(2, 2, 9, 13, 3)).astype(np.float32))


def test_a_picture_is_the_projection_of_its_pooled_vector(params):
    inputs = document()
    bound = MODEL.bind({"params": params})
    embedded = bound.embedded(dict(inputs))[0]["embeddings"]
    pooled, out = bound.image_tower(jnp.asarray(inputs["images"][1]))
    assert pooled.shape == (2, 16) and isinstance(bound.image_tower, NFNet)
    np.testing.assert_allclose(pooled, out["tokens"].mean(1), atol=1e-6)
    kernel, bias = params["projection"]["kernel"], params["projection"]["bias"]
    assert kernel.shape == (16, 3, 16) and MODEL.image_tokens() == 3
    np.testing.assert_allclose(embedded[1, 2:5], np.einsum("d,dne->ne", pooled[0], kernel) + bias, atol=1e-5)
    np.testing.assert_allclose(embedded[1, 7:10], np.einsum("d,dne->ne", pooled[1], kernel) + bias, atol=1e-5)
    np.testing.assert_allclose(embedded[1, 0], params["language"]["token_embedding"][inputs["tokens"][1, 0]], rtol=1e-6)


def test_pictures_stand_anywhere_and_act_forwards_only(params, apply):
    inputs = document()
    logits = apply(params, inputs)
    assert logits.shape == (2, 13, 31)
    other = dict(inputs, images=inputs["images"].copy())
    other["images"][:, 1] += 1
    changed = np.abs(apply(params, other) - logits).max((0, 2))
    assert (changed[:7] == 0).all() and (changed[7:] > 1e-4).all()
    # Positions are relative: behind padding everything says the same.
    padded = {"tokens": np.pad(inputs["tokens"], ((0, 0), (4, 0))), "slots": np.pad(inputs["slots"], ((0, 0), (4, 0)), constant_values=-1),
              "images": inputs["images"], "valid": np.pad(np.ones((2, 13), bool), ((0, 0), (4, 0))), "positions": np.tile(np.arange(17), (2, 1))}
    np.testing.assert_allclose(apply(params, padded)[:, 4:], logits, atol=1e-4)


def test_the_tower_learns_through_the_language_model(params):
    inputs = document()

    def loss(params):
        return -jax.nn.log_softmax(MODEL.apply({"params": params}, inputs)[0])[:, -2, 5].mean()
    gradient = jax.jit(jax.grad(loss))(params)
    for leaf in jax.tree.leaves((gradient["image"], gradient["projection"])):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


def test_decoding_goes_on_with_further_pictures(params, apply):
    inputs = document()
    logits = apply(params, inputs)
    first = {"tokens": inputs["tokens"][:, :6], "slots": inputs["slots"][:, :6], "images": inputs["images"][:, :1]}
    _, cache = MODEL.apply({"params": params}, first, 16, method="start")
    slots = np.where(inputs["slots"][:, 6:] < 0, -1, inputs["slots"][:, 6:] - 3)
    after, _ = MODEL.apply({"params": params}, inputs["tokens"][:, 6:], cache, images=inputs["images"][:, 1:], slots=slots, method="extend")
    np.testing.assert_allclose(after, logits[:, 6:], atol=1e-4)


NFNET = dict(tower="nfnet", image_size=20, widths=(8,), depths=(1,), strides=(1,), group_size=2)
VIT = dict(image_size=(8, 12), patch_size=4, width=12, depth=1, mlp_dim=20, num_heads=3)


@pytest.mark.parametrize("image, width", [(IMAGE, 16), (NFNET, 16), (VIT, 12)])
def test_any_tower_can_be_read_as_a_prefix(image, width):
    model = PrefixLM(image, LANGUAGE, projection="prefix", prefix_tokens=3)
    assert model.image_tokens() == 3 and parameter_shapes(model)["projection"]["kernel"].shape == (width, 3, 16)


def test_a_grid_of_a_convolutional_tower_is_read_like_patches():
    model = PrefixLM(dict(IMAGE), LANGUAGE)
    assert model.image_tokens() == 2 * 2 and parameter_shapes(model)["projection"]["kernel"].shape == (16, 16)
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), abstract_inputs(model))[0]
    assert logits.shape == (1, 5, 31)


def test_presets():
    model = registry.build("frozen", "frozen-7b")
    shapes = parameter_shapes(model)
    tower = sum(leaf.size for leaf in jax.tree.leaves(shapes["image"]))
    assert model.image_tokens() == 2 and tower == 25_556_984 - 2049 * 1000 and shapes["projection"]["kernel"].shape == (2048, 2, 4096)
    assert parameter_count(model) == pytest.approx(6.6e9, rel=0.02)
    for preset in ("test", "shapes"):
        assert registry.build("frozen", preset).image_tokens() == 2


@pytest.mark.parametrize("image, settings, message", [
    (dict(IMAGE, pool="none"), dict(projection="prefix"), 'model.projection="prefix" maps one vector of a picture; set model.image.pool="gap"'),
    (dict(IMAGE, pool="gap"), {}, 'model.image.pool is "gap", but the language model reads every token'),
    (dict(IMAGE, tower="resnet"), {}, 'model.image.tower: "resnet" is unknown. Did you mean "nf_resnet"'),
    (dict(IMAGE, patch_size=4), {}, "model.image.patch_size: NFNet takes no such setting"),
    (dict(IMAGE, variant="F9"), {}, 'variant: "F9" is unknown'),
    (dict(IMAGE), dict(projection="prefix", prefix_tokens=0), "model.prefix_tokens is 0"),
])
def test_errors(image, settings, message):
    model = PrefixLM(image, LANGUAGE, **settings)
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), abstract_inputs(model))

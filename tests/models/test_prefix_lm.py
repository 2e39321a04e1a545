"""The prefix language model: where pictures stand, several of them, other sizes, text alone, sizes of the published models."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.generative import abstract_inputs, parameter_count
from vlm_jax import registry
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.models.prefix_lm import PrefixLM
from vlm_jax.models.visual_tokens import check_slots

IMAGE = dict(image_size=(8, 12), patch_size=4, width=12, depth=1, mlp_dim=20, num_heads=3)   # six tokens
LANGUAGE = dict(vocab_size=31, width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=2, embed_scale=4.0, norm="rms_plus_one")
MODEL = PrefixLM(IMAGE, LANGUAGE)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def variables():
    shapes = abstract_inputs(MODEL, 2)
    return jax.jit(MODEL.init)(jax.random.key(0), {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()})


@pytest.fixture(scope="module")
def apply():
    return jax.jit(MODEL.apply)


def two_pictures():
    """Text, the second picture, text, the first picture, text: 16 tokens."""
    slots = np.concatenate([[-1], np.arange(6, 12), [-1], np.arange(6), [-1, -1]])
    return dict(tokens=RNG.integers(0, 31, (2, 16)), slots=np.tile(slots, (2, 1)), images=RNG.normal(size=(2, 2, 8, 12, 3)).astype(np.float32))


def test_several_pictures_stand_where_slots_say(variables, apply):
    inputs = two_pictures()
    logits, out = apply(variables, inputs)
    assert logits.shape == (2, 16, 31) and logits.dtype == jnp.float32 and out["hidden"].shape == (2, 16, 16)
    assert out["image"]["tokens"].shape == (4, 6, 12)
    swapped = dict(inputs, images=inputs["images"][:, ::-1], slots=np.where(inputs["slots"] < 0, -1, (inputs["slots"] + 6) % 12))
    np.testing.assert_allclose(apply(variables, swapped)[0], logits, atol=1e-5)
    under = dict(inputs, tokens=np.where(inputs["slots"] < 0, inputs["tokens"], 0))   # what an image token covers is not read
    np.testing.assert_array_equal(apply(variables, under)[0], logits)


def test_image_tokens_are_those_of_the_tower_unscaled(variables):
    inputs = two_pictures()
    bound = MODEL.bind(variables)
    embedded = bound.embedded(dict(inputs))[0]["embeddings"]
    tokens, _ = bound.image_tower(jnp.asarray(inputs["images"][0]))
    np.testing.assert_allclose(embedded[0, 8:14], bound.projector(tokens)[0], rtol=1e-5, atol=1e-6)
    table = variables["params"]["language"]["token_embedding"]
    np.testing.assert_allclose(embedded[0, 0], 4.0 * table[inputs["tokens"][0, 0]], rtol=1e-6)


def test_without_pictures_it_is_the_decoder(variables, apply):
    tokens = RNG.integers(0, 31, (2, 5))
    alone = MODEL.parts()[1].apply({"params": variables["params"]["language"]}, {"tokens": tokens})[0]
    np.testing.assert_allclose(apply(variables, {"tokens": tokens})[0], alone, atol=1e-5)
    head = MODEL.head(variables["params"])
    assert head["tied"] and head["kernel"] is variables["params"]["language"]["token_embedding"]


def test_other_resolutions_resample_the_positions(variables, apply):
    slots = np.concatenate([np.arange(12), [-1]])[None]
    inputs = dict(tokens=np.ones((1, 13), int), slots=slots, images=RNG.normal(size=(1, 1, 16, 12, 3)).astype(np.float32))
    logits, out = apply(variables, inputs)
    assert out["image"]["tokens"].shape == (1, 12, 12) and np.isfinite(logits).all()


@pytest.mark.parametrize("slots, images, message", [
    (np.arange(5)[None], 1, r"cats\[7\]: its text has 5 places for image tokens, its 1 picture\(s\) give 6; set processor.format.image_tokens=6"),
    (np.arange(12)[None], 1, r"cats\[7\]: its text has places for 2 pictures, but the example has 1"),
    (np.array([[0, 1, 2, 3, 5, 4]]), 1, "its text has 6 places"),
])
def test_image_token_count_mismatch_names_the_sample(slots, images, message):
    with pytest.raises(DataError, match=message):
        check_slots(slots, images, 6, ["cats[7]"])


def test_right_slots_pass():
    check_slots(np.array([[-1, 0, 1, 2, 3, 4, 5, -1], [-1] * 8]), 2, 6, ["a", "b"])


@pytest.mark.parametrize("model, inputs, message", [
    (MODEL, dict(tokens=jnp.zeros((1, 4), int), images=jnp.zeros((1, 1, 8, 12, 3))), "images without slots"),
    (MODEL, dict(tokens=jnp.zeros((1, 4), int), slots=jnp.zeros((1, 4), int), images=jnp.zeros((1, 8, 12, 3))), r'"images" have shape \(1, 8, 12, 3\)'),
    (PrefixLM(dict(IMAGE, pool="map"), LANGUAGE), None, 'model.image.pool is "map"'),
    (PrefixLM(IMAGE, LANGUAGE, projection="linaer"), None, 'model.projection: "linaer" is unknown. Did you mean "linear"'),
    (PrefixLM(IMAGE, dict(LANGUAGE, widht=3)), None, 'model.language.widht: Decoder takes no such setting'),
])
def test_errors(model, inputs, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), inputs or abstract_inputs(model))


# Counted from transformers' classes, built without values at the published sizes.
@pytest.mark.parametrize("preset, count", [("paligemma-3b-224", 2_923_466_480), ("paligemma-3b-448", 2_924_351_216), ("paligemma-3b-896", 2_927_890_160),
                                           ("paligemma2-3b-224", 3_032_242_416), ("paligemma2-10b-224", 9_662_638_832), ("paligemma2-28b-224", 27_650_487_024)])
def test_published_parameter_counts(preset, count):
    assert parameter_count(registry.build("paligemma", preset)) == count

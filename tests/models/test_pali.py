"""Pictures in the encoder of an encoder-decoder: order, slots, several of them, flexible patches, sizes of the published models."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.generative import abstract_inputs, parameter_count
from vlm_jax import registry
from vlm_jax.errors import ConfigError
from vlm_jax.models.pali import Pali
from vlm_jax.models.pix2struct import Pix2Struct

IMAGE = dict(image_size=8, patch_size=4, width=12, depth=1, mlp_dim=20, num_heads=3)   # four tokens
LANGUAGE = dict(vocab_size=31, width=16, encoder_depth=1, decoder_depth=2, mlp_dim=24, num_heads=2, head_dim=8, activation="gelu_tanh", gated=True, tied=False)
FLEXIBLE = dict(max_patches=6, patch_size=2, max_rows=9, width=12, depth=1, mlp_dim=20, num_heads=3)
RNG = np.random.default_rng(0)


def init(model):
    inputs = {name: jnp.ones(leaf.shape, leaf.dtype) for name, leaf in abstract_inputs(model, 2).items()}
    return jax.jit(model.init)(jax.random.key(0), inputs)


@pytest.fixture(scope="module")
def grid():
    model = Pali(IMAGE, LANGUAGE)
    return model, init(model), jax.jit(model.apply)


def question(pictures: int, text: int = 5):
    return dict(tokens=RNG.integers(0, 31, (2, text)), targets=RNG.integers(0, 31, (2, 3)), images=RNG.normal(size=(2, pictures, 8, 8, 3)).astype(np.float32))


def test_pictures_stand_in_front_of_the_text(grid):
    model, variables, apply = grid
    inputs = question(2)
    logits, out = apply(variables, inputs)
    assert logits.shape == (2, 3, 31) and out["encoded"].shape == (2, 13, 16) and out["image"]["tokens"].shape == (4, 4, 12)
    slots = np.tile(np.concatenate([np.arange(8), [-1] * 5]), (2, 1))
    padded = np.concatenate([np.zeros((2, 8), int), inputs["tokens"]], 1)
    np.testing.assert_allclose(apply(variables, dict(inputs, tokens=padded, slots=slots))[0], logits, atol=1e-5)
    other = dict(inputs, images=inputs["images"][:, ::-1])
    assert float(np.abs(apply(variables, other)[0] - logits).max()) > 1e-4


def test_padding_of_the_text_and_cached_answers(grid):
    model, variables, apply = grid
    inputs = question(1)
    valid = np.ones((2, 5), bool)
    valid[1, 3:] = False
    inputs["valid"] = valid
    logits, _ = apply(variables, inputs)
    changed = inputs["tokens"].copy()
    changed[1, 3:] = 7
    np.testing.assert_allclose(apply(variables, dict(inputs, tokens=changed))[0], logits, atol=1e-6)
    prompt = {name: value for name, value in inputs.items() if name != "targets"}
    first, cache = jax.jit(lambda inputs: model.apply(variables, inputs, 4, method="start"))(prompt)
    rest, _ = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache, method="extend"))(jnp.asarray(inputs["targets"][:, :2]), cache)
    np.testing.assert_allclose(jnp.concatenate([first[:, None], rest], 1), logits, atol=1e-5)


def test_text_alone_needs_no_picture(grid):
    model, variables, apply = grid
    inputs = {name: value for name, value in question(1).items() if name != "images"}
    alone = model.parts()[1].apply({"params": variables["params"]["language"]}, inputs)[0]
    np.testing.assert_allclose(apply(variables, inputs)[0], alone, atol=1e-5)
    assert not model.head(variables["params"])["tied"]


def test_flexible_patches_and_their_padding():
    model = Pali(FLEXIBLE, LANGUAGE, patching="flexible")
    assert model.image_tokens() == 6 and model.input_shapes()["patches"] == (6, 14)
    variables, apply = init(model), jax.jit(model.apply)
    patches = RNG.normal(size=(2, 6, 14)).astype(np.float32)
    patches[..., :2] = np.array([[1, 1], [1, 2], [2, 1], [2, 2], [0, 0], [0, 0]])
    inputs = dict(patches=patches, tokens=RNG.integers(0, 31, (2, 3)), targets=RNG.integers(0, 31, (2, 3)))
    logits, _ = apply(variables, inputs)
    noisy = patches.copy()
    noisy[:, 4:, 2:] = 9
    np.testing.assert_allclose(apply(variables, dict(inputs, patches=noisy))[0], logits, atol=1e-5)
    moved = patches.copy()
    moved[:, :4, :2] = patches[:, :4, 1::-1]
    assert float(np.abs(apply(variables, dict(inputs, patches=moved))[0] - logits).max()) > 1e-4


@pytest.mark.parametrize("model, inputs, message", [
    (Pali(IMAGE, LANGUAGE), dict(question(1), images=jnp.zeros((2, 8, 8, 3))), r'"images" have shape \(2, 8, 8, 3\)'),
    (Pali(FLEXIBLE, LANGUAGE, patching="flexibel"), None, 'model.patching: "flexibel" is unknown. Did you mean "flexible"'),
    (Pali(FLEXIBLE, LANGUAGE), None, "model.image.max_patches: Vit takes no such setting"),
    (Pix2Struct(dict(patch=2), LANGUAGE), None, 'model.image.patch: .* takes no such setting. Did you mean "patch_size"'),
    (Pix2Struct({}, LANGUAGE), dict(question(1)), 'reads "patches", which the inputs lack'),
])
def test_errors(model, inputs, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), inputs or abstract_inputs(model))


# Pix2Struct: counted from transformers' class. The others: the papers' figures, of tower and language model (models/pali_presets.py says what is open).
@pytest.mark.parametrize("family, preset, count, tolerance", [
    ("pix2struct", "base", 282_285_696, 0), ("pix2struct", "large", 1_336_107_264, 0),
    ("pali", "pali-3b", 3.0e9, 0.05), ("pali", "pali-15b", 14.8e9, 0.02), ("pali", "pali-17b", 16.9e9, 0.02), ("pali", "pali-x-55b", 55e9, 0.05),
    ("pali", "pali-3-5b", 5e9, 0.1), ("screenai", "screenai-670m", 675e6, 0.01), ("screenai", "screenai-2b", 1.883e9, 0.02),
    ("screenai", "screenai-5b", 4.62e9, 0.05),
])
def test_published_sizes(family, preset, count, tolerance):
    found = parameter_count(registry.build(family, preset))
    assert found == count if not tolerance else abs(found / count - 1) <= tolerance, found

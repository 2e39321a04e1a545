"""Padding changes nothing, and a mesh changes nothing beyond rounding."""
import jax
import numpy as np
import pytest

from vlm_jax import registry
from vlm_jax.data.processor import Processor
from vlm_jax.errors import ConfigError
from vlm_jax.evaluation.predictor import Predictor, padded_batches
from vlm_jax.sharding.mesh import make_mesh

TEXTS = [f"a {word} thing" for word in ("red", "green", "blue", "small", "large")]


@pytest.fixture(scope="module")
def parts():
    model = registry.build("siglip", "test")
    train_on = {"name": "shapes", "split": "train", "size": 24, "limit": 50}
    processor = Processor(image=[["resize", {"size": 24}], ["value_range", {"low": -1, "high": 1}]],
                          text=[["lowercase", {}], ["tokenize", {"tokenizer": {"train_on": train_on, "vocab_size": 300}, "length": 16, "eos": "sticky"}]])
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 24, 24, 3), np.float32), np.zeros((1, 16), np.int32))["params"]
    images = [np.random.default_rng(i).integers(0, 256, (20 + i, 31, 3), np.uint8) for i in range(13)]
    return model, params, processor, images


def test_thirteen_examples_at_batch_four_equal_batch_thirteen(parts):
    model, params, processor, images = parts
    small, large = Predictor(model, params, processor, batch_size=4), Predictor(model, params, processor, batch_size=13)
    np.testing.assert_allclose(small.embed_images(images), large.embed_images(images), rtol=0, atol=2e-6)
    np.testing.assert_allclose(small.embed_texts(TEXTS), large.embed_texts(TEXTS), rtol=0, atol=2e-6)
    assert small.embed_images(images).shape == (13, 64)
    np.testing.assert_allclose(np.linalg.norm(small.embed_images(images), axis=1), 1, atol=1e-5)


def test_a_mesh_gives_the_same_embeddings(parts):
    model, params, processor, images = parts
    alone = Predictor(model, params, processor, batch_size=4).embed_images(images)
    mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        spread = Predictor(model, params, processor, mesh=mesh, batch_size=6)
        assert spread.batch_size == 8   # rounded up to what the devices share evenly
        np.testing.assert_allclose(spread.embed_images(images), alone, rtol=0, atol=2e-6)


def test_features_are_before_normalisation(parts):
    model, params, processor, images = parts
    features = Predictor(model, params, processor, batch_size=4).features(images[:3])
    assert features.shape[0] == 3 and not np.allclose(np.linalg.norm(features, axis=1), 1)


def test_nothing_in_nothing_out(parts):
    model, params, processor, _ = parts
    assert Predictor(model, params, processor).embed_images([]).shape == (0, 64)
    with pytest.raises(ConfigError, match="batch_size"):
        Predictor(model, params, processor, batch_size=0)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 9])
def test_padded_batches_cover_each_example_once(count):
    batches = list(padded_batches((np.array([i]) for i in range(count)), 4))
    seen = [int(row[0]) for batch, valid in batches for row in batch[:valid]]
    assert seen == list(range(count)) and all(len(batch) == 4 for batch, _ in batches)

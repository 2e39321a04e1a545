"""From documents to a Flamingo's loss and answers: what the format gives is what the model reads, and no picture reaches a text that it must not."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.test_interleaved import TOKENIZER, Listed, document, picture
from vlm_jax.data.documents import image_segment, text_segment
from vlm_jax.data.loader import Loader
from vlm_jax.data.processor import Processor
from vlm_jax.errors import ConfigError
from vlm_jax.evaluation.generator import Generator
from vlm_jax.registry import build
from vlm_jax.tasks.generation import generation_task

RECORDS = [document("my pets", 10, "a dog", 200, "a cat"), {"image": picture(90), "prompt": "a", "texts": ["star"]}]


@pytest.fixture(scope="module")
def flamingo():
    """(model, parameters with open gates, processor)"""
    model = build("flamingo", "test", language=dict(vocab_size=TOKENIZER.vocab_size, new_tokens=0))
    processor = Processor([["resize", {"size": 24}], ["value_range", {"low": -1, "high": 1}]], [["tokenize", {"tokenizer": TOKENIZER.to_dict()}]],
                          {"kind": "interleaved", "length": 32, "pictures": 3, "pack": 2})
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(generation_task(model).init, jax.random.key(0))
    params = jax.tree.map_with_path(lambda path, leaf: np.float32(0.15 * rng.standard_normal(leaf.shape) + (path[-1].key == "scale")), shapes)
    return model, params, processor


def test_losses_and_gradients_of_a_batch(flamingo):
    model, params, processor = flamingo
    task = generation_task(model)
    task.check_fit(processor, "processor")
    batch = next(Loader(Listed(RECORDS), processor, 2, shuffle=False, on_bad="raise").batches())
    assert {key: (value.shape[1:], value.dtype) for key, value in batch.items() if key not in ("mask", "weight", "example_id")} == {
        key: (shape, np.dtype(dtype)) for key, (shape, dtype) in task.batch_shapes(processor.to_dict()).items()}
    task.check_batch(params, {"pages": batch})

    def loss(images):
        (total, count), = task.loss(params, {}, {"pages": {**batch, "images": images}}, jax.random.key(0), 0)[0].values()
        return total / count, count

    (value, count), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.asarray(batch["images"]))
    assert count == batch["loss_weights"].sum() and 0 < value < 20
    used = np.abs(slope).max((2, 3, 4)) > 0
    assert used.tolist() == [[True, True, False], [True, False, False]]           # pictures that fill a row are read by nothing


def test_formats_that_a_model_cannot_read_are_refused(flamingo):
    model, _, processor = flamingo
    section = processor.to_dict()
    for wrong, other, message in ((dict(image_tokens=4), model, "image_tokens is 4, but the model makes 0"),
                                  (dict(), build("paligemma", "test"), "image_tokens is 0, but the model makes")):
        made = Processor(section["image"], section["text"], {**section["format"], **wrong})
        with pytest.raises(ConfigError, match=message):
            generation_task(other).check_fit(made, "processor")


def test_texts_of_a_row_read_their_own_pictures_only(flamingo):
    model, params, processor = flamingo
    arrays = processor({"documents": RECORDS})
    inputs = {key: jnp.asarray(value)[None] for key, value in arrays.items() if key != "loss_weights"}
    run = jax.jit(lambda images: model.apply({"params": params}, {**inputs, "images": images})[0][0])
    first = run(inputs["images"])
    for number in range(3):
        changed = np.abs(run(inputs["images"].at[0, number].set(0.3)) - first).max(-1) > 1e-6
        own = arrays["media_index"] == number
        segment = arrays["segment_ids"][own].max()
        place = np.flatnonzero(own)[0]
        assert changed[own].all() and not changed[:place].any() and not changed[arrays["segment_ids"] != segment].any()


def test_answers_about_documents_and_about_plain_pictures(flamingo):
    model, params, processor = flamingo
    questions = [[image_segment(picture(200)), text_segment("a")], [image_segment(picture(10)), text_segment("what?")]]
    asked, documents = processor.prompts([picture(200), picture(10)], ["a", "what?"]), processor.documents(questions)
    assert set(asked) == set(documents) and all(np.array_equal(asked[key], documents[key]) for key in asked)
    answers = Generator(model, params, processor, batch_size=2).answer([picture(200), picture(10)], ["a", "what?"], max_tokens=5)
    # The first token of each answer is the likeliest one after its document.
    logits, _ = jax.jit(lambda inputs: model.apply({"params": params}, inputs))({key: jnp.asarray(value) for key, value in documents.items()})
    last = documents["valid"].sum(1) - 1
    for answer, row, place in zip(answers, np.asarray(logits), last):
        first = int(row[place].argmax())
        assert answer.startswith(processor.decode([first]).strip()) or first in processor.format.end
    assert len(answers) == 2

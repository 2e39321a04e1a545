"""The preprocessing of an IDEFICS directory: ids, which picture each token reads and pixels as transformers' IdeficsProcessor makes them."""
import dataclasses
import json

import numpy as np
from PIL import Image
import pytest

from tests.data.tokenizer_samples import WORDS
import vlm_jax
from vlm_jax import registry
from vlm_jax.data.documents import image_segment, text_segment
from vlm_jax.data.processor import Processor
from vlm_jax.errors import ConfigError
from vlm_jax.interop.processors import image_operations, read_processor
from vlm_jax.restore import Loaded

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")
from transformers.models.idefics import processing_idefics  # noqa: E402
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil  # noqa: E402

AROUND, RNG = "<fake_token_around_image>", np.random.default_rng(0)
PICTURES = [Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)) for height, width in ((19, 31), (25, 25), (40, 13))]
MODEL = registry.build("idefics", "test")


def tokenizer_folder(folder, scheme, more=()):
    """A tokenizer of Llama's kind: a space is put in front of every piece of text ("prepend"), or of the first alone."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))  # noqa: S106
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([*WORDS, "User: Describe this image.\nAssistant: two dogs\n"] * 3, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>",  # noqa: S106
                                                additional_special_tokens=[AROUND, "<image>", *more])
    fast.save_pretrained(folder)
    return fast


def ids_and_mask(tokenizer, document, utterances=False):
    """What the reference's `__call__` makes of a document, by the functions of its module: its text, and which picture each token reads."""
    class Images:
        image_num_channels, image_size = 3, 20

        def __call__(self, images, **_):
            return torch.zeros(len(images), 3, 20, 20)
    processor = object.__new__(processing_idefics.IdeficsProcessor)
    processor.image_processor, processor.tokenizer, processor.image_token_id = Images(), tokenizer, tokenizer.convert_tokens_to_ids("<image>")
    processor.default_image_dims, processor.tokenizer_was_trained_with_end_of_utterance_token = (3, 20, 20), utterances
    processor._merge_kwargs = lambda *_, **__: {"text_kwargs": {"add_special_tokens": False, "padding": "longest"}, "images_kwargs": {}, "add_eos_token": False}
    made = processing_idefics.IdeficsProcessor.__call__(processor, text=[document])
    mask = made["image_attention_mask"][0].numpy()
    return made["input_ids"][0].numpy(), np.where(mask.any(-1), mask.argmax(-1), -1)


DOCUMENTS = [
    ["User:", PICTURES[0], "Describe this image.\nAssistant: two dogs\n", "User:", PICTURES[1], "Describe this image.\nAssistant:"],
    [PICTURES[0], PICTURES[1], PICTURES[2], " a red circle ", "User:"], ["the blue square", " is left of a star"], [PICTURES[2]],
    ["User:", PICTURES[0], "", PICTURES[1], "Ein Dreieck!"],
]


@pytest.mark.parametrize("scheme, utterances", [("prepend", False), ("first", False), ("prepend", True)])
def test_ids_and_pictures_of_documents(scheme, utterances, tmp_path):
    tokenizer = tokenizer_folder(tmp_path, scheme, ["<end_of_utterance>"] if utterances else [])
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "IdeficsImageProcessor", "image_size": 20}))
    processor = read_processor(str(tmp_path), MODEL, {})
    for document in DOCUMENTS:
        segments = [text_segment(item) if isinstance(item, str) else image_segment(item) for item in document]
        ours, (ids, index) = processor.document(segments), ids_and_mask(tokenizer, document, utterances)
        assert ours["tokens"].tolist() == ids.tolist()
        assert ours["media_index"].tolist() == index.tolist()
    assert processor.format.read_from == 1 and processor.format.pictures == 8 and not processor.format._chunk_end
    again = Processor.from_dict(processor.to_dict())
    assert again.digest == processor.digest and again.document(segments)["tokens"].tolist() == ids.tolist()


def test_documents_of_one_row_do_not_read_each_others_pictures(tmp_path):
    """As the reference masks what follows the end of a document, up to the next picture."""
    tokenizer = tokenizer_folder(tmp_path, "prepend")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "IdeficsImageProcessor", "image_size": 20}))
    settings = read_processor(str(tmp_path), MODEL, {}).to_dict()
    settings["format"] |= {"pack": 2, "length": 80}
    documents = [{"segments": [image_segment(PICTURES[0]), text_segment("a star")]},
                 {"segments": [text_segment("two dogs"), image_segment(PICTURES[1]), text_segment("a circle")]}]
    row = Processor.from_dict(settings)({"documents": documents})
    index, _ = processing_idefics.image_attention_mask_for_packed_input_ids(torch.from_numpy(row["tokens"][None].astype(np.int64)), tokenizer, "pt")
    np.testing.assert_array_equal(row["media_index"][row["valid"]], index[0].numpy()[row["valid"]])
    assert sorted(set(row["media_index"].tolist())) == [-1, 0, 1]


@pytest.mark.parametrize("config", [{"image_size": 21}, {"size": {"height": 17, "width": 17}}, {"image_size": 13, "size": {"height": 17, "width": 17}}])
def test_pixels(config, tmp_path):
    theirs = IdeficsImageProcessorPil(**config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "IdeficsImageProcessor", **config}))
    processor = Processor(image=image_operations(str(tmp_path)))
    for picture in PICTURES:
        made = theirs(picture, return_tensors="np")
        np.testing.assert_allclose(processor.image(picture), np.asarray(made)[0].transpose(1, 2, 0), atol=2e-6)


def test_a_directory_is_asked_about_pictures(tmp_path):
    """What `vlm_jax.load` gives is asked without another word; a document may have any number of pictures."""
    import jax
    tokenizer_folder(tmp_path, "prepend")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "IdeficsImageProcessor", "image_size": 24}))
    model = MODEL.clone(gated=dict(MODEL.gated, every=3))
    params = jax.jit(model.init)(jax.random.key(0), {name: np.zeros((1, *shape), np.float32 if name == "images" else np.int32)
                                                     for name, shape in model.input_shapes().items()})["params"]
    loaded = Loaded(model, params, None, {"model": {"name": "idefics"}}, 0)
    vlm_jax.save(dataclasses.replace(loaded, files={path.name: path.read_bytes() for path in tmp_path.iterdir()}), tmp_path / "model")
    read = vlm_jax.load(tmp_path / "model")
    inputs = read.processor.documents([[text_segment("User:"), *map(image_segment, PICTURES), text_segment("Describe")], [text_segment("two")]])
    assert inputs["images"].shape == (2, 3, 24, 24, 3) and (inputs["media_index"][1] == -1).all()
    logits, _ = jax.jit(read.model.apply)({"params": read.params}, inputs)
    assert np.isfinite(np.asarray(logits)[inputs["valid"]]).all()


@pytest.mark.parametrize("change, message", [(dict(read_from="<pic>"), "read_from: '<pic>' is no token of image_text"), (dict(join_texts=3), "join_texts is 3"),
                                             (dict(image_text=f"{AROUND}<image>"), "share_marks: image_text")])
def test_settings_that_cannot_be(change, message, tmp_path):
    tokenizer_folder(tmp_path, "prepend")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "IdeficsImageProcessor", "image_size": 20}))
    settings = read_processor(str(tmp_path), MODEL, {}).to_dict()
    with pytest.raises(ConfigError, match=message):
        Processor(settings["image"], settings["text"], {**settings["format"], **change})

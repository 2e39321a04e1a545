"""preprocessor_config.json as a processor: the same pixels as transformers' classes, there and back."""
import json

import numpy as np
from PIL import Image
import pytest

from vlm_jax.data.processor import Processor
from vlm_jax.errors import ConfigError
from vlm_jax.interop.processors import image_operations, processor_config, tokenizer_files

transformers = pytest.importorskip("transformers")
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil  # noqa: E402
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil  # noqa: E402
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil  # noqa: E402

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 58, 3), np.uint8))
CLASSES = {
    "siglip": (SiglipImageProcessorPil, dict(size={"height": 22, "width": 30})),
    "clip": (CLIPImageProcessorPil, dict(size={"shortest_edge": 24}, crop_size={"height": 20, "width": 22})),
    "vit": (ViTImageProcessorPil, dict(size={"height": 25, "width": 25}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])),
    "siglip2": (Siglip2ImageProcessorPil, dict(patch_size=5, max_num_patches=29)),
}


def operations_of(config, folder):
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return image_operations(str(folder))


@pytest.mark.parametrize("name", CLASSES)
def test_pixels_match_and_go_back(name, tmp_path):
    cls, settings = CLASSES[name]
    theirs = cls(**settings)
    theirs.save_pretrained(tmp_path)
    processor = Processor(image=image_operations(str(tmp_path)))
    made = theirs(PICTURE, return_tensors="np")
    ours = processor.image(PICTURE)
    if name == "siglip2":
        rows, columns = made["spatial_shapes"][0]
        assert ours[:, :2].max(0).tolist() == [rows, columns] and (ours[:, 0] > 0).sum() == made["pixel_attention_mask"].sum()
        expected, ours = made["pixel_values"][0], ours[:, 2:]
        ours, expected = ours[:rows * columns], expected[:rows * columns]
    else:
        expected = made["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(ours, expected, atol=2e-6)
    # What is written describes the same pixels, and transformers' class reads it.
    again = Processor(image=operations_of(processor_config(processor), tmp_path))
    assert again.digest == processor.digest
    back = cls.from_pretrained(tmp_path)(PICTURE, return_tensors="np")
    np.testing.assert_allclose(back["pixel_values"], made["pixel_values"], atol=2e-6)


@pytest.mark.parametrize("image", [
    [["siglip", {"size": 20}]], [["clip", {"size": 20}]], [["resize", {"size": [12, 20]}], ["value_range", {"low": -1, "high": 1}]],
    [["resize", {"size": 8}], ["value_range", {"low": -2, "high": 0}]], [["flexible_patches", {"max_patches": 9, "patch_size": 4}]],
])
def test_our_own_operations_have_a_form_there(image, tmp_path):
    processor = Processor(image=image)
    again = Processor(image=operations_of(processor_config(processor), tmp_path))
    np.testing.assert_allclose(again.image(PICTURE), processor.image(PICTURE), atol=1e-5)


@pytest.mark.parametrize("config, message", [
    ({"image_processor_type": "OwlImageProcessor"}, "image_processor_type: 'OwlImageProcessor' is unknown"),
    ({"image_processor_type": "SiglipImageProcessor", "size": {"height": -3, "width": 4}}, "size.height: -3 is not a whole number"),
    ({"image_processor_type": "SiglipImageProcessor", "resample": 9}, "resample: 9 is not a whole number from 0 to 5"),
    ({"image_processor_type": "SiglipImageProcessor", "image_std": [1, 0, 1]}, "image_std: three positive numbers are needed"),
    ({"image_processor_type": "SiglipImageProcessor", "do_rescale": False}, "do_rescale: false"),
    ({"image_processor_type": 3}, "image_processor_type: 3 is not a short printable string"),
])
def test_damaged_files(config, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        operations_of(config, tmp_path)
    assert message in str(error.value)


def test_what_has_no_form():
    with pytest.raises(ConfigError, match="pad_to_square has no form"):
        processor_config(Processor(image=[["pad_to_square"], ["resize", {"size": 8}], ["value_range"]]))


def test_a_combined_file_is_read_too(tmp_path):
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "SiglipProcessor", "image_processor": {
        "image_processor_type": "SiglipImageProcessorFast", "size": {"height": 9, "width": 9}}}))
    assert Processor(image=image_operations(str(tmp_path))).image_size == (9, 9)


def test_a_run_exports_its_tokenizer(tmp_path):
    pieces = [chr(c) for c in range(97, 103)] + [f"{chr(c)}</w>" for c in range(97, 103)] + ["ab", "<|startoftext|>", "<|endoftext|>"]
    settings = {"byte_pairs": {"pieces": pieces, "merges": ["a b"]}}
    processor = Processor(text=[["tokenize", {"tokenizer": settings, "length": 6}]])
    for name, content in tokenizer_files(processor).items():
        (tmp_path / name).write_bytes(content)
    again = Processor(text=[["tokenize", {"tokenizer": {"clip": str(tmp_path)}, "length": 6}]])
    assert again.text("abc fed").tolist() == processor.text("abc fed").tolist()


def test_tokens_of_our_own_are_exported_under_their_numbers(tmp_path):
    tokens = dict(train_on=dict(name="shapes_captions", split="train", size=16, count=20), vocab_size=300, added=["<bos>", "\n", "<loc0..3>"],
                  special=["<loc1>"], marks=dict(bos="<bos>"))
    first = Processor(text=[["tokenize", {"tokenizer": tokens, "length": 6}]])
    for name, content in tokenizer_files(first).items():
        (tmp_path / name).write_bytes(content)
    second = Processor(text=[["tokenize", {"tokenizer": {"path": str(tmp_path)}, "length": 6}]])
    text = "<bos>a red star\n<loc2><loc1>"
    assert second.tokenizer.encode(text) == first.tokenizer.encode(text)
    assert second.tokenizer.bos_id == first.tokenizer.bos_id and second.tokenizer.vocab_size == first.tokenizer.vocab_size
    assert second.decode(second.tokenizer.encode(text)) == first.decode(first.tokenizer.encode(text))

"""The processor: records to arrays, what travels in processor.json, and every way in which a record can be wrong."""
import copy
import io
import json

import ml_collections
import numpy as np
from PIL import Image
import pytest

from vlm_jax.data.processor import Processor
from vlm_jax.data.tokenizer_training import train_sentencepiece
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.settings import call

CAPTIONS = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("circle", "square", "star")]
IMAGE = [["decode"], ["resize", {"size": [6, 8]}], ["flip_left_right"], ["value_range", {"low": -1, "high": 1}]]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "x.model"
    path.write_bytes(train_sentencepiece(CAPTIONS, 290))
    return path


@pytest.fixture(scope="module")
def text(model_path):
    return [["lowercase"], ["tokenize", {"tokenizer": {"path": str(model_path)}, "length": 14, "eos": "sticky", "pad_id": 1}]]


@pytest.fixture(scope="module")
def processor(text):
    return Processor(image=IMAGE, text=text)


def picture(kind="PNG", width=13, height=7):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def test_a_record_becomes_arrays(processor):
    result = processor({"image": picture(), "texts": ["A red circle", "second"]})
    assert set(result) == {"image", "tokens"}
    assert result["image"].shape == (6, 8, 3) and result["image"].dtype == np.float32
    assert result["tokens"].shape == (14,) and result["tokens"].dtype == np.int32
    assert result["tokens"][-1] == 1 and processor.tokenizer.decode(result["tokens"]) == "a red circle"
    np.testing.assert_array_equal(result["image"], processor.image(picture()))
    np.testing.assert_array_equal(result["tokens"], processor.text("A RED circle"))
    assert processor.image_size == (6, 8) and processor.length == 14 and processor.vocab_size == processor.tokenizer.vocab_size
    assert processor.input_shapes() == {"image": (6, 8, 3), "tokens": (14,)}


def test_texts_are_stacked(processor):
    tokens = processor.texts(CAPTIONS)
    assert tokens.shape == (9, 14) and tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[3], processor.text(CAPTIONS[3]))
    assert processor.texts([]).shape == (0, 14)


def test_the_rng_draws_captions_and_flips(processor):
    record = {"image": picture(), "texts": CAPTIONS[:3]}
    results = [processor(record, np.random.default_rng(seed)) for seed in range(40)]
    assert {processor.tokenizer.decode(result["tokens"]) for result in results} == set(CAPTIONS[:3])
    plain = processor.image(picture())
    flips = [np.array_equal(result["image"], plain[:, ::-1]) for result in results]
    assert 8 < sum(flips) < 32
    again = processor(record, np.random.default_rng(7))
    np.testing.assert_array_equal(again["image"], results[7]["image"])
    np.testing.assert_array_equal(again["tokens"], results[7]["tokens"])


def test_a_record_may_lack_what_is_not_asked_for(text):
    words, pictures = Processor(text=text), Processor(image=IMAGE)
    assert set(words({"texts": ["a"]})) == {"tokens"} and words.image_size is None and words.input_shapes() == {"tokens": (14,)}
    assert set(pictures({"image": picture(), "texts": [3]})) == {"image"} and pictures.vocab_size is None and pictures.length is None
    assert Processor()({}) == {} and Processor().input_shapes() == {}
    with pytest.raises(ConfigError, match="no image operations"):
        words.image(picture())
    with pytest.raises(ConfigError, match="no text operations"):
        pictures.text("a")


@pytest.mark.parametrize("change, reason", [
    ({"image": None}, "image_missing"), ({"image": b""}, "image_empty"), ({"image": picture()[:-60]}, "image_truncated"),
    ({"image": b"text"}, "image_unknown_format"),
    ({"image": np.zeros((3, 3, 3))}, "image_wrong_type"), ({"texts": None}, "caption_missing"), ({"texts": []}, "caption_missing"),
    ({"texts": "a red circle"}, "caption_not_text"), ({"texts": [3]}, "caption_not_text"), ({"texts": [None]}, "caption_not_text"),
    ({"texts": [""]}, "caption_empty"), ({"texts": [" \n"]}, "caption_empty")])
def test_bad_records_have_reasons(processor, change, reason):
    record = {"image": picture(), "texts": ["a"], **change}
    with pytest.raises(DataError) as error:
        processor(record, name="table[5]")
    assert error.value.reason == reason and str(error.value).startswith("table[5]: ") and "\n" not in str(error.value)
    del record[next(iter(change))]
    with pytest.raises(DataError) as error:
        processor(record)
    assert error.value.reason in ("image_missing", "caption_missing") and str(error.value).startswith("record: there")


def test_a_caption_that_the_operations_empty_is_a_bad_record(text):
    processor = Processor(text=[["canonicalize"], text[-1]])
    with pytest.raises(DataError) as error:
        processor({"texts": ["?!"]}, name="x[1]")
    assert error.value.reason == "caption_empty" and str(error.value).startswith("x[1]: caption")


def test_what_is_saved_needs_no_file(processor, model_path, tmp_path):
    path = tmp_path / "processor.json"
    processor.save(path)
    moved = model_path.rename(model_path.with_name("moved.model"))
    try:
        loaded = Processor.load(path)
    finally:
        moved.rename(model_path)
    for other in (loaded, Processor.from_dict(processor.to_dict()), copy.deepcopy(processor)):
        assert other.digest == processor.digest and other.to_dict() == processor.to_dict()
        np.testing.assert_array_equal(other.texts(CAPTIONS), processor.texts(CAPTIONS))
        np.testing.assert_array_equal(other.image(picture("JPEG")), processor.image(picture("JPEG")))
    content = json.loads(path.read_text())
    assert content["format_version"] == 1 and len(content["text"][-1][1]["tokenizer"]["sha256"]) == 64
    assert str(model_path) not in path.read_text()


def test_the_digest_tells_processors_apart(processor, text):
    assert Processor(image=IMAGE, text=text).digest == processor.digest
    assert Processor(image=IMAGE[1:], text=text).digest == processor.digest         # decode comes first, said or not
    assert Processor(image=IMAGE[:2] + IMAGE[3:], text=text).digest != processor.digest
    assert Processor(image=IMAGE, text=[text[0], ["tokenize", {**text[1][1], "length": 10}]]).digest != processor.digest


def test_a_config_section_builds_a_processor(processor, text):
    section = ml_collections.ConfigDict({"image": IMAGE, "text": text})
    assert call(Processor, section, "processor").digest == processor.digest
    assert call(Processor, section.to_dict(), "processor").digest == processor.digest


def test_a_trained_tokenizer_sees_the_texts_as_the_operations_leave_them(monkeypatch, tmp_path):
    class Source:
        def __len__(self):
            return len(CAPTIONS)

        def texts_at(self, i):
            return [CAPTIONS[i].upper()]

    from vlm_jax.data import sources
    monkeypatch.setattr(sources, "build_source", lambda settings: Source())
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path))
    tokenize = ["tokenize", {"tokenizer": {"train_on": {"name": "x"}, "vocab_size": 290}, "length": 5}]
    trained = Processor(text=[["lowercase"], tokenize])
    assert trained.tokenizer.model == train_sentencepiece(CAPTIONS, 290)
    assert Processor.from_dict(trained.to_dict()).digest == trained.digest
    assert "train_on" not in json.dumps(trained.to_dict())


@pytest.mark.parametrize("image, message", [
    ([["decode"]], "value_range"), ([["resize", {"size": 8}]], "value_range"), ([["value_range"]], "differing shapes"),
    ([["resize_shortest", {"size": 8}], ["value_range"]], "differing shapes"), ([["value_range"], ["resize", {"size": 8}]], "before value_range"),
    ([["center_crop", {"size": 700}], ["value_range"]], "640 x 480"), ([["resise", {"size": 8}]], r"processor.image\[1\]"),
    (3, "processor.image must be")])
def test_image_operations_must_end_in_arrays_of_one_shape(image, message):
    with pytest.raises(ConfigError, match=message):
        Processor(image=image)


def test_text_operations_must_end_in_tokens(text):
    for listed in ([["lowercase"]], [text[1], ["lowercase"]], [text[1], text[1]]):
        with pytest.raises(ConfigError, match="must end in"):
            Processor(text=listed)


def test_damaged_files_are_errors(processor, tmp_path):
    path = tmp_path / "processor.json"
    with pytest.raises(DataError, match="no such processor file"):
        Processor.load(path)
    good = processor.to_dict()
    wrong_model = copy.deepcopy(good)
    wrong_model["text"][-1][1]["tokenizer"]["sha256"] = "0" * 64
    for content, message in ((b"", "no processor.json"), (b"[]", "format version None"), (b"{}", "format version None"),
                             (b"\xff", "no processor.json"),
                             (json.dumps({**good, "format_version": 2}).encode(), "update vlm_jax"),
                             (json.dumps({**good, "audio": []}).encode(), "audio is unknown"),
                             (json.dumps({**good, "image": [["resise"]]}).encode(), "cannot be built"),
                             (json.dumps(wrong_model).encode(), "SHA-256")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            Processor.load(path)
        assert "\n" not in str(error.value)

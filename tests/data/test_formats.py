"""Formats of generation: what stands where, exactly; every way in which a record cannot be used is an error with a reason."""
import dataclasses
import json

import numpy as np
import pytest

from tests.data.tokenizer_samples import byte_level, gemma_model, sentencepiece_model
from vlm_jax.data.loader import Loader
from vlm_jax.data.operations import register
from vlm_jax.data.processor import Processor
from vlm_jax.data.sources import ArraySource
from vlm_jax.data.tokenizers import SentencePieceTokenizer
from vlm_jax.errors import ConfigError, DataError


@register("text", "nothing_left")
@dataclasses.dataclass(frozen=True)
class NothingLeft:
    """Leaves nothing of "a", for a test."""

    def __call__(self, text, rng=None):
        return text.replace("a", "").strip()


GEMMA = SentencePieceTokenizer(gemma_model(), added=["<loc0000..1023>"]).to_dict()
IMAGE = [["resize", {"size": 8}], ["value_range", {"low": -1, "high": 1}]]
PICTURE = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)


def processor(tokenizer=GEMMA, image=IMAGE, operations=(), **form):
    form = {"kind": "prefix_lm", "length": 30, **({"image_tokens": 4} if image else {}), **form}
    return Processor(image, [*operations, ["tokenize", {"tokenizer": tokenizer}]], form)


def record(prompt="caption en", texts=("a red circle",), **more):
    return {"image": PICTURE, "prompt": prompt, "texts": list(texts), **more}


def test_paligemma_layout():
    made = processor()
    tokenizer = made.tokenizer
    prompt, newline, target = tokenizer.encode("caption en"), tokenizer.token_id("\n"), tokenizer.encode("a red circle")
    arrays = made(record())
    head, end = 4 + 1 + len(prompt) + 1, 4 + 1 + len(prompt) + 1 + len(target) + 1
    assert {key: (value.shape, value.dtype) for key, value in arrays.items()} == {
        "tokens": ((30,), np.int32), "valid": ((30,), bool), "prefix": ((30,), bool), "loss_weights": ((30,), np.float32), "slots": ((30,), np.int32),
        "images": ((1, 8, 8, 3), np.float32)}
    assert {key: value.shape for key, value in arrays.items()} == made.input_shapes()
    assert {key: value.dtype for key, value in arrays.items()} == made.input_dtypes()
    assert arrays["tokens"].tolist() == [0] * 4 + [2, *prompt, newline, *target, 1] + [0] * (30 - end)
    assert arrays["slots"].tolist() == [0, 1, 2, 3] + [-1] * 26
    for key, start, stop in (("valid", 0, end), ("prefix", 0, head), ("loss_weights", head, end)):
        assert arrays[key].tolist() == [start <= place < stop for place in range(30)], key
    np.testing.assert_allclose(arrays["images"][0], PICTURE / 127.5 - 1, atol=1e-6)


def test_paligemma_layout_equals_transformers():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    tokenizer = byte_level()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|user|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>")  # noqa: S106
    images = transformers.SiglipImageProcessor(size={"height": 8, "width": 8})
    images.image_seq_length = 4
    reference = transformers.PaliGemmaProcessor(images, theirs)
    made = processor({**_json(tokenizer), "marks": {"bos": "<|user|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>"}})
    expected = reference(text=["<image>caption en"], images=[PICTURE], suffix=["a red circle"], return_tensors="np")
    arrays, filled = made(record()), expected["input_ids"].shape[1]
    ids, types, labels = (np.asarray(expected[key])[0] for key in ("input_ids", "token_type_ids", "labels"))
    assert arrays["valid"].sum() == filled and arrays["tokens"][4:filled].tolist() == ids[4:].tolist() and (ids[:4] == reference.image_token_id).all()
    assert arrays["prefix"][:filled].tolist() == (types == 0).tolist()
    assert arrays["loss_weights"][:filled].tolist() == (labels != -100).tolist()


def _json(tokenizer):
    from vlm_jax.data.json_tokenizer import JsonTokenizer
    return JsonTokenizer(tokenizer.to_str().encode()).to_dict()


def test_causal():
    made = processor(kind="causal", image=[], operations=[["lowercase"]])
    arrays, tokenizer = made({"prompt": "A", "texts": ["RED"]}), made.tokenizer
    ids = [2, *tokenizer.encode("a"), *tokenizer.encode("red"), 1]
    assert set(arrays) == {"tokens", "valid", "prefix", "loss_weights"} and arrays["tokens"][:len(ids)].tolist() == ids and not arrays["prefix"].any()
    assert arrays["loss_weights"].sum() == len(tokenizer.encode("red")) + 1
    text = made({"texts": ["red"]})
    assert text["loss_weights"].sum() == text["valid"].sum() - 1      # all but the begin mark


def test_encoder_decoder():
    made = processor(kind="encoder_decoder", length=15, target_length=9)
    prompt, target = made.tokenizer.encode("caption en"), made.tokenizer.encode("a red")
    arrays = made(record(texts=["a red"]))
    assert set(arrays) == {"tokens", "valid", "slots", "images", "targets", "loss_weights"} and {k: v.shape for k, v in arrays.items()} == made.input_shapes()
    assert arrays["tokens"].tolist() == [0] * 4 + [*prompt, 1] + [0] * (10 - len(prompt)) and arrays["valid"].sum() == 5 + len(prompt)
    assert arrays["targets"].tolist() == [*target, 1] + [0] * (8 - len(target)) and arrays["loss_weights"].tolist() == [i <= len(target) for i in range(9)]


def test_a_record_of_text_alone():
    arrays = processor()(dict(prompt="say", texts=["a"], text_only=True))
    assert not arrays["images"].any() and (arrays["slots"] == -1).all() and arrays["tokens"][0] == 2


def test_the_marker_says_where_the_picture_stands():
    made = processor(image_marker="<image>")
    before, after = made.tokenizer.encode("USER: "), made.tokenizer.encode(" What?")
    arrays = made(record("USER: <image> What?"))
    start = 1 + len(before)
    assert arrays["tokens"][:start].tolist() == [2, *before] and arrays["slots"][start:start + 4].tolist() == [0, 1, 2, 3]
    assert arrays["tokens"][start + 4:start + 4 + len(after)].tolist() == after
    for prompt, more in (("What?", {}), ("<image><image>", {}), ("<image>", {"text_only": True})):
        with pytest.raises(DataError, match="markers but") as error:
            made(record(prompt, **more), name="vqa[3]")
        assert error.value.reason == "image_tokens_mismatch" and str(error.value).startswith("vqa[3]: ")


def test_separators_and_marks():
    tokenizer = SentencePieceTokenizer(sentencepiece_model(), added=["\n", "<|go|>"]).to_dict()
    made = processor(tokenizer, begin="<|go|>", end="<|go|>")
    assert made(record())["tokens"][4] == made.tokenizer.token_id("<|go|>") and made.format.separator == [made.tokenizer.token_id("\n")]
    joint = processor(separator=" -> ", image=[])
    ids = [2, *joint.tokenizer.encode("a -> ")]
    assert joint({"prompt": "a", "texts": ["b"]})["tokens"][:len(ids)].tolist() == ids
    numbers = processor(begin=7, separator=9, end=False)
    assert numbers(record())["tokens"][4] == 7 and not numbers.format.end
    with pytest.raises(ConfigError, match="makes nothing of"):
        processor(SentencePieceTokenizer(sentencepiece_model()).to_dict())


def test_flexible_patches():
    image = [["flexible_patches", {"max_patches": 6, "patch_size": 2}]]
    made = processor(image=image, image_tokens=6, kind="encoder_decoder", target_length=9)
    arrays = made({"image": np.zeros((10, 10, 3), np.uint8), "prompt": "a", "texts": ["b"]})
    assert set(arrays) == {"tokens", "valid", "slots", "patches", "targets", "loss_weights"} and arrays["patches"].shape == (6, 14) and made.image_size is None
    assert arrays["valid"][:7].tolist() == [True] * 4 + [False] * 2 + [True] and arrays["slots"][:7].tolist() == [0, 1, 2, 3, 4, 5, -1]
    alone = processor(image=image, image_tokens=0, length=0, kind="encoder_decoder", target_length=9)
    arrays = alone({"image": np.zeros((10, 10, 3), np.uint8), "texts": ["b"]})
    assert set(arrays) == {"patches", "targets", "loss_weights"} == set(alone.input_shapes()) and set(alone.prompts([PICTURE], [""])) == {"patches"}
    with pytest.raises(DataError, match="prompt_too_long|format.length is 0"):
        alone({"image": PICTURE, "prompt": "a", "texts": ["b"]})
    with pytest.raises(ConfigError, match="6 patches"):
        processor(image=image, image_tokens=5)


@pytest.mark.parametrize("changes, form, reason, words", [
    (dict(prompt="a " * 60), {}, "prompt_too_long", "format.length is 30; raise it to"),
    (dict(texts=["b " * 60]), {}, "target_too_long", "raise format.length to"),
    (dict(texts=["b " * 60]), dict(kind="encoder_decoder", target_length=9), "target_too_long", "raise format.target_length to 1"),
    (dict(texts=[""]), {}, "caption_empty", "a caption is empty"), (dict(texts=[]), {}, "caption_missing", "no captions"),
    (dict(texts=[" a "]), dict(operations=[["prompt", {"template": "{}"}], ["nothing_left"]]), "target_empty", "no token is left"),
    (dict(image=None), {}, "image_missing", "mark it text_only"), (dict(prompt=3), {}, "prompt_not_text", "must be a string"),
    (dict(texts=[4]), {}, "caption_not_text", "must be a string"),
])
def test_records_that_cannot_be_used(changes, form, reason, words):
    made = processor(**form)
    with pytest.raises(DataError, match=words) as error:
        made({**record(), **changes}, name="shapes[7]")
    assert error.value.reason == reason and str(error.value).startswith("shapes[7]: ") and "\n" not in str(error.value)


def test_truncation_is_asked_for_and_of_the_target_alone():
    made = processor(truncate_target=True)
    arrays, full = made(record(texts=["b " * 60])), made.tokenizer.encode("b " * 60)
    head = int(arrays["prefix"].sum())
    assert arrays["valid"].all() and arrays["tokens"][head:].tolist() == full[:30 - head] and arrays["loss_weights"].sum() == 30 - head
    with pytest.raises(DataError, match="but format.length is 30"):
        made(record(prompt="a " * 60))
    long = processor(truncate_target=True, kind="encoder_decoder", target_length=5)
    assert long(record(texts=["b " * 60]))["targets"].tolist() == full[:5]


@pytest.mark.parametrize("form, words", [
    (dict(kind="prefix"), 'Did you mean "prefix_lm"'), (dict(length=6), "need at least 8"), (dict(length="x"), "length is 'x'"),
    (dict(image_tokens=0), "some image"), (dict(image=[], image_tokens=4), "no image"), (dict(target_length=3), "is of encoder-decoders"),
    (dict(kind="encoder_decoder"), "target_length is None"),
    (dict(begin="nothing"), "no token 'nothing'"), (dict(end=10 ** 6), "outside the vocabulary"), (dict(vocab_size=500), "the model's vocabulary 500"),
    (dict(image_marker=""), "image_marker"), (dict(lenght=3), "lenght"), (dict(tokenizer_=3), "takes no such setting"), (dict(pad_id=3), "set by the program"),
])
def test_settings_that_cannot_work(form, words):
    with pytest.raises(ConfigError, match=words):
        processor(**form)


def test_wrong_sections():
    tokenize = ["tokenize", {"tokenizer": GEMMA, "length": 8}]
    for text, form in (([], {"kind": "causal", "length": 9}), ([tokenize], 3)):
        with pytest.raises(ConfigError, match="processor.format must be a section"):
            Processor([], text, form)
    with pytest.raises(ConfigError, match="leave bos and eos of tokenize out"):
        Processor([], [["tokenize", {"tokenizer": GEMMA, "length": 8, "bos": True}]], {"kind": "causal", "length": 9})
    with pytest.raises(ConfigError, match="no format"):
        Processor([], [tokenize]).prompt(None, "a")
    bare = SentencePieceTokenizer(sentencepiece_model(bos_id=-1, eos_id=-1, pad_id=0, unk_id=1)).to_dict()
    with pytest.raises(ConfigError, match="no begin mark"):
        processor(bare, image=[], kind="causal")


def test_what_fits_the_model():
    made = processor()
    made.format.check_model(made.vocab_size, 4)
    with pytest.raises(ConfigError, match="is 4, but the model makes 256 tokens of a picture; set it to 256"):
        made.format.check_model(image_tokens=256)
    with pytest.raises(ConfigError, match=f"it has {made.vocab_size} tokens, the model's vocabulary 100"):
        made.format.check_model(vocab_size=100)


@pytest.mark.parametrize("kind, more", [("prefix_lm", {}), ("causal", {}), ("encoder_decoder", {"target_length": 12})])
def test_prompts_are_the_beginning_of_examples(kind, more):
    made = processor(kind=kind, **more)
    one, example = made.prompt(PICTURE, "caption en"), made(record())
    length = len(one["tokens"])
    for key, value in one.items():
        np.testing.assert_array_equal(value, example[key] if key == "images" else example[key][:length])
    batch = made.prompts([PICTURE, PICTURE], ["caption en", "a"])
    assert batch["images"].shape == (2, 1, 8, 8, 3) and batch["tokens"].shape == (2, length) and batch["tokens"].dtype == np.int32
    np.testing.assert_array_equal(batch["tokens"][0], one["tokens"])
    short = made.prompt(PICTURE, "a")
    assert batch["valid"][1].sum() == len(short["tokens"]) and (batch["slots"][1] == -1).sum() == length - 4
    assert ("prefix" in batch) == (kind != "encoder_decoder")
    texts = made.prompts(None, ["a", "b c"])
    assert not texts["images"].any() and (texts["slots"] == -1).all()
    with pytest.raises(DataError, match="prompt_too_long|format.length"):
        made.prompt(PICTURE, "a " * 60)
    with pytest.raises(ConfigError, match="1 images for 2 prompts"):
        made.prompts([PICTURE], ["a", "b"])


def test_decode_ends_at_the_end_mark():
    made = processor()
    ids = made.tokenizer.encode("a red <loc0003>")
    assert made.decode([*ids, 1, *ids, 0]) == "a red <loc0003>" and made.decode(np.array([*ids, 0, 0])) == "a red <loc0003>"
    assert made.decode([*ids, made.vocab_size + 5]) == "a red <loc0003>"      # a model's table may be longer than the vocabulary
    with pytest.raises(DataError, match="outside the vocabulary"):
        made.decode([-1])


def test_it_travels_with_the_processor(tmp_path):
    made = processor(begin="<s>", image_marker=None, truncate_target=True)
    made.save(tmp_path / "processor.json")
    copy = Processor.load(tmp_path / "processor.json")
    assert copy.digest == made.digest and copy.format.truncate_target
    for key, value in made(record()).items():
        np.testing.assert_array_equal(copy(record())[key], value)
    without = Processor(IMAGE, [["tokenize", {"tokenizer": GEMMA, "length": 30}]])
    assert "format" not in json.loads(json.dumps(without.to_dict())) and without.digest != made.digest and without.format is None


def test_the_loader_carries_them_and_keeps_bad_rows_empty():
    pictures = [PICTURE] * 6
    texts = ["a red circle", "b " * 60, "a", "the blue square", "a", "a star"]
    source = ArraySource(pictures, texts, extras={"prompt": ["caption en"] * 6})
    made = processor()
    batch = next(Loader(source, made, 6, shuffle=False, threads=0, bad_budget=1.0).batches())
    assert batch["weight"].tolist() == [1, 0, 1, 1, 1, 1] and batch["images"].shape == (6, 1, 8, 8, 3)
    assert (batch["slots"][1] == -1).all() and not batch["valid"][1].any() and not batch["loss_weights"][1].any() and not batch["images"][1].any()
    np.testing.assert_array_equal(batch["tokens"][3], made(source[3])["tokens"])
    loader = Loader(ArraySource(pictures, ["b " * 60] * 6, extras={"prompt": [""] * 6}), made, 3, shuffle=False, threads=0, bad_budget=1.0)
    empty = next(loader.batches())
    assert {key: value.shape[1:] for key, value in empty.items() if key in made.input_shapes()} == made.input_shapes() and (empty["slots"] == -1).all()
    assert loader.bad["target_too_long"] == 3 and "arrays[0]" in loader.bad_examples[0]

"""Interleaved documents: what stands where, which picture each token reads (against a slow reference), cuts, packs, and every kind of bad document."""
import json

from hypothesis import given, settings, strategies
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.tokenizer_samples import gemma_model
from vlm_jax.data.documents import check_segments, frames_of, image_segment, marked_segments, text_segment, video_segment
from vlm_jax.data.loader import Loader
from vlm_jax.data.processor import Processor
from vlm_jax.data.tokenizers import SentencePieceTokenizer
from vlm_jax.errors import ConfigError, DataError

TOKENIZER = SentencePieceTokenizer(gemma_model(), added=["<image>", "<|endofchunk|>"])
PLAIN = SentencePieceTokenizer(gemma_model(), added=["<|endofchunk|>"])
IMAGE = [["resize", {"size": 4}], ["value_range", {"low": 0, "high": 1}]]
MARK, CHUNK = TOKENIZER.token_id("<image>"), TOKENIZER.token_id("<|endofchunk|>")
_made = {}


def processor(tokenizer=TOKENIZER, image=IMAGE, operations=(), **form):
    form = {"kind": "interleaved", "length": 40, **({"pictures": 3} if image else {}), **form}
    key = repr((id(tokenizer), image, operations, sorted(form.items())))
    if key not in _made:
        _made[key] = Processor(image, [*operations, ["tokenize", {"tokenizer": tokenizer.to_dict()}]], form)
    return _made[key]


def picture(value):
    return np.full((5, 5, 3), value, np.uint8)


def document(*segments, **more):
    """Strings are texts, numbers grey pictures; (text,) is a text without loss."""
    made = [text_segment(s) if isinstance(s, str) else text_segment(s[0], False) if isinstance(s, tuple) else s if isinstance(s, dict)
            else image_segment(picture(s)) for s in segments]
    return {"segments": made, **more}


class Listed:
    """A source of the records that it is given."""
    name = "pages"

    def __init__(self, records):
        self.records = records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.records[index]

    def describe(self, index):
        return f"pages.jsonl:{index + 1}"


def test_layout_of_a_document():
    made = processor()
    encode = made.tokenizer.encode
    arrays = made(document("my pets", 50, "a dog", 100, "a cat"))
    pets, dog, cat = encode("my pets"), encode("a dog"), encode("a cat")
    ids = [2, *pets, CHUNK, MARK, *dog, CHUNK, MARK, *cat, CHUNK, 1]
    media = [-1] * (2 + len(pets)) + [0] * (2 + len(dog)) + [1] * (3 + len(cat))
    weights = [0, *[1] * len(pets), 1, 0, *[1] * len(dog), 1, 0, *[1] * len(cat), 1, 1]
    rest = 40 - len(ids)
    assert arrays["tokens"].tolist() == ids + [0] * rest and arrays["valid"].tolist() == [True] * len(ids) + [False] * rest
    assert arrays["media_index"].tolist() == media + [-1] * rest and arrays["loss_weights"].tolist() == weights + [0] * rest
    np.testing.assert_allclose(arrays["images"][:, 0, 0, 0], [50 / 255, 100 / 255, 0], atol=1e-6)
    assert {key: value.shape for key, value in arrays.items()} == made.input_shapes() and arrays["images"].shape == (3, 4, 4, 3)
    assert {key: value.dtype for key, value in arrays.items()} == made.input_dtypes()
    # A pair as in Flamingo: begin, mark, caption, end of chunk, end.
    pair = made({"image": picture(9), "texts": ["a dog"]})
    assert pair["tokens"][:len(dog) + 4].tolist() == [2, MARK, *dog, CHUNK, 1]


def test_targets_of_openflamingo():
    made = processor(loss_before_first_image=False)
    arrays = made(document("my pets", 50, ("a",), " dog", 100, 101))
    tokens, weights = arrays["tokens"], arrays["loss_weights"]
    first = tokens.tolist().index(MARK)
    assert not weights[:first + 1].any() and not weights[tokens == MARK].any() and not weights[~arrays["valid"]].any()
    assert weights.sum() == len(made.tokenizer.encode(" dog")) + 2        # one chunk end and the end mark; behind a picture without words there is no target
    asked = processor(loss_on_image_text=True)(document(5, "a", 6, "a"))
    assert asked["loss_weights"][asked["tokens"] == MARK].tolist() == [1, 1] and asked["loss_weights"][0] == 0
    # A text alone is a target all the same.
    assert made(document("my pets"))["loss_weights"].sum() == len(made.tokenizer.encode("my pets")) + 2


def test_marks_as_text_without_chunk_ends_and_as_places():
    plain = processor(PLAIN, chunk_end=False)
    marker = plain.tokenizer.encode("<image>")
    assert len(marker) > 1
    arrays = plain(document("a", 1, "b"))
    ids = [2, *plain.tokenizer.encode("a"), *marker, *plain.tokenizer.encode("b"), 1]
    assert arrays["tokens"][:len(ids)].tolist() == ids and arrays["media_index"][2:2 + len(marker)].tolist() == [0] * len(marker)
    places = processor(image_text=False, image_tokens=2)
    arrays = places(document("a", 1, "b", 2))
    assert set(arrays) == {"tokens", "valid", "slots", "loss_weights", "images"}
    assert arrays["slots"][arrays["slots"] >= 0].tolist() == [0, 1, 2, 3] and arrays["slots"][3:5].tolist() == [0, 1] and arrays["tokens"][3] == 0


def reference(tokens, marker, following):
    """The slow definition of media_index, over one document whose mark is one token."""
    places = [t for t, token in enumerate(tokens) if token == marker]
    result = []
    for t, token in enumerate(tokens):
        seen = [k for k, place in enumerate(places) if (place > t or token == marker and place == t if following else place <= t)]
        result.append(-1 if not seen else seen[0] if following else seen[-1])
    return result


WORDS = strategies.sampled_from(["a", "small red circle", "is left of", "\n", "x = y"])
PARTS = strategies.lists(strategies.one_of(WORDS, strategies.integers(0, 255)), min_size=1, max_size=9)


@settings(max_examples=120, deadline=None)
@given(parts=PARTS, seed=strategies.integers(0, 9), span=strategies.sampled_from(["start", "random"]), following=strategies.booleans(),
       length=strategies.sampled_from([7, 12, 40]), text_marks=strategies.booleans())
def test_media_index_equals_a_slow_reference_and_no_mark_is_without_its_picture(parts, seed, span, following, length, text_marks):
    made = processor(PLAIN if text_marks else TOKENIZER, span=span, length=length + 8 * text_marks, next_image=float(following))
    marker = made.tokenizer.encode("<image>")
    try:
        row = made._row(document(*parts), np.random.default_rng(seed))
    except DataError as error:
        assert error.reason in ("target_empty", "document_empty")
        return
    ids = row.tokens.tolist()
    assert len(ids) <= made.format.length and ids[0] == 2
    # What is left of marks: whole ones, as many as there are pictures, in the order of the document.
    one, place = [], 0
    while place < len(ids):
        whole = ids[place:place + len(marker)] == marker
        one += [-7] * len(marker) if whole else [ids[place]]
        place += len(marker) if whole else 1
    starts = [t for t, token in enumerate(one) if token == -7][::len(marker)]
    assert len(starts) == len(row.pictures) <= 3
    shown = [int(p["image"][0, 0, 0]) for p in row.pictures]
    given_pictures = [p for p in parts if isinstance(p, int)]
    assert any(given_pictures[k:k + len(shown)] == shown for k in range(len(given_pictures) + 1))
    expected, number = [], 0
    for t in range(len(ids)):
        if one[t] == -7:
            number = sum(start <= t for start in starts)
            expected.append(number - 1)
        elif following:
            expected.append(next((k for k, start in enumerate(starts) if start > t), -1))
        else:
            expected.append(sum(start <= t for start in starts) - 1)
    assert row.media_index.tolist() == expected
    if len(marker) == 1:
        assert expected == reference(ids, marker[0], following)
    assert row.loss_weights[0] == 0 and not row.loss_weights[np.asarray(one) == -7].any()


@settings(max_examples=60, deadline=None)
@given(parts=PARTS)
def test_a_whole_document_round_trips(parts):
    made = processor(length=400, pictures=9)
    try:
        row = made._row(document(*parts), None)
    except DataError as error:
        assert error.reason in ("target_empty", "document_empty")
        return
    assert not row.notes and [int(p["image"][0, 0, 0]) for p in row.pictures] == [p for p in parts if isinstance(p, int)]
    assert made.tokenizer.decode([t for t in row.tokens if t not in (MARK, CHUNK)]) == "".join(p for p in parts if isinstance(p, str))


def test_cuts_are_counted_and_spans_are_pure():
    words = "small red circle " * 4
    records = [document(words, 1, words, 2, "a", 3, "b", 4, "c", 5, words)] * 3 + [document(1, "a")]
    loader = Loader(Listed(records), processor(span="random"), 4, seed=3)
    batch = next(loader.batches())
    assert loader.notes == {"document_cut": 3, "pictures_cut": 3} and not loader.bad and batch["mask"].all()
    again = next(Loader(Listed(records), processor(span="random"), 4, seed=3, threads=0).batches())
    assert all((batch[key] == again[key]).all() for key in batch)
    assert len({row.tobytes() for row in batch["tokens"]}) > 1                       # the same document, other spans
    whole = processor(span="whole")
    for record, reason in ((document(words, words, words, 1), "document_too_long"), (document(1, "a", 2, 3, 4, "b"), "too_many_images")):
        with pytest.raises(DataError, match="raise format.* to ") as error:
            whole(record, name="pages[3]")
        assert error.value.reason == reason and str(error.value).startswith("pages[3]: ")


def test_places_for_image_tokens_are_cut_as_a_whole():
    from vlm_jax.models.visual_tokens import check_slots
    made = processor(image_tokens=3, length=16, span="random")
    for seed in range(30):
        arrays = made(document("a dog", 1, "small red", 2, "b", 3, "x = y"), np.random.default_rng(seed))
        check_slots(arrays["slots"][None], 3, 3, ["row"])
        assert (arrays["tokens"] == MARK).sum() * 3 == (arrays["slots"] >= 0).sum() and not arrays["loss_weights"][arrays["slots"] >= 0].any()


def test_marks_in_a_text_of_a_record():
    record = {"text": "a dog <image> and <image>", "images": [picture(1), picture(2)]}
    assert (processor()(record)["tokens"] == processor()(document("a dog ", 1, " and ", 2))["tokens"]).all()


def test_next_image_is_drawn_once_a_document_and_may_be_given():
    made, record = processor(next_image=0.5), document("a", 1, "b", 2, "c")
    seen = [tuple(made(record, np.random.default_rng(seed))["media_index"][:9]) for seed in range(40)]
    assert len(set(seen)) == 2 and 8 <= seen.count(seen[0]) <= 32
    assert tuple(made(record)["media_index"][:9]) in seen
    following = made({**record, "next_image": True})["media_index"]
    assert following[:9].tolist() == [0, 0, 0, 0, 1, 1, 1, -1, -1] and made({**record, "next_image": False})["media_index"][1] == -1


def test_prompts_continue_the_last_segment():
    made = processor(length=12)
    encode = made.tokenizer.encode
    asked = made.document([image_segment(picture(7)), text_segment("a dog"), image_segment(picture(8)), text_segment("a")])
    assert asked["tokens"].tolist() == [2, MARK, *encode("a dog"), CHUNK, MARK, *encode("a")] and asked["images"].shape == (2, 4, 4, 3)
    many = made.document([part for k in range(9) for part in (image_segment(picture(k)), text_segment("a dog"))])       # more than in training
    assert len(many["images"]) == 9 and many["media_index"].max() == 8 and many["media_index"][-1] == 8
    examples = made.document([text_segment("a cat"), {"kind": "chunk_end"}, text_segment("a dog"), {"kind": "chunk_end"}, image_segment(picture(3))])
    assert examples["tokens"].tolist() == [2, *encode("a cat"), CHUNK, *encode("a dog"), CHUNK, MARK]
    batch = made.documents([[text_segment("a")], [image_segment(picture(7)), text_segment("a dog"), image_segment(picture(8))]])
    assert batch["images"].shape == (2, 2, 4, 4, 3) and not batch["images"][0].any() and (batch["media_index"][0] == -1).all()
    assert batch["valid"].sum(1).tolist() == [1 + len(encode("a")), 4 + len(encode("a dog"))]
    # As every model is asked.
    assert made.prompt(picture(7), "what?")["tokens"].tolist() == [2, MARK, *encode("what?")]
    assert made.prompt(picture(7), "see <image> what?")["tokens"].tolist() == [2, *encode("see "), CHUNK, MARK, *encode(" what?")]
    assert made.prompt(None, "what?")["tokens"].tolist() == [2, *encode("what?")] and made.prompts(None, ["a", "what?"])["images"].shape[:2] == (2, 1)
    chat = made.conversation([picture(1)], "<bos><image>a<|endofchunk|>", "<image>")
    assert chat["tokens"].tolist() == [*encode("<bos>"), MARK, *encode("a"), CHUNK] and chat["media_index"][-1] == 0
    assert made.decode([*encode("a dog"), CHUNK, *encode("a")]) == "a dog" == made.decode([*encode("a dog"), 1, 5]) and made.format.end == [1, CHUNK]


def test_videos_share_their_random_draws_and_pictures_stand_still():
    made = processor(image=[["flip_left_right"], *IMAGE], frames=3)
    clip = np.arange(5 * 5 * 5 * 3, dtype=np.uint8).reshape(5, 5, 5, 3)
    arrays = made(document(video_segment(clip), "it moves", 50, "a"))
    assert arrays["images"].shape == (3, 3, 4, 4, 3) and made.input_shapes()["images"] == (3, 3, 4, 4, 3)
    assert (arrays["images"][1] == arrays["images"][1, 0]).all() and not arrays["images"][2].any()
    assert frames_of(video_segment(list("abcde")), 3) == ["a", "c", "e"] and frames_of(video_segment(["a", "b"]), 4) == ["a", "a", "b", "b"]
    for seed in range(6):
        flipped = made({"frames": clip, "texts": ["a"]}, np.random.default_rng(seed))["images"][0]
        assert any(np.array_equal(flipped, one[..., ::step, :]) for one in [arrays["images"][0]] for step in (1, -1))
    with pytest.raises(DataError, match="frames") as error:
        processor()(document(video_segment(clip), "a"))
    assert error.value.reason == "video_unexpected"


def test_several_documents_of_a_row_do_not_mix():
    made = processor(pack=3, pictures=4)
    records = [document(10, "a dog", 20, "b"), document("a"), {"image": picture(30), "prompt": "a", "texts": ["cat"]}]
    arrays = made({"documents": records})
    begin = 0
    for number, record in enumerate(records, 1):
        alone = made._row(record, None)
        place = slice(begin, begin + len(alone.tokens))
        assert (arrays["segment_ids"][place] == number).all() and arrays["tokens"][place].tolist() == alone.tokens.tolist()
        assert arrays["loss_weights"][begin] == 0                                         # the document before it does not predict its first token
        begin = place.stop
    assert arrays["valid"].sum() == begin and not arrays["segment_ids"][begin:].any()
    assert sorted(set(arrays["media_index"])) == [-1, 0, 1, 2]
    np.testing.assert_allclose(arrays["images"][:, 0, 0, 0] * 255, [10, 20, 30, 0], atol=1e-4)
    with pytest.raises(DataError) as error:
        made({"documents": records + records})
    assert error.value.reason == "pack_too_long"
    # A bad one is left out of its row and counted; the others are trained on.
    loader = Loader(Listed([{"documents": [records[0], document(), records[2]]}]), made, 1, bad_budget=1.0)
    batch = next(loader.batches())
    assert loader.bad == {"document_empty": 1} and "pages.jsonl:1" in loader.bad_examples[0] and batch["weight"].tolist() == [1]
    assert batch["segment_ids"].max() == 2 and batch["media_index"].max() == 2
    with pytest.raises(DataError) as error:
        made({"documents": [document()]})
    assert error.value.reason == "document_empty"


CUT_OFF = b"\x89PNG\r\n\x1a\n" + b"\0" * 20
BAD = [
    (None, "document_wrong_type"), (["a"], "document_wrong_type"), ({"frames": 3, "texts": ["a"]}, "document_wrong_type"),
    ({"segments": []}, "document_empty"), (document("", "  ", "\n"), "document_empty"), ({"segments": "a"}, "document_wrong_type"),
    ({"segments": None}, "document_wrong_type"), ({"segments": ["a"]}, "document_wrong_type"), ({"segments": [{"kind": "sound"}]}, "document_wrong_type"),
    ({"segments": [{"text": "a"}]}, "document_wrong_type"), ({"segments": [{"kind": ["text"], "text": "a"}]}, "document_wrong_type"),
    ({"segments": [{"kind": "text"}]}, "document_wrong_type"), ({"segments": [{"kind": "text", "text": 5}]}, "document_wrong_type"),
    ({"segments": [{"kind": "text", "text": "a", "loss": 1}]}, "document_wrong_type"), (document("a", 1, next_image="no"), "document_wrong_type"),
    (document("see <image> a <image>", 1, "b"), "images_missing"), (document(1, "a dog<image>"), "images_missing"),
    ({"segments": [{"kind": "image", "image": None}, text_segment("a")]}, "image_missing"),
    (document(1, "a", image_segment(CUT_OFF), "b"), "image_corrupt"), (document(1, "a", image_segment(b""), "b"), "image_empty"),
    (document(1, "a", image_segment(b"junk"), "b"), "image_unknown_format"), (document(1, "a", image_segment(3.5), "b"), "image_wrong_type"),
    (document(1, 2), "target_empty"), (document(1, ("a",)), "target_empty"), (document(video_segment([]), "a"), "video_empty"),
    (document(video_segment("abc"), "a"), "document_wrong_type"), (document(1, "half \ud800"), "caption_not_text"),
    ({"prompt": "a", "texts": ["b"]}, "image_missing"), ({"image": picture(1), "texts": []}, "caption_missing"),
    ({"image": picture(1), "prompt": 3, "texts": ["a"]}, "prompt_not_text"), ({"documents": []}, "document_wrong_type"),
    ({"image": picture(1), "prompt": "<image> <image>", "texts": ["a"]}, "images_missing"),
    ({"text": "a <image> b <image>", "images": [picture(1)]}, "images_missing"), ({"text": "a", "images": [picture(2)]}, "images_unreferenced"),
    ({"text": "a <image> b", "images": [picture(1), picture(2)]}, "images_unreferenced"), ({"documents": ["a"]}, "document_wrong_type"),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_documents_are_named_counted_and_skipped(number):
    record, reason = BAD[number]
    made, good = processor(), document(1, "a")
    with pytest.raises(DataError) as error:
        made(record, name="pages[0]")
    message = str(error.value)
    assert error.value.reason == reason and message.startswith("pages[0]: ") and "\n" not in message and len(message) < 400 and ";" in message
    loader = Loader(Listed([record, good]), made, 2, shuffle=False, bad_budget=1.0)
    batch = next(loader.batches())
    assert loader.bad == {reason: 1} and batch["mask"].tolist() == [False, True] and "pages.jsonl:1" in loader.bad_examples[0]
    assert (batch["media_index"][0] == -1).all() and not batch["loss_weights"][0].any() and not batch["images"][0].any()
    with pytest.raises(DataError, match="pages.jsonl:1"):
        next(Loader(Listed([record, good]), made, 2, shuffle=False, on_bad="raise").batches())


def test_markers_and_pictures_that_do_not_match():
    one = image_segment(picture(1))
    assert [s["kind"] for s in marked_segments("<image>a<image>", [one, one], "<image>")] == ["image", "text", "image"]
    for text, images, reason in (("<image> <image> <image>", 2, "images_missing"), ("a", 1, "images_unreferenced"), ("<image>", 3, "images_unreferenced")):
        with pytest.raises(DataError, match=f"{text.count('<image>')} <image> markers but {images} images; ") as error:
            marked_segments(text, [one] * images, "<image>")
        assert error.value.reason == reason
    with pytest.raises(DataError, match="segment 2: 3 <image> markers but 2 images"):
        check_segments([one, text_segment("a"), text_segment("<image>"), one], "<image>")


@pytest.mark.parametrize("wrong, message", [
    (dict(length=3), "at least 5"), (dict(pictures=0), "some image operations"), (dict(image=(), pictures=2), "no image operations"),
    (dict(span="middle"), "span"), (dict(next_image=2), "probability"), (dict(pack=0), "pack"), (dict(frames=0), "frames"), (dict(pictures=True), "pictures"),
    (dict(chunk_end="<|none|>"), "no token '<|none|>'"), (dict(chunk_end=True), "name its token"), (dict(image_text=5), "image_text"),
    (dict(image=[["flexible_patches", {"patch_size": 2, "max_patches": 4}]]), "flexible patches"), (dict(vocab_size=9), "vocabulary 9"),
    (dict(kind="interlaved"), 'Did you mean "interleaved"'), (dict(picture=1), 'Did you mean "pictures"'),
])
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ConfigError, match=message):
        processor(**wrong)


def test_processors_are_saved_and_text_operations_apply(tmp_path):
    made = processor(operations=[["lowercase"]], next_image=0.25, span="random")
    made.save(tmp_path / "processor.json")
    again = Processor.load(tmp_path / "processor.json")
    assert again.digest == made.digest and json.loads((tmp_path / "processor.json").read_text())["format"]["kind"] == "interleaved"
    record = document("A DOG", 1, "B")
    assert (again(record)["tokens"] == processor()(document("a dog", 1, "b"))["tokens"]).all()
    assert made.format.measure(made.segments(record)) == (made(record)["valid"].sum(), 1)
    texts = processor(image=())
    assert set(texts(document("a dog"))) == {"tokens", "valid", "loss_weights"} and set(texts({"texts": ["a"]})) == set(texts.input_shapes())
    with pytest.raises(DataError) as error:
        texts(document(1, "a"))
    assert error.value.reason == "image_unexpected"


class Small:
    """A stand-in for a model that reads pictures through cross-attention."""
    def input_shapes(self):
        return {"images": (1, 4, 4, 3), "tokens": (9,)}

    def head(self, params):
        return {"kernel": jnp.zeros((8, TOKENIZER.vocab_size)), "tied": False}

    extend = init = None


def test_the_task_knows_the_shapes_and_checks_batches():
    from vlm_jax.tasks.generation import generation_task
    task = generation_task(Small())
    for form in (dict(), dict(pack=2), dict(frames=2), dict(image_tokens=2, image_text=False)):
        made = processor(**form)
        settings = made.to_dict()
        shapes = task.batch_shapes(settings)
        assert {key: shape for key, (shape, _) in shapes.items()} == made.input_shapes()
        assert {key: np.dtype(dtype) for key, (_, dtype) in shapes.items()} == made.input_dtypes()
    batch = {"pages": next(Loader(Listed([document(1, "a", 2, "b")]), processor(), 2).batches())}
    task.check_batch(None, batch)
    batch["pages"]["media_index"][1, 3] = 3
    with pytest.raises(DataError, match=r"stream pages, example 0: media_index\[3\] is 3, but the example has 3 pictures"):
        task.check_batch(None, batch)
    batch["pages"]["media_index"][1, 3] = 0
    batch["pages"]["tokens"][0, 1] = TOKENIZER.vocab_size
    with pytest.raises(DataError, match="vocabulary"):
        task.check_batch(None, batch)

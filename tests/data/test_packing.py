"""Packing: every document in exactly one row of an epoch, nothing above the room, and rows that are the documents as if alone."""
import pickle

from hypothesis import given, settings, strategies
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.data.test_interleaved import TOKENIZER, Listed, document, picture, processor
from vlm_jax.data.loader import Loader
from vlm_jax.data.packing import PackedSource, measure, pack_plan, packed_source
from vlm_jax.data.sources import build_source
from vlm_jax.errors import ConfigError, DataError


@settings(max_examples=80, deadline=None)
@given(strategies.lists(strategies.tuples(strategies.integers(0, 16), strategies.integers(0, 3)), min_size=1, max_size=60),
       strategies.integers(1, 9), strategies.integers(1, 30), strategies.integers(0, 3))
def test_every_document_is_in_exactly_one_row_that_has_room(lengths, most, window, seed):
    lengths = np.asarray(lengths)
    documents, offsets = pack_plan(lengths, (16, 3, most), (seed,), window)
    assert sorted(documents) == list(range(len(lengths))) and offsets[0] == 0 and offsets[-1] == len(lengths) and (np.diff(offsets) > 0).all()
    for begin, end in zip(offsets, offsets[1:]):
        tokens, pictures = lengths[documents[begin:end]].sum(0)
        assert tokens <= 16 and pictures <= 3 and end - begin <= most
    again = pack_plan(lengths, (16, 3, most), (seed,), window)
    assert all(np.array_equal(one, other) for one, other in zip((documents, offsets), again))


def test_rows_are_full_and_orders_differ():
    lengths = np.stack([np.random.default_rng(0).integers(5, 120, 3000), np.zeros(3000, int)], axis=1)
    documents, offsets = pack_plan(lengths, (256, 0, 99))
    assert lengths[:, 0].sum() / (256 * (len(offsets) - 1)) > 0.97
    other, _ = pack_plan(lengths, (256, 0, 99), (1,))
    assert not np.array_equal(documents, other)
    with pytest.raises(DataError, match="document 3000 has 257 tokens and 0 pictures, but a row has room for 256 and 0"):
        pack_plan(np.concatenate([lengths, [[257, 0]]]), (256, 0, 99))


RECORDS = [*(document("a dog", k, "b" * (k % 5), *([k + 1, "a"] * (k % 2))) for k in range(20)),
           *({"image": picture(k), "texts": ["a", "a cat"]} for k in (100, 101))]
SECTION = {"image": [["resize", {"size": 4}], ["value_range", {"low": 0, "high": 1}]], "text": [["tokenize", {"tokenizer": TOKENIZER.to_dict()}]],
           "format": {"kind": "interleaved", "length": 40, "pictures": 4, "pack": 5}}


def test_packed_rows_hold_each_document_once_an_epoch_as_if_alone(tmp_path):
    kept = tmp_path / "lengths.npy"
    source = packed_source(Listed(RECORDS), processor=SECTION, lengths=str(kept), epochs=2)
    made = processor(pack=5, pictures=4)
    assert (np.load(kept) == measure(Listed(RECORDS), made)).all()
    assert sorted(sum((source.documents_at(i) for i in range(len(source))), [])) == sorted([*range(22)] * 2)
    first = len(source._plans[0][1]) - 1
    assert sorted(sum((source.documents_at(i) for i in range(first)), [])) == list(range(22))
    for i in range(len(source)):
        arrays, numbers = made(source[i]), source.documents_at(i)
        assert arrays["segment_ids"].max() == len(numbers)
        for place, number in enumerate(numbers, 1):
            alone = processor()(RECORDS[number])
            own, count = arrays["segment_ids"] == place, alone["valid"].sum()
            assert all(arrays[key][own].tolist() == alone[key][:count].tolist() for key in ("tokens", "loss_weights"))
            read = arrays["media_index"][own]
            seen = [None if k < 0 else arrays["images"][k, 0, 0, 0] for k in read]
            assert seen == [None if k < 0 else alone["images"][k, 0, 0, 0] for k in alone["media_index"][:count]]
    assert {*source.texts_at(0)} <= {"a dog", "a", "a cat", *("b" * k for k in range(5))}
    from vlm_jax.data.tokenizer_training import captions_of
    assert {*captions_of(source)} == {*captions_of(Listed(RECORDS))} == {"a dog", "a", "a cat", "b", "bb", "bbb", "bbbb"}
    assert packed_source(Listed(RECORDS), processor=SECTION, lengths=str(kept)).details["filled"] > 0.7
    again = pickle.loads(pickle.dumps(source))  # noqa: S301  (our own bytes)
    assert again.documents_at(3) == source.documents_at(3) and len(next(Loader(source, made, 3, on_bad="raise").batches())["mask"]) == 3


def test_a_bad_document_is_counted_by_name_and_the_rest_of_its_row_is_used():
    class Failing(Listed):
        def __getitem__(self, index):
            if index == 1:
                raise DataError(f"{self.describe(index)}: the line is no JSON; mend it.")
            return self.records[index]

    records = [document(1, "a"), None, document(2, "see <image>"), document(3, "b")]
    source = packed_source(Failing(records), processor=SECTION)
    assert len(source) == 1 and measure(Failing(records), processor(pack=5, pictures=4))[:, 0].min() == 1
    loader = Loader(source, processor(pack=5, pictures=4), 1, bad_budget=1.0)
    batch = next(loader.batches())
    assert batch["segment_ids"].max() == 2 and loader.bad == {"other": 1, "images_missing": 1} and batch["mask"].all()
    assert any("pages.jsonl:2" in line and line.count("pages.jsonl:2") == 1 for line in loader.bad_examples)
    assert any("pages.jsonl:3: segment 1: 2 <image> markers but 1 images" in line for line in loader.bad_examples)
    with pytest.raises(DataError, match="images_missing|pages.jsonl"):
        next(Loader(source, processor(pack=5, pictures=4), 1, on_bad="raise").batches())


def test_no_token_of_a_packed_row_sees_another_document():
    """The logits of a small decoder on a row are those of each document alone."""
    from vlm_jax.registry import build
    texts = [document("a dog is"), document("small red"), document("x")]
    made, alone = processor(image=(), pack=3), processor(image=())
    model = build("decoder", vocab_size=TOKENIZER.vocab_size, width=16, depth=2, num_heads=2, mlp_dim=16, max_positions=64)
    row = {key: jnp.asarray(value)[None] for key, value in made({"documents": texts}).items() if key != "loss_weights"}
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), row)["params"], np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.float32(0.3 * rng.standard_normal(leaf.shape)), shapes)
    apply = jax.jit(lambda inputs: model.apply({"params": params}, inputs)[0][0])
    packed = apply(row)
    begin = 0
    for one in texts:
        single = {key: jnp.asarray(value)[None] for key, value in alone(one).items() if key != "loss_weights"}
        count = int(single["valid"].sum())
        np.testing.assert_allclose(packed[begin:begin + count], apply(single)[:count], atol=1e-5)
        begin += count


def test_wrong_settings_are_named(tmp_path):
    pages = Listed(RECORDS)
    for wrong, message in ((dict(), "needs a processor"), (dict(processor={**SECTION, "format": {**SECTION["format"], "pack": 1}}), "format.pack"),
                           (dict(processor=SECTION, length=5), "leave them out"), (dict(processor=SECTION, lengths=[[1, 2]]), ".npy"),
                           (dict(processor=SECTION, epochs=0), "epochs"), (dict(processor=SECTION, window=0), "window")):
        with pytest.raises(ConfigError, match=message):
            packed_source(pages, **wrong)
    (tmp_path / "bad.npy").write_bytes(b"junk")
    for lengths in ([[1, 2]], np.ones((22, 2)), str(tmp_path / "bad.npy"), -np.ones((22, 2), int)):
        with pytest.raises(DataError, match="lengths"):
            packed_source(pages, lengths=lengths, length=40, documents=3)
    made = build_source({"name": "packed", "source": {"name": "shapes_texts", "count": 7}, "lengths": [[5, 0]] * 7, "length": 10, "documents": 2})
    assert isinstance(made, PackedSource) and len(made) == 4 and made.describe(0) == "packed(shapes_texts/train)[0]"

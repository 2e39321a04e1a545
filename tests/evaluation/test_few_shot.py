"""Few-shot evaluation: what stands before a question, which examples are chosen, one reading of shared examples, metrics that come again from the lines."""
import json
import types

import jax
import numpy as np
import pytest

from tests.data.test_interleaved import CHUNK, MARK, TOKENIZER
from tests.models.generative import parameter_shapes
from tests.models.test_cross_attention_lm import perturbed
from vlm_jax.data.documents import image_segment, text_segment
from vlm_jax.data.processor import Processor
from vlm_jax.data.sources import build_source
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation import evaluate, few_shot as module
from vlm_jax.evaluation.few_shot import score, score_predictions
from vlm_jax.evaluation.generator import Generator
from vlm_jax.evaluation.shots import Chooser, Features, Layout, context, shuffled_pictures
from vlm_jax.models.cross_attention_lm import CrossAttentionLM
from vlm_jax.models.prefix_lm import PrefixLM

IMAGE = dict(image_size=8, patch_size=4, width=8, depth=1, mlp_dim=8, num_heads=2)
LANGUAGE = dict(vocab_size=TOKENIZER.vocab_size, width=8, depth=1, mlp_dim=12, num_heads=2)
FLAMINGO = CrossAttentionLM(IMAGE, LANGUAGE, gated=dict(every=2, num_heads=2, head_dim=4), resampler=dict(num_latents=2, depth=1, num_heads=2, head_dim=4))
FROZEN = PrefixLM(IMAGE, LANGUAGE)
OPERATIONS = [["resize", {"size": 8}], ["value_range", {"low": -1, "high": 1}]]
WORDS = ("red", "a dog", "blue star")
QUERIES = dict(name="shapes_words", count=5, size=8, ways=3, lexicon=3, seed=1)
SUPPORT = dict(QUERIES, count=9, seed=2)
EPISODES = dict(name="shapes_episodes", split="train", count=5, size=8, kinds=["binding"], shots=4, ways=2)


def processor(**form):
    return Processor(OPERATIONS, [["tokenize", {"tokenizer": TOKENIZER.to_dict()}]], {"kind": "interleaved", "length": 40, "pictures": 3, **form})


PROCESSOR = processor()


def generator(model, made=PROCESSOR, batch_size=2):
    params = perturbed(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), parameter_shapes(model)))
    return Generator(model, params, made, batch_size=batch_size)


class Stub:
    """Takes the place of `rank`: scores that the test makes of the prompt, and what was asked."""

    def __init__(self, monkeypatch, answers=lambda tokens, row: 0.0):
        self.batches, self.answers = [], answers
        monkeypatch.setattr(module, "rank", self)
        self.generator = Generator(types.SimpleNamespace(extend=None), {}, PROCESSOR, batch_size=2)

    def __call__(self, model, params, inputs, candidates, prefix=None, mesh=None, normalize="sum"):
        self.batches.append({name: np.asarray(value) for name, value in inputs.items()} | {"candidates": candidates})
        rows = [[self.answers(tuple(one), row) for one in candidates[row]] for row in range(len(candidates))]
        most = max(map(len, rows))
        return np.array([row + [-np.inf] * (most - len(row)) for row in rows], np.float32)

    @property
    def prompts(self):
        return [batch["tokens"][row][batch["valid"][row]].tolist() for batch in self.batches for row in range(len(batch["tokens"]))]


def ids(*texts):
    return [number for text in texts for number in ([text] if isinstance(text, int) else TOKENIZER.encode(text))]


def test_layouts_of_plain_records():
    record = {"image": np.zeros((8, 8, 3), np.uint8), "prompt": "what?", "texts": ["red"]}
    layout = Layout.of("question", TOKENIZER)
    assert [segment.get("text") for segment in layout.segments(record, "red")] == [None, "Question: what? Answer:", " red"]
    words = types.SimpleNamespace(encode=lambda text: [f"_{word}" for word in text.split()])   # a tokenizer that puts blanks before words itself
    assert [segment.get("text") for segment in Layout.of("output", words).segments(record, "red")] == [None, "Output:", "red"]
    assert [segment.get("text") for segment in Layout.of("plain", TOKENIZER).segments(record)] == [None, "what?"]
    assert [segment["kind"] for segment in Layout.of("{answer}", TOKENIZER).segments({**record, "prompt": ""})] == ["image"]
    for wrong in ("Output:", "{answer} {prompt}"):
        with pytest.raises(ConfigError, match="does not end in"):
            Layout.of(wrong, TOKENIZER)


def test_the_context_and_the_question_are_one_document():
    examples = [[image_segment(np.full((8, 8, 3), n, np.uint8)), text_segment(word)] for n, word in enumerate(WORDS)]
    opening, question = [text_segment("x = y")], [image_segment(np.full((8, 8, 3), 9, np.uint8)), text_segment("small")]
    before = context(opening, examples)
    first, rest, whole = PROCESSOR.document(before), PROCESSOR.document(question, begin=False), PROCESSOR.document([*before, *question])
    assert whole["tokens"].tolist() == [2, *ids("x = y", CHUNK), *[n for word in WORDS for n in ids(MARK, word, CHUNK)], *ids(MARK, "small")]
    np.testing.assert_array_equal(np.concatenate([first["tokens"], rest["tokens"]]), whole["tokens"])
    np.testing.assert_array_equal(np.concatenate([first["media_index"], rest["media_index"] + 3]), whole["media_index"])
    np.testing.assert_array_equal(np.concatenate([first["images"], rest["images"]]), whole["images"])


@pytest.mark.parametrize("number", [2, 5])
def test_shuffled_pictures_all_leave_their_texts(number):
    examples = [[text_segment(str(n)), image_segment(n)] for n in range(number)]
    moved = shuffled_pictures(examples, np.random.default_rng(0))
    found = [example[1]["image"] for example in moved]
    assert sorted(found) == list(range(number)) and all(n != place for place, n in enumerate(found))
    assert [example[0]["text"] for example in moved] == [str(n) for n in range(number)] and examples[0][1]["image"] == 0


def test_how_examples_are_chosen():
    drawn = Chooser("random", 3)
    assert drawn(6, 9, 4)[:2] == drawn(2, 9, 4) != drawn(2, 9, 5) and len(set(drawn(9, 9, 4))) == 9
    assert 7 not in drawn(8, 9, 4, itself=7) and Chooser("random", 4)(6, 9, 4) != drawn(6, 9, 4)
    assert Chooser("fixed", 3)(4, 9, 0) == Chooser("fixed", 3)(4, 9, 8)
    assert Chooser("rices", 0)(3, 5, 0, similarity=np.array([0.1, 0.9, 0.5, 0.9, 0.2])) == [2, 3, 1]
    assert Chooser("rices", 0)(2, 3, 0, itself=1, similarity=np.array([0.1, 0.9, 0.5])) == [0, 2]
    orders = drawn.orders(4, 1, 6)
    assert len(orders) == 6 and orders[0] == [0, 1, 2, 3] and all(sorted(order) == [0, 1, 2, 3] for order in orders) and drawn.orders(1, 1, 6) == [[0]]


def test_every_query_once_behind_its_own_examples(monkeypatch, tmp_path):
    stub = Stub(monkeypatch, lambda tokens, row: -float(sum(tokens)))
    found = evaluate("it", dict(evaluator="few_shot", source=EPISODES, shots=[0, 1, 4]), stub.generator, tmp_path)
    assert len(stub.batches) == 9 and {batch["images"].shape for batch in stub.batches[6:]} == {(2, 5, 8, 8, 3)}     # four pictures and the question's
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(line["shots"], line["index"]) for line in lines] == [(number, index) for number in (0, 1, 4) for index in range(5)]
    record = build_source(EPISODES)[1]
    words = [example[-1]["text"] for example in record["support"]]
    shots = [n for word in words for n in ids(MARK, "this is a", word, CHUNK)]
    assert stub.prompts[13] == [2, *shots, *ids(MARK, "this is a")]
    assert stub.prompts[7] == [2, *shots[:len(ids(MARK, "this is a", words[0], CHUNK))], *ids(MARK, "this is a")]
    # Without shots two examples stand there without pictures; the last batch repeats its last query.
    assert stub.prompts[1] == [2, *[n for word in words[:2] for n in ids("this is a", word, CHUNK)], *ids(MARK, "this is a")]
    assert stub.prompts[4] == stub.prompts[5]
    assert stub.batches[0]["candidates"][1] == [ids(word, CHUNK) for word in record["candidates"]]
    assert found["chance"] == 0.5 and found["queries"] == 5 and {f"{name}/{n}_shots" for name in ("accuracy", "standard_error") for n in (0, 1, 4)} < set(found)
    assert score_predictions(tmp_path / "predictions.jsonl") == pytest.approx(found)
    assert (tmp_path / "episodes.png").read_bytes().startswith(b"\x89PNG")


def test_controls_and_orders(monkeypatch, tmp_path):
    plain, blind, moved = (Stub(monkeypatch) for _ in range(3))
    for stub, settings in ((plain, dict(permutations=3)), (blind, dict(images=False)), (moved, dict(shuffled=True, repeats=2, zero_shot="none"))):
        monkeypatch.setattr(module, "rank", stub)
        found = evaluate("it", dict(evaluator="few_shot", source=dict(EPISODES, count=1), shots=4, **settings), stub.generator, tmp_path)
        assert found["accuracy/4_shots"] == 0      # ties count against the model
    assert len(plain.batches) == 3 and len({tuple(prompt) for prompt in plain.prompts}) > 1
    assert sorted(plain.prompts[0]) == sorted(plain.prompts[2])
    assert MARK not in blind.prompts[0] and not blind.batches[0]["images"].any() and (blind.batches[0]["media_index"] == -1).all()
    assert blind.prompts[0] == [number for number in plain.prompts[0] if number != MARK]
    images, others = moved.batches[0]["images"][0], plain.batches[0]["images"][0]
    assert len(images) == 9 and (images[0] == images[1]).all() and (images[0] != others[0]).any() and (images[8] == others[4]).all()


@pytest.mark.parametrize("model, made", [(FLAMINGO, PROCESSOR), (FROZEN, processor(image_text=False, image_tokens=4))], ids=["flamingo", "frozen"])
def test_cached_examples_equal_reading_them_again(model, made):
    asker = module._Asker(generator(model, made), "rank", "sum", 1, 4, "")
    rng = np.random.default_rng(0)
    before = context([], [[image_segment(rng.integers(0, 255, (8, 8, 3), np.uint8)), text_segment(word)] for word in WORDS])
    asked = [[image_segment(rng.integers(0, 255, (8, 8, 3), np.uint8)), text_segment("small")] for _ in range(3)]
    queries = [module.Query(n, f"q{n}", one, [], ["red"], list(WORDS), None, None) for n, one in enumerate(asked)]
    cached, again = (np.stack(asker(queries, [before] * 3, asked, shared)) for shared in (True, False))
    np.testing.assert_allclose(cached, again, rtol=1e-5, atol=3e-5)
    assert np.ptp(cached, axis=0).min() > 1e-3       # pictures count


def test_retrieved_examples_and_written_answers(tmp_path):
    made = generator(FLAMINGO)
    settings = dict(evaluator="few_shot", source=QUERIES, support=SUPPORT, shots=[0, 2], choice="rices", method="generate", max_tokens=3, metrics=["anls"])
    found = evaluate("it", settings, made, tmp_path)
    assert {"accuracy/2_shots", "anls/0_shots", "standard_error/0_shots"} <= set(found) and "chance" not in found
    assert score_predictions(tmp_path / "predictions.jsonl") == pytest.approx(found)
    features = Features(None, made)([np.full((8, 8, 3), n, np.uint8) for n in (0, 250, 0)])
    assert features.shape == (3, 8) and np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    assert (features @ features[0])[2] > 0.99999 > (features @ features[0])[1]


def test_features_of_another_run_choose_the_examples(monkeypatch, tmp_path):
    """A run whose features are the mean colour, without the background: the last example is the picture of the most similar colour."""
    def mean(variables, batch, method):
        return None, {"pooled": (batch * (batch.min(-1, keepdims=True) < 0)).mean((1, 2))}
    dual = types.SimpleNamespace(encode_image=None, embed_dim=3, apply=mean)
    monkeypatch.setattr("vlm_jax.load", lambda path: types.SimpleNamespace(model=dual, params={}, processor=PROCESSOR), raising=False)
    stub = Stub(monkeypatch)
    evaluate("it", dict(evaluator="few_shot", source=QUERIES, support=SUPPORT, shots=3, choice="rices", features="runs/siglip"), stub.generator, tmp_path)
    pictures = [batch["images"][row] for batch in stub.batches for row in range(2)][:5]
    features = Features("runs/siglip", stub.generator)
    pool = features([record["image"] for record in build_source(SUPPORT)])
    raw = [PROCESSOR.image(record["image"]) for record in build_source(SUPPORT)]
    for asked, shown in zip(features([record["image"] for record in build_source(QUERIES)]), pictures):
        order = np.argsort(-(pool @ asked), kind="stable")[:3]
        for place, number in enumerate(order[::-1]):
            np.testing.assert_array_equal(shown[place], raw[number])


def test_scores_from_lines():
    line = {"shots": 8, "references": ["a"], "task": "x", "prediction": "a", "candidates": ["a", "b", "c"]}
    lines = [{**line, "scores": scores, "task": task} for scores, task in (([0, -1, -2], "x"), ([0, 0, -2], "x"), ([-1, 0, -2], "y"), ([3, 0, 1], "y"))]
    found = score(lines)
    assert found["accuracy/8_shots"] == 0.5 and found["standard_error/8_shots"] == 0.25 and found["chance"] == pytest.approx(1 / 3)
    assert found["accuracy/8_shots/x"] == 0.5 and found["queries"] == 4


@pytest.mark.parametrize("settings, error, message", [
    (dict(shots=[5]), DataError, "5 examples are asked for, but there are 4"),
    (dict(choice="fixed"), ConfigError, "support"),
    (dict(choice="ricess"), ConfigError, "choice"),
    (dict(shots=[-1]), ConfigError, "shots is"),
    (dict(method="generate", permutations=6), ConfigError, "permutations is of"),
    (dict(beams=3), ConfigError, "beams is of"),
    (dict(template="output"), ConfigError, "leave template out"),
    (dict(candidates=["no", "yes"]), DataError, "is none of its 2 candidates"),
    (dict(source=QUERIES), DataError, "there are 0"),
    (dict(source=QUERIES, support=QUERIES, choice="fixed"), ConfigError, "among the queries"),
    (dict(features="runs/none"), ConfigError, "rices"),
    (dict(method="generate", metrics=["anl"]), ConfigError, 'Did you mean "anls"'),
])
def test_what_cannot_be_evaluated_is_named(monkeypatch, tmp_path, settings, error, message):
    stub = Stub(monkeypatch)
    with pytest.raises(error, match=message):
        evaluate("it", {"evaluator": "few_shot", "source": EPISODES, "shots": [2], **settings}, stub.generator, tmp_path)

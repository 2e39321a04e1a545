"""Zero-shot accuracy against brute force, ensembles of prompts, ties, errors, and the linear probe against scikit-learn's own."""
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tests.evaluation.stand_in import StandIn
from tests.evaluation.test_retrieval import Records, unit
from vlm_jax import evaluation
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation import linear_probe, zero_shot


class Labelled(Records):
    class_names = [f"c{i}" for i in range(7)]


@pytest.fixture
def run(monkeypatch, tmp_path):
    def evaluate(labels, images, texts, evaluator="zero_shot", **settings):
        monkeypatch.setattr("vlm_jax.evaluation.records.build_source", lambda settings: Labelled([{"label": label} for label in labels]))
        return evaluation.evaluate("classes", {"evaluator": evaluator, "source": {"name": "given"}, **settings}, StandIn(images, texts), tmp_path)
    return evaluate


def test_accuracy_equals_brute_force_with_ensembled_prompts(run, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(7, size=40)
    prompts = {f"{form}c{i}": unit(rng, 5) for form in ("a ", "the ") for i in range(7)}
    classes = np.stack([prompts[f"a c{i}"] + prompts[f"the c{i}"] for i in range(7)])
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    images = unit(rng, 40, 5) + 0.8 * classes[labels]
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    metrics = run([int(label) for label in labels], images, prompts, templates=["a {}", "the {}"])
    scores = images @ classes.T
    expected = scores.argmax(axis=1) == labels
    assert metrics["top1"] == pytest.approx(expected.mean()) and 0.2 < metrics["top1"] < 1
    assert metrics["top5"] == pytest.approx(np.mean([label in np.argsort(-row)[:5] for label, row in zip(labels, scores)]))
    assert metrics["mean_per_class"] == pytest.approx(np.mean([expected[labels == label].mean() for label in np.unique(labels)]))
    again = zero_shot.score_predictions(tmp_path / "predictions.jsonl")
    assert all(metrics[name] == pytest.approx(value) for name, value in again.items())
    assert (tmp_path / "confusion.png").exists() and (tmp_path / "classified.png").exists()


def test_ties_count_against_the_model(run):
    metrics = run([0, 1, 2], np.ones((3, 1)), {f"c{i}": [1.0] for i in range(7)})
    assert metrics["top1"] == 0 and metrics["top5"] == 0


def test_errors(run):
    texts = {f"c{i}": np.eye(7)[i] for i in range(7)}
    with pytest.raises(ConfigError, match="must hold {} once"):
        run([0], np.eye(7)[:1], texts, templates=["a photo"])
    with pytest.raises(DataError, match=r"given\[1\]: its label 7 is not one of the 7 classes"):
        run([0, 7], np.eye(7)[:2], texts)
    with pytest.raises(ConfigError, match="at least two"):
        run([0], np.eye(7)[:1], texts, class_names=["only"])


def test_linear_probe_equals_scikit_learn_at_the_strength_it_chose(run, tmp_path):
    rng = np.random.default_rng(1)
    labels = rng.integers(3, size=60)
    images = rng.normal(size=(60, 4)) + 1.5 * np.eye(3, 4)[labels]
    part = {"name": "given"}
    metrics = run([int(label) for label in labels], images, {}, evaluator="linear_probe", train=part, validation=part)
    x = np.concatenate([images.astype(np.float32)] * 2).astype(np.float64)
    x = (x - x[:60].mean(axis=0)) / (x[:60].std(axis=0) + 1e-6)
    expected = LogisticRegression(C=1 / (metrics["strength"] * 120), max_iter=1000).fit(x, np.tile(labels, 2)).score(x[:60], labels)
    assert metrics["top1"] == pytest.approx(expected) and metrics["top1"] > 0.6
    assert linear_probe.score_predictions(tmp_path / "predictions.jsonl")["top1"] == metrics["top1"]


def test_linear_probe_refuses_one_class(run):
    with pytest.raises(DataError, match="one class"):
        run([1, 1], np.eye(2), {}, evaluator="linear_probe", train={"name": "given"}, validation={"name": "given"})

"""What a run finds out about its evaluations before its first step."""
import jax
import pytest

from vlm_jax import evaluation
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.training.config import load_config
from vlm_jax.training.loop import train

SHAPES = dict(name="shapes", split="validation", size=16, limit=3)


@pytest.mark.parametrize("settings, error, message", [
    (dict(evaluator="zero_shots", source=SHAPES), ConfigError, r'evaluations.mine.evaluator: "zero_shots" is unknown. Did you mean "zero_shot"'),
    (dict(source=SHAPES), ConfigError, "evaluations.mine.evaluator is missing"),
    (dict(evaluator="retrieval", source=SHAPES, evry=3), ConfigError, "evaluations.mine.evry: retrieval takes no such setting.*every|evry"),
    (dict(evaluator="retrieval"), ConfigError, "evaluations.mine.source is missing"),
    (dict(evaluator="retrieval", source=dict(name="table", path="no.jsonl")), DataError, "evaluations.mine: .*no.jsonl"),
    (dict(evaluator="vqa", source=dict(name="shaps")), ConfigError, "evaluations.mine.source.name"),
    (dict(evaluator="zero_shot", source=SHAPES, templates=["a photo"]), ConfigError, "must hold {} once"),
    (dict(evaluator="zero_shot", source=SHAPES, class_names=["cat", "dog"]), ConfigError, "2 names, but .*100 classes"),
    (dict(evaluator="zero_shot", source=SHAPES, class_names="missing/data.noun"), ConfigError, "class_names missing/data.noun"),
    (dict(evaluator="few_shot", source=SHAPES, support=dict(name="shaps")), ConfigError, "evaluations.mine.support.name"),
    (dict(evaluator="few_shot", source=SHAPES, choice="fixed"), ConfigError, "support; name its source"),
])
def test_mistakes_are_found(settings, error, message):
    with pytest.raises(error, match=message):
        evaluation.check({"mine": settings})


def test_what_is_right_passes():
    evaluation.check({"a": dict(evaluator="zero_shot", source=SHAPES, every=3, templates="ensemble"), "b": dict(evaluator="retrieval", source=SHAPES),
                      "c": dict(evaluator="captioning", source=dict(SHAPES, name="shapes_captions"), max_tokens=3)})
    evaluation.check({})


def test_a_run_stops_before_its_first_step(tmp_path):
    config = load_config("configs/siglip/shapes.py:variant=test")
    config.evaluations = dict(mine=dict(evaluator="zero_shot", source=SHAPES, class_names="missing.txt"))
    with pytest.raises(ConfigError, match="missing.txt"):
        train(config, tmp_path / "run", devices=jax.devices()[:1])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()

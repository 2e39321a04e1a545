"""Every config: resolves, matches its golden text, says how it is launched, and its test variant trains two steps."""
import ast
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.configs.describe import GOLDEN, ROOT, config_files, describe, golden_path, program
from vlm_jax.data.worlds.emoji_font import emoji_ready
from vlm_jax.errors import ConfigError
from vlm_jax.training.config import load_config
from vlm_jax.training.loop import train

FILES = config_files()


def distinct_programs() -> list[str]:
    """The first config of each distinct test program."""
    seen: dict[str, str] = {}
    for file in FILES:
        seen.setdefault(program(file), file)
    return sorted(seen.values())


@pytest.mark.parametrize("file", FILES)
def test_config_matches_its_golden_text(file):
    assert describe(file) == golden_path(file).read_text(), f"{file} changed; read the difference, then run make golden"


def test_no_golden_text_without_a_config():
    assert {path.name for path in GOLDEN.glob("*.txt")} == {golden_path(file).name for file in FILES}


@pytest.mark.parametrize("file", FILES)
def test_docstring_says_how_to_launch_this_very_config(file):
    docstring = ast.get_docstring(ast.parse((ROOT / file).read_text()))
    assert f"python -m vlm_jax.train --config {file}" in docstring.replace('--config "', "--config ")   # quoted where a shell would expand it
    assert f"{file}:variant=test" in docstring


@pytest.mark.parametrize("file", FILES)
def test_misspelt_argument_is_an_error(file):
    with pytest.raises(ConfigError, match="variant"):
        load_config(f"{file}:varient=test")


def selected(source) -> str:
    """What a source section selects, whatever part of it: two that give the same text read the same records."""
    return json.dumps({key: value for key, value in source.items() if key not in ("limit", "subset")}, sort_keys=True)


@pytest.mark.parametrize("variant", ["full", "test"])
@pytest.mark.parametrize("file", FILES)
def test_nothing_is_evaluated_on_what_is_trained_on(file, variant):
    config = load_config(f"{file}:variant={variant}")
    trained = {selected(stream["source"]) for stage in config["stages"] for stream in stage["data"].values()}
    evaluated = {selected(settings["source"]) for settings in config["evaluations"].values()}
    assert trained and not trained & evaluated


@pytest.mark.parametrize("file", ["configs/pali/pali3_5b.py", "configs/paligemma/paligemma_3b.py", "configs/language/gemma2_9b.py"])
def test_tuning_recipes_evaluate_the_table_that_the_argument_names(file):
    assert not load_config(file)["evaluations"]
    section = load_config(f"{file}:validation=val.jsonl")["evaluations"]["held_out"]
    assert section["source"]["path"] == "val.jsonl" and section["evaluator"] == "captioning"
    assert ("image" in section["source"]) == ("language" in file) == (section.get("images") is False)


@pytest.mark.parametrize("file", distinct_programs())
def test_test_variant_trains_and_evaluates(file, tmp_path):
    if "emoji" in file and (missing := emoji_ready()):
        pytest.skip(f"the emoji data cannot be drawn here: {missing}")
    summary = train(load_config(f"{file}:variant=test"), tmp_path / "run", devices=jax.devices()[:2])
    rows = [json.loads(line) for line in Path(tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses) == summary["step"] and np.isfinite(losses).all()
    assert summary["evaluations"] and all(np.isfinite(list(metrics.values())).all() for metrics in summary["evaluations"].values())
    assert (tmp_path / "run" / "report.html").stat().st_size > 5_000

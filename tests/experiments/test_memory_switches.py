"""The study's own arithmetic, its recorded figures, and one small pair of switches compiled here."""
import json

import jax
import pytest

from experiments.memory_switches import run


@pytest.mark.slow
def test_a_switch_is_compiled_and_counted():
    model = dict(name="siglip", preset="test")
    devices = jax.devices()[:2]
    base, kept = (run.figures(run.compile_switch(switch, devices, model=model, batch=4)) for switch in ({}, run.SWITCHES["donate=False"]))
    assert base["aliased"] > 0 and kept["aliased"] == 0
    assert "peak" in run.line_of(dict(base, platform="cpu", switch="base"))


def test_every_switch_is_a_config():
    from vlm_jax.training.config import resolve
    for name, switch in run.SWITCHES.items():
        assert resolve(run.config_of(switch))["name"] == "memory_switches", name
    assert {name for names in run.PLATFORMS.values() for name in names} <= {*run.SWITCHES, *run.VOCABULARY, *run.KEPT}


def test_bytes_kept_are_those_of_the_blocks_inputs_and_of_what_the_policy_names():
    rows, tokens, width, depth = 6, 10, 64, 3
    size = dict(rows=rows, tokens=tokens, width=width, depth=depth)
    stream = rows * tokens * width * depth * 4                     # float32 whatever the products read
    for dtype, item in (("float32", 4), ("bfloat16", 2)):
        each = rows * tokens * width * depth * item
        assert run.kept_bytes("full", dtype, **size) == stream
        assert run.kept_bytes("attention", dtype, **size) == stream + 4 * each, "queries, keys, values and mixed values"
        assert run.kept_bytes("mlp", dtype, **size) == stream + 4 * each, "the hidden layer, four times as wide"
        assert run.kept_bytes("none", dtype, **size) > run.kept_bytes("minimal", dtype, **size) > stream + 8 * each


def test_the_page_on_memory_shows_the_recorded_figures():
    page = (run.FOLDER.parents[1] / "docs" / "memory.md").read_text()
    rows = json.loads((run.FOLDER / "results.json").read_text())["details"]["bytes_per_device"]
    kept = {row["switch"]: f"{row['kept'] / 2**20:,.0f}" for row in rows if "kept" in row}
    for dtype in ("bfloat16", "float32"):
        assert f"| {dtype} | " + " | ".join(kept[f"{dtype}, remat={remat}"] for remat in ("none", "minimal", "attention", "mlp", "full")) + " |" in page
    for line in run.table_of([row for row in rows if "kept" not in row]).splitlines():
        assert line in page


def test_the_recorded_figures_say_what_the_readme_says():
    results = json.loads((run.FOLDER / "results.json").read_text())
    rows = {(row["platform"], row["switch"]): row for row in results["details"]["bytes_per_device"]}
    assert run.metrics_of(list(rows.values())).keys() == results["metrics"].keys()
    assert results["metrics"]["vocabulary_tiled_over_dense_temporaries"] < 0.05
    assert rows["tpu", "remat=full"]["temporaries"] < 0.4 * rows["tpu", "base"]["temporaries"]
    assert rows["state", "all: full, fsdp=8, moments bf16"]["state"] < 0.1 * rows["state", "base"]["state"]
    assert run.table_of(results["details"]["bytes_per_device"]) in (run.FOLDER / "README.md").read_text()

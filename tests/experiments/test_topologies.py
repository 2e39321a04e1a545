"""What the study of topologies records of a config's programs, from stand-ins for compiled ones."""
import json

from experiments.topologies import run
from vlm_jax.training.config import load_config

GIB = 2 ** 30


def finding(program: str, fits: bool = True) -> dict:
    """The findings of one program, as `analysis.report.analyse` gives them."""
    found = {"config": "c", "topology": "v5e-16", "program": program, "mesh": {"data": 2, "fsdp": 8}, "batch": {"rows": 32}, "collective_bytes": 5e8,
             "warnings": [], "memory": {"parameters": GIB, "cache": GIB // 2, "peak": 2 * GIB, "limit": 16 * GIB, "share": 0.125, "fits": fits}}
    times = {"seconds": 0.01, "mfu": 0.5, "mfu_without_overlap": 0.4, "bound": "memory", "examples_per_second_per_device": 200.0}
    return found | ({"roofline": times} if fits else {})


def test_generating_configs_have_their_decoding_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    asked = []

    def analyse(config, topology, what, stage, quick):
        asked.append(what)
        return [finding("train")] if what == "train" else [finding("generate/prompt", fits=False), finding("generate/step")]
    monkeypatch.setattr(run, "analyse", analyse)
    monkeypatch.setattr(run, "table", lambda found: found["program"])
    path = run.study("configs/pali/pali3_5b.py:topology=v5e-16")
    written = json.loads(path.read_text())
    assert asked == ["train", "generate"] and path.parent.name == "pali_pali3_5b-v5e-16"
    assert [one["program"] for one in written["details"]["decoding"]] == ["generate/prompt", "generate/step"]
    metrics = written["metrics"]
    assert metrics["fits"] == metrics["generate_step_fits"] == 1 and metrics["generate_prompt_fits"] == 0 and metrics["tokens_per_second_per_chip"] == 200
    assert "generate_prompt_step_ms" not in metrics and metrics["generate_step_step_ms"] == 10
    (tmp_path / "README.md").write_text("words\n<!-- table -->\nold\n")
    run.write_table()
    text = (tmp_path / "README.md").read_text()
    assert "old" not in text and "DOES NOT FIT" in text and "| generate/step | 32 | 2.00 (16.00) | 1.00 | 0.50 | 10.0 | memory | 200.0 | 0.50 |" in text


def test_which_configs_generate():
    assert run.generates(load_config("configs/paligemma/paligemma_3b.py")) and not run.generates(load_config("configs/siglip/shapes.py"))

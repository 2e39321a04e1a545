"""The small studies beside the parity sweep write their figures, and the README shows what is recorded."""
import json

from experiments.parity import doubles, draws

README = (draws.OUTPUT.parent / "README.md").read_text()


def test_draws_and_doubles_write_what_they_measure(tmp_path):
    ratios = draws.main("gpt2:1", 2, tmp_path / "draws")
    written = json.loads((tmp_path / "draws" / "results.json").read_text())
    assert written["metrics"]["draws"] == len(ratios["gpt2:1"]) == 2 and len(set(ratios["gpt2:1"])) == 2
    assert written["metrics"]["above_1_5"] == sum(ratio > 1.5 for ratio in ratios["gpt2:1"])
    errors = doubles.main("gpt2:1", tmp_path / "doubles")
    assert set(errors) == {"gpt2_1_ours", "gpt2_1_reference"} and 0 < errors["gpt2_1_ours"] < 1e-5
    assert json.loads((tmp_path / "doubles" / "results.json").read_text())["name"] == "parity_doubles"


def test_the_readme_shows_the_recorded_figures():
    metrics = json.loads((draws.OUTPUT / "results.json").read_text())["metrics"]
    assert metrics["above_1_5"] == 0 and f"the median is {metrics['median']:.2f}, the largest {metrics['largest']:.2f}" in " ".join(README.split())
    errors = json.loads((doubles.OUTPUT / "results.json").read_text())["metrics"]
    shown = [f"{errors[f'gemma3_9_{name}']:.1e}".replace("e-0", "e-") for name in ("ours", "reference")]
    assert f"ours errs by {shown[0]} and the reference in float32 by {shown[1]}" in " ".join(README.split())

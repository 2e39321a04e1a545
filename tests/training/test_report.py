"""The report of a run: well-formed, self-contained, complete, and written whatever is missing."""
import html.parser
import io
import json
import re

from PIL import Image
import pytest

from vlm_jax.training import report
from vlm_jax.training.report_html import compact_json, escape, line_chart, number, smooth, ticks, without_paths

VOID = {"meta", "img", "br", "circle", "line", "path"}


class Checker(html.parser.HTMLParser):
    """Raises where tags do not nest; keeps tags, attributes and text."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *item) for item in attrs]
        assert tag not in ("script", "link", "iframe")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *item) for item in attrs]

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read(path) -> tuple[str, Checker, str]:
    page = open(path, encoding="utf-8").read()
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    return page, checker, " ".join(" ".join(checker.text).split()).replace("\u00a0", " ")


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "secret_folder" / "run"
    folder.mkdir(parents=True)
    source = {"name": "table", "path": "/srv/someone/private/pairs.jsonl"}
    stage = {"steps": 40, "data": {"pairs": {"source": source, "batch_size": 32}}}
    (folder / "config.json").write_text(json.dumps({
        "name": "tiny_<script>alert(1)</script>", "seed": 3, "model": {"name": "siglip", "preset": "test"},
        "task": {"name": "contrastive", "loss": "sigmoid"}, "stages": [stage, stage], "evaluations": {}}))
    rows = [{"step": step, "kind": "train", "loss": 5.0 - step / 20, "learning_rate": 1e-3 * step, "gradient_norm": None if step == 30 else 1.0,
             "seconds_per_step": 0.5, "examples_per_second": 64.0, "gflops": 20.0, "mfu": 0.25, "data_wait": 0.01} for step in range(10, 81, 10)]
    rows[0].pop("seconds_per_step")
    rows[3]["loss"] = None
    for step in (40, 80):
        rows.append({"step": step, "kind": "eval", "name": "classes", "top1": 0.5 * step / 80, "top5": 0.9, "pictures": 64.0, "classes": 8.0,
                     "seconds": 2.0})
        rows.append({"step": step, "kind": "eval", "name": "search", "text_to_image/r@1": 0.25, "image_to_text/r@1": 0.375,
                     "text_to_image/median_rank": 4.0, "text_to_image/r@1/de": 0.2, "text_to_image/r@1/fa": None,
                     "image_to_text/r@1/de": 0.3, "image_to_text/r@1/fa": 0.45, "seconds": 1.0})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 90, "ki')
    (folder / "environment.json").write_text(json.dumps({
        "started": "2026-01-02T03:04:05+00:00", "command": ["/opt/secret_folder/bin/python", "train.py", "--workdir", str(folder)],
        "python": "3.11.7", "packages": {"jax": "0.10.2"}, "variables": {"XLA_FLAGS": "--dump_to=/var/secret_folder/dump"}, "matmul_gflops": 80.0}))
    (folder / "parameters.txt").write_text("parameter  shape\nimage/kernel  3x4\ntotal: 1,234,567 parameters, 4.9 MB; 1,234,567 trained\n")
    for name, step in (("search", 40), ("search", 80), ("by_hand", 80)):
        (folder / "evaluations" / name / str(step)).mkdir(parents=True)
    newest = folder / "evaluations" / "search" / "80"
    (newest.parent / "40" / "old.png").write_bytes(png(900, 900))
    (newest / "recall_curve.png").write_bytes(png(30, 20))
    (newest / "text_to_image.png").write_bytes(png(90, 60))
    (newest / "a<b>.png").write_bytes(png(10, 10))
    (newest / "not_really.png").write_bytes(b"no picture")
    lines = [{"direction": "text_to_image", "language": "fa", "query": {"text": "قلب <script>x</script>"}, "rank": 2,
              "answers": [{"index": 1, "caption": "a heart", "score": 0.5, "right": False}]}] * 30
    (newest / "predictions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{cut")
    (folder / "evaluations" / "by_hand" / "80" / "metrics.json").write_text('{"top1": 0.125}')
    return folder


def test_says_what_happened(workdir):
    path = report.write_report(workdir)
    assert path == str(workdir / "report.html")
    _, checker, text = read(path)
    assert "A SigLIP model of 1,234,567 parameters, trained for 80 steps in 2 stages on table." in text
    for expected in ("50.0 %", "chance 12.5 %", "25.0 %", "37.5 %", "45.0 %", "training loss 1 4.5 at step 10", "time in training 0:40",
                     "1.23 million", "20 GF/s", "of 80 GF/s", "time in evaluations 0:06", "top-1 accuracy 12.5 %"):
        assert expected in text, expected
    assert checker.tags.count("svg") >= 5 and "German" in text and "Persian" in text
    assert [value for tag, key, value in checker.attributes if (tag, key) == ("img", "alt")] == ["Text to image", "Recall curve", "A<b>"]


def test_escapes_and_keeps_to_itself(workdir):
    page, checker, text = read(report.write_report(workdir))
    assert "<script" not in page and "قلب <script>x</script>" in text
    sources = [value for _, key, value in checker.attributes if key in ("src", "href", "xlink:href", "srcset")]
    assert sources and all(value.startswith("data:image/png;base64,") for value in sources)
    assert not re.search(r"https?://|@import|url\(", page)
    assert "secret_folder" not in page and "/srv/" not in page and "someone" not in page and "pairs.jsonl" in text
    assert ("td", "dir", "auto") in checker.attributes


@pytest.mark.parametrize("files", [
    {},
    {"config.json": '{"name": "alone"}'},
    {"config.json": "[1, 2"},
    {"config.json": '{"stages": null, "model": 3, "name": null}'},
    {"metrics.jsonl": '{"step": 1, "kind": "train"}\n{"step": 2, "kind": "eval", "name": "x", "top1": null}\n[]\n'},
    {"metrics.jsonl": '{"step": 1, "kind": "train", "loss": null}\n'},
    {"environment.json": "{}", "parameters.txt": ""},
])
def test_a_run_that_has_hardly_begun(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    _, checker, text = read(report.write_report(tmp_path))
    assert checker.tags.count("h1") == 1 and text
    assert "nan" not in text.lower().split()


def test_too_many_pictures_are_named_not_shown(workdir, monkeypatch):
    monkeypatch.setattr(report, "PICTURES_LIMIT", 10)
    _, checker, text = read(report.write_report(workdir))
    assert "img" not in checker.tags and "Text to image is too large" in text


def test_the_command_prints_the_path(workdir, capsys):
    report.main([str(workdir)])
    assert capsys.readouterr().out.strip() == str(workdir / "report.html")
    assert sorted(path.name for path in workdir.iterdir() if path.name.startswith("report")) == ["report.html"]
    with pytest.raises(SystemExit, match="no such folder"):
        report.main([str(workdir / "nowhere")])


def test_numbers():
    shown = {1529858: "1,529,858", 2.918: "2.918", 3.9e-8: "3.9e-08", 0.0: "0", None: "–", float("nan"): "–", 110.94: "110.9", -0.25: "-0.25"}
    assert {value: number(value) for value in shown} == shown
    assert number(0.4834, "text_to_image/r@1/de") == "48.3\u00a0%" and number(3.0, "median_rank") == "3"
    assert ticks(0, 1) == [0, 0.5, 1.0] and ticks(2.9, 5.9) == [2, 3, 4, 5, 6]
    for low, high in ((0, 1), (2.9, 5.9), (-1e-9, 3e-9), (7, 7), (0, 0), (-3e6, 12.5)):
        found = ticks(low, high)
        assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8 and len(set(found)) == len(found)
    assert smooth([(0, 4.0), (1, 4.0), (2, 4.0)]) == [(0, 4.0), (1, 4.0), (2, 4.0)]


def test_paths_are_cut_and_addresses_stay():
    assert without_paths("--workdir=/a/b/c d /x") == "--workdir=.../c d /x"
    assert without_paths(r"C:\Users\me\run") == ".../run"
    for text in ("gs://bucket/a/b", "image/blocks/mlp/kernel", ".*/bias", "a / b / c", "text_to_image/r@1/de"):
        assert without_paths(text) == text
    assert escape('<"/a/b/c">') == "&lt;&quot;.../c&quot;&gt;"


def test_curves_leave_out_what_is_not_finite():
    chart = line_chart("Loss <1>", {"loss": [(1, 3.0), (2, float("nan")), (3, None), (4, 1.0)]}, stages=[2])
    assert "nan" not in chart.lower() and "Loss &lt;1&gt;" in chart and 'class="stage"' in chart
    assert chart.count('class="curve s0"') == 1 and line_chart("Loss", {"loss": [(1, 3.0)]}) == ""
    many = line_chart("Loss", {"loss": [(step, 1 / step) for step in range(1, 5001)]}, smoothed=True)
    assert "faint" in many and len(many) < 60_000
    assert json.loads(compact_json({"a": [1] * 90, "b": {"c": None}})) == {"a": [1] * 90, "b": {"c": None}}

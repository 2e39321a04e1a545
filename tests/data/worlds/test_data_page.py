"""The code of docs/data.md works as it is written."""
import json
from pathlib import Path
import re
import runpy
import shlex
import warnings

import numpy as np
from PIL import Image
import pytest

PAGE = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)([^\n]*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """The folder of the page, with eight pictures."""
    folder = tmp_path / "photos"
    (folder / "cats").mkdir(parents=True)
    lines = []
    for i in range(8):
        name = f"cats/{i}.png"
        Image.fromarray(np.full((40, 50, 3), 30 * i, np.uint8)).save(folder / name)
        lines.append(json.dumps({"image": name, "caption": f"a cat number {i} of grey"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VLM_JAX_CACHE", str(tmp_path / "cache"))
    return folder


def test_blocks_run_in_order(photos, monkeypatch):
    pytest.importorskip("tensorflow_datasets", reason="tensorflow_datasets is not installed")
    names = {}
    for language, tag, code in BLOCKS:
        if language == "python" and not tag.strip():
            exec(compile(code, "docs/data.md", "exec"), names)  # noqa: S102  (our own page)
        elif language == "sh":
            words = shlex.split(code)
            assert words[:2] == ["python", "-m"]
            _run(words[2], words[3:], monkeypatch)
    assert len(names["source"]) == 8 and len(names["mixed"]) > 8 and len(names["prepared"]) == 20
    assert names["batch"]["image"].shape == (2, 48, 48, 3) and names["batch"]["weight"].tolist() == [1, 1]
    assert (photos.parent / "my.model").stat().st_size > 1000


def test_emoji_block(monkeypatch, emoji_cache):
    from vlm_jax.data.sources import build_source
    monkeypatch.setenv("VLM_JAX_CACHE", emoji_cache)
    # The pictures of the other tests, which are smaller, are drawn already.
    code = next(code for _, tag, code in BLOCKS if tag.strip() == "emoji").replace('"name": "emoji"', '"name": "emoji", "size": 24')
    names = {"build_source": build_source}
    exec(compile(code, "docs/data.md", "exec"), names)  # noqa: S102  (our own page)
    assert len(names["gallery"]) >= 500 and len(names["gallery"][0]["texts"]) == 2


def test_config_block(photos):
    from vlm_jax.data.sources import build_source
    names = {}
    exec(compile(next(code for _, tag, code in BLOCKS if tag.strip() == "config"), "docs/data.md", "exec"), names)  # noqa: S102  (our own page)
    config = names["get_config"]()
    assert len(build_source(config.stages[0]["data"]["pairs"]["source"])) == 6
    assert len(build_source(config.evaluations.held_out.source)) == 2


def test_every_source_is_listed():
    from vlm_jax.data.sources import SOURCES
    assert all(f"`{name}`" in PAGE for name in SOURCES)


def _run(module, arguments, monkeypatch):
    """Does what `python -m module arguments` does, in this process."""
    monkeypatch.setattr("sys.argv", [module, *arguments])
    with warnings.catch_warnings():
        # The module is imported already, which is no matter here.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as stop:
            assert not stop.code, stop.code

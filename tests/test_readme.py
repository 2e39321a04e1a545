"""What README and the docs promise: their commands are understood by the programs they name, their links lead somewhere, their figures are recorded."""
import json
from pathlib import Path
import re
import shlex

import pytest

from vlm_jax.training.config import load_config, resolve

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("experiments/*/README.md"))]


def commands(page: Path) -> list[list[str]]:
    """The `python -m vlm_jax...` commands of a page, comments cut off, continued lines joined."""
    text = page.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python -m ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_modules_and_configs_that_exist(page):
    for words in commands(page):
        module = words[2]
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or place.is_dir() or module in ("pytest", "venv", "lmms_eval"), module
        if "--config" in words and "vlm_jax" in module:
            config = words[words.index("--config") + 1]
            if config.startswith("configs/") and "/my_" not in config:   # my_...: a file that the reader writes
                resolve(load_config(config))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_readme_has_the_two_commands_and_no_gaps():
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text and "make test" in text
    assert not re.search(r"[A-Z]+_TABLE", text), "a table was never filled in"


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*/results.json")), ids=lambda path: path.parent.name)
def test_results_were_written_by_the_command_in_them(path):
    results = json.loads(path.read_text())
    assert set(results) >= {"name", "command", "hardware", "date", "seeds", "metrics"} and results["name"] == path.parent.name
    assert results["command"].startswith(f"python -m experiments.{path.parent.name}.")
    assert all(isinstance(value, (int, float)) for value in results["metrics"].values()) and results["metrics"]
    assert (path.parent / "README.md").exists()


def test_architecture_names_the_floors_there_are():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for folder in sorted(path.name for path in (ROOT / "vlm_jax").iterdir() if path.is_dir() and not path.name.startswith("__")):
        assert folder in text, folder

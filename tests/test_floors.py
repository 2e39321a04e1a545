"""A floor of the house imports only from floors below it: docs/architecture.md lists them from top to bottom."""
import ast
from pathlib import Path
import re

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "vlm_jax"


def floors() -> dict[str, int]:
    """{first name under vlm_jax: floor}, 0 at the top, from the listing in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    listing = text[text.index("    vlm_jax/\n"):].split("\n\n")[0]
    order = {"configs": 0}
    for number, line in enumerate(listing.splitlines()[1:], start=1):
        for name in re.findall(r"\b([a-z_]+)(?:\.py|/)", line):
            order.setdefault(name, number)
    return order


def imported(path: Path) -> set[str]:
    """First names under vlm_jax that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    known = {entry.stem for entry in PACKAGE.iterdir()}
    return {name.split(".")[1] for name in names if name.startswith("vlm_jax.") and name.split(".")[1] in known}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if "configs" not in path.relative_to(PACKAGE).parts)


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    order = floors()
    here = floor_of(path)
    if here == "__init__":      # the roof: its lazy attributes reach everywhere
        return
    assert here in order, f"{here} has no floor: add it to the listing in docs/architecture.md"
    for name in imported(path):
        assert name in order, f"{name} has no floor: add it to the listing in docs/architecture.md"
        assert order[name] >= order[here], f"{path.relative_to(ROOT)} (floor {here}) imports vlm_jax.{name}, which lies above it"


def test_the_listing_is_read():
    order = floors()
    assert order["training"] < order["evaluation"] < order["models"] < order["nn"] < order["data"] < order["errors"]
    assert order["train"] == order["restore"]


def test_only_one_module_imports_orbax():
    importers = {path.relative_to(PACKAGE).as_posix() for path in FILES for node in ast.walk(ast.parse(path.read_text()))
                 if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "orbax" for alias in node.names))
                 or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "orbax")}
    assert importers == {"training/checkpoint_writer.py"}

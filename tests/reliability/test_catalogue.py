"""docs/reliability.md: every fault of the catalogue has its tests, each of which exists, or its reason; exit codes are those of the program."""
import ast
from pathlib import Path
import re

import pytest

from vlm_jax import errors

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text()
NAMED = sorted(set(re.findall(r"tests/[\w/]+\.py(?:::\w+)?", PAGE + (ROOT / "SECURITY.md").read_text())))


def rows():
    """{"R1": its cells} of the catalogue."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines()]
    return {cells[0]: cells for cells in table if re.fullmatch(r"R\d+", cells[0])}


def test_every_fault_has_a_row_with_a_test_or_a_reason():
    assert list(rows()) == [f"R{number}" for number in range(1, 20)]
    for name, (_, fault, behaviour, tests) in rows().items():
        assert fault and behaviour, name
        assert re.search(r"tests/[\w/]+\.py::\w+", tests) or "not tested here:" in tests, name


@pytest.mark.parametrize("reference", NAMED)
def test_each_test_that_is_named_exists(reference):
    path, _, function = reference.partition("::")
    assert (ROOT / path).exists(), path
    defined = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert not function or function in defined, reference


def test_exit_codes_are_the_programs():
    said = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    there = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.VlmError) and kind is not errors.VlmError}
    assert said == there | {0, 130}


def test_figures_are_recorded():
    """Where the page quotes the study, the numbers are those of its results.json."""
    import json
    path = ROOT / "experiments" / "kill_resume" / "results.json"
    quoted = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", PAGE, re.MULTILINE))
    if not path.exists():
        assert not quoted, "figures without a results.json"
        return
    metrics = json.loads(path.read_text())["metrics"]
    assert {name: float(value.replace(",", "")) for name, value in quoted.items()} == {name: metrics[name] for name in quoted} and quoted

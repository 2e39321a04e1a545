"""Fault points: the grammar of VLM_JAX_FAULT, what each action does, and that the table of points is the truth about the source."""
import ast
from collections import defaultdict
import errno
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

import pytest

from vlm_jax import faults
from vlm_jax.errors import ConfigError

PACKAGE = Path(faults.__file__).parent


def passes(points, fault="", trace=None, process=None):
    """Runs a program that passes `points` in order, printing each with what it returned."""
    program = ("from vlm_jax import faults\n"
               f"for name in {list(points)!r}:\n"
               "    try:\n        print(name, faults.point(name), flush=True)\n"
               "    except OSError as error:\n        print(name, error.errno, error.strerror, flush=True)\n")
    environment = {**os.environ, "VLM_JAX_FAULT": fault}
    for name, value in (("VLM_JAX_FAULT_TRACE", trace), ("VLM_JAX_PROCESS_ID", process)):
        environment.pop(name, None)
        if value is not None:
            environment[name] = str(value)
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PACKAGE.parent)


def result(*arguments, **options):
    process = passes(*arguments, **options)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output.splitlines(), errors


@pytest.fixture
def plan(monkeypatch):
    """Switches a plan on in this process."""
    def switch(text):
        monkeypatch.setattr(faults, "_plan", faults._read(text))
        monkeypatch.setattr(faults, "_counts", faults.Counter())
    return switch


def test_items_counts_and_processes_are_read():
    assert faults._read("") == {} == faults._read(" , ")
    assert faults._read("loop.step:10@1=hang, metrics.write:2=full,loop.step:3=kill") == {
        "loop.step": {10: ("hang", 1), 3: ("kill", None)}, "metrics.write": {2: ("full", None)}}


@pytest.mark.parametrize("text, message", [
    ("loop.step=kill", 'VLM_JAX_FAULT: "loop.step=kill" is not POINT:COUNT=ACTION'), ("loop.step:x=kill", "is not POINT:COUNT=ACTION"),
    ("loop.step:1=", "is not POINT:COUNT=ACTION"), ("loop.step:1@=kill", "is not POINT"),
    ("loop.stop:1=kill", 'no point "loop.stop".*Did you mean "loop.step"')])
def test_what_cannot_be_meant_is_refused(text, message):
    with pytest.raises(ConfigError, match=message) as error:
        faults._read(text)
    assert "\n" not in str(error.value)


def test_a_program_with_a_wrong_variable_does_not_start():
    code, printed, errors = result(["loop.step"], fault="loop.step:kill")
    assert code != 0 and not printed and "POINT:COUNT=ACTION" in errors


def test_the_count_is_of_passes_of_that_point(plan):
    plan("loop.batch:3=nan,loop.batch:5=spike")
    passed = [faults.point(name) for name in ("loop.batch", "loop.step", "loop.batch", "loop.batch", "loop.step", "loop.batch", "loop.batch", "loop.batch")]
    assert passed == [None, None, None, "nan", None, None, "spike", None]


def test_errors_are_those_of_the_system(plan):
    plan("metrics.write:1=full,checkpoint.save:1=fail")
    with pytest.raises(OSError, match="No space left on device .VLM_JAX_FAULT at metrics.write") as full:
        faults.point("metrics.write")
    with pytest.raises(OSError, match="VLM_JAX_FAULT at checkpoint.save") as failed:
        faults.point("checkpoint.save")
    assert full.value.errno == errno.ENOSPC and failed.value.errno == errno.EIO
    assert faults.point("metrics.write") is None


def test_a_point_outside_the_table_is_a_bug(plan):
    plan("loop.step:9=kill")
    with pytest.raises(AssertionError):
        faults.point("loop.sleep")


def test_kill_is_at_once_and_the_trace_names_the_place(tmp_path):
    code, printed, _ = result(["loop.step", "loop.log", "loop.step", "loop.log"], fault="loop.step:2=kill", trace=tmp_path / "trace")
    assert code == -signal.SIGKILL and printed == ["loop.step None", "loop.log None"]
    rows = [line.split() for line in (tmp_path / "trace").read_text().splitlines()]
    assert [(name, int(count)) for _, name, count in rows] == [("loop.step", 1), ("loop.log", 1), ("loop.step", 2)]
    assert all(float(seconds) > 1e9 for seconds, _, _ in rows)


def test_only_the_named_process_is_hit():
    assert result(["loop.step"], fault="loop.step:1@1=kill", process=0)[0] == 0
    assert result(["loop.step"], fault="loop.step:1@1=kill", process=1)[0] == -signal.SIGKILL
    assert result(["loop.step"], fault="loop.step:1=kill", process=1)[0] == -signal.SIGKILL


def test_term_is_a_signal_that_a_handler_may_take():
    assert result(["loop.step", "loop.log"], fault="loop.step:1=term")[0] == -signal.SIGTERM


@pytest.mark.parametrize("action, state", [("hang", "S"), ("stop", "T")])
def test_hang_and_stop_stay_where_they_are(action, state):
    process = passes(["loop.step", "loop.log"], fault=f"loop.log:1={action}")
    try:
        assert process.stdout.readline() == "loop.step None\n"
        deadline = time.monotonic() + 60
        while (found := Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]) != state and time.monotonic() < deadline:
            time.sleep(0.02)
        assert found == state
    finally:
        process.kill()
        rest, _ = process.communicate()
    assert rest == "" and process.returncode == -signal.SIGKILL


def test_off_means_nothing_is_counted_or_written(monkeypatch):
    monkeypatch.setattr(faults, "_plan", {})
    monkeypatch.setattr(faults, "_trace", None)
    monkeypatch.setattr(faults, "_counts", None)    # a count would raise
    assert faults.point("loop.step") is None


def used_points():
    """{point: [file:line]} of every `faults.point("...")` in the package."""
    places = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        if path.name == "faults.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "point" \
                    and isinstance(node.func.value, ast.Name) and node.func.value.id == "faults":
                [argument] = node.args
                assert isinstance(argument, ast.Constant), f"{path}:{node.lineno}: a point is named by a literal, so that it can be found"
                places[argument.value].append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    return places


def test_the_table_of_points_is_the_truth_about_the_source():
    places = used_points()
    assert set(places) - set(faults.POINTS) == set(), {name: places[name] for name in set(places) - set(faults.POINTS)}
    assert set(faults.POINTS) - set(places) == set(), "points of the table that no code passes"
    for name, where in places.items():
        assert len(where) == 1, f"{name} lies at {where}: a count would not say which"


def test_points_have_plain_names_and_descriptions():
    for name, description in faults.POINTS.items():
        assert re.fullmatch(r"[a-z]+\.[a-z_]+", name) and description and not description.endswith("."), name

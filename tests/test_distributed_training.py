"""Training and evaluation in several processes over loopback: the same run as in one, also when a process is killed, stopped by SIGTERM, or left out."""
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from vlm_jax import evaluate
from vlm_jax.training import setup
from vlm_jax.training.checkpoints import Checkpoints, restore_parameters
from vlm_jax.training.config import apply_overrides, load_config, load_saved, resolve
from vlm_jax.training.digests import digests
from vlm_jax.training.loop import train
from vlm_jax.training.trees import flatten

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "configs/siglip/shapes.py:variant=test"
EVALUATION = {"seen": {"evaluator": "zero_shot", "source": {"name": "shapes", "split": "validation", "size": 24, "limit": 13}, "every": 100}}
OVERRIDES = ["stages.0.steps=4", "checkpoint.every=2", "log_every=1", "evaluations={}"]
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def launched(module, *arguments, options, overrides, **environment):
    """A finished module of vlm_jax in several processes, compiled without optimisation: compiling is what tests cost."""
    command = [sys.executable, "-m", "vlm_jax.launch", "--heartbeat", "60", *options, "--", "python", "-m", f"vlm_jax.{module}", *map(str, arguments),
               *(f"--config.{override}" for override in overrides)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=dict(os.environ, XLA_FLAGS=FLAGS, **environment))


def here(workdir, *overrides, devices=8):
    """The same run in this process, on simulated devices."""
    config = apply_overrides(load_config(CONFIG), [*OVERRIDES, *overrides])
    return train(config, workdir, devices=jax.devices()[:devices])


def rows(workdir, kind):
    return [row for row in map(json.loads, (Path(workdir) / "metrics.jsonl").read_text().splitlines()) if row["kind"] == kind]


def losses(workdir):
    found = [(row["step"], row["loss"]) for row in rows(workdir, "train")]
    assert [step for step, _ in found] == list(range(1, len(found) + 1)), "every step is logged once"
    return np.array([loss for _, loss in found])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Four steps in 2 processes of 4 devices by the script that users have, and what was printed."""
    workdir = tmp_path_factory.mktemp("pair") / "run"
    command = [ROOT / "experiments" / "launch" / "local_simulation.sh", CONFIG, workdir, *(f"--config.{override}" for override in OVERRIDES)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, env=dict(os.environ, XLA_FLAGS=FLAGS, PYTHON=sys.executable))
    assert done.returncode == 0, done.stdout + done.stderr
    return workdir, done


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The same four steps in one process of 8 devices."""
    workdir = tmp_path_factory.mktemp("single") / "run"
    here(workdir)
    return workdir


def test_two_processes_train_what_one_trains(pair, single):
    np.testing.assert_allclose(losses(pair[0]), losses(single), rtol=1e-5)
    assert len(losses(pair[0])) == 4


def test_process_0_writes_alone_and_prints_alone(pair):
    workdir, done = pair
    assert "step 4/4" in done.stdout and not re.search(r"^\[1\] ", done.stdout, re.MULTILINE), done.stdout
    assert "Gloo" not in done.stdout + done.stderr and "error" not in done.stderr
    assert (workdir / "report.html").exists() and not list(workdir.glob("*.tmp*")) and not (workdir / "train.lock").exists()
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert json.loads((workdir / "environment.json").read_text())["devices"]["processes"] == 2


@pytest.mark.parametrize("devices, mesh", [(1, {}), (4, {}), (8, {"data": 2, "fsdp": 4})])
def test_a_checkpoint_of_two_processes_is_read_on_any_mesh(pair, devices, mesh):
    """Bit-identical arrays, by their digests, which do not depend on the layout; and as numpy, without knowing the mesh."""
    config = load_saved(pair[0])
    config["mesh"] = {**config["mesh"], **mesh}
    parts = setup.build(resolve(config), 0, setup.read(resolve(config)), jax.devices()[:devices])
    with Checkpoints(pair[0] / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(parts.abstract_state, 4)
    plain, step = restore_parameters(pair[0], 4)
    assert step == 4
    assert digests(flatten(state["params"])) == digests(flatten(plain))
    for a, b in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(plain), strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)


def back_at_step_2(workdir, copy):
    """A copy of a run that ended after its second step."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / "4")
    for pointer in (copy / "checkpoints").glob("LAST_GOOD-*.json"):
        if json.loads(pointer.read_text()).get("step") == 4 or "-4" in pointer.name:
            pointer.unlink()
    return copy


@pytest.mark.slow
def test_one_process_goes_on_from_two(pair, single, tmp_path):
    """The data go on in the same order: the losses of steps 3 and 4 are those of the run that never stopped."""
    workdir = back_at_step_2(pair[0], tmp_path / "run")
    assert here(workdir)["step"] == 4
    np.testing.assert_allclose(losses(workdir), losses(single), rtol=1e-5)


@pytest.mark.slow
def test_evaluation_in_three_processes_counts_every_example_once(single, tmp_path):
    """13 pictures do not divide by 3 processes; the figures are those of one process."""
    workdir = tmp_path / "run"
    shutil.copytree(single, workdir)
    expected = evaluate.run(["--workdir", str(single), f"--config.evaluations={EVALUATION}"])["seen"]
    done = launched("evaluate", "--workdir", workdir, overrides=[f"evaluations={EVALUATION}"], options=("--processes", "3", "--devices_per_process", "1"))
    assert done.returncode == 0, done.stdout + done.stderr
    folder = workdir / "evaluations" / "seen" / "4"
    answers = [json.loads(line)["index"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert answers == list(range(13))
    assert json.loads((folder / "metrics.json").read_text()) == {name: value for name, value in expected.items() if name != "seconds"}
    assert done.stdout.count("seen at step 4") == 1


@pytest.mark.slow
def test_a_killed_process_is_missed_at_once_and_the_run_goes_on_without_a_gap(tmp_path):
    """Process 1 is killed at its fifth step; the launcher starts both again; every step is logged once and has the loss of an undisturbed run."""
    overrides = ["stages.0.steps=7", "checkpoint.every=1", "log_every=1", "evaluations={}"]
    done = launched("train", "--config", CONFIG, "--workdir", tmp_path / "killed", overrides=overrides, options=(
        "--processes", "2", "--devices_per_process", "1", "--restarts", "1"), VLM_JAX_FAULT="loop.step:5@1=kill")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\[0\] error: process 1 \(host .*\) died: .*python -m vlm_jax.launch --heartbeat 60 --processes 2", done.stderr), done.stderr
    assert "process 1 was ended by SIGKILL" in done.stderr and "exit code 76: restart 1 of 1" in done.stderr and "resumed at step" in done.stdout
    here(tmp_path / "here", *overrides, devices=2)
    np.testing.assert_allclose(losses(tmp_path / "killed"), losses(tmp_path / "here"), rtol=1e-5)


@pytest.mark.slow
def test_sigterm_to_one_process_saves_the_same_step_in_both(single, tmp_path):
    """R4, then R6: start with 2, go on with 1."""
    done = launched("train", "--config", CONFIG, "--workdir", tmp_path / "run", options=("--processes", "2", "--devices_per_process", "4"),
                    overrides=[*OVERRIDES, "checkpoint.every=100"], VLM_JAX_FAULT="loop.step:2@1=term")
    assert done.returncode == 75, done.stdout + done.stderr
    saved = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    assert saved in ([2], [3]) and f"saved after step {saved[0]}" in done.stderr
    here(tmp_path / "run")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(single), rtol=1e-5)


def test_processes_with_different_configs_are_refused(tmp_path):
    """Each process has a config of its own: the seed is its number."""
    config = tmp_path / "config.py"
    config.write_text("""import os
from vlm_jax.configs.siglip.shapes import get_config as shapes

def get_config(arg=None):
    config = shapes("variant=test")
    config.seed = int(os.environ["VLM_JAX_PROCESS_ID"])
    return config
""")
    done = launched("train", "--config", config, "--workdir", tmp_path / "run", overrides=[], options=("--processes", "2", "--devices_per_process", "1"))
    assert done.returncode == 78
    assert sorted(line for line in done.stderr.splitlines() if "] error: " in line) == [
        f"[{n}] error: config.seed is 1 in process 1, 0 in process 0; start all with the same command and the same files." for n in (0, 1)]
    assert not (tmp_path / "run").exists()

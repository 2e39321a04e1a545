"""The command lines as a user meets them: first-hour errors in one line with their exit code; train, evaluate, sweep, dry run, load."""
import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys

import jax
import numpy as np
import pytest

import vlm_jax
from vlm_jax import absent_tpu, command_line, evaluate, sweep, train
from vlm_jax.errors import CheckpointError, ConfigError

ROOT = Path(__file__).resolve().parents[1]
SHAPES = "configs/siglip/shapes.py:variant=test"
ONE = "--config.mesh.data=1"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir trained by the command line on one device."""
    workdir = tmp_path_factory.mktemp("command") / "run"
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0")
    done = subprocess.run([sys.executable, "-m", "vlm_jax.train", "--config", SHAPES, "--workdir", str(workdir), "--config.seed=3"], cwd=ROOT,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_training_prints_what_it_does_and_leaves_a_whole_workdir(run):
    workdir, output = run
    assert "step 2/2" in output and "heldout_pairs at step 2" in output
    for name in ("config.json", "processor.json", "environment.json", "parameters.txt", "metrics.jsonl", "report.html", "checkpoints", "tensorboard",
                 "evaluations"):
        assert (workdir / name).exists(), name
    assert json.loads((workdir / "config.json").read_text())["seed"] == 3


def test_load_gives_model_params_and_processor(run):
    loaded = vlm_jax.load(run[0])
    assert loaded.step == 2
    image = loaded.processor.image(np.zeros((30, 40, 3), np.uint8))[None]
    tokens = loaded.processor.texts(["a red circle"])
    (of_image, of_text), _ = jax.jit(lambda p, x, t: loaded.model.apply({"params": p}, x, t))(loaded.params, image, tokens)
    np.testing.assert_allclose(loaded.predictor().embed_texts(["a red circle"]), of_text, atol=2e-6)
    assert of_image.shape == (1, 64)


def test_evaluate_gives_the_figures_of_training(run, capsys):
    workdir, _ = run
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    trained = next(row for row in rows if row.get("name") == "heldout_pairs")
    results = evaluate.run(["--workdir", str(workdir), "--only", "heldout_pairs"])
    assert results["heldout_pairs"]["top5"] == trained["top5"]
    assert "report:" in capsys.readouterr().out
    with pytest.raises(ConfigError, match='--only heldout_pair: .*Did you mean "heldout_pairs"'):
        evaluate.run(["--workdir", str(workdir), "--only", "heldout_pair"])
    with pytest.raises(CheckpointError, match="there is no checkpoint of step 1"):
        evaluate.run(["--workdir", str(workdir), "--checkpoint", "1"])


def test_a_run_whose_preset_changed_says_so(run, monkeypatch):
    from vlm_jax.models import dual_encoder_presets
    changed = dict(dual_encoder_presets.SIGLIP["test"], image=dict(dual_encoder_presets.SIGLIP["test"]["image"], patch_size=12))
    monkeypatch.setitem(dual_encoder_presets.SIGLIP, "test", changed)
    with pytest.raises(CheckpointError, match=r"parameters are not those of its model.*preset has changed"):
        vlm_jax.load(run[0])


def test_a_planted_config_file_in_the_workdir_is_not_run(run):
    planted = run[0] / "config.py"
    planted.write_text("raise SystemExit('the planted file ran')\n")
    try:
        assert vlm_jax.load(run[0]).step == 2
    finally:
        planted.unlink()


@pytest.mark.parametrize("arguments, message, code", [
    (["--config", "configs/siglip/emojy.py", "--workdir", "x"], r'no such file.*Did you mean "configs/siglip/emoji.py"', 78),
    (["--config", SHAPES, "--workdir", "x", "--config.stages.0.stepz=3"], r'stepz.*Did you mean "steps"', 78),
    (["--config", SHAPES, "--workdir", "x", "--config.stages.0.steps=many"], r"steps", 78),
    (["--config", SHAPES, "--workdir", "x", "--workdire=y"], r'--workdire=y: no such argument.*Did you mean "--workdir"', 78),
    (["--config", SHAPES, "--workdir", "x", "--config.model.preset=huge"], r'model.preset of "siglip": "huge" is unknown', 78),
    (["--config", SHAPES, "--workdir", "/proc/nowhere/x"], r"/proc/nowhere/x: cannot be written", 73),
])
def test_first_hour_errors_are_one_line(arguments, message, code, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command_line.main(lambda: train.run([*arguments, ONE]))
    printed = capsys.readouterr().err
    assert stopped.value.code == code, printed
    assert printed.startswith("error: ") and len(printed.strip().splitlines()) == 1
    import re
    assert re.search(message, printed), printed


def test_dry_run_of_a_large_config_needs_neither_data_nor_memory(capsys):
    train.run(["--config", "configs/siglip/so400m14_webli.py:topology=local", "--dry_run", ONE])   # its data and tokenizer are not on this machine
    printed = capsys.readouterr().out
    assert "877,360,306 parameters" in printed and "TFLOP" in printed and "training state" in printed


@pytest.mark.parametrize("vendor, told", [("0x1ae0", False), ("0x8086", True)])
def test_libtpu_is_told_that_there_is_no_tpu_only_where_there_is_none(vendor, told, tmp_path, monkeypatch):
    environment = {}
    monkeypatch.setattr(absent_tpu.os, "environ", environment)
    monkeypatch.setattr(absent_tpu, "find_spec", lambda name: object())
    (tmp_path / "0000:00:04.0").mkdir()
    (tmp_path / "0000:00:04.0" / "vendor").write_text(vendor + "\n")
    absent_tpu.quiet_libtpu(tmp_path)
    assert set(environment) == ({"TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"} if told else set())


def test_studies_quiet_libtpu_before_they_import_jax():
    code = "import experiments, os, sys; print('jax' in sys.modules, os.environ.get('TPU_WORKER_HOSTNAMES'))"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TPU_")}
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    google = any(vendor.read_text().strip() == "0x1ae0" for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"))
    assert printed.split() == ["False", "localhost" if importlib.util.find_spec("libtpu") and not google else "None"]


def test_print_config_is_json(capsys):
    train.run(["--config", SHAPES, "--print_config", "--config.seed=5"])
    assert json.loads(capsys.readouterr().out)["seed"] == 5


def test_sweep_names_points_and_gathers_metrics(tmp_path):
    points = sweep.parse_grid(["seed=0,1", "stages.0.schedule.peak=1e-3,3e-3"])
    assert len(points) == 4 and points[1] == {"seed": "0", "stages.0.schedule.peak": "3e-3"}
    assert sweep.point_name(points[1]) == "seed=0,peak=3e-3"
    with pytest.raises(ConfigError, match="twice"):
        sweep.parse_grid(["seed=0", "seed=1"])
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        sweep.parse_grid(["seed"])
    rows = [{"step": 1, "kind": "eval", "name": "a", "r@1": 0.25, "seconds": 1.0}, {"step": 2, "kind": "eval", "name": "a", "r@1": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert sweep.final_metrics(tmp_path) == {"a/r@1": 0.5}


def test_sweep_refuses_a_misspelt_key_before_training(tmp_path):
    with pytest.raises(ConfigError, match="sead"):
        sweep.run(["--config", SHAPES, "--workdir", str(tmp_path), "--grid", "sead=1,2"])
    assert not list(tmp_path.iterdir())


def test_sweep_trains_its_points(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0")
    rows = sweep.run(["--config", SHAPES, "--workdir", str(tmp_path), "--grid", "seed=1,2"])
    assert [row["exit_code"] for row in rows] == [0, 0]
    assert (tmp_path / "seed=2" / "report.html").exists()
    assert "heldout_pairs/top1" in capsys.readouterr().out

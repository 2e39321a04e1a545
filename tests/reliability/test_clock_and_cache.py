"""R18: a clock that is set back, compiled programs that are damaged or stale: no effect on a run that is resumed."""
import os
from pathlib import Path
import subprocess
import sys
import time

import pytest

from experiments.kill_resume.event_files import curves
from vlm_jax.training.metrics import MetricWriter, read_metrics
from vlm_jax.training.tensorboard import TensorBoardWriter

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("jump", [-86_400.0, -0.5, 0.0, 3e8])
def test_curves_have_every_step_once_whatever_the_clock_says(tmp_path, monkeypatch, jump):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    first = TensorBoardWriter(tmp_path)
    for step in (1, 2, 3, 4):
        first.scalars(step, {"loss": float(step)})
    monkeypatch.setattr(time, "time", lambda: now + jump)
    for _ in range(2):      # the second start goes on from the same step: its predecessor was killed at once
        second = TensorBoardWriter(tmp_path, resume_from=2)
        second.scalars(3, {"loss": 30.0})
        second.close()
    first.close()
    assert curves(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 30.0)]}


def test_rows_are_kept_by_step_and_not_by_time(tmp_path, monkeypatch):
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": float(step)})
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with MetricWriter(tmp_path, resume_from=2) as writer:
        writer.write(3, "train", {"loss": 3.5})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.5)]


PROGRAM = """
import sys
from vlm_jax.training.environment import use_compile_cache
import jax, jax.numpy as jnp
assert use_compile_cache(sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
print(float(jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.arange(64.0).reshape(8, 8) / 7)).hex())
"""


def compute(folder, flags=""):
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder)], cwd=ROOT, env={**environment, "XLA_FLAGS": flags}, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_damaged_compile_cache_changes_nothing(tmp_path):
    first = compute(tmp_path / "cache")
    entries = [path for path in (tmp_path / "cache").iterdir() if path.is_file() and path.name.startswith("jit")]
    assert entries
    for number, path in enumerate(sorted(entries)):     # cut short, as a kill while it is written leaves it; empty; rubbish
        content = path.read_bytes()
        path.write_bytes([content[:len(content) // 2], b"", os.urandom(64)][number % 3])
    assert compute(tmp_path / "cache") == first


def test_other_compiler_flags_do_not_meet_stale_programs(tmp_path):
    first = compute(tmp_path / "cache")
    before = {path.name for path in (tmp_path / "cache").iterdir()}
    second = compute(tmp_path / "cache", "--xla_force_host_platform_device_count=3 --xla_cpu_enable_fast_math=false")
    assert float.fromhex(second) == pytest.approx(float.fromhex(first), rel=1e-6)
    assert {path.name for path in (tmp_path / "cache").iterdir()} > before, "programs compiled under other flags have other keys"

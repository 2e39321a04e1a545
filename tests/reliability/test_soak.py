"""R19: two thousand steps with saves and evaluations; memory and open files stay what they are after the first few hundred."""
import os
from pathlib import Path
import signal
import statistics
import subprocess
import sys
import time

import pytest

from experiments.kill_resume.trainer import CONFIG, ROOT
from vlm_jax.training.metrics import read_metrics

STEPS = 1000        # of each of the two stages


def resident(process):
    """Bytes of memory that belong to the process alone: files it has mapped come and go with the system's cache."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return 1024 * int(fields["RssAnon"].split()[0])


def growth(samples, of=statistics.median):
    """The median (or what `of` says) of the last third of the samples over that of the middle third."""
    third = len(samples) // 3
    return of(samples[-third:]) / of(samples[third:2 * third])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_and_open_files_stay_flat(tmp_path):
    command = [sys.executable, "-m", "vlm_jax.train", "--config", f"{CONFIG}:steps={STEPS}", "--workdir", str(tmp_path / "run"), "--config.log_every=20",
               "--config.checkpoint.every=50", "--config.evaluations.heldout.every=100", "--config.evaluations.search.every=100"]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    samples = {"memory": [], "files": []}
    with open(tmp_path / "output", "w") as output:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline, step = time.monotonic() + 570, 0
        while child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
            now = max((row["step"] for row in read_metrics(tmp_path / "run")), default=0)
            # The second stage compiles anew and has an average more: growth is measured inside it.
            if now > STEPS and now >= step + 20 and child.poll() is None:
                step = now
                samples["memory"].append(resident(child.pid))
                samples["files"].append(len(os.listdir(f"/proc/{child.pid}/fd")))
    finally:
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == 0, (tmp_path / "output").read_text()[-2000:]
    assert len(samples["memory"]) >= 20
    # A save has files open while it runs: what counts is what is open between saves.
    print(growth(samples["memory"]), growth(samples["files"], min))
    assert growth(samples["memory"]) < 1.05 and growth(samples["files"], min) < 1.05

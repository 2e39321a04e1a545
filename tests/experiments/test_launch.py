"""The launch scripts: sound shell, the commands they would run, the directives where SLURM reads them.

The local simulation is run by tests/test_distributed_training.py.
"""
import os
from pathlib import Path
import stat
import subprocess

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "launch"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])


def stub(folder, name, code=0):
    """A program that writes down how it was called."""
    path = folder / name
    path.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >> "{folder}/calls"\nexit {code}\n')
    path.chmod(0o755)


def called(script, *arguments, stubs=(), tmp_path, **environment):
    """(exit code, calls of the stubs) of a script."""
    for name, code in dict(stubs).items():
        stub(tmp_path, name, code)
    done = subprocess.run(["bash", FOLDER / script, *arguments], capture_output=True, text=True, timeout=60,
                          env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), **environment})
    calls = tmp_path / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound_and_explained(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and script.name in text and f"`{script.name}`" in (FOLDER / "README.md").read_text()
    assert script.suffix == ".sbatch" or script.stat().st_mode & stat.S_IXUSR


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.sbatch")))
@pytest.mark.parametrize("code, count, requeued", [(0, 0, False), (75, 0, True), (76, 3, True), (137, 0, True), (78, 0, False), (70, 0, False),
                                                  (1, 0, False), (75, 100, False)])
def test_a_slurm_job_goes_into_the_queue_again_when_it_should(script, code, count, requeued, tmp_path):
    done, calls = called(script, "config.py", "run dir", "--config.seed=1", stubs={"srun": code, "scontrol": 0}, tmp_path=tmp_path, SLURM_JOB_ID="7",
                         SLURM_RESTART_COUNT=str(count))
    assert done.returncode == code
    assert calls[0] == "srun --label --kill-on-bad-exit=0 python -m vlm_jax.train --config config.py --workdir run dir --config.seed=1"
    assert calls[1:] == (["scontrol requeue 7"] if requeued else [])


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("*.sbatch")))
def test_slurm_reads_directives_only_before_the_first_command(script):
    lines = (FOLDER / script).read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives and max(directives) < first
    assert "#SBATCH --signal=TERM@300" in lines      # to the steps: with B: it would reach the shell alone


def test_a_pod_runs_one_launcher_on_every_host(tmp_path):
    done, calls = called("tpu_pod.sh", "config.py:topology=v5e-64", "gs://bucket/run", "--config.name=a b", stubs={"gcloud": 0}, tmp_path=tmp_path,
                         NAME="pod", ZONE="zone-a")
    assert done.returncode == 0, done.stderr
    (call,) = calls
    assert call.startswith("gcloud compute tpus tpu-vm ssh pod --zone=zone-a --worker=all --command=cd vlm_jax && { nohup python3 -m vlm_jax.launch "
                           "--restarts 100 -- ")
    assert "--config config.py:topology=v5e-64 --workdir gs://bucket/run --config.name=a\\ b" in call


def test_slices_are_started_together(tmp_path):
    settings = dict(NAME="many", ZONE="zone-a", SLICES="3", TYPE="v5litepod-256", VERSION="v2-alpha-tpuv5-lite")
    done, calls = called("tpu_multislice.sh", "create", stubs={"gcloud": 0}, tmp_path=tmp_path, **settings)
    assert done.returncode == 0 and "queued-resources create many --zone=zone-a --node-count=3 --node-prefix=many --accelerator-type=v5litepod-256" in calls[0]
    done, calls = called("tpu_multislice.sh", "run", "config.py:topology=v5e:16x16*3", "gs://bucket/run", tmp_path=tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    assert sorted(call.split()[5] for call in calls[1:]) == ["many-0", "many-1", "many-2"]
    assert all("--workdir gs://bucket/run" in call for call in calls[1:])
    done, _ = called("tpu_multislice.sh", "stop", stubs={"gcloud": 3}, tmp_path=tmp_path, **settings)
    assert done.returncode == 3

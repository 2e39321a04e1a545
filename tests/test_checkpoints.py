"""The command `python -m vlm_jax.checkpoints`."""
import jax.numpy as jnp
import pytest

from vlm_jax import checkpoints
from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.training.checkpoints import Checkpoints
from vlm_jax.training.locks import WorkdirLock


@pytest.fixture
def workdir(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", keep=3) as saved:
        for step in (10, 20):
            saved.save(step, {"params": {"kernel": jnp.full((20, 30), step, jnp.float32), "same": jnp.ones(3)}}, {"step": step, "run": {"seed": step}})
    return tmp_path


def test_list(workdir, capsys):
    assert checkpoints.run(["list", str(workdir)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "10" and "2 arrays" in lines[0] and "last good" not in lines[0]
    assert lines[1].split()[0] == "20" and lines[1].endswith("last good")
    assert checkpoints.run(["list", str(workdir / "none")]) == 0


def test_verify(workdir, capsys):
    assert checkpoints.run(["verify", str(workdir)]) == 2
    for file in (workdir / "checkpoints" / "20" / "state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged: 20; .*delete .* --step 20"):
        checkpoints.run(["verify", str(workdir)])
    assert "20: DAMAGED: params/" in capsys.readouterr().out
    assert checkpoints.run(["verify", str(workdir), "--step", "10"]) == 1
    with pytest.raises(CheckpointError, match="no checkpoint of step 11"):
        checkpoints.run(["verify", str(workdir), "--step", "11"])


def test_diff(workdir, capsys):
    assert checkpoints.run(["diff", str(workdir), "10", "20"]) == 3
    assert capsys.readouterr().out.splitlines() == ["- seed: 10", "+ seed: 20", "1 of 2 arrays that both have differ in their values: params/kernel"]
    with Checkpoints(workdir / "other") as saved:
        saved.save(20, {"params": {"kernel": jnp.ones((20, 31))}})
    checkpoints.run(["diff", str(workdir), "20", "20", "--other", str(workdir / "other")])
    assert "- params/kernel float32[20, 30]\n+ params/kernel float32[20, 31]\n- params/same float32[3]" in capsys.readouterr().out


def test_delete(workdir):
    with WorkdirLock(workdir), pytest.raises(CheckpointError, match="training here"):
        checkpoints.run(["delete", str(workdir), "--step", "10"])
    with pytest.raises(CheckpointError, match="step 20 is the last one known to be good; add --force"):
        checkpoints.run(["delete", str(workdir), "--step", "20"])
    checkpoints.run(["delete", str(workdir), "--step", "10"])
    checkpoints.run(["delete", str(workdir), "--step", "20", "--force"])
    assert list((workdir / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("arguments", [["delete", "x"], ["diff", "x", "1"], ["list", "x", "3"], ["list", "x", "--config.a=1"], ["list", "x", "--stepp", "3"]])
def test_wrong_arguments(arguments):
    with pytest.raises(ConfigError):
        checkpoints.run(arguments)

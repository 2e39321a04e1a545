"""metrics.jsonl across interruptions; rates and the progress line with a clock of our own."""
import json

import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import CheckpointError
from vlm_jax.training.metrics import TIME_FIELDS, MetricWriter, Progress, duration, read_metrics


def test_rows_and_types(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, "train", {"loss": jnp.float32(0.5), "n": np.int64(3), "bad": float("nan"), "ok": True})
        writer.write(np.int64(2), "eval", {"name": "retrieval", "r1": 0.25, "by": {"de": np.float32(1.0)}})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[0] == '{"step": 1, "kind": "train", "loss": 0.5, "n": 3, "bad": null, "ok": true}'
    assert read_metrics(tmp_path)[1] == {"step": 2, "kind": "eval", "name": "retrieval", "r1": 0.25, "by": {"de": 1.0}}
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert b"eval/retrieval/r1" in next((tmp_path / "tensorboard").iterdir()).read_bytes()


def test_resuming_drops_later_and_broken_rows(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        for step in (10, 20, 30):
            writer.write(step, "train", {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 15, "ki')
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]
    with MetricWriter(tmp_path, resume_from=20, tensorboard=False) as writer:
        writer.write(30, "train", {"loss": 31})
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(10, 10), (20, 20), (30, 31)]
    MetricWriter(tmp_path, tensorboard=False).close()
    assert read_metrics(tmp_path) == []
    assert not (tmp_path / "tensorboard").exists()


def test_same_rows_same_bytes(tmp_path):
    for name in ("a", "b"):
        with MetricWriter(tmp_path / name) as writer:
            writer.write(1, "train", {"loss": np.float32(0.1), "grad": 1 / 3})
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()


def test_unwritable_workdir_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written.*--workdir") as error:
        MetricWriter(tmp_path / "file" / "run")
    assert "\n" not in str(error.value)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_rates_leave_out_compiling_and_pauses(capsys):
    clock = Clock()
    progress = Progress(first=0, last=40, batch_size=8, clock=clock)
    clock.now += 5
    with progress.waiting_for_data():
        clock.now += 1
    progress.compiling()
    clock.now += 60
    for _ in range(9):
        with progress.waiting_for_data():
            clock.now += 0.1
        clock.now += 0.9
    with progress.paused():
        clock.now += 1000
    rates = progress.rates(10, step_flops=3e9, peak=4e9, num_devices=8)
    assert set(rates) <= TIME_FIELDS
    seconds = 5 + 1 + 9
    assert rates["seconds_per_step"] == pytest.approx(seconds / 10)
    assert rates["examples_per_second"] == pytest.approx(80 / seconds)
    assert rates["data_wait"] == pytest.approx(1.9 / seconds)
    assert rates["gflops"] == pytest.approx(30 / seconds)
    assert rates["mfu"] == pytest.approx(30 / seconds / 4)      # the simulated CPU devices share one peak
    line = progress.line(10, {"loss": 3.21454, "learning_rate": 1e-3, **rates})
    assert line.startswith("step 10/40  loss 3.2145  lr 1.00e-03  5.333 examples/s  MFU 50 %  2 GFLOP/s  data wait 13 %  ETA 50:45")
    out = capsys.readouterr().out
    assert "compiling" in out and "compiled in 60.0 s" in out


def test_a_window_of_nothing_but_compiling_has_no_rates():
    clock = Clock()
    progress = Progress(first=4, last=8, batch_size=2, clock=clock)
    progress.compiling()
    clock.now += 30
    assert progress.rates(5, 1e9, 1e9) == {}
    assert progress.line(5, {"loss": 1.0}) == "step 5/8  loss 1.0000  ETA 0:00"
    clock.now += 2
    assert progress.rates(6)["examples_per_second"] == 1.0
    assert progress.rates(6) == {}


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (201.4, "3:21"), (7401, "2:03:21"), (4 * 86400 + 7400, "4 d 02:03")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_rows_are_plain_json(tmp_path):
    with MetricWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, "train", {"loss": float("inf")})
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["loss"] is None

"""metrics.jsonl across interruptions; rates and the progress line with a clock of our own."""
import json

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.kill_resume.event_files import curves
from vlm_jax import faults
from vlm_jax.errors import CheckpointError
from vlm_jax.training import metrics
from vlm_jax.training.metrics import TIME_FIELDS, Goodput, MetricWriter, Progress, duration, read_metrics


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


def test_a_full_disk_delays_rows_and_loses_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(faults, "_plan", faults._read("metrics.write:2=full,metrics.write:3=full"))
    faults._counts.clear()
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": step})
        assert [row["step"] for row in read_metrics(tmp_path)] == [1]
        writer.write(4, "train", {"loss": 4})
        assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count("rows wait in memory") == 1
    assert curves(tmp_path / "tensorboard")["train/loss"] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_rows_that_cannot_be_written_at_the_end_are_an_error(tmp_path, monkeypatch):
    def full(data):
        raise OSError(28, "No space left on device")
    writer = MetricWriter(tmp_path, tensorboard=False)
    monkeypatch.setattr(writer._file, "write", full)
    writer.write(1, "train", {"loss": 1.0})
    with pytest.raises(CheckpointError, match="1 rows cannot be written .No space left on device.*start again"):
        writer.close()
    monkeypatch.setattr(metrics, "HELD_ROWS", 1)
    with pytest.raises(CheckpointError, match="2 rows"):
        writer.write(2, "train", {"loss": 1.0})


def test_curves_of_a_kill_between_a_row_and_its_curves_are_drawn_once(tmp_path):
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, "train", {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "kind": "train", "loss": 4}\n')      # killed before its curve was written
    for resume_from, expected in ((4, [1, 2, 3, 4]), (4, [1, 2, 3, 4]), (2, [1, 2])):
        MetricWriter(tmp_path, resume_from=resume_from).close()
        assert curves(tmp_path / "tensorboard")["train/loss"] == [(step, float(step)) for step in expected]


def test_goodput_over_starts(capsys):
    clock = Clock()
    goodput = Goodput(clock=clock, began=clock.now - 3)
    progress = Progress(first=0, last=40, batch_size=8, clock=clock, goodput=goodput)
    with progress.waiting_for_data():
        clock.now += 2
    progress.compiling()
    clock.now += 5
    with progress.waiting_for_data():
        clock.now += 1
    clock.now += 10
    with progress.paused():
        clock.now += 4
    with progress.paused("evaluate"):
        clock.now += 6
    seconds = goodput.seconds()
    assert seconds == {"start": 3, "compile": 5, "steps": 10, "data": 3, "save": 4, "evaluate": 6, "lost": 0}
    assert goodput.line() == "goodput: steps 32 % of 0:31  start 10 %  compile 16 %  data 10 %  save 13 %  evaluate 19 %"
    kept, dropped = [{"step": 1, "goodput": seconds}], [{"step": 2, "goodput": {**seconds, "steps": 70}}]
    clock.now += 100
    later = Goodput(kept, dropped, clock=clock)
    clock.now += 1
    assert later.seconds() == {**seconds, "start": 4, "lost": 60}
    assert "goodput" in TIME_FIELDS

"""Asked to stop: at any moment of a run, and what the resumed run then looks like."""
import os
import signal
import subprocess
import sys
import textwrap
import threading

import jax
import numpy as np
import pytest

from experiments.kill_resume.event_files import curves
from tests.training.test_loop import shapes
from vlm_jax import faults
from vlm_jax.errors import Preempted
from vlm_jax.training.checkpoints import restore_parameters
from vlm_jax.training.loop import train
from vlm_jax.training.metrics import TIME_FIELDS, read_metrics
from vlm_jax.training.preemption import Preemption


def send(number):
    os.kill(os.getpid(), number)


def test_nothing_to_save_leaves_at_once():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Preempted, match="nothing is to be saved"), Preemption():
        send(signal.SIGTERM)
        pytest.fail("still here")
    with pytest.raises(KeyboardInterrupt), Preemption():
        send(signal.SIGINT)
    with pytest.raises(Preempted), Preemption() as preemption:
        preemption.work()
        send(signal.SIGTERM)
        assert preemption.should_stop()
        preemption.rest()
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


def test_steps_are_finished_and_a_second_signal_does_no_harm(capfd):
    with Preemption() as preemption:
        preemption.work()
        assert not preemption.should_stop()
        send(signal.SIGTERM)
        assert preemption.should_stop() and preemption.should_stop()
        send(signal.SIGTERM)
        assert isinstance(preemption.stop("runs/a", 7), Preempted) and preemption.stop("runs/a", 7).exit_code == 75
    with Preemption() as preemption:
        preemption.work()
        send(signal.SIGINT)
        assert preemption.should_stop() and isinstance(preemption.stop("runs/a", 7), KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert capfd.readouterr().err.count("finishing this step, then saving") == 2


def test_other_threads_leave_signals_alone():
    found = []

    def use():
        with Preemption() as preemption:
            found.append((signal.getsignal(signal.SIGTERM), preemption.should_stop()))
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), False)]


def test_a_compilation_does_not_hold_it_up():
    """The main thread waits in C, where no Python handler runs: a mutex that is locked twice stands for a long compilation."""
    script = textwrap.dedent("""
        import ctypes, threading
        from vlm_jax import command_line
        from vlm_jax.training import preemption
        preemption.GRACE_SECONDS = 0.1

        def run():
            mutex, library = ctypes.create_string_buffer(256), ctypes.CDLL(None)
            with preemption.Preemption():
                threading.Timer(0.5, print, ["ready"], {"flush": True}).start()
                library.pthread_mutex_lock(mutex)
                library.pthread_mutex_lock(mutex)
        command_line.main(run)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"})
    try:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75 and "nothing is to be saved" in error


def rows(workdir):
    return [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in read_metrics(workdir)]


def start(workdir, monkeypatch, plan, **overrides):
    monkeypatch.setattr(faults, "_plan", faults._read(plan))
    faults._counts.clear()
    evaluations = {"search": dict(evaluator="retrieval", source=dict(name="shapes", split="heldout_pairs", size=32, limit=3), every=2)}
    return train(shapes(evaluations=evaluations, **overrides), workdir, devices=jax.devices()[:1])


def test_a_run_that_is_asked_to_stop_again_and_again_ends_as_the_undisturbed_one(tmp_path, monkeypatch):
    summary = start(tmp_path / "whole", monkeypatch, "")
    run = tmp_path / "run"
    asked = [("loop.step:2=term,checkpoint.save:1=term", "saved after step 2", [2]),        # a step, and again in its save
             ("evaluation.predict:1=term", "nothing is to be saved", [2]),                  # the evaluation that was owed, before the next step
             ("evaluation.predict:3=term", "saved after step 4", [2, 4])]                   # an evaluation after a save: it is abandoned
    for plan, message, steps in asked:
        with pytest.raises(Preempted, match=message):
            start(run, monkeypatch, plan)
        assert sorted(int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal()) == steps
    again = start(run, monkeypatch, "")
    assert rows(run) == rows(tmp_path / "whole") and [row["kind"] for row in rows(run)] == ["train", "train", "eval", "train", "train", "eval"]
    assert {tag: points for tag, points in curves(run / "tensorboard").items() if tag.rpartition("/")[2] not in TIME_FIELDS} == {
        tag: points for tag, points in curves(tmp_path / "whole" / "tensorboard").items() if tag.rpartition("/")[2] not in TIME_FIELDS}
    for part in ("params", "optimizer", "guard"):
        ours, expected = (restore_parameters(folder, which=part)[0] for folder in (run, tmp_path / "whole"))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a, b)
    assert again["loss"] == summary["loss"] and again["goodput"]["lost"] == 0
    third = start(run, monkeypatch, "")      # a finished run, started once more: nothing is done again
    assert rows(run) == rows(tmp_path / "whole") and third["loss"] == summary["loss"]
    assert {**third["evaluations"]["search"], "seconds": 0} == {**again["evaluations"]["search"], "seconds": 0}


"""When to save, by steps and by minutes; saves that fail are noticed, counted, made again, and end the run where that does not help."""
import pytest

from vlm_jax.errors import CheckpointError
from vlm_jax.training.saving import FAILURES_IN_A_ROW, Saver


class Disk:
    """Checkpoints whose saves fail in the background as planned; `step` is committed by `wait`, or when the next save begins."""

    def __init__(self, *failing):
        self.failing, self.running, self.failed, self.committed = list(failing), None, None, []

    def check(self):
        failed, self.failed = self.failed, None
        if failed is not None:
            raise CheckpointError(f"checkpoint {failed} could not be saved (No space left on device).")

    def save(self, step, state, metadata):
        self.wait()
        self.running = step

    def wait(self):
        self.end()
        self.check()

    def end(self):
        step, self.running = self.running, None
        if step is not None and self.failing and self.failing.pop(0):
            self.failed = step
        elif step is not None:
            self.committed.append(step)


def test_due_by_steps_and_by_minutes():
    now = [0.0]
    saver = Saver(Disk(), every=10, minutes=2, clock=lambda: now[0])
    assert saver.due(10, False) and not saver.due(11, True)
    now[0] = 121
    assert saver.due(11, False)
    saver.save(11, None, {})
    assert not saver.due(12, True)
    assert not Saver(Disk(), every=None).due(1000, True)


def test_a_failed_save_is_noticed_at_the_next_step_and_made_again(capsys):
    disk = Disk(True, False)
    saver = Saver(disk, every=1)
    saver.save(1, None, {})
    saver.check()
    assert saver.failures == 0
    disk.end()                  # in the background
    saver.check()
    assert saver.failures == 1 and "Training goes on" in capsys.readouterr().err
    saver.save(2, None, {})
    saver.finish(2, None, {})
    assert disk.committed == [2] and saver.failures == 1


def test_the_last_save_is_repeated_at_once():
    disk = Disk(True, True, False)
    saver = Saver(disk)
    saver.finish(9, None, {})
    assert disk.committed == [9] and saver.failures == 2


def test_failures_in_a_row_end_the_run_others_do_not():
    disk = Disk(*[True] * FAILURES_IN_A_ROW)
    with pytest.raises(CheckpointError, match=r"No space left on device\). 3 saves in a row"):
        Saver(disk).finish(9, None, {})
    assert disk.committed == []
    saver = Saver(Disk(*[True, False] * 5))
    for step in range(10):
        saver.save(step, None, {})
        saver.checkpoints.end()
        saver.check()
    assert saver.failures == 5

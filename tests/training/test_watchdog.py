"""The watchdog: a process that hangs ends with the stacks of all threads; one that is slow, or was stopped, does not."""
import subprocess
import sys
import textwrap
import threading
import time

from vlm_jax.training import watchdog
from vlm_jax.training.watchdog import Watchdog, stacks


def test_a_hang_ends_with_all_stacks(tmp_path):
    script = textwrap.dedent(f"""
        import threading, time
        from vlm_jax.training.watchdog import Watchdog

        def waits_for_ever():
            threading.Event().wait()

        def another_thread():
            time.sleep(1000)
        threading.Thread(target=another_thread, daemon=True).start()
        with Watchdog(0.5, r"{tmp_path / 'hang.txt'}") as dog:
            dog.beat("step 7")
            waits_for_ever()
    """)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 77
    written = (tmp_path / "hang.txt").read_text()
    for text in (ended.stderr, written):
        assert text.startswith("error: step 7 has not ended in 0.5 s") and "watchdog.seconds" in text.splitlines()[0]
        assert "waits_for_ever" in text and "another_thread" in text


def test_a_workdir_that_cannot_be_written_does_not_keep_it_alive(tmp_path):
    script = f"from vlm_jax.training.watchdog import Watchdog\nimport time\nwith Watchdog(0.2, r'{tmp_path}/gone/hang.txt') as dog:\n    time.sleep(1000)\n"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 77 and "start-up has not ended" in ended.stderr and "cannot be written" in ended.stderr


class Patient(Watchdog):
    """Notes what it would have left for."""
    left: tuple | None = None

    def _leave(self, what, limit):
        self.left = (what, limit)
        self._end.set()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_time_spent_stopped_does_not_count(tmp_path, monkeypatch):
    now, looked = [0.0], threading.Event()

    class Clock:
        @staticmethod
        def monotonic():
            looked.set()
            return now[0]
    monkeypatch.setattr(watchdog, "time", Clock)
    with Patient(20.0, tmp_path / "hang.txt") as dog:
        dog._end.wait(0.1)
        now[0] += 10_000      # SIGSTOP, SIGCONT
        looked.clear()
        assert looked.wait(60) and dog.left is None and dog._silent <= 2.0


def test_a_phase_may_have_its_own_limit_and_none_watches_nothing(tmp_path):
    with Patient(0.05, tmp_path / "hang.txt") as dog:
        dog.beat("compiling", 3600)
        time.sleep(0.3)
        assert dog.left is None
        dog.beat("step 1", 0.01)       # never less than `seconds`
        assert wait_for(lambda: dog.left == ("step 1", 0.05))
    with Patient(None, tmp_path / "hang.txt") as dog:
        dog.beat("step 1", 3600)
        assert dog._thread is None and dog._limit is None
    assert not (tmp_path / "hang.txt").exists()


def test_stacks_name_the_functions_of_all_threads():
    go = threading.Event()

    def a_function_of_its_own():
        go.wait()
    thread = threading.Thread(target=a_function_of_its_own)
    thread.start()
    text = stacks()
    go.set()
    thread.join()
    assert "a_function_of_its_own" in text and "test_stacks_name_the_functions" in text

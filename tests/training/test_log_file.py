"""log.txt: what the terminal shows, over several starts, in files of a size."""
import sys

import pytest

from vlm_jax.errors import DataError
from vlm_jax.training.log_file import LogFile


def test_the_terminal_and_the_file_say_the_same(tmp_path, capsys):
    with LogFile(tmp_path):
        print("step 1")
        print("warning: w", file=sys.stderr, flush=True)
    with pytest.raises(DataError), LogFile(tmp_path):
        print("resumed at step 1")
        raise DataError("two bad records")
    print("not in the log")
    said = capsys.readouterr()
    assert said.out == "step 1\nresumed at step 1\nnot in the log\n" and said.err == "warning: w\n"
    assert (tmp_path / "log.txt").read_text() == "step 1\nwarning: w\nresumed at step 1\nDataError: two bad records\n"


def test_rotation_keeps_the_newest_files(tmp_path):
    with LogFile(tmp_path, largest=40, kept=3):
        for number in range(50):
            print(f"a line, number {number:3d}")
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["log.1.txt", "log.2.txt", "log.txt"]
    assert all(file.stat().st_size < 40 + 20 for file in files)
    text = "".join((tmp_path / name).read_text() for name in ("log.2.txt", "log.1.txt", "log.txt"))
    assert [int(line.split()[-1]) for line in text.splitlines()] == list(range(50))[-len(text.splitlines()):]


def test_a_file_that_cannot_be_written_is_done_without(tmp_path, capsys):
    with LogFile(tmp_path / "gone"):
        print("step 1")
    assert "there will be no log" in capsys.readouterr().out
    with LogFile("gs://bucket/run"):
        print("step 2")
    assert capsys.readouterr().out == "step 2\n"

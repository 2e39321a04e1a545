"""The launcher: processes of one run on this machine, prefixed output, ends, restarts, no orphans."""
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import pytest

from vlm_jax import launch
from vlm_jax.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def command(program, *arguments):
    return ["python", "-c", program, *map(str, arguments)]


def launched(*arguments, **changes):
    """A finished `python -m vlm_jax.launch ...`."""
    return subprocess.run([sys.executable, "-m", "vlm_jax.launch", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, **changes))


def eventually(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


TELL = "import os, json; print(json.dumps({k: v for k, v in os.environ.items() if k.startswith(('VLM_JAX', 'XLA', 'JAX'))}))"


def test_each_process_is_told_who_it_is_and_its_lines_carry_its_number():
    done = launched("--processes", 3, "--devices_per_process", 2, "--heartbeat", 7, "--", *command(TELL),
                    XLA_FLAGS="--xla_cpu_foo=1 --xla_force_host_platform_device_count=8")
    assert done.returncode == 0 and done.stderr == ""
    told = {line[:4]: json.loads(line[4:]) for line in done.stdout.splitlines()}
    assert sorted(told) == ["[0] ", "[1] ", "[2] "]
    for number in range(3):
        mine = told[f"[{number}] "]
        assert (mine["VLM_JAX_PROCESS_ID"], mine["VLM_JAX_PROCESSES"], mine["VLM_JAX_HEARTBEAT"]) == (str(number), "3", "7")
        assert mine["VLM_JAX_COORDINATOR"].startswith("127.0.0.1:") and mine["VLM_JAX_COORDINATOR"] == told["[0] "]["VLM_JAX_COORDINATOR"]
        assert mine["XLA_FLAGS"] == "--xla_cpu_foo=1 --xla_force_host_platform_device_count=2" and mine["JAX_PLATFORMS"] == "cpu"
        assert mine["VLM_JAX_COMMAND"].startswith("python -m vlm_jax.launch --processes 3 --devices_per_process 2")


def test_one_process_is_left_to_its_cluster(monkeypatch):
    for name in ("VLM_JAX_COORDINATOR", "VLM_JAX_PROCESSES", "VLM_JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    done = launched("--", *command(TELL))
    told = json.loads(done.stdout)      # no prefix
    assert "VLM_JAX_PROCESSES" not in told and "VLM_JAX_COORDINATOR" not in told


def test_noise_of_libraries_is_left_out_unless_a_process_aborts():
    print_noise = ("import sys; print('[Gloo] Rank 0 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1');"
                   "print('a line');"
                   "print('    @     0x7f6463c40634  absl::Flush()', file=sys.stderr, flush=True); print('    @ here', file=sys.stderr); import os;")
    done = launched("--", *command(print_noise))
    assert (done.stdout, done.stderr) == ("a line\n", "    @ here\n")
    done = launched("--", *command(print_noise + "sys.stdout.flush(); sys.stderr.flush(); os.abort()"))
    assert "0x7f6463c40634" in done.stderr and "process 0 was ended by SIGABRT" in done.stderr and done.returncode == 128 + signal.SIGABRT


ONE_ENDS = "import os, sys, time; me = os.environ['VLM_JAX_PROCESS_ID']; sys.exit(int(sys.argv[1])) if me == '1' else time.sleep(300)"


@pytest.mark.parametrize("codes, expected, again", [
    ([0, 0], 0, False), ([75, 75], 75, True), ([76, -9], 76, True), ([77, 76], 77, True), ([76, 65], 65, False), ([1, 76], 1, False), ([78, 78], 78, False),
    ([73, 1, 75], 73, False), ([0, 76], 76, True), ([70, 76], 70, False), ([-9], 137, True), ([75], 75, True), ([130, 130], 130, False), ([-6, 0], 76, True),
])
def test_the_exit_code_that_says_most_and_whether_to_start_again(codes, expected, again):
    assert (launch.worst(codes), launch.starts_again(codes)) == (expected, again)


def test_an_error_of_one_ends_all(monkeypatch):
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.3)
    assert launch.launch(command(ONE_ENDS, 65), processes=2) == 65
    assert launch.launch(command(ONE_ENDS, 3), processes=2, restarts=3) == 3        # a bug: not again


def test_a_process_that_does_not_react_is_killed_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.3)
    program = ("import os, signal, subprocess, sys, time; me = os.environ['VLM_JAX_PROCESS_ID']; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
               "child = subprocess.Popen(['sleep', '300']) if me == '0' else None;"
               "open(sys.argv[1], 'w').write(f'{os.getpid()} {child.pid}') if child else time.sleep(1);"
               "time.sleep(300) if me == '0' else sys.exit(70)")
    assert launch.launch(command(program, tmp_path / "pids"), processes=2) == 70
    eventually(lambda: not any(alive(int(pid)) for pid in (tmp_path / "pids").read_text().split()))


COUNT = "import os, sys, signal; path = sys.argv[1]; open(path, 'a').write('x'); n = len(open(path).read()); code = int(sys.argv[2]);"


def test_interruptions_are_started_again_with_a_pause_and_errors_are_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(launch, "_LONGEST_PAUSE", 1.0)
    again = COUNT + "sys.exit(0 if n == 3 else code) if code > 0 or n == 3 else os.kill(os.getpid(), -code)"
    for code in (76, -9):
        path = tmp_path / f"runs{code}"
        assert launch.launch(command(again, path, code), restarts=5) == 0
        assert path.read_text() == "xxx"
    assert "restart 1 of 5 in 1 s" in capsys.readouterr().err
    for code in (65, 1):
        path = tmp_path / f"runs{code}"
        assert launch.launch(command(again, path, code), restarts=5) == code
        assert path.read_text() == "x"
    path = tmp_path / "worn"
    assert launch.launch(command(COUNT + "sys.exit(code)", path, 75), restarts=1) == 75
    assert path.read_text() == "xx"


def test_each_attempt_gets_a_port_of_its_own(tmp_path, monkeypatch):
    program = "import os, sys; open(sys.argv[1] + os.environ['VLM_JAX_PROCESS_ID'], 'a').write(os.environ['VLM_JAX_COORDINATOR'] + ' '); sys.exit(76)"
    assert launch.launch(command(program, tmp_path / "ports"), processes=2, restarts=1) == 76
    first, second = (tmp_path / "ports0").read_text().split()
    assert (tmp_path / "ports1").read_text().split() == [first, second] and first != second


WAIT = ("import os, signal, sys, time; folder = sys.argv[1]; me = os.environ.get('VLM_JAX_PROCESS_ID', '0');"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); signal.signal(signal.SIGINT, lambda *_: sys.exit(130));"
        "open(os.path.join(folder, me), 'w').write(str(os.getpid()));\nwhile True: time.sleep(0.1)")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signals_go_to_all_and_nothing_is_started_again(tmp_path, number, code):
    running = subprocess.Popen([sys.executable, "-m", "vlm_jax.launch", "--processes", "2", "--restarts", "5", "--", *command(WAIT, tmp_path)], cwd=ROOT)
    eventually(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "01"))
    running.send_signal(number)
    assert running.wait(timeout=30) == code
    assert not any(alive(int((tmp_path / name).read_text())) for name in "01")


def test_a_killed_launcher_leaves_no_orphan(tmp_path):
    running = subprocess.Popen([sys.executable, "-m", "vlm_jax.launch", "--processes", "2", "--", *command(WAIT, tmp_path)], cwd=ROOT)
    eventually(lambda: all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "01"))
    running.kill()
    assert running.wait() == -signal.SIGKILL
    eventually(lambda: not any(alive(int((tmp_path / name).read_text())) for name in "01"))


@pytest.mark.parametrize("arguments, message", [
    (["--processes", "2"], "needs its command after --"),
    (["python", "-m", "vlm_jax.train"], "needs its command after --"),
    (["--processes", "0", "--", "python"], "--processes 0: it must be at least 1"),
    (["--restarts", "-1", "--", "python"], "--restarts -1: it must be at least 0"),
    (["--devices_per_process", "0", "--", "python"], "--devices_per_process 0"),
    (["--", "no_such_program"], "no_such_program: no such program"),
])
def test_wrong_command_lines(arguments, message):
    with pytest.raises(ConfigError, match=message):
        launch.run(arguments)

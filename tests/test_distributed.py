"""Several processes: who is missing or does not belong is named, all agree, all stop at one step, the end of one is the end of all in one line."""
import json
import os
from pathlib import Path
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from vlm_jax import connections, distributed
from vlm_jax.errors import ConfigError, PeerError
from vlm_jax.peers import Peers

ROOT = Path(__file__).resolve().parents[1]
FACTS = {"vlm_jax": "1", "jax": "2"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Group:
    """Peers of several processes inside this one, each with a main thread of its own."""

    def __init__(self, count, timeout=20.0, heartbeat=20.0, **changes):
        self.port, self.ended, self.said = free_port(), {}, []
        self.peers = [self.peer(process, count, timeout=timeout, heartbeat=heartbeat, **changes.get(f"of_{process}", {})) for process in range(count)]

    def peer(self, process, count, **changes):
        settings = dict(bind="127.0.0.1", facts=FACTS, timeout=20.0, heartbeat=20.0, say=self.said.append,
                        on_end=lambda error: self.ended.setdefault(process, error)) | changes
        return Peers(process, count, ("127.0.0.1", self.port), **settings)

    def each(self, function, which=None):
        """Runs function(peer) for all at once; returns results or exceptions by process."""
        results = {}

        def run(peer):
            try:
                results[peer.process] = function(peer)
            except Exception as error:
                results[peer.process] = error
        threads = [threading.Thread(target=run, args=(peer,), daemon=True) for peer in (self.peers if which is None else which)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
            assert not thread.is_alive()
        return results

    def close(self):
        for peer in self.peers:
            peer.leave()
        for peer in self.peers:
            peer.close()


@pytest.fixture
def three():
    group = Group(3)
    assert group.each(Peers.join) == {0: None, 1: None, 2: None}
    yield group
    group.close()


def eventually(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_values_of_all_by_process(three):
    results = three.each(lambda peer: [peer.exchange(f"place {n}", {"n": n, "from": peer.process}) for n in range(5)])
    for process in range(3):
        assert results[process] == [[{"n": n, "from": k} for k in range(3)] for n in range(5)]


def test_processes_at_different_places_are_told_both(three):
    results = three.each(lambda peer: peer.exchange("barrier a" if peer.process < 2 else "barrier b", None))
    assert all(isinstance(error, PeerError) and "process 2 is at barrier b, process 0 at barrier a" in str(error) for error in results.values())


def test_a_barrier_that_one_does_not_reach_names_it(three):
    results = three.each(lambda peer: peer.exchange("barrier end", None, timeout=0.5), which=three.peers[:2])
    assert "process 2 did not come to barrier end within 0.5 s" in str(results[0])
    assert isinstance(results[1], PeerError)


@pytest.mark.parametrize("seed", range(5))
def test_all_stop_at_the_same_step_whenever_one_is_asked(seed):
    """Steps take random times and nobody may run ahead of the slowest by more than two (as collectives see to): nothing deadlocks, no step is different."""
    group = Group(3)
    group.each(Peers.join)
    chance = random.Random(seed)
    asker, when = chance.randrange(3), chance.randrange(0, 6)
    taken = [0, 0, 0]

    def train(peer):
        own = random.Random(seed * 10 + peer.process)
        for step in range(1, 200):
            eventually(lambda step=step: min(taken) >= step - 2)      # a collective of the step before last
            time.sleep(own.random() * 0.01)
            taken[peer.process] = step
            if peer.process == asker and step == when + 1:
                peer.request_stop()
            if peer.stops_at(step):
                return step
        return None

    steps = group.each(train)
    group.close()
    assert len(set(steps.values())) == 1 and steps[0] is not None and when < steps[0] < when + 150


def test_a_process_that_closes_without_goodbye_is_named_to_all(three):
    three.peers[1]._leaving = three.peers[1]._ending = True
    three.peers[1]._connections[0].socket.shutdown(socket.SHUT_RDWR)
    eventually(lambda: {0, 2} <= three.ended.keys())
    for process in (0, 2):
        assert re.search(r"process 1 \(host .*, pid \d+\) died: its connection is closed", str(three.ended[process]))
        assert three.ended[process].exit_code == 76
    with pytest.raises(PeerError, match="process 1"):
        three.peers[2].exchange("anything", None)


@pytest.mark.parametrize("code, theirs", [(65, 65), (70, 70), (1, 76), (130, 76)])
def test_an_error_of_one_ends_all_and_codes_that_no_restart_mends_are_everyones(code, theirs):
    group = Group(3)
    group.each(Peers.join)
    group.peers[2].leave(code, "too many bad records")
    eventually(lambda: {0, 1} <= group.ended.keys())
    for process in (0, 1):
        assert "process 2" in str(group.ended[process]) and "stopped: too many bad records" in str(group.ended[process])
        assert group.ended[process].exit_code == theirs
    group.close()


def test_an_error_of_process_0_ends_the_others(three):
    three.peers[0].leave(78, "no such preset")
    eventually(lambda: {1, 2} <= three.ended.keys())
    assert all(three.ended[process].exit_code == 78 and "no such preset" in str(three.ended[process]) for process in (1, 2))


def test_goodbye_ends_nobody(three):
    for process in (2, 0):
        three.peers[process].leave(0)
        three.peers[process].close()
    time.sleep(0.5)
    assert three.ended == {}


def hello(port, process, count):
    """A connection that says hello and then nothing more: a process that hangs."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(json.dumps({"kind": "hello", "protocol": "vlm_jax peers 1", "process": process, "processes": count, "facts": FACTS, "host": "far",
                                   "pid": 7}).encode() + b"\n")
    return connection


def test_a_silent_process_counts_as_lost_after_the_heartbeat():
    group = Group(1)
    first = group.peer(0, 2, heartbeat=1.0)
    group.peers = [first]
    thread = threading.Thread(target=first.join, daemon=True)
    thread.start()
    eventually(lambda: first._listener is not None)
    silent = hello(group.port, 1, 2)
    thread.join(timeout=30)
    eventually(lambda: 0 in group.ended)
    assert re.search(r"process 1 \(host far, pid 7\) has given no sign of life for \d+ s: it hangs", str(group.ended[0]))
    silent.close()
    group.close()


def test_who_is_missing_is_said_and_then_an_error_on_all(monkeypatch):
    monkeypatch.setattr("vlm_jax.peers._SAY_SECONDS", 0.3)
    group = Group(4, timeout=1.5)
    results = group.each(Peers.join, which=[group.peers[0], group.peers[2]])
    assert all(isinstance(error, PeerError) for error in results.values())
    assert "processes 1, 3 of 4 did not come to 127.0.0.1" in str(results[0])
    assert str(results[2]) == str(results[0])
    assert any("process 0 waits for processes 1, 3 of 4" in line for line in group.said)
    assert any("process 2 waits for processes 1, 3 of 4" in line for line in group.said)


def test_nobody_at_the_coordinator(monkeypatch):
    monkeypatch.setattr("vlm_jax.connections._SAY_SECONDS", 0.2)
    said = []
    with pytest.raises(PeerError, match=r"process 1 cannot reach process 0 at 127.0.0.1:\d+ since 0.6 s \(.*[Rr]efused\)"):
        connections.connect(("127.0.0.1", free_port()), 1, 0.6, said.append)
    assert said and "waits for process 0" in said[0]


def test_something_else_listens_at_the_coordinator():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        threading.Thread(target=lambda: other.accept()[0].close(), daemon=True).start()
        peer = Peers(1, 2, other.getsockname(), bind="", facts=FACTS, timeout=20, heartbeat=20, on_end=lambda error: None)
        with pytest.raises(PeerError, match="process 0 ended, or something else listens there"):
            peer.join()


def test_a_port_in_use_and_an_address_of_another_machine(monkeypatch):
    monkeypatch.setattr("vlm_jax.connections._BIND_SECONDS", 0.3)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match="cannot listen on .* in use.*choose another port"):
            connections.listen("127.0.0.1", other.getsockname())
    with pytest.raises(ConfigError, match="process 0 must run on the machine that the address names"):
        connections.listen("192.0.2.1", ("192.0.2.1", 1234))
    with pytest.raises(ConfigError, match="is no address of a machine"):
        connections.listen("no.such.host.invalid", ("no.such.host.invalid", 1234))


@pytest.mark.parametrize("changes, count, message", [
    (dict(facts={"vlm_jax": "1", "jax": "3"}), 3, r"jax is 3 in process 1 .*, 2 in process 0"),
    (dict(), 5, r"process 1 .* was started with --processes 5, process 0 with 3"),
])
def test_processes_that_do_not_belong_together_are_refused_everywhere(changes, count, message):
    group = Group(3)
    group.peers[1] = group.peer(1, count, **changes)
    results = group.each(Peers.join, which=group.peers[:2])
    assert all(isinstance(error, ConfigError) and re.search(message, str(error)) for error in results.values()), results


def test_an_id_that_comes_twice_is_refused_everywhere():
    group = Group(3)
    group.peers[2] = group.peer(1, 3)
    results = []

    def join(peer):
        with pytest.raises(ConfigError, match="process id 1 came twice.*its own --process_id"):
            peer.join()
        results.append(True)
    threads = [threading.Thread(target=join, args=(peer,)) for peer in group.peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert results == [True] * 3


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b"{}\n", b'{"kind": "beat"}\n', b'{"kind": "hello", "protocol": "x"}\n',
                                     b"\xff\x00\n",
                                     b'{"kind": "hello", "protocol": "vlm_jax peers 1", "process": [], "processes": 2, "facts": 3}\n'])
def test_strangers_are_ignored(garbage):
    group = Group(2)
    thread = threading.Thread(target=group.peers[0].join, daemon=True)
    thread.start()
    eventually(lambda: group.peers[0]._listener is not None)
    with socket.create_connection(("127.0.0.1", group.port)) as stranger:
        stranger.sendall(garbage)
        assert group.each(Peers.join, which=group.peers[1:]) == {1: None}
    thread.join(timeout=30)
    assert not thread.is_alive() and group.ended == {}
    group.close()


@pytest.mark.parametrize("arguments, message", [
    (dict(coordinator="127.0.0.1:99"), "--processes, --process_id missing"),
    (dict(processes=2, process_id=0), "--coordinator missing"),
    (dict(coordinator="127.0.0.1:99", processes=2, process_id=2), "process id 2 of 2 processes: ids go from 0 to 1"),
    (dict(coordinator="127.0.0.1:99", processes=2, process_id=-1), "process id -1"),
    (dict(coordinator="127.0.0.1:99", processes=0, process_id=0), "process id 0 of 0 processes"),
    (dict(coordinator="here", processes=2, process_id=0), "write HOST:PORT"),
    (dict(coordinator="here:http", processes=2, process_id=0), "write HOST:PORT"),
    (dict(coordinator="127.0.0.1:99", processes=2, process_id=0, heartbeat=0), "heartbeat is 0 seconds"),
])
def test_arguments_that_cannot_work(arguments, message):
    with pytest.raises(ConfigError, match=message):
        distributed.start(**arguments)


@pytest.fixture
def clean(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("VLM_JAX_", "SLURM_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    return monkeypatch


def test_one_process_is_the_default_and_nothing_is_done(clean):
    assert distributed.start() == 1
    assert distributed.start(coordinator="127.0.0.1:99", processes=1, process_id=0) == 1
    clean.setenv("VLM_JAX_PROCESS_ID", "3")     # faults alone may set it
    assert distributed.start() == 1
    assert distributed.agree({"a": 1}) == {"a": 1} and distributed.any_process(True) and not distributed.any_process(False)
    distributed.barrier("alone")
    distributed.check_same("config", {"a": 1})
    with distributed.guarded():
        pass


def test_what_the_environment_says(clean):
    clean.setenv("VLM_JAX_COORDINATOR", "10.0.0.1:1234")
    with pytest.raises(ConfigError, match="VLM_JAX_PROCESSES, VLM_JAX_PROCESS_ID missing"):
        distributed.start()
    clean.setenv("VLM_JAX_PROCESSES", "many")
    with pytest.raises(ConfigError, match="VLM_JAX_PROCESSES is many; it must be a whole number"):
        distributed.start()
    clean.setenv("VLM_JAX_PROCESSES", "4")
    clean.setenv("VLM_JAX_PROCESS_ID", "2")
    assert distributed._who(None, None, None) == ("10.0.0.1:1234", 4, 2)


@pytest.mark.parametrize("nodes, first", [("node[003-010,012]", "node003"), ("node3,node4", "node3"), ("gpu1", "gpu1")])
def test_what_slurm_says(clean, nodes, first):
    for name, value in dict(JOB_ID="4242", STEP_NODELIST=nodes, NTASKS="16", PROCID="9", LOCALID="1", STEP_TASKS_PER_NODE="8(x2)").items():
        clean.setenv(f"SLURM_{name}", value)
    coordinator, processes, process = distributed._who(None, None, None)
    assert (coordinator.rpartition(":")[0], processes, process) == (first, 16, 9)
    clean.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    assert distributed._local_devices() == [1]      # a process a GPU, all of them visible
    clean.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert distributed._local_devices() is None     # bound by SLURM
    clean.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    clean.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x2)")
    assert distributed._local_devices() is None     # a process a node: all GPUs
    clean.setenv("SLURM_NTASKS", "1")
    assert distributed._who(None, None, None) == (None, 1, 0)


def test_the_first_difference_is_named():
    a = {"stages": [{"steps": 10}, {"steps": 5}], "seed": 0}
    assert distributed._difference("config", a, {"stages": [{"steps": 10}, {"steps": 6}], "seed": 0}) == ("config.stages.1.steps", 5, 6)
    assert distributed._difference("config", a, {"seed": 0}) == ("config.stages", a["stages"], "missing")


PROGRAM = """
import os, sys, time
from vlm_jax import distributed
from vlm_jax.errors import DataError

def listening():
    own = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink("/proc/self/fd/" + name))
        except OSError:
            pass
    rows = [line.split() for kind in ("tcp", "tcp6") for line in open("/proc/net/" + kind).read().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]

with distributed.guarded():
    distributed.start(heartbeat=3)
    from jax.experimental import multihost_utils
    import numpy as np
    me = distributed.process_id()
    total = multihost_utils.process_allgather(np.float32(me)).sum()
    print("values", distributed.agree(f"from {me}"), distributed.any_process(me == 1), total, flush=True)
    print("listening", listening(), flush=True)
    print("ready", os.getpid(), flush=True)
    what = sys.argv[1]
    if what == "differ":
        distributed.check_same("config", {"seed": me})
    if what == "bad" and me == 1:
        raise DataError("train.jsonl: too many bad records.")
    if what == "bug" and me == 0:
        raise RuntimeError("a bug")
    while what in ("run", "bad", "bug"):
        multihost_utils.process_allgather(np.float32(me))
print("done", flush=True)
"""


class Run:
    """Two processes of PROGRAM over loopback."""

    def __init__(self, what):
        environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="", VLM_JAX_PROCESSES="2", VLM_JAX_COORDINATOR=f"127.0.0.1:{free_port()}",
                           PYTHONPATH=str(ROOT))
        self.processes = [subprocess.Popen([sys.executable, "-c", PROGRAM, what], env=dict(environment, VLM_JAX_PROCESS_ID=str(number)), text=True,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE) for number in range(2)]

    def ready(self):
        """Waits for both; returns what they have printed."""
        return [self._until_ready(process) for process in self.processes]

    @staticmethod
    def _until_ready(process):
        lines = []
        while not (lines and lines[-1].startswith("ready")):
            line = process.stdout.readline()
            assert line, process.stderr.read()
            lines.append(line)
        return "".join(lines)

    def end(self, number):
        """(exit code, errors) of a process."""
        _, errors = self.processes[number].communicate(timeout=60)
        return self.processes[number].returncode, errors

    def kill(self):
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def run_two():
    runs = []

    def start(what):
        runs.append(Run(what))
        return runs[-1]
    yield start
    for run in runs:
        run.kill()


def last_line(errors):
    return errors.strip().splitlines()[-1]


def test_two_processes_agree_listen_on_loopback_and_end_well(run_two):
    run = run_two("end")
    for output in run.ready():
        assert "values from 0 True 1.0" in output and "Gloo" not in output
        addresses = re.findall(r"'([0-9A-F]+):[0-9A-F]{4}'", output)
        assert addresses and all(address in ("0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000") for address in addresses)
    assert [run.end(number)[0] for number in (0, 1)] == [0, 0]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(run_two, victim):
    run = run_two("run")
    run.ready()
    began = time.monotonic()
    run.processes[victim].send_signal(signal.SIGKILL)
    code, errors = run.end(1 - victim)
    assert code == 76 and time.monotonic() - began < 3 + 5 + 20     # heartbeat + 5 s, and a machine that is busy
    assert re.match(rf"error: process {victim} \(host .*, pid \d+\) died: .*Start all of them again to go on from the last checkpoint: python -c",
                    last_line(errors)), errors
    assert "Traceback" not in errors


def test_a_stopped_process_ends_the_other_with_one_line(run_two):
    run = run_two("run")
    run.ready()
    run.processes[0].send_signal(signal.SIGSTOP)
    code, errors = run.end(1)
    assert code == 76 and re.match(r"error: process 0 \(host .*\) has given no sign of life for \d+ s: it hangs", errors), errors
    assert len(errors.splitlines()) == 1


def test_a_difference_an_error_and_a_bug_end_both(run_two):
    differ, bad, bug = run_two("differ"), run_two("bad"), run_two("bug")
    for number in (0, 1):
        code, errors = differ.end(number)
        assert code == 78 and last_line(errors).startswith("error: config.seed is 1 in process 1, 0 in process 0")
    code, errors = bad.end(1)
    assert code == 65 and last_line(errors) == "error: train.jsonl: too many bad records."
    code, errors = bad.end(0)
    assert code == 65 and "stopped: train.jsonl: too many bad records." in last_line(errors)
    code, errors = bug.end(0)
    assert code == 1 and "RuntimeError: a bug" in errors
    code, errors = bug.end(1)
    assert code == 76 and "stopped: RuntimeError: a bug" in last_line(errors)

"""The attack surface of SECURITY.md that is not one module's: what the source never does, and what a run opens, writes and obeys."""
import ast
import json
import os
from pathlib import Path
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("vlm_jax", "configs", "experiments", "scripts", "notebooks") for path in (ROOT / folder).rglob("*.py"))
CANARIES = {"HF_TOKEN": "hf_canaryCANARY0123456789", "WANDB_API_KEY": "canary-wandb-0123456789", "AWS_SECRET_ACCESS_KEY": "canary/aws/0123456789",
            "MY_PASSWORD": "canary-password-0123"}

# Calls that run, unpack or fetch what a file or a string says. `importlib` is used on names from tables in the source only.
FORBIDDEN = {"eval", "exec", "compile", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "marshal.loads",
             "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "shelve.open", "tarfile.extractall", "urllib.request.urlopen", "requests.get",
             "jax.export.deserialize", "jax.profiler.start_server"}
FORBIDDEN_METHODS = {"extractall", "extract", "unsafe_load"}


def dotted(node):
    """`a.b.c` of a call's function, or None."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def unsafe(source):
    """[(line, what)] of unsafe calls and arguments in Python source."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN or (isinstance(node.func, ast.Attribute) and node.func.attr in FORBIDDEN_METHODS):
                found.append((node.lineno, name or node.func.attr))
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else "an expression"
                if keyword.arg in ("allow_pickle", "shell", "trust_remote_code", "share") and value is not False:
                    found.append((node.lineno, f"{keyword.arg}={value}"))
            if name in ("np.load", "numpy.load") and not any(keyword.arg == "allow_pickle" for keyword in node.keywords):
                found.append((node.lineno, "np.load without allow_pickle=False"))
        elif isinstance(node, ast.Assign):
            found += [(node.lineno, dotted(target)) for target in node.targets if (dotted(target) or "").endswith("LOAD_TRUNCATED_IMAGES")]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(node.lineno, f"import {module}") for module in modules
                      if module.split(".")[0] in ("pickle", "dill", "marshal", "shelve", "yaml", "cloudpickle")]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_or_unpickles_what_a_file_says(path):
    assert unsafe(path.read_text()) == []


@pytest.mark.parametrize("line", [
    "import pickle", "np.load(path)", "np.load(path, allow_pickle=True)", "np.load(path, allow_pickle=flag)", "torch.load(path)", "eval(text)",
    "tar.extractall(folder)", "subprocess.run(text, shell=True)", "ImageFile.LOAD_TRUNCATED_IMAGES = True", "from yaml import load",
    "AutoModel.from_pretrained(name, trust_remote_code=True)"])
def test_the_check_sees_what_it_is_for(line):
    assert unsafe(line)
    assert not unsafe("np.load(path, allow_pickle=False)\nmodel.evaluate(x)\nre.compile('a')")


def test_dependencies_come_from_the_registry_by_version():
    for path in (ROOT / "setup.py", *sorted((ROOT / "constraints").glob("*.txt"))):
        text = path.read_text()
        assert not re.search(r"git\+|@ *file:|@ *https?:|--index-url|--extra-index-url|--find-links", text), path
    for path in sorted((ROOT / "constraints").glob("*.txt")):
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        assert lines and all(re.fullmatch(r"[\w.\[\]-]+==[\w.!+]+( *;.*)?", line) for line in lines), path
        assert "sentencepiece==0.2.1" not in lines


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that is looked at while it stands still at its second step; the environment holds secrets, the workdir a planted file."""
    folder = tmp_path_factory.mktemp("canary")
    workdir, trace = folder / "run", folder / "trace"
    workdir.mkdir()
    for name in ("config.py", "vlm_jax.py", "sitecustomize.py", "conftest.py"):
        (workdir / name).write_text(f"open({str(folder / 'planted')!r}, 'w').close()\n")
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_COMPILATION_CACHE_DIR", "VLM_JAX_COMPILE_CACHE")}
    environment.update(CANARIES, XDG_CACHE_HOME=str(folder / "cache"), XLA_FLAGS="--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
                       JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", VLM_JAX_FAULT="loop.step:2=stop", VLM_JAX_FAULT_TRACE=str(trace),
                       PYTHONPATH=str(ROOT))
    command = [sys.executable, "-m", "vlm_jax.train", "--config", str(ROOT / "configs/siglip/shapes.py:variant=test"), "--workdir", str(workdir),
               "--config.evaluations.search.every=1000", "--config.stages.0.data.pairs.workers=1"]
    umask = os.umask(0o022)
    try:
        with open(folder / "output", "w") as output:
            child = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)
    finally:
        os.umask(umask)
    try:
        deadline = time.monotonic() + 300
        while child.poll() is None and not (trace.exists() and " loop.step 2" in trace.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        open_sockets = listening(session(child.pid))
        os.kill(child.pid, signal.SIGCONT)
        code = child.wait(timeout=300)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    assert code == 0, (folder / "output").read_text()
    return folder, open_sockets


def session(leader):
    """The processes that a session leader and its children are."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(entry.read_text().rpartition(")")[2].split()[3]) == leader:
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def listening(processes):
    """Addresses (hexadecimal, as in /proc/net/tcp) on which the processes accept connections."""
    inodes = set()
    for process in processes:
        for entry in Path(f"/proc/{process}/fd").iterdir():
            try:
                if match := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry)):
                    inodes.add(match[1])
            except OSError:
                continue
    rows = [line.split() for name in ("tcp", "tcp6") if Path(f"/proc/net/{name}").exists() for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and row[9] in inodes]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_run_on_one_host_listens_nowhere(run):
    assert run[1] == []
    with socket.socket() as mine:       # the look-up does find what listens
        mine.bind(("127.0.0.1", 0))
        mine.listen()
        assert [address.split(":")[1] for address in listening([os.getpid()]) if int(address.split(":")[1], 16) == mine.getsockname()[1]]


def test_secrets_are_in_no_file_of_a_run(run):
    folder, _ = run
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "environment.json", "output", "metadata", "config.json"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files) and any(path.suffix == ".html" for path in files)
    hit = {str(path.relative_to(folder)): name for path in files for name, value in CANARIES.items() if value.encode() in path.read_bytes()}
    assert hit == {}


def test_no_python_file_of_the_workdir_runs(run):
    assert not (run[0] / "planted").exists()


def test_compiled_programs_are_the_users_alone(run):
    [cache] = (run[0] / "cache" / "vlm_jax").glob("compiled-*")
    assert cache.stat().st_mode & 0o777 == 0o700 and any(cache.iterdir())


def test_the_config_of_a_run_is_data(run):
    saved = json.loads((run[0] / "run" / "config.json").read_text())
    assert saved["model"]["name"] == "siglip" and saved["schema_version"] >= 1

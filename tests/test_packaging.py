"""The package imports quickly and lightly, and ships what it needs."""
import os
from pathlib import Path
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "tensorflow", "tensorflow_datasets", "orbax", "grain", "tensorboardX", "matplotlib", "pyarrow", "sklearn")

IMPORT_ALL = """
import importlib, importlib.abc, pkgutil, sys
heavy = set(sys.argv[1].split(","))
culprits = []

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in heavy:
            frame = sys._getframe(1)
            while frame and not frame.f_globals.get("__name__", "").startswith("vlm_jax"):
                frame = frame.f_back
            culprits.append(f"{frame.f_globals['__name__'] if frame else 'a dependency'} imports {name}")
            raise ImportError(f"{name} is blocked by the test")

sys.meta_path.insert(0, Blocker())
import vlm_jax
names = ["vlm_jax"] + [module.name for module in pkgutil.walk_packages(vlm_jax.__path__, "vlm_jax.") if not module.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
assert any(name.startswith("vlm_jax.configs.") for name in names), names
loaded = sorted(heavy & {name.split(".")[0] for name in sys.modules})
print(len(names), "modules;", "loaded:", loaded, "tried:", culprits)
sys.exit(bool(loaded or culprits))
"""


def python(*arguments, timeout=120):
    # One plain device: the simulated ones of the tests are no part of this.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


def test_no_module_imports_anything_heavy():
    result = python("-c", IMPORT_ALL, ",".join(HEAVY))
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_is_light_and_quick():
    """Well under two seconds on an idle machine; the bound leaves room for a busy one."""
    result = python("-c", "import vlm_jax, sys; print(len(sys.modules))", timeout=10)
    assert result.returncode == 0, result.stderr


def test_configs_are_shipped(tmp_path):
    setuptools = pytest.importorskip("setuptools", reason="find_packages needs setuptools")
    packages = setuptools.find_packages(str(ROOT), include=["vlm_jax", "vlm_jax.*"])
    assert {"vlm_jax.configs", "vlm_jax.configs.siglip", "vlm_jax.training"} <= set(packages)
    assert (ROOT / "vlm_jax" / "configs").resolve() == ROOT / "configs"
    assert (ROOT / "vlm_jax" / "py.typed").exists()
    missing = [path for path in (ROOT / "vlm_jax").rglob("*.py") if not (path.parent / "__init__.py").exists()]
    assert not missing, f"folders without __init__.py are not shipped: {missing}"


def test_one_version():
    import vlm_jax
    assert re.fullmatch(r"\d+\.\d+\.\d+", vlm_jax.__version__)
    assert f"version: {vlm_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {vlm_jax.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert "__version__" in (ROOT / "setup.py").read_text() and vlm_jax.__version__ not in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("python_version", ["311", "312"])
def test_constraints_lie_in_the_ranges(python_version):
    requirements = pytest.importorskip("packaging.requirements")
    pinned = dict(line.split("==") for line in (ROOT / "constraints" / f"py{python_version}.txt").read_text().splitlines() if "==" in line)
    pinned = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pinned.items()}
    text = (ROOT / "setup.py").read_text()
    text = text.split("install_requires=[")[1].split("\n    ],")[0] + text.split("TEST = ")[1].split("setup(")[0]
    listed = re.findall(r'"([A-Za-z][\w.-]*(?:\[\w+\])?[<>=!][^"]*)"', text)
    assert len(listed) > 20
    for requirement in map(requirements.Requirement, listed):
        version = pinned[re.sub(r"[-_.]+", "-", requirement.name).lower()]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_ci_calls_the_commands_of_the_readme():
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    assert "make lint" in run.read_text() and "make test" in run.read_text()
    assert "make test" in (ROOT / "README.md").read_text() and "make demo" in (ROOT / "README.md").read_text()
    tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("script", ["scripts/setup_env.sh", "scripts/install_font.sh", ".ci/run"])
def test_scripts_are_valid(script):
    assert subprocess.run(["bash", "-n", ROOT / script], check=False).returncode == 0


def test_setup_env_says_what_is_missing(tmp_path):
    result = subprocess.run(["bash", ROOT / "scripts" / "setup_env.sh", "run"], capture_output=True, text=True, check=False,
                            env={**os.environ, "PYTHON": "/bin/false", "VENV": str(tmp_path / "venv")})
    assert result.returncode == 1 and "Python 3.11" in result.stderr
    assert not (tmp_path / "venv").exists()

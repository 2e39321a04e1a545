"""The notebooks run, and each .ipynb is what its .py says."""
import json
import os
from pathlib import Path
import sys

import jupytext
from nbclient import NotebookClient
import nbformat
import pytest

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_two_forms_agree_and_hold_no_outputs(path):
    script, notebook = jupytext.read(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [(cell.cell_type, cell.source) for cell in script.cells] == [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)
    nbformat.validate(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_a_picture(path, tmp_path, monkeypatch):
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    # A kernel of this very Python: one that a user has registered may belong to another environment.
    kernel = tmp_path / "kernels" / "this_python"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "this Python", "language": "python"}))
    for name in ("VLM_JAX_RUN", "VLM_JAX_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLM_JAX_COMPILE_CACHE", str(tmp_path / "compiled"))
    monkeypatch.setenv("VLM_JAX_STEPS", "4")            # that it runs, not that it learns
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])))
    monkeypatch.delenv("MPLBACKEND", raising=False)     # the kernel's own: pictures become outputs

    specs = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")], ensure_native_kernel=False)
    manager = AsyncKernelManager(kernel_name="this_python", kernel_spec_manager=specs)
    notebook = nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    client = NotebookClient(notebook, km=manager, timeout=600, resources={"metadata": {"path": str(REPOSITORY)}})
    client.execute(cleanup_kc=True)     # else a kernel of its own manager lives as long as the tests
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "parameters" in "".join(output.get("text", "") for output in outputs)

"""environment.json without secrets; a compile cache that belongs to the user alone."""
import json
import os
from pathlib import Path

import jax
import pytest

import vlm_jax
from vlm_jax.training.environment import commit, environment, scrub, use_compile_cache, write_environment


def test_environment_names_what_ran(tmp_path):
    write_environment(tmp_path / "run", extra={"matmul_gflops": 12.5})
    written = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert written["vlm_jax"] == vlm_jax.__version__ and written["packages"]["jax"] == jax.__version__
    assert written["devices"] == {"platform": "cpu", "kind": jax.devices()[0].device_kind, "count": len(jax.devices()), "processes": 1}
    assert written["matmul_gflops"] == 12.5 and written["cpu"] and written["cpu_count"] >= 1


def test_canary_secrets_never_show(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary-0123456789")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=https://u:canary-pw@host")
    text = json.dumps(environment(["train.py", "--note=canary-0123456789", "--api_key", "canary", "--workdir", "gs://b/r?sig=canary&x=1"]))
    assert "canary" not in text
    assert "gs://b/r?sig=***&x=1" in text


@pytest.mark.parametrize("given, expected", [
    (["--hf_token=abc", "--workdir=/tmp/x"], ["--hf_token=***", "--workdir=/tmp/x"]),
    (["--password", "abc", "--seed", "3"], ["--password", "***", "--seed", "3"]),
    (["--token", "--seed=3"], ["--token", "--seed=3"]),
    (["https://me:pw@host/x.git"], ["https://***@host/x.git"]),
    (["note: hf_abcdefghijkl here"], ["note: *** here"]),
    (["--config.stages[0].optimizer.name=adamw", "file.py:variant=test"], ["--config.stages[0].optimizer.name=adamw", "file.py:variant=test"]),
])
def test_scrub(given, expected):
    assert scrub(given) == expected


def test_commit_of_a_checkout_only(tmp_path):
    assert commit(tmp_path) is None
    found = commit(Path(vlm_jax.__file__).parent)
    assert found is None or len(found.removesuffix("-dirty")) == 40


@pytest.fixture
def cache_setting():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_compile_cache_is_private(tmp_path, monkeypatch, cache_setting):
    monkeypatch.delenv("VLM_JAX_COMPILE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = use_compile_cache()
    assert folder.startswith(str(tmp_path)) and jax.config.jax_compilation_cache_dir == folder
    assert os.stat(folder).st_mode & 0o777 == 0o700
    assert use_compile_cache(tmp_path / "other") == folder       # what is set stays


def test_compile_cache_refuses_links_and_may_be_off(tmp_path, monkeypatch, cache_setting):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="not used.*VLM_JAX_COMPILE_CACHE"):
        assert use_compile_cache(tmp_path / "link") is None
    monkeypatch.setenv("VLM_JAX_COMPILE_CACHE", "off")
    assert use_compile_cache() is None
    assert jax.config.jax_compilation_cache_dir is None

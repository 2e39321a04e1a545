"""What makes a run the same run, and the +/- lines where it is not."""
import copy

import jax.numpy as jnp
import pytest

from vlm_jax import registry
from vlm_jax.errors import CheckpointError
from vlm_jax.settings import plain
from vlm_jax.training import checkpoints as checkpoints_module
from vlm_jax.training.checkpoints import Checkpoints
from vlm_jax.training.config import load_config, resolve, save_config
from vlm_jax.training.run_identity import check, check_same_run, describe


@pytest.fixture(scope="module")
def config():
    return resolve(load_config("configs/siglip/shapes.py:variant=test"))


def changed(config, *path, value):
    result = copy.deepcopy(plain(config))
    node = result
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return result


def stream(config):
    return next(iter(config["stages"][0]["data"]))


def test_what_may_change(config):
    identity = describe(config)
    check(identity, identity, "x")
    check(None, identity, "x")      # a checkpoint of before
    for path, value in [(("stages", 0, "steps"), 99), (("log_every",), 7), (("evaluations",), {}), (("mesh",), {"data": 1, "fsdp": 8}),
                        (("checkpoint", "keep"), 9), (("stages", 0, "clip"), 0.5), (("stages", 0, "data", stream(config), "threads"), 5)]:
        check(identity, describe(changed(config, *path, value=value)), "x")


def test_what_may_not(config):
    name = stream(config)
    for path, value, section, lines in [
        (("seed",), 5, "seed", ["- seed: 0", "+ seed: 5"]),
        (("task", "loss"), "softmax", "task", ['- task.loss: "sigmoid"', '+ task.loss: "softmax"']),
        (("dtypes", "compute"), "bfloat16", "dtypes", ["+ dtypes.compute: \"bfloat16\""]),
        (("stages", 0, "data", name, "batch_size"), 4096, "data", [f"+ data.{name}.batch_size: 4096"]),
        (("stages", 0, "data", name, "source", "split"), "other", "data", [f'+ data.{name}.source.split: "other"']),
        (("processor", "image", 0), ["no such operation", {}], "processor", ["+ processor.image[0]"]),
        (("model", "text"), {"length": 9}, "model", ["+ model.text.length: 9"]),
    ]:
        with pytest.raises(CheckpointError) as error:
            check(describe(config), describe(changed(config, *path, value=value)), "run/checkpoints/3")
        text = str(error.value)
        assert text.startswith(f"run/checkpoints/3: checkpoint of another run: {section} differ (- there, + here); use the config")
        for line in lines:
            assert f"\n  {line}" in text
        assert len(text.splitlines()) <= 22


def test_a_preset_that_changed_is_noticed(config, monkeypatch):
    before = describe(config)
    real = registry.settings
    monkeypatch.setattr(registry, "settings", lambda name, preset, **overrides: {**real(name, preset, **overrides), "embedding": 12345})
    with pytest.raises(CheckpointError, match=r"\+ model.embedding: 12345"):
        check(before, describe(config), "x")


def test_a_tokenizer_trained_anew_is_noticed(config):
    check(describe(config), describe(config, 0, "abc"), "x")
    with pytest.raises(CheckpointError, match='- processor.digest: "abc"\n  [+] processor.digest: "abd"'):
        check(describe(config, 0, "abc"), describe(config, 0, "abd"), "x")


def test_restore_refuses_before_an_array_is_read(config, tmp_path, monkeypatch):
    tree = {"params": {"x": jnp.ones(3)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {"step": 1, "run": describe(config)})
    checkpoints.restore(tree, run=describe(config))
    monkeypatch.setattr(checkpoints_module, "read_onto_devices", lambda *_: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="another run: seed differ"):
        checkpoints.restore(tree, run=describe({**config, "seed": 3}))
    other = {"params": {"x": jnp.ones(4), "y": jnp.ones(2, jnp.bfloat16)}}
    with pytest.raises(CheckpointError, match=r"- params/x float32\[3\]\n  \+ params/x float32\[4\]\n  \+ params/y bfloat16\[2\]"):
        checkpoints.restore(other, run=describe(config))


def test_the_workdir(config, tmp_path):
    check_same_run(config, tmp_path)
    save_config(config, tmp_path)
    check_same_run(config, tmp_path)
    with pytest.raises(CheckpointError, match="config.json: checkpoint of another run: seed differ"):
        check_same_run({**config, "seed": 1}, tmp_path)

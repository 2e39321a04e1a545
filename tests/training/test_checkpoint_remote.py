"""A run's files on an object store: nothing is renamed, appended or locked, requests fail now and then, and what was unfinished is never a step.

The store is tests/fake_gcs.py on loopback; Orbax, TensorStore and epath speak to it as they do to gs://.
"""
import json

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from tests.training.test_checkpoints import assert_same, make_tree
from tests.training.test_loop import shapes
from vlm_jax import storage
from vlm_jax.errors import CheckpointError
from vlm_jax.restore import load
from vlm_jax.settings import plain
from vlm_jax.training import append_file
from vlm_jax.training.checkpoint_policy import last_good, point_at
from vlm_jax.training.checkpoints import Checkpoints, restore_parameters
from vlm_jax.training.config import load_config
from vlm_jax.training.locks import WorkdirLock
from vlm_jax.training.loop import train
from vlm_jax.training.metrics import MetricWriter, read_metrics

FOLDER = "gs://bucket/run/checkpoints"


def test_saves_restores_and_collects(bucket):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    tree = {"params": {"kernel": jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, P("data")))}}
    with Checkpoints(FOLDER, keep=1) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, tree, {"step": step})
            checkpoints.wait()
    assert checkpoints.steps() == [3] and checkpoints.last_good() == 3
    assert {name.split("/")[3] for name in bucket.objects} == {"3", "LAST_GOOD-3.json"}
    restored, metadata = Checkpoints(FOLDER).restore({"params": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}})
    assert metadata == {"step": 3}
    np.testing.assert_array_equal(restored["params"]["kernel"], tree["params"]["kernel"])
    params, step = restore_parameters("gs://bucket/run")
    assert step == 3 and params["kernel"].shape == (8, 8)
    assert not any("rewriteTo" in path or "/copyTo/" in path or "compose" in path for _, path in bucket.log)


def test_an_unfinished_save_is_no_step_and_is_cleared(bucket):
    with Checkpoints(FOLDER, keep=2) as checkpoints:
        checkpoints.save(1, make_tree(1), {"step": 1})
    for name, (content, generation) in list(bucket.objects.items()):    # a save that was killed before its marker
        if "/1/" in name and "commit_success" not in name:
            bucket.objects[name.replace("/1/", "/2/")] = (content, generation)
    assert Checkpoints(FOLDER).steps() == [1]
    assert_same(Checkpoints(FOLDER).restore(make_tree())[0], make_tree(1))
    with Checkpoints(FOLDER, keep=2) as checkpoints:
        checkpoints.save(2, make_tree(2), {"step": 2})
    assert Checkpoints(FOLDER).steps() == [1, 2]
    assert_same(Checkpoints(FOLDER).restore(make_tree())[0], make_tree(2))


def test_damaged_objects_are_noticed(bucket):
    with Checkpoints(FOLDER, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_tree(step), {"step": step})
    for name, (content, generation) in list(bucket.objects.items()):
        if "/2/state/" in name and "/d/" in name:
            bucket.objects[name] = (content[:-1], generation)
    assert Checkpoints(FOLDER).restore(make_tree())[1]["step"] == 1


def test_requests_that_fail_are_made_again(bucket):
    """Also those that took effect while their answer was lost."""
    bucket.fail_every = 4
    path = storage.path_of("gs://bucket/run/f")
    for number in range(30):
        storage.write(path, f"{number}".encode())
        assert storage.read(path) == f"{number}".encode()
        assert storage.create_if_absent(f"gs://bucket/run/new{number}", f"mine {number}".encode())
        assert not storage.create_if_absent(f"gs://bucket/run/new{number}", b"theirs")
        storage.remove(f"gs://bucket/run/new{number}")
        assert not storage.exists(f"gs://bucket/run/new{number}")
    point_at(storage.path_of(FOLDER), 3, "abc")
    point_at(storage.path_of(FOLDER), 4, "def")
    assert last_good(storage.path_of(FOLDER)) == (4, "def")
    assert bucket.failures > 50


def test_a_store_that_does_not_answer_is_no_damage(bucket, monkeypatch):
    """A step is not thrown away because the network was down."""
    with Checkpoints(FOLDER) as checkpoints:
        checkpoints.save(1, make_tree(1), {"step": 1})
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    bucket.fail_every = 1
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        Checkpoints(FOLDER).restore(make_tree())
    assert "damaged" not in str(error.value)
    bucket.fail_every = None
    assert Checkpoints(FOLDER).restore(make_tree())[1]["step"] == 1


def test_metrics_are_whole_files(bucket, monkeypatch):
    monkeypatch.setattr(append_file, "_REWRITE_SECONDS", 0.0)
    with MetricWriter("gs://bucket/run", tensorboard=False) as writer:
        for step in (1, 2):
            writer.write(step, "train", {"loss": 1.0 / step})
    assert [row["loss"] for row in read_metrics("gs://bucket/run")] == [1.0, 0.5]
    with MetricWriter("gs://bucket/run", resume_from=1, tensorboard=False) as writer:
        writer.write(2, "train", {"loss": 0.25})
    content, _ = bucket.objects["bucket/run/metrics.jsonl"]
    assert [json.loads(line)["loss"] for line in content.decode().splitlines()] == [1.0, 0.25]


def test_the_fake_store_cannot_rename(bucket):
    path = storage.path_of("gs://bucket/a")
    path.write_text("a")
    with pytest.raises(OSError, match="cannot rename"):
        path.rename("gs://bucket/b")
    with pytest.raises(OSError, match="mode"):
        path.open("a").write("b")


def test_a_run_in_a_bucket_is_the_run_on_a_disk(bucket, tmp_path, monkeypatch):
    """The whole loop, with an evaluation, interrupted after step 2; then `vlm_jax.load`."""
    monkeypatch.chdir(tmp_path)
    evaluations = plain(load_config("configs/siglip/shapes.py:variant=test"))["evaluations"]
    name, settings = next(iter(evaluations.items()))
    config = shapes(steps=4, evaluations={name: {**settings, "every": 4}}, checkpoint={"every": 2, "keep": 1})
    train(shapes(steps=2, checkpoint={"every": 2, "keep": 1}), "gs://bucket/run", devices=jax.devices()[:1])
    with pytest.raises(CheckpointError, match="training here"), WorkdirLock("gs://bucket/run"):
        train(config, "gs://bucket/run", devices=jax.devices()[:1])
    train(config, "gs://bucket/run", devices=jax.devices()[:1])
    train(config, tmp_path / "disk", devices=jax.devices()[:1])
    remote_params, step = restore_parameters("gs://bucket/run")
    local_params, _ = restore_parameters(tmp_path / "disk")
    assert step == 4
    for a, b in zip(jax.tree.leaves(remote_params), jax.tree.leaves(local_params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk"]       # nothing went to a local folder named gs:
    files = {name.removeprefix("bucket/run/").split("/")[0] for name in bucket.objects}
    assert {"checkpoints", "config.json", "processor.json", "metrics.jsonl", "evaluations", "report.html", "parameters.txt"} <= files
    assert load("gs://bucket/run").step == 4

"""Checkpoints: what is saved comes back on any mesh, what is damaged is noticed, what belongs elsewhere is refused."""
import logging
import os
from pathlib import Path
import shutil

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import optax
import pytest

from vlm_jax.errors import CheckpointError
from vlm_jax.training.checkpoints import Checkpoints, DamagedCheckpoint, flatten, restore_parameters


def make_tree(seed=0, width=6):
    random = np.random.default_rng(seed)
    params = {"image": {"kernel": jnp.asarray(random.normal(size=(8, width)), jnp.float32), "bias": jnp.zeros((width,), jnp.bfloat16)},
              "scale": jnp.float32(seed + 0.5), "nothing": jnp.zeros((0, 3))}
    trained = {"image": {"kernel": True, "bias": True}, "scale": True, "nothing": False}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), trained))
    return {"params": params, "optimizer": optimizer.init(params), "ema": {"image": {"kernel": params["image"]["kernel"] * 2}},
            "state": {"seen": jnp.arange(5), "flag": jnp.array(True)}}


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding and sharding(x)), tree)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with sound steps 1 and 3; tests copy it."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (0, 1, 3):
            checkpoints.save(step, make_tree(step), {"step": step, "name": "run"})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def files(step_folder):
    return sorted(os.path.join(root, name) for root, _, names in os.walk(step_folder) for name in names)


def test_round_trip_keeps_structure_dtypes_and_the_newest_steps(folder):
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [1, 3] and checkpoints.latest() == 3
    tree, metadata = checkpoints.restore(abstract(make_tree()))
    assert_same(tree, make_tree(3))
    assert metadata == {"step": 3, "name": "run"}
    tree, metadata = checkpoints.restore(make_tree(), step=1)      # arrays serve as an abstract tree
    assert_same(tree, make_tree(1))
    assert metadata["step"] == 1


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 1)])
def test_restores_on_another_mesh(tmp_path, shape):
    def on(mesh, rows, columns):
        return lambda x: NamedSharding(mesh, P(rows, columns) if x.shape == (8, 8) else P())
    tree = make_tree(1, width=8)
    first = on(Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp")), "data", "fsdp")
    second = on(Mesh(np.array(jax.devices()[:shape[0] * shape[1]]).reshape(shape), ("data", "fsdp")), "fsdp", "data")
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(5, jax.tree.map(lambda x: jax.device_put(x, first(x)), tree))
        restored, metadata = checkpoints.restore(abstract(tree, second))
    assert_same(restored, tree)
    assert metadata == {}
    assert restored["params"]["image"]["kernel"].sharding.spec == P("fsdp", "data")


def test_arrays_may_be_donated_right_after_save(tmp_path):
    step_once = jax.jit(lambda x: x * 1.5 + 1, donate_argnums=0)
    x = jnp.arange(200_000, dtype=jnp.float32)
    with Checkpoints(tmp_path / "c", keep=20) as checkpoints:
        expected = []
        for step in range(3):
            expected.append(np.array(x))
            checkpoints.save(step, {"params": {"x": x}})
            for _ in range(4):
                x = step_once(x)
        for step, value in enumerate(expected):
            np.testing.assert_array_equal(checkpoints.restore({"params": {"x": value}}, step)[0]["params"]["x"], value)


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_in_a_data_file_is_noticed(tmp_path, caplog, seed):
    """Dense random arrays: every byte of the file is content, which Orbax alone would restore silently changed."""
    random = np.random.default_rng(seed)
    trees = [{"params": {"kernel": jnp.asarray(random.normal(size=(64, 64)), jnp.float32)}} for _ in range(2)]
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step, tree in enumerate(trees):
            checkpoints.save(step, tree)
    data = [path for path in files(tmp_path / "c" / "1" / "state") if os.path.getsize(path) > 8000]
    assert data
    for path in data:   # more than one where Orbax left a file behind that its merged manifest no longer names
        content = bytearray(Path(path).read_bytes())
        content[len(content) // 3 + 1000 * seed] ^= 1 << random.integers(8)
        Path(path).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        restored, _ = Checkpoints(tmp_path / "c").restore(trees[0])
    assert_same(restored, trees[0])
    assert "1 is damaged" in caplog.text and "going on from" in caplog.text
    with pytest.raises(DamagedCheckpoint, match="no sound checkpoint"):
        Checkpoints(tmp_path / "c").restore(trees[0], step=1)
    params, step = restore_parameters(tmp_path / "c")
    assert step == 0
    np.testing.assert_array_equal(params["kernel"], trees[0]["params"]["kernel"])


def truncate(path):
    os.truncate(path, os.path.getsize(path) // 2)


@pytest.mark.parametrize("damage", [truncate, os.remove])
@pytest.mark.parametrize("victim", ["meta/metadata", "state/manifest.ocdbt", "state/_METADATA", "data files"])
def test_truncated_and_missing_files_fall_back(folder, caplog, victim, damage):
    data = [path for path in files(folder / "3" / "state") if "/d/" in path]
    # Orbax may leave data files behind that its merged manifest no longer names, so all of them are damaged.
    for path in data if victim == "data files" else [folder / "3" / victim]:
        damage(path)
    tree, metadata = Checkpoints(folder).restore(make_tree())
    assert_same(tree, make_tree(metadata["step"]))
    if victim == "state/_METADATA":
        assert metadata["step"] == 3    # nothing reads this file of Orbax's; the digests say that nothing is lost
        return
    assert metadata["step"] == 1
    assert "damaged" in caplog.text


def test_changed_metadata_is_noticed(folder):
    path = folder / "3" / "meta" / "metadata"
    path.write_text(path.read_text().replace('"run"', '"ran"'))
    assert Checkpoints(folder).restore(make_tree())[1]["step"] == 1


def test_empty_and_half_deleted_steps_are_not_steps_and_are_cleared(folder):
    (folder / "7").mkdir()
    (folder / "2" / "state").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest() == 3 and checkpoints.steps() == [1, 3]
    assert checkpoints.restore(make_tree())[1]["step"] == 3
    with checkpoints:
        checkpoints.save(5, make_tree(5), {"step": 5})
    assert Checkpoints(folder).steps() == [3, 5]
    assert sorted(os.listdir(folder)) == ["3", "5", "LAST_GOOD-5.json", "notes.txt"]


def test_saving_after_a_fallback_replaces_the_damaged_step(folder):
    for path in files(folder / "3" / "state" / "d"):
        truncate(path)
    with Checkpoints(folder) as checkpoints:
        checkpoints.restore(make_tree())
        assert checkpoints.latest() == 1
        checkpoints.save(2, make_tree(2), {"step": 2})
        checkpoints.save(3, make_tree(9), {"step": 3})
    checkpoints = Checkpoints(folder)
    assert checkpoints.steps() == [2, 3]
    assert_same(checkpoints.restore(make_tree())[0], make_tree(9))


def test_all_damaged_or_none(folder, tmp_path):
    for step in ("1", "3"):
        truncate(folder / step / "meta" / "metadata")
    with pytest.raises(CheckpointError, match=r"no sound checkpoint \(3: .*; 1: "):
        Checkpoints(folder).restore(make_tree())
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        Checkpoints(tmp_path / "none").restore(make_tree())
    assert Checkpoints(tmp_path / "none").latest() is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(CheckpointError, match="no checkpoint of step 2; there are: 1, 3"):
        Checkpoints(folder).restore(make_tree(), step=2)


def test_another_model_is_refused_with_a_difference(folder):
    other = make_tree(width=7)
    other["params"]["extra"] = jnp.zeros(2)
    other["params"]["scale"] = other["params"]["scale"].astype(jnp.bfloat16)
    del other["state"]["flag"]
    with pytest.raises(CheckpointError) as error:
        Checkpoints(folder).restore(other)
    text = str(error.value)
    assert "another model" in text.splitlines()[0]
    assert "\n  - params/image/kernel float32[8, 6]\n  + params/image/kernel float32[8, 7]" in text
    assert "\n  - params/scale float32[]\n  + params/scale bfloat16[]" in text
    assert len(text.splitlines()) <= 22
    assert error.value.exit_code == 73
    del other["optimizer"], other["ema"], other["params"]["image"]
    with pytest.raises(CheckpointError, match=r"\+ params/extra float32\[2\]"):
        Checkpoints(folder).restore(other)


def test_parts_as_numpy_without_the_model(folder):
    params, step = restore_parameters(folder.parent, which="params")
    assert step == 3
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    assert_same(params, jax.tree.map(np.asarray, make_tree(3)["params"]))
    assert_same(restore_parameters(folder, step=1)[0], jax.tree.map(np.asarray, make_tree(1)["ema"]))
    with pytest.raises(CheckpointError, match='has no "teacher"; it has ema, optimizer, params, state'):
        restore_parameters(folder, which="teacher")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        restore_parameters(folder.parent / "elsewhere")


def test_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointError, match="could not be saved|cannot be read") as error:
        checkpoints.save(1, {"params": {"x": jnp.ones(3)}})
    assert "\n" not in str(error.value) and "file/checkpoints" in str(error.value)


def test_a_save_that_fails_in_the_background_surfaces(folder, monkeypatch):
    checkpoints = Checkpoints(folder)
    checkpoints.save(4, make_tree(4))
    checkpoints.wait()
    full = OSError(28, "No space left on device")

    def fail(*_, **__):
        raise full
    monkeypatch.setattr(checkpoints._writer, "raise_failed", fail)
    with pytest.raises(CheckpointError, match="No space left on device.*check free space"):
        checkpoints.save(6, make_tree(6))
    monkeypatch.setattr(checkpoints._writer, "wait", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        checkpoints.close()
    assert Checkpoints(folder).latest() == 4


def test_metadata_must_be_json(tmp_path):
    with pytest.raises(CheckpointError, match="metadata must be JSON"):
        Checkpoints(tmp_path / "c").save(1, {"params": {"x": jnp.ones(3)}}, {"function": print})
    with pytest.raises(CheckpointError, match="keep"):
        Checkpoints(tmp_path / "c", keep=0)


def test_paths_of_leaves():
    state = optax.adam(1e-3).init({"a": jnp.zeros(2)})
    assert list(flatten({"optimizer": state})) == ["optimizer/0/count", "optimizer/0/mu/a", "optimizer/0/nu/a"]
    with pytest.raises(ValueError, match="a/b"):
        flatten({"a": {"b": 1}, "a/b": 2})

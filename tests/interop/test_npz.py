"""big_vision's .npz: bfloat16 as void, keys with slashes; damaged and hostile files are refused in one line."""
import io
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest

from vlm_jax import registry
from vlm_jax.errors import CheckpointError
from vlm_jax.interop import table
from vlm_jax.interop.abstract import abstract_params
from vlm_jax.interop.directory import load_npz
from vlm_jax.interop.families import big_vision
from vlm_jax.interop.npz import NpzFile

TOWER = dict(width=12, depth=2, mlp_dim=20, num_heads=3)


def make(**settings):
    image = dict(TOWER, image_size=8, patch_size=4)
    return registry.build("siglip", image=image, text=dict(TOWER, vocab_size=19, length=5, embed_dim=12), embed_dim=12, **settings)


def random_params(model, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(dtype), abstract_params(model))


@pytest.mark.parametrize("stacked, dtype, prefix", [(False, "float32", "params/"), (True, ml_dtypes.bfloat16, "")])
def test_round_trip(tmp_path, stacked, dtype, prefix):
    model = make()
    params = random_params(model, dtype)
    tensors = {name: tensor.compute() for name, tensor in table.write(big_vision.rows(model, stacked), params).items()}
    assert ("params/img/Transformer/encoderblock/LayerNorm_0/scale" in tensors) == stacked
    assert tensors["params/img/MAPHead_0/probe"].shape == (1, 1, 12) and tensors["params/t"].shape == (1,)
    stored = {prefix + name.removeprefix("params/"): value.view("V2") if dtype == ml_dtypes.bfloat16 else value for name, value in tensors.items()}
    np.savez(tmp_path / "a.npz", **stored)
    loaded = load_npz(tmp_path / "a.npz")
    assert {key: loaded.config["model"]["image"][key] for key in TOWER} == TOWER and loaded.config["model"]["image"]["image_size"] == 8
    assert jax.tree.structure(loaded.params) == jax.tree.structure(params)
    for (path, ours), given in zip(jax.tree_util.tree_leaves_with_path(loaded.params), jax.tree.leaves(params)):
        assert ours.dtype == given.dtype and np.asarray(ours).tobytes() == given.tobytes(), path


def test_orders_and_parts(tmp_path):
    value = np.arange(24, dtype=">f4").reshape(2, 3, 4)
    np.savez_compressed(tmp_path / "a.npz", **{"a/b": np.asfortranarray(value), "c": np.float64(3)})
    file = NpzFile(tmp_path / "a.npz")
    assert file.names() == ["a/b", "c"] and file.shape("c") == () and file.dtype("a/b") == np.float32
    np.testing.assert_array_equal(file.read("a/b"), value)
    np.testing.assert_array_equal(file.read("a/b", (slice(1, 2), 2)), value[1:2, 2])


def entry(name, content, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return tmp_path / "a.npz"


def npy(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@pytest.mark.parametrize("name, content, message", [
    ("a.npy", npy(np.array([{}], object), allow_pickle=True), "holds Python objects"),
    ("a.npy", npy(np.array(["x"])), "numbers are expected"),
    ("a.npy", npy(np.ones(5))[:-8], "does not fit its"),
    ("a.npy", b"nonsense", "no sound .npz"),
    ("../a.npy", npy(np.ones(5)), "is no name of an array"),
    ("a.npy", npy(np.zeros(20_000_000)), "claim to hold 160,000,128"),
])
def test_refused(tmp_path, name, content, message):
    with pytest.raises(CheckpointError, match=message) as error:
        NpzFile(entry(name, content, tmp_path))
    assert "\n" not in str(error.value)


def test_damage(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.random.default_rng(0).normal(size=1000))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[3000] ^= 1
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match="'a' is damaged"):
        NpzFile(tmp_path / "a.npz").read("a")
    with pytest.raises(CheckpointError, match="there is no such file"):
        NpzFile(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", **{"params/llm/x": np.ones(3)})
    with pytest.raises(CheckpointError, match="embedding/kernel is missing"):
        load_npz(tmp_path / "c.npz")

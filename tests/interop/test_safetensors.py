"""The safetensors reader trusts nothing; the writer writes what it was given, whatever its strides, and reads it back."""
import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest

from vlm_jax.errors import CheckpointError
from vlm_jax.interop import safetensors
from vlm_jax.interop.safetensors import Lazy, open_file, open_folder, write_file, write_folder

RNG = np.random.default_rng(0)


def file_of(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("header, data, message", [
    (b"\xff\xfe", b"", "no sound JSON"),
    (b"[1]", b"", "an object is expected, got a list"),
    (b'{"a": {}, "a": {}}', b"", "the key 'a' is there twice"),
    (b'{"a": NaN}', b"", "NaN is no number"),
    (b"[" * 100_000, b"", "no sound JSON"),
    ({"a": 3}, b"", "'a': it must have dtype, shape and data_offsets"),
    ({"a": {**entry(), "more": 1}}, bytes(8), "it must have dtype, shape and data_offsets"),
    ({"a": entry("F33")}, bytes(8), "'a': the dtype 'F33' is unknown"),
    ({"a": entry(["F32"])}, bytes(8), "the dtype ['F32'] is unknown"),
    ({"a": entry(shape=[-2])}, bytes(8), "the shape [-2] is not a list"),
    ({"a": entry(shape=[True, 2])}, bytes(8), "the shape [True, 2] is not a list"),
    ({"a": entry(shape=[1] * 17)}, bytes(8), "is not a list of at most 16 sizes"),
    ({"a": entry(shape=[2 ** 32, 2 ** 32])}, bytes(8), "is larger than any memory"),
    ({"a": entry(shape=[0, 2 ** 40, 2 ** 40], offsets=(0, 0))}, b"", "is larger than any memory"),
    ({"a": entry(offsets=(8, 0))}, bytes(8), "needs 8 bytes, its offsets hold -8"),
    ({"a": entry(offsets=(0, 2 ** 63))}, bytes(8), "are not two positions"),
    ({"a": entry(offsets=(-8, 0))}, bytes(8), "are not two positions"),
    ({"a": entry(offsets=(0, 12))}, bytes(12), "needs 8 bytes, its offsets hold 12"),
    ({"a": entry(offsets=(4, 12))}, bytes(12), "'a' begins at byte 4 and leaves a hole"),
    ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "'b' begins at byte 4 and overlaps"),
    ({"a": entry()}, bytes(4), "its tensors need 8 bytes, the file has 4"),
    ({"a": entry()}, bytes(9), "its tensors need 8 bytes, the file has 9"),
    ({"../a": entry()}, bytes(8), "'../a': a name must be printable"),
    ({"/a": entry()}, bytes(8), "'/a': a name must be printable"),
    ({"a\n": entry()}, bytes(8), "a name must be printable"),
    ({"": entry()}, bytes(8), "a name must be printable"),
    ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map strings to strings"),
])
def test_headers_that_lie(tmp_path, header, data, message):
    with pytest.raises(CheckpointError) as error:
        open_file(file_of(tmp_path / "a.safetensors", header, data))
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("content, message", [
    (b"", "0 bytes are too few"), (struct.pack("<Q", 2 ** 63) + b"{}", "claims 9,223,372,036,854,775,808 bytes"),
    (struct.pack("<Q", 100_000_001) + b"{}", "at most 100,000,000"), (struct.pack("<Q", 3) + b"{}", "claims 3 bytes"),
])
def test_lengths_that_lie(tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_file(tmp_path / "a.safetensors")


def test_files_that_are_none(tmp_path):
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt"):
        (tmp_path / name).write_bytes(b"\x80\x02c__builtin__\neval\n")
        with pytest.raises(CheckpointError, match="can run any program when opened and are never read; use a release in safetensors"):
            open_file(tmp_path / name)
    with pytest.raises(CheckpointError, match="it holds model.ckpt, model.pt, pytorch_model.bin; pickled weights"):
        open_folder(tmp_path)
    with pytest.raises(CheckpointError, match="no regular file"):
        open_file(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        open_folder(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        open_file(tmp_path / "nothing.safetensors")


KINDS = {
    "transposed": RNG.normal(size=(5, 7)).astype(np.float32).T, "strided": RNG.normal(size=(9, 8)).astype(np.float32)[::2, 1::3],
    "reversed": np.arange(6, dtype=np.int16)[::-1], "fortran": np.asfortranarray(RNG.normal(size=(3, 4, 2))), "big_endian": np.arange(5, dtype=">i4"),
    "bfloat16": RNG.normal(size=(3, 5)).astype(ml_dtypes.bfloat16).T,
    "float8": RNG.normal(size=(4,)).astype(ml_dtypes.float8_e4m3fn), "scalar": np.float32(3),
    "empty": np.zeros((0, 3), np.float16), "broadcast": np.broadcast_to(np.float32(2), (3, 2)), "bool": np.array([True, False]),
    "complex": np.ones(2, np.complex64),
}


def test_writes_what_it_was_given(tmp_path):
    import jax.numpy as jnp
    lazy = Lazy((2,), np.dtype("int8"), lambda: np.arange(2, dtype="int8"))
    write_file(tmp_path / "a.safetensors", {**KINDS, "jax": jnp.arange(6.0).reshape(2, 3).T, "lazy": lazy}, {"format": "pt"})
    file = open_file(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt"} and os.listdir(tmp_path) == ["a.safetensors"]
    for name, value in KINDS.items():
        found = file.read(name)
        assert found.shape == file.shape(name) == value.shape and found.dtype == file.dtype(name) == value.dtype.newbyteorder("="), name
        assert found.tobytes() == np.ascontiguousarray(value).astype(found.dtype).tobytes(), name
    np.testing.assert_array_equal(file.read("jax"), np.arange(6.0).reshape(2, 3).T)
    content = (tmp_path / "a.safetensors").read_bytes()
    assert struct.unpack("<Q", content[:8])[0] % 8 == 0


def test_the_library_reads_it(tmp_path):
    reader = pytest.importorskip("safetensors")
    plain = {name: value for name, value in KINDS.items() if name not in ("bfloat16", "float8", "complex")}
    write_file(tmp_path / "a.safetensors", plain)
    with reader.safe_open(tmp_path / "a.safetensors", "np") as file:
        for name, value in plain.items():
            np.testing.assert_array_equal(file.get_tensor(name), value)


@pytest.mark.parametrize("index", [None, 1, -1, slice(1, 3), slice(None, None, 2), slice(3, 0, -1), (slice(2), slice(1, 4)), (0, 2),
                                   (slice(1, 4, 2), slice(None), 1), slice(2, 2)])
def test_parts(tmp_path, index, monkeypatch):
    value = RNG.normal(size=(4, 5, 3)).astype(np.float32)
    write_file(tmp_path / "a.safetensors", {"a": value})
    monkeypatch.setattr(safetensors, "CHUNK_BYTES", 100)
    found = open_file(tmp_path / "a.safetensors").read("a", index)
    np.testing.assert_array_equal(found, value if index is None else value[index])
    assert found.flags.owndata or found.base is not None


def test_only_the_rows_that_are_asked_for_are_read(tmp_path, monkeypatch):
    write_file(tmp_path / "a.safetensors", {"a": np.zeros((1000, 100), np.float32)})
    counted = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, position: (counted.append(sum(map(len, buffers))), preadv(file, buffers, position))[1])
    open_file(tmp_path / "a.safetensors").read("a", slice(10, 13))
    assert sum(counted) == 3 * 400


def test_what_the_format_does_not_have(tmp_path):
    for value, message in ((np.array(["x"]), "no dtype <U1"), (np.ones(1, np.longdouble), "no dtype")):
        with pytest.raises(CheckpointError, match=message):
            write_file(tmp_path / "a.safetensors", {"a": value})
    with pytest.raises(CheckpointError, match="a name must be printable"):
        write_file(tmp_path / "a.safetensors", {"../a": np.ones(1)})
    with pytest.raises(CheckpointError, match=r"came out as \(2,\)"):
        write_file(tmp_path / "a.safetensors", {"a": Lazy((3,), np.dtype("float32"), lambda: np.ones(2, np.float32))})
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_file(tmp_path / "missing" / "a.safetensors", {"a": np.ones(1)})
    assert not list(tmp_path.iterdir())


def test_a_faulty_disk_is_noticed_and_the_old_file_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_file(path, {"a": np.ones(3)})
    old = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda number: os.pwrite(number, b"\x01", os.fstat(number).st_size - 3))
    with pytest.raises(CheckpointError, match="'a' reads back differently than it was written"):
        write_file(path, {"a": np.ones(3)})
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_file_that_shrinks_while_it_is_open(tmp_path):
    write_file(tmp_path / "a.safetensors", {"a": np.ones(30)})
    file = open_file(tmp_path / "a.safetensors")
    os.truncate(tmp_path / "a.safetensors", 150)
    with pytest.raises(CheckpointError, match="'a' cannot be read whole"):
        file.read("a")


def test_several_files(tmp_path):
    tensors = {f"t{k}": np.full((10, 10), k, np.float32) for k in range(5)}
    names = write_folder(tmp_path, tensors, shard_bytes=800)
    assert names == ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors", "model.safetensors.index.json"]
    found = open_folder(tmp_path)
    assert all(np.array_equal(found.read(name), value) for name, value in tensors.items())
    assert write_folder(tmp_path, tensors) == ["model.safetensors"] and os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("change, message", [
    (lambda m: {**m, "t0": "../outside.safetensors"}, "is not a .safetensors file of the same folder"),
    (lambda m: {**m, "t0": "/etc/passwd"}, "is not a .safetensors file of the same folder"),
    (lambda m: {**m, "t0": "pytorch_model.bin"}, "is not a .safetensors file of the same folder"),
    (lambda m: {**m, "t9": m["t0"]}, "'t9' is missing, which the index lists"),
    (lambda m: {key: value for key, value in m.items() if key != "t0"}, "the index does not list 't0'"),
    (lambda m: {**m, "t0": m["t4"]}, "the index does not list 't0' for this file"),
    (lambda m: {**m, "t0": "link.safetensors"}, "a link leads out of the folder"),
    (lambda m: {**m, "t0": "missing.safetensors"}, "No such file"),
    (lambda m: {"t0": 3}, "weight_map must map"), (lambda m: [], "weight_map must map"),
])
def test_indices_that_lie(tmp_path, change, message):
    folder = tmp_path / "model"
    write_folder(folder, {f"t{k}": np.ones(100, np.float32) for k in range(5)}, shard_bytes=800)
    (tmp_path / "outside.safetensors").write_bytes((folder / "model-00001-of-00003.safetensors").read_bytes())
    (folder / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
    with pytest.raises(CheckpointError, match=message) as error:
        open_folder(folder)
    assert "\n" not in str(error.value)

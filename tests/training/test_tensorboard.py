"""Event files: read back by a parser written from the format, and by tensorboardX's message classes where they are installed."""
import math
import struct

from hypothesis import given, strategies as st
import pytest

from experiments.kill_resume.event_files import message
from vlm_jax.training.tensorboard import TensorBoardWriter, crc32c, frame, masked_crc32c


def records(content):
    while content:
        length, check = struct.unpack_from("<QI", content)
        data, (data_check,) = content[12:12 + length], struct.unpack_from("<I", content, 12 + length)
        assert check == masked_crc32c(content[:8]) and data_check == masked_crc32c(data)
        content = content[16 + length:]
        yield data


def write(folder):
    writer = TensorBoardWriter(folder, resume_from=300)
    writer.scalars(301, {"train/loss": 1.5, "train/größe": -2.0})
    writer.scalars(2**40, {"eval/retrieval/r1": float("nan"), "huge": 1e300})
    writer.scalars(303, {})
    writer.close()
    writer.close()
    [path] = folder.iterdir()
    return path


def test_scalars_read_back(tmp_path):
    path = write(tmp_path / "tensorboard")
    assert path.name.startswith("events.out.tfevents.")
    first, start, *events = [message(data) for data in records(path.read_bytes())]
    assert first[3] == [b"brain.Event:2"]
    assert start[2] == [301] and message(start[7][0]) == {1: [1]}       # TensorBoard drops what older files say from step 301 on
    assert [event[2] for event in events] == [[301], [2**40]]
    points = [{message(value)[1][0].decode(): message(value)[2][0] for value in message(event[5][0])[1]} for event in events]
    assert points[0] == {"train/loss": 1.5, "train/größe": -2.0}
    assert math.isnan(points[1]["eval/retrieval/r1"]) and points[1]["huge"] == math.inf
    assert all(event[1][0] > 1e9 for event in events)


def test_the_official_messages_agree(tmp_path):
    events = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs tensorboardX")
    first, start, one, two = [events.Event.FromString(data) for data in records(write(tmp_path / "t").read_bytes())]
    assert first.file_version == "brain.Event:2"
    assert start.step == 301 and start.session_log.status == events.SessionLog.START
    assert one.step == 301 and [(v.tag, v.simple_value) for v in one.summary.value] == [("train/loss", 1.5), ("train/größe", -2.0)]
    assert two.step == 2**40


def test_checksums():
    assert crc32c(b"123456789") == 0xE3069283      # the check value of CRC-32C
    assert crc32c(b"") == 0
    assert crc32c(bytes(32)) == 0x8A9136AA         # RFC 3720, appendix B.4


@given(st.lists(st.binary(max_size=300), max_size=4))
def test_frames(datas):
    assert list(records(b"".join(map(frame, datas)))) == datas

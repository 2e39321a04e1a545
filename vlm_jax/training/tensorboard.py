"""Scalars for TensorBoard, written without TensorFlow or TensorBoard.

An event file is a sequence of records (length, its checksum, data, its checksum); the data is an `Event` protocol buffer. Scalars need
six of its fields, so they are encoded here by hand.
"""
from collections.abc import Mapping
import os
import socket
import struct
import time

from vlm_jax import storage
from vlm_jax.training.append_file import AppendFile

# Field numbers of tensorflow.Event, tensorflow.Summary(.Value) and tensorflow.SessionLog.
_WALL_TIME, _STEP, _FILE_VERSION, _SUMMARY, _SESSION_LOG = 1, 2, 3, 5, 7
_SUMMARY_VALUE, _TAG, _SIMPLE_VALUE = 1, 1, 2
_SESSION_STATUS, _SESSION_START = 1, 1
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5     # wire types

_POLYNOMIAL = 0x82F63B78    # CRC-32C (Castagnoli), reflected


class TensorBoardWriter:
    """Writes scalars into a new event file of `folder`.

    Args:
      folder: usually `workdir/tensorboard`.
      resume_from: TensorBoard forgets what earlier files of the folder hold of steps after this one.
    """

    def __init__(self, folder: str | os.PathLike, resume_from: int = 0):
        now = time.time()
        # TensorBoard reads the files in the order of their names, and a start takes back what was read before it: so the number counts on from the newest
        # file, also where the clock was set back or two starts fall into one second.
        numbers = [int(parts[3]) for name in storage.names(folder) if len(parts := name.split(".")) > 3 and parts[3].isdecimal()]
        name = f"events.out.tfevents.{max(int(now), *(number + 1 for number in numbers), 0):010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendFile(os.path.join(os.fspath(folder), name))
        self._record(_bytes(_FILE_VERSION, b"brain.Event:2"), now)
        start = _varint_field(_SESSION_STATUS, _SESSION_START)
        self._record(_varint_field(_STEP, resume_from + 1) + _bytes(_SESSION_LOG, start), now)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one point to the curve of every name in `values` (`train/loss`)."""
        summary = b"".join(
            _bytes(_SUMMARY_VALUE, _bytes(_TAG, name.encode()) + _key(_SIMPLE_VALUE, _FIXED_32) + struct.pack("<f", _clip(value)))
            for name, value in values.items())
        if summary:
            self._record(_varint_field(_STEP, step) + _bytes(_SUMMARY, summary), time.time())

    def flush(self) -> None:
        """Makes sure that a kill loses nothing."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file; may be called twice."""
        self._file.close()

    def _record(self, fields: bytes, wall_time: float) -> None:
        self._file.write(frame(_key(_WALL_TIME, _FIXED_64) + struct.pack("<d", wall_time) + fields))


def frame(data: bytes) -> bytes:
    """One record: length, masked checksum of the length, data, masked checksum of the data."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The checksum as record files store it: rotated and shifted, so that checksums of checksums stay distinct."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _table() -> list[int]:
    table = []
    for byte in range(256):
        crc = byte
        for _ in range(8):
            crc = (crc >> 1) ^ (_POLYNOMIAL if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _table()


def _clip(value: float) -> float:
    """A float that fits 32 bits; struct refuses larger ones, but keeps infinities and NaN."""
    value = float(value)
    if abs(value) <= 3.4028234663852886e38 or value != value:
        return value
    return float("inf") if value > 0 else float("-inf")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _varint_field(field: int, value: int) -> bytes:
    return _key(field, _VARINT) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, _BYTES) + _varint(len(value)) + value

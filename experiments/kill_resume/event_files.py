"""Reads back what `vlm_jax/training/tensorboard.py` writes, as TensorBoard does: a restart makes it forget the later steps of earlier files."""
from collections.abc import Iterator
import os
from pathlib import Path
import struct
from typing import Any

Curve = list[tuple[int, float]]


def curves(folder: str | os.PathLike) -> dict[str, Curve]:
    """{tag: [(step, value)]} of the event files of a folder, in the order they were written; a record cut short ends its file."""
    found: dict[str, Curve] = {}
    for path in sorted(Path(folder).glob("events.out.tfevents.*")):
        for record in _records(path.read_bytes()):
            event = message(record)
            step = event.get(2, [0])[0]
            if 7 in event:      # session_log: a start at `step`
                found = {tag: [point for point in points if point[0] < step] for tag, points in found.items()}
            for summary in event.get(5, []):
                for value in message(summary).get(1, []):
                    fields = message(value)
                    found.setdefault(fields[1][0].decode(), []).append((step, fields[2][0]))
    return {tag: points for tag, points in found.items() if points}


def _records(content: bytes) -> Iterator[bytes]:
    while len(content) >= 12:
        length = struct.unpack_from("<Q", content)[0]
        if len(content) < length + 16:
            return
        yield content[12:12 + length]
        content = content[16 + length:]


def message(data: bytes) -> dict[int, list[Any]]:
    """{field: values} of a protocol buffer."""
    fields: dict[int, list[Any]] = {}
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        value: Any
        if kind == 0:
            value, at = _varint(data, at)
        elif kind == 1:
            value, at = struct.unpack_from("<d", data, at)[0], at + 8
        elif kind == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        else:
            length, at = _varint(data, at)
            value, at = data[at:at + length], at + length
        fields.setdefault(key >> 3, []).append(value)
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at

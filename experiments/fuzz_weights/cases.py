"""Mutations of safetensors files and of config.json, by a seed, and what reading them may end in."""
from collections.abc import Iterator
import json
import struct
from typing import Any

import numpy as np

VALUES: tuple[Any, ...] = (None, True, False, 0, -1, 1, 2 ** 31, 2 ** 63, 2 ** 64, -2 ** 63, 10 ** 30, 1e308, -0.5, 0.1, "", "x", "F32", "\u0000",
                           "../../x", "/etc/x", "é" * 300, [], [0], [-1, 5], [2 ** 62, 2 ** 62], {}, {"a": 1}, [[[]]], "None", "NaN", [None],
                           "__class__", "1e999", "siglip", "gelu")


def base_file() -> bytes:
    """A sound safetensors file of a few tensors of several kinds."""
    import ml_dtypes
    rng = np.random.default_rng(0)
    tensors = {"a.weight": rng.normal(size=(3, 5)).astype(np.float32), "b": rng.normal(size=(7,)).astype(np.float16), "c": np.int64(4),
               "d": rng.normal(size=(2, 2, 2)).astype(ml_dtypes.bfloat16), "e": np.zeros((0, 4), np.int8)}
    names = {"float32": "F32", "float16": "F16", "int64": "I64", "bfloat16": "BF16", "int8": "I8"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        content = np.asarray(value).tobytes()
        header[name] = {"dtype": names[str(value.dtype)], "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutated(value: Any, rng: np.random.Generator, depth: int = 0) -> Any:
    """A copy of a JSON value with one place changed: replaced, removed, doubled, or gone into."""
    if isinstance(value, dict) and value and (depth == 0 or rng.random() < 0.7):
        key = list(value)[rng.integers(len(value))]
        kind = rng.integers(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {**value, str(VALUES[rng.integers(len(VALUES))]): value[key]}
        return {**value, key: mutated(value[key], rng, depth + 1)}
    if isinstance(value, list) and value and rng.random() < 0.6:
        place = rng.integers(len(value))
        return [mutated(item, rng, depth + 1) if i == place else item for i, item in enumerate(value)]
    if type(value) is int and rng.random() < 0.6:
        return int(value) + int(rng.choice([-1, 1, 7, -8, 2 ** 20, 2 ** 40, 2 ** 62])) if rng.random() < 0.8 else float(value)
    return VALUES[rng.integers(len(VALUES))]


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes with a few flipped, a part cut out, doubled or cut off."""
    kind, place = rng.integers(5), int(rng.integers(max(len(content), 1)))
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + content[place + int(rng.integers(1, 40)):]
    if kind == 2:
        return content[:place] + content[max(0, place - 30):]
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
    return bytes(changed)


def files(count: int, seed: int = 0) -> Iterator[bytes]:
    """Mutated safetensors files: of the JSON, of the length in front, of the bytes."""
    rng, base = np.random.default_rng(seed), base_file()
    length = struct.unpack("<Q", base[:8])[0]
    header, data = json.loads(base[8:8 + length]), base[8 + length:]
    for _ in range(count):
        kind = rng.integers(10)
        if kind < 6:
            changed = header
            for _ in range(int(rng.integers(1, 3))):
                changed = mutated(changed, rng)
            text = json.dumps(changed).encode()
            if kind == 5:   # the same key twice
                text = text[:-1] + b', "b": ' + json.dumps(header["b"]).encode() + b"}"
            yield struct.pack("<Q", len(text)) + text + data
        elif kind == 6:
            wrong = (0, 1, length - 1, length + 1, len(base), 10 ** 8, 10 ** 8 + 1, 2 ** 40, 2 ** 63, 2 ** 64 - 1)
            yield struct.pack("<Q", wrong[rng.integers(len(wrong))]) + base[8:]
        elif kind == 7:
            text = b'{"a":' * int(rng.integers(1, 50_000)) if rng.random() < 0.5 else b"[" * int(rng.integers(1, 50_000))
            yield struct.pack("<Q", len(text)) + text
        else:
            yield damaged(base, rng)


def configs(base: dict[str, Any], count: int, seed: int = 0) -> Iterator[bytes]:
    """Mutated config.json files."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        changed = base
        for _ in range(int(rng.integers(1, 4))):
            changed = mutated(changed, rng)
        text = json.dumps(changed).encode()
        yield damaged(text, rng) if rng.random() < 0.2 else text

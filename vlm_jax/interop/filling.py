"""Filling one parameter, a layer at a time, on the devices where it belongs."""
import math
from typing import Any

import jax
import numpy as np

from vlm_jax.interop.safetensors import LARGE_BYTES, empty

ALIGNMENT = 64               # what XLA's CPU client takes over without a copy
PIECE_BYTES = 32 * 2 ** 20   # of a transposed array this much is made contiguous at a time on its way to an accelerator


class Leaf:
    """An array of `shape` and `dtype` in the making, whose layers arrive one by one and are cut to what each device of `sharding` holds.

    On CPUs the parts are assembled in memory that JAX takes over as it is; on accelerators a part is written into the array on the device, so that the
    host holds no more than the layer that arrived. `on_host` chooses between the two; by default the platform does.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding, on_host: bool | None = None):
        self.shape, self.dtype, self.sharding = tuple(shape), np.dtype(dtype), sharding
        self._indices = {device: _bounds(index, self.shape) for device, index in sharding.addressable_devices_indices_map(self.shape).items()}
        self._on_host = all(device.platform == "cpu" for device in self._indices) if on_host is None else on_host
        self._parts: dict[Any, Any] = {}
        for device, bounds in self._indices.items():
            part = tuple(stop - start for start, stop in bounds)
            if not self._on_host:
                with jax.default_device(device):
                    self._parts[device] = jax.device_put(jax.numpy.zeros(part, self.dtype), device)
            elif bounds not in self._parts:
                self._parts[bounds] = aligned_empty(part, self.dtype)

    def put(self, layer: int | None, array: np.ndarray) -> None:
        """Stores layer `layer` (the whole parameter if None), casting it to the dtype."""
        done = set()
        for device, bounds in self._indices.items():
            if layer is not None:
                (first, last), *rest = bounds
                if not first <= layer < last:
                    continue
                part, place = array[tuple(slice(*pair) for pair in rest)], layer - first
            else:
                part, place = array[tuple(slice(*pair) for pair in bounds)], None
            if not self._on_host:
                self._write(device, place, part)
            elif bounds not in done:
                done.add(bounds)
                target = self._parts[bounds]
                np.copyto(target if place is None else target[place, ...], part, casting="unsafe")

    def _write(self, device: Any, place: int | None, part: np.ndarray) -> None:
        part = part if place is None else part[None]
        start = [0 if place is None else place] + [0] * (part.ndim - 1)
        if part.ndim == 0:
            self._parts[device] = jax.device_put(np.asarray(part, self.dtype), device)
            return
        axis = 0 if place is None else min(1, part.ndim - 1)   # cut along the first axis that is not the layer's
        rows = part.shape[axis]
        step = max(1, min(rows, PIECE_BYTES * rows // max(part.size * self.dtype.itemsize, 1)))
        for begin in range(0, rows, step):
            piece = part[(slice(None),) * axis + (slice(begin, begin + step),)]
            start[axis] = begin if axis or place is None else place
            on_device = jax.device_put(np.ascontiguousarray(piece, self.dtype).reshape(piece.shape), device)
            self._parts[device] = _update(self._parts[device], on_device, tuple(np.int32(s) for s in start))
            self._parts[device].block_until_ready()   # else the pieces would pile up on the host

    def finish(self) -> jax.Array:
        """The finished array."""
        if self._on_host:
            pieces = [jax.device_put(self._parts[bounds], device) for device, bounds in self._indices.items()]
        else:
            pieces = [self._parts[device] for device in self._indices]
        self._parts = {}
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, pieces)


_update = jax.jit(lambda target, piece, start: jax.lax.dynamic_update_slice(target, piece, start), donate_argnums=0)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose memory begins at a multiple of `ALIGNMENT`."""
    size = math.prod(shape) * dtype.itemsize
    if size >= LARGE_BYTES:
        return empty(shape, dtype)
    memory = np.empty(size + ALIGNMENT, np.uint8)
    offset = -memory.ctypes.data % ALIGNMENT
    return memory[offset:offset + size].view(dtype).reshape(shape)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))

"""Memory of batches, used again: the system hands out fresh pages one fault at a time, which can cost as much as decoding the pictures."""
from collections import deque
import math
import weakref

import numpy as np

SMALLEST_BYTES = 2**20
KEPT = 16


class Buffers:
    """Gives arrays whose memory comes back once nothing refers to the array or any view of it any more: a batch may be kept as long as one likes.

    Threads may share it; a pickled copy starts empty.
    """

    def __init__(self):
        self._free: dict[int, deque[bytearray]] = {}

    def __reduce__(self):
        return Buffers, ()

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns an array with arbitrary contents."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        if size < SMALLEST_BYTES or dtype.hasobject:
            return np.empty(shape, dtype)
        free = self._free.setdefault(size, deque(maxlen=KEPT))
        try:
            memory = free.pop()
        except IndexError:
            memory = bytearray(size)
        # Every view of `root` keeps `root` alive, since its own base is no array; so its end is the end of them all.
        root = np.frombuffer(memory, dtype)
        weakref.finalize(root, free.append, memory).atexit = False
        return root.reshape(shape)

    def copy(self, array: np.ndarray) -> np.ndarray:
        """Returns a copy, in memory of this pool."""
        result = self.array(array.shape, array.dtype)
        np.copyto(result, array)
        return result

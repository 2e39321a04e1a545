"""Memory of batches comes back, but never while anything still looks at it."""
import gc
import pickle
import threading

import numpy as np
import pytest

from vlm_jax.data.buffers import SMALLEST_BYTES, Buffers

SHAPE = (4, SMALLEST_BYTES // 16, 1)


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_nothing_refers_to_it():
    buffers = Buffers()
    first = buffers.array(SHAPE, np.float32)
    first[:] = 1
    place = address(first)
    second = buffers.array(SHAPE, np.float32)
    assert address(second) != place
    del first
    gc.collect()
    assert address(buffers.array(SHAPE, np.float32)) == place
    assert second.shape == SHAPE and second.dtype == np.float32 and second.flags.writeable and second.flags.c_contiguous


@pytest.mark.parametrize("look", [
    lambda a: a[1], lambda a: a[1:].reshape(-1)[5:], lambda a: a.T, lambda a: memoryview(a), lambda a: a.view(np.int32), lambda a: {"x": [a[0, 0]]},
    lambda a: np.asarray(memoryview(a))])
def test_any_view_keeps_the_memory(look):
    buffers = Buffers()
    array = buffers.array(SHAPE, np.float32)
    place, view = address(array), look(array)
    del array
    gc.collect()
    others = [buffers.array(SHAPE, np.float32) for _ in range(3)]
    assert place not in [address(other) for other in others]
    del view
    gc.collect()
    assert address(buffers.array(SHAPE, np.float32)) == place


def test_small_arrays_and_copies_of_the_pool():
    buffers = Buffers()
    assert buffers.array((3,), np.int64).base is None
    array = buffers.array(SHAPE, np.float32)
    copy = pickle.loads(pickle.dumps(buffers))  # noqa: S301
    assert address(copy.array(SHAPE, np.float32)) != address(array)


def test_threads_never_share_memory():
    buffers, failures = Buffers(), []

    def work(number):
        for _ in range(60):
            array = buffers.array(SHAPE, np.float32)
            array[:] = number
            if not (array == number).all():
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_jax_arrays_made_from_a_batch_keep_their_values():
    import jax
    buffers = Buffers()
    kept = []
    for number in range(4):
        array = buffers.array(SHAPE, np.float32)
        array[:] = number
        kept.append(jax.device_put(array))
        del array
    assert [float(value.max()) for value in kept] == [float(value.min()) for value in kept] == [0, 1, 2, 3]

"""The product of one row, which CPUs take in two halves, is the product."""
import jax
import numpy as np
import pytest

from vlm_jax.nn.linear import LARGE_KERNEL, product


@pytest.mark.parametrize("leading, rows, columns", [((1,), 512, 513), ((1, 1), 514, 512), ((1,), 511, 520), ((2,), 512, 512)])
def test_a_large_kernel(leading, rows, columns):
    assert rows * columns >= LARGE_KERNEL
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(*leading, rows)).astype(np.float32), rng.normal(size=(rows, columns)).astype(np.float32)
    got = jax.jit(product)(x, kernel)
    assert got.shape == (*leading, columns) and got.dtype == np.float32
    np.testing.assert_allclose(got, x.astype(np.float64) @ kernel, atol=1e-3)


def test_the_dtype_of_the_sum():
    x, kernel = np.ones((1, 512), jax.numpy.bfloat16), np.ones((512, 512), jax.numpy.bfloat16)
    assert product(x, kernel).dtype == jax.numpy.bfloat16 and product(x, kernel, "float32").dtype == np.float32

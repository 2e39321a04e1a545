import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.nn import resample_positions, sincos2d


def test_sincos2d_values():
    table = np.asarray(sincos2d(2, 3, 8))
    assert table.shape == (6, 8)
    for y in range(2):
        for x in range(3):
            slow = 1e-4
            expected = [np.sin(x), np.sin(slow * x), np.cos(x), np.cos(slow * x), np.sin(y), np.sin(slow * y), np.cos(y), np.cos(slow * y)]
            np.testing.assert_allclose(table[3 * y + x], expected, atol=1e-6)
    for features in (6, 4):
        with pytest.raises(ConfigError, match="multiple of 4"):
            sincos2d(2, 2, features)


def test_resampling():
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(1 + 2 * 3, 5)), jnp.float32)
    assert resample_positions(table, (2, 3), (2, 3), keep_first=1) is table
    bigger = resample_positions(table, (2, 3), (4, 9), keep_first=1)
    assert bigger.shape == (1 + 36, 5)
    np.testing.assert_array_equal(bigger[0], table[0])
    grid = bigger[1:].reshape(4, 9, 5)
    # Bilinear with pixel centres: a corner keeps its value, tripling keeps the middle of every cell.
    np.testing.assert_allclose(grid[0, 0], table[1], atol=1e-6)
    np.testing.assert_allclose(grid[0, 1::3], table[1:4], atol=1e-6)
    # Antialiased: halving averages, so that a checkerboard vanishes but for its mean.
    board = jnp.asarray(np.indices((6, 6)).sum(0) % 2, jnp.float32).reshape(36, 1)
    smaller = resample_positions(board, (6, 6), (3, 3)).reshape(3, 3)
    assert abs(float(smaller[1, 1]) - 0.5) < 0.1
    with pytest.raises(ValueError, match="7 rows"):
        resample_positions(table, (2, 3), (4, 4))


def test_resampling_is_linear_and_keeps_constants():
    ones = resample_positions(jnp.ones((12, 2)), (3, 4), (5, 2))
    np.testing.assert_allclose(ones, np.ones((10, 2)), atol=1e-6)
    assert np.isfinite(jax.grad(lambda t: resample_positions(t, (3, 4), (5, 2)).sum())(jnp.ones((12, 2)))).all()


@pytest.mark.parametrize("old, new", [((3, 3), (4, 6)), ((5, 5), (2, 9))])
def test_bicubic_matches_pytorch(old, new):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(old[0] * old[1], 4)).astype(np.float32)
    expected = torch.nn.functional.interpolate(torch.from_numpy(table.reshape(1, *old, 4).transpose(0, 3, 1, 2).copy()), size=new, mode="bicubic",
                                               align_corners=False)
    ours = resample_positions(jnp.asarray(table), old, new, method="bicubic")
    np.testing.assert_allclose(ours, expected[0].numpy().transpose(1, 2, 0).reshape(-1, 4), atol=1e-5)

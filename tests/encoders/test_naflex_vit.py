import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.encoders.naflex_vit import NaflexVit
from vlm_jax.errors import ConfigError
from vlm_jax.nn import resample_positions
from vlm_jax.nn.positions import triangle_weights

MODEL = NaflexVit(num_positions=16, patch_size=2, width=12, depth=2, mlp_dim=20, num_heads=3, scan=True)


def patches(grids, longest, seed=0):
    made = np.zeros((len(grids), longest, 14), np.float32)
    for number, (row, (rows, columns)) in enumerate(zip(made, grids)):
        count = rows * columns
        row[:count, 0], row[:count, 1] = np.repeat(np.arange(rows), columns) + 1, np.tile(np.arange(columns), rows) + 1
        row[:count, 2:] = np.random.default_rng((seed, number)).normal(size=(count, 12))
    return made


def test_padding_changes_nothing_and_pictures_do_not_meet():
    params = jax.jit(MODEL.init)(jax.random.key(0), patches([(2, 3)], 6))
    apply = jax.jit(MODEL.apply)
    together, out = apply(params, patches([(2, 3), (5, 1), (3, 3)], 11))
    assert out["tokens"].shape == (3, 11, 12) and out["blocks"]["output"].shape == (2, 3, 11, 12)
    alone, _ = apply(params, patches([(2, 3)], 6))
    np.testing.assert_allclose(together[:1], alone, atol=1e-5)


@pytest.mark.parametrize("grid", [(2, 3), (4, 4), (7, 5), (1, 9)])
def test_positions_are_those_of_the_fixed_tower(grid):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5)), jnp.float32)
    rows, columns = np.repeat(np.arange(grid[0]), grid[1]), np.tile(np.arange(grid[1]), grid[0])
    down = triangle_weights(jnp.asarray(rows), 4, jnp.asarray(grid[0]))
    across = triangle_weights(jnp.asarray(columns), 4, jnp.asarray(grid[1]))
    ours = jnp.einsum("pa,pb,abd->pd", down, across, table.reshape(4, 4, 5))
    np.testing.assert_allclose(ours, resample_positions(table, (4, 4), grid), atol=1e-5)


def test_errors():
    with pytest.raises(ConfigError, match=r"takes \[batch, patches, 14\]"):
        MODEL.init(jax.random.key(0), jnp.zeros((1, 3, 15)))
    with pytest.raises(ConfigError, match="15 is no square number"):
        MODEL.clone(num_positions=15).init(jax.random.key(0), jnp.zeros((1, 3, 14)))
    with pytest.raises(ConfigError, match='"cls" is not for patches'):
        MODEL.clone(pool="cls").init(jax.random.key(0), jnp.zeros((1, 3, 14)))

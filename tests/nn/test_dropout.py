import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.nn import Dropout, PatchDropout


def apply(module, x, train=True, seed=0):
    return module.apply({}, x, train, rngs={"dropout": jax.random.key(seed)})


def test_dropout_keeps_the_mean_and_is_off_outside_training():
    x = jnp.ones((100, 101))
    y = apply(Dropout(0.25), x)
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float(y.mean()) - 1) < 0.02
    np.testing.assert_array_equal(apply(Dropout(0.25), x), y)
    assert (np.asarray(apply(Dropout(0.25), x, seed=1)) != np.asarray(y)).any()
    np.testing.assert_array_equal(Dropout(0.25).apply({}, x), x)
    np.testing.assert_array_equal(Dropout(0.0).apply({}, x, True), x)   # needs no random key


def test_patch_dropout_keeps_order_and_class_token():
    x = jnp.broadcast_to(jnp.arange(9.0)[None, :, None], (4, 9, 2))
    y = np.asarray(apply(PatchDropout(0.5, keep_first=1), x))[..., 0]
    assert y.shape == (4, 5)
    assert (y[:, 0] == 0).all() and (np.diff(y, axis=1) > 0).all()
    assert len({tuple(row) for row in y}) > 1
    np.testing.assert_array_equal(PatchDropout(0.5).apply({}, x), x)


@pytest.mark.parametrize("module", [Dropout, PatchDropout])
def test_rates_out_of_range(module):
    with pytest.raises(ConfigError, match="the rate is 1.0"):
        module(1.0).apply({}, jnp.ones((2, 3, 4)), True)

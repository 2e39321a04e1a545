"""A stack whose parameters come as tuples of layers computes what it computes from one array with a layer axis."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn import Mlp, Stack
from vlm_jax.nn.stack import unstacked


@pytest.mark.parametrize("scan", [True, False])
def test_tuples_of_layers_give_the_same(scan):
    stack = Stack(partial(Mlp, 5, "gelu"), 3, scan=scan)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
    params = stack.init(jax.random.key(0), x)["params"]
    split = unstacked({"other": params, "blocks": params})
    assert split["other"] is not None and jax.tree.structure(split["other"]) == jax.tree.structure(params)
    assert all(len(leaf) == 3 for leaf in jax.tree.leaves(split["blocks"], is_leaf=lambda leaf: isinstance(leaf, tuple)))
    assert jax.tree.structure(unstacked(split)) == jax.tree.structure(split)
    wanted, every = stack.apply({"params": params}, x)
    got, also = stack.apply({"params": split["blocks"]}, x)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    np.testing.assert_allclose(also["output"], every["output"], atol=1e-6)

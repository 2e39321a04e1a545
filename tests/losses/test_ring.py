"""The ring against the matrix of all pairs on 1, 2, 4 and 8 devices, and what its compiled program does and holds."""
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from tests.losses.reference import LOSSES, SCALARS, assert_same, features, mesh_of, value_and_gradients
from vlm_jax.losses import matching_accuracy, sigmoid_loss
from vlm_jax.losses.ring import TILE, layout_of
from vlm_jax.sharding import batch_sharding, replicated


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_ring_equals_dense(name, devices):
    """40 pairs: 40, 20, 10, 5 on a device. Masked rows included."""
    weight = np.ones(40, np.float32)
    weight[[3, 17, 39]] = 0
    weight[8] = 0.5
    arguments = (*features(40), *SCALARS, weight)
    assert_same(value_and_gradients(name, True, mesh_of(devices))(*arguments), value_and_gradients(name, False)(*arguments), arguments)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("pairs", [27, 5])
def test_batches_that_do_not_divide_by_the_devices(name, pairs):
    arguments = (*features(pairs), *SCALARS, None)
    assert_same(value_and_gradients(name, True, mesh_of(8))(*arguments), value_and_gradients(name, False)(*arguments), arguments)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("devices, pairs", [(1, 2 * TILE + 1), (2, 2 * TILE + 6)])
def test_several_tiles(name, devices, pairs):
    assert layout_of(pairs, mesh_of(devices), ("data", "fsdp")).tiles > 1
    arguments = (*features(pairs), *SCALARS, None)
    assert_same(value_and_gradients(name, True, mesh_of(devices))(*arguments), value_and_gradients(name, False)(*arguments), arguments)


@pytest.mark.parametrize("fsdp, tensor", [(2, 1), (8, 1), (2, 2)])
def test_other_meshes(fsdp, tensor):
    arguments = (*features(40), *SCALARS, None)
    mesh = mesh_of(8, fsdp, tensor)
    for name in LOSSES:
        assert_same(value_and_gradients(name, True, mesh)(*arguments), value_and_gradients(name, False)(*arguments), arguments)


def test_a_mesh_that_is_set_needs_no_argument():
    image, text = features(16)
    with jax.set_mesh(mesh_of(4)):
        lowered = jax.jit(lambda *a: sigmoid_loss(*a)[0]).lower(image, text, *SCALARS)
    assert "collective_permute" in lowered.as_text()
    np.testing.assert_allclose(lowered.compile()(image, text, *SCALARS), sigmoid_loss(image, text, *SCALARS, chunked=False)[0], rtol=1e-6)


def test_accuracy_on_the_ring():
    image, text = features(40, width=3)
    weight = np.ones(40, np.float32)
    weight[4] = 0
    similar = image @ text.T
    similar[:, 4] = -np.inf
    wanted = sum(similar[i].argmax() == i for i in range(40) if i != 4)
    assert 3 < wanted < 37
    hits, count = jax.jit(lambda *a: matching_accuracy(a[0], a[1], weight=a[2], mesh=mesh_of(8)))(image, text, weight)
    assert (float(hits), float(count)) == (wanted, 39)


@pytest.mark.parametrize("name", LOSSES)
def test_the_program_rotates_blocks_and_never_holds_a_row_of_all_texts(name):
    """16 pairs on each of 8 devices: no array of 128 texts but the features' own gradient outputs, no gather, and temporaries far below dense."""
    mesh, rows = mesh_of(8), batch_sharding(mesh_of(8))
    features = jax.ShapeDtypeStruct((8 * 16, 6), jnp.float32, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    compiled = value_and_gradients(name, True, mesh).lower(features, features, scalar, scalar, None).compile()
    program = compiled.as_text()
    assert "collective-permute" in program and "all-gather" not in program
    assert not re.search(r"f32\[(\d+,)*128[,\]]", program)
    (_, gradients) = compiled.output_shardings
    assert gradients[0].is_equivalent_to(NamedSharding(mesh, P("data")), 2)

"""A device that computes wrongly is noticed: by computing twice, and by comparing the copies of an array."""
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
import pytest

from vlm_jax.errors import DivergedError
from vlm_jax.training.silent_corruption import differing_replicas, taken_twice


def on_mesh(spec, value):
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp"))
    return jax.device_put(value, NamedSharding(mesh, spec))


@pytest.fixture
def state():
    return {"params": {"kernel": on_mesh(P("fsdp"), jnp.arange(8.0)), "bias": on_mesh(P(), jnp.ones(3))}, "empty": on_mesh(P(), jnp.zeros((0, 2)))}


@jax.jit
def update(state, batch, number):
    return jax.tree.map(lambda x: x * 1.5 + batch.sum() + number, state), {"loss": batch.sum()}


def test_a_sound_step_is_taken_once(state):
    donating = jax.jit(update, donate_argnums=0)
    expected, _ = update(state, jnp.ones(4), 3)
    new, metrics = taken_twice(donating, state, jnp.ones(4), 3)
    assert float(metrics["loss"]) == 4.0
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(new), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_result_that_does_not_come_again_stops_the_run(state):
    calls = []

    def faulty(state, batch, number):
        calls.append(number)
        new, metrics = update(state, batch, number)
        if len(calls) == 2:     # the lowest bit of one element
            new["params"]["bias"] = new["params"]["bias"].at[1].set(np.nextafter(np.float32(new["params"]["bias"][1]), np.float32(9)))
        return new, metrics
    with pytest.raises(DivergedError, match=r"step 4: a device computed wrongly \(1 arrays, first params/bias differs between two computations.*machine out"):
        taken_twice(faulty, state, jnp.ones(4), 3)


def test_copies_that_differ_are_named():
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "fsdp")), P("fsdp"))
    right = np.arange(8, dtype=np.float32)
    wrong = right.copy()
    wrong[5:6] = (wrong[5:6].view(np.uint32) ^ 1).view(np.float32)
    pieces = [jax.device_put((wrong if number == 3 else right)[index], device)
              for number, (device, index) in enumerate(sharding.addressable_devices_indices_map((8,)).items())]
    array = jax.make_array_from_single_device_arrays((8,), sharding, pieces)
    [line] = differing_replicas({"kernel": array, "sound": on_mesh(P(), jnp.ones(2))})
    assert line.startswith("kernel differs between ")
    assert differing_replicas({"sharded": on_mesh(P(("data", "fsdp")), jnp.arange(4.0)), "sound": on_mesh(P(), jnp.ones(2))}) == []


def test_a_run_that_is_checked_is_the_same_run(tmp_path):
    from tests.training.test_loop import losses, shapes
    from vlm_jax.training.loop import train
    for name, every in (("plain", None), ("checked", 2)):
        train(shapes(steps=3, sdc_check_every=every), tmp_path / name, devices=jax.devices()[:1])
    assert losses(tmp_path / "checked") == losses(tmp_path / "plain") and len(losses(tmp_path / "plain")) == 3

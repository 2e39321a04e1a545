"""Constraints by logical names, read from compiled programs."""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import pytest

from vlm_jax.sharding import LOGICAL_AXES, constrain, logical_spec, make_mesh


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)


def compiled_spec(mesh, shape, *names):
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x: constrain(x * 2, *names)).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    return compiled.output_shardings.spec


def test_rows_and_heads_are_split_in_the_compiled_program(mesh):
    assert compiled_spec(mesh, (8, 5, 4, 3), "batch", "sequence", "heads", "head_dim") == P(("data", "fsdp"), None, "tensor")


def test_rows_that_do_not_divide_use_the_axes_that_do(mesh):
    assert logical_spec((6, 3), ("batch", "embed"), mesh) == P("data", None)
    assert logical_spec((5, 3), ("batch", "embed"), mesh) == P(P.UNCONSTRAINED, None)
    assert compiled_spec(mesh, (6, 4), "batch", "mlp") == P("data", "tensor")
    assert logical_spec((8, 49, 5, 3), ("batch", "sequence", "heads", "head_dim"), make_mesh(sequence=2, tensor=2)) == P("data", None, None, None)
    assert float(jax.jit(lambda x: constrain(x, "batch", None))(jnp.ones((5, 3))).sum()) == 15


def test_without_a_mesh_the_array_itself_comes_back():
    x = jnp.ones((3, 2))
    assert constrain(x, "batch", "embed") is x


def test_one_device_is_no_mesh():
    x = jnp.ones((3, 2))
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        assert constrain(x, "batch", "embed") is x


def test_inside_shard_map_nothing_is_constrained(mesh):
    with jax.set_mesh(mesh):
        spec = P(("data", "fsdp"), "tensor")
        f = jax.jit(jax.shard_map(lambda x: constrain(x * 2, "batch", "mlp"), in_specs=spec, out_specs=spec))
        assert f(jnp.ones((8, 4))).sum() == 64


def test_works_under_vmap_and_grad(mesh):
    with jax.set_mesh(mesh):
        f = jax.vmap(lambda x: constrain(x, "batch", "embed") ** 2)
        assert jnp.array_equal(jax.jit(jax.grad(lambda x: f(x).sum()))(jnp.ones((2, 8, 3))), 2 * jnp.ones((2, 8, 3)))


def test_errors_name_the_axis_and_the_remedy(mesh):
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match='"bach".*Did you mean "batch"'):
            constrain(jnp.ones((4, 4)), "bach", None)
        with pytest.raises(ValueError, match="give one name"):
            constrain(jnp.ones((4, 4)), "batch")
    assert LOGICAL_AXES["batch"] == ("data", "fsdp")

"""The parameter table: counts, bytes, shardings, what is trained."""
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np

from vlm_jax.training.parameters import count_parameters, parameter_bytes, parameter_table
from vlm_jax.training.stages import Rules

PARAMS = {"image": {"blocks": {"kernel": np.zeros((4, 3, 5), np.float32)}, "norm": {"scale": np.zeros(3, np.float32)}},
          "text": {"table": jnp.zeros((8, 2), jnp.bfloat16)}, "logit_scale": np.zeros((), np.float32)}


def test_counts():
    assert count_parameters(PARAMS) == 60 + 3 + 16 + 1
    assert parameter_bytes(PARAMS) == 4 * 64 + 2 * 16
    assert count_parameters(jax.eval_shape(lambda: PARAMS)) == 80


def test_table_with_rules():
    rules = Rules([("image/blocks/3/.*", {}), ("image/.*", None), ("text/.*", {"lr": 0.1}), (".*", {})], PARAMS)
    lines = parameter_table(PARAMS, rules).splitlines()
    assert lines[0].split() == ["parameter", "shape", "dtype", "count", "bytes", "trained"]
    assert [line.split(maxsplit=5)[-1] for line in lines[1:-1]] == ["1 of 4 layers", "frozen", "yes", "lr x 0.1"]
    assert lines[1].split()[:5] == ["image/blocks/kernel", "4x3x5", "float32", "60", "240"]
    assert lines[3].split()[1] == "scalar"
    assert lines[-1] == "total: 80 parameters, 0.0 MB; 32 trained"


def test_table_with_shardings():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def leaf(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
    lines = parameter_table({"a": leaf((8, 4), None, "fsdp"), "b": leaf((8,), ("data", "fsdp")), "c": leaf((3,))}).splitlines()
    assert [line.split()[-1] for line in lines[:-1]] == ["sharding", "-,fsdp", "data+fsdp", "replicated"]
    assert lines[-1] == "total: 43 parameters, 0.0 MB"

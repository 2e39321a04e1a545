"""The mesh, the layout of parameters, batches and activations. Changing the mesh changes no model code and no loss curve."""
from vlm_jax.sharding.activations import LOGICAL_AXES, constrain, logical_spec
from vlm_jax.sharding.mesh import batch_axes, batch_sharding, batch_shards, make_mesh, process_part, put_batch, replicated
from vlm_jax.sharding.rules import parameter_shardings, state_shardings

__all__ = ["LOGICAL_AXES", "batch_axes", "batch_sharding", "batch_shards", "constrain", "logical_spec", "make_mesh", "parameter_shardings",
           "process_part", "put_batch", "replicated", "state_shardings"]

"""The mesh, the layout of parameters, batches and activations. Changing the mesh changes no model code and no loss curve."""
from vlm_jax.sharding.activations import LOGICAL_AXES, constrain, is_split, logical_spec
from vlm_jax.sharding.layouts import abstract_mesh, layout
from vlm_jax.sharding.mesh import batch_axes, batch_sharding, batch_shards, make_mesh, padded_rows, process_part, put_batch, replicated, to_host
from vlm_jax.sharding.rules import check_replicated, parameter_shardings, replicated_share, state_shardings
from vlm_jax.sharding.topologies import parse_topology

__all__ = ["LOGICAL_AXES", "abstract_mesh", "batch_axes", "batch_sharding", "batch_shards", "check_replicated", "constrain", "is_split", "layout",
           "logical_spec", "make_mesh", "padded_rows", "parameter_shardings", "parse_topology", "process_part", "put_batch", "replicated",
           "replicated_share", "state_shardings", "to_host"]

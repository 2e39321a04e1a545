"""The mesh, the layout of parameters, batches and activations. Changing the mesh changes no model code and no loss curve."""
from vlm_jax.sharding.activations import LOGICAL_AXES, constrain, logical_spec

__all__ = ["LOGICAL_AXES", "constrain", "logical_spec"]

"""`--dry_run`: what a config would train, from its shapes alone: parameters and their rules, shardings, FLOPs, memory of the training state.

Nothing is read, allocated or compiled; what the compiled programs need, `python -m vlm_jax.compile` says.
"""
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.sharding.mesh import batch_sharding, padded_rows
from vlm_jax.training import flops, setup
from vlm_jax.training.config import resolve
from vlm_jax.training.parameters import parameter_table


def abstract_batch(parts: setup.Parts) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Returns shapes, dtypes and shardings of one batch of the stage; reads no record."""
    sharding = batch_sharding(parts.mesh)

    def leaf(rows: int, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
    batch = {}
    for name, loader in parts.loaders.items():
        rows = padded_rows(parts.mesh, loader.batch_size)
        processor = parts.stage.data[name].get("processor") or parts.stage.sections["processor"]
        shapes = {**parts.task.batch_shapes(processor), "mask": ((), jnp.bool_), "weight": ((), jnp.float32), "example_id": ((), jnp.int32)}
        batch[name] = {key: leaf(rows, *shape_and_dtype) for key, shape_and_dtype in shapes.items()}
    return batch


def dry_run(config, devices=None) -> str:
    """Returns a text: for every stage its parameter table, batch, FLOPs a step and bytes of the training state on a device.

    Raises:
      ConfigError: for whatever training would refuse, but for data and tokenizers, which are not read.
    """
    config = resolve(config)
    stages = setup.read(config)
    texts = [f"{config['name']}: {len(stages)} stage(s), {stages[-1].last:,} steps"]
    for index in range(len(stages)):
        parts = setup.build(config, index, stages, devices, data=False)
        batch = abstract_batch(parts)
        with jax.set_mesh(parts.mesh):
            operations = flops.training_flops(parts.task, parts.abstract_state["params"], parts.abstract_state["task"], batch, parts.rules)
            texts += [f"\nstage {index + 1}: steps {parts.first + 1} to {parts.last}, mesh " + ", ".join(f"{k}={v}" for k, v in parts.mesh.shape.items()),
                      parameter_table(parts.abstract_state["params"], parts.rules), parts.rules.summary()]
            texts += [f"{name}: " + ", ".join(f"{key} {leaf.dtype}{list(leaf.shape)}" for key, leaf in stream.items()) for name, stream in batch.items()]
            texts.append(f"{operations / 1e12:,.3f} TFLOP of matrix products a step")
            texts.append(f"training state: {state_bytes(parts.abstract_state) / 1e9:,.3f} GB a device")
    return "\n".join(texts)


def state_bytes(abstract_state) -> int:
    """Returns the bytes of the training state on one device, after sharding."""
    return sum(int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_state))

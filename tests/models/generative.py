"""What the tests of text-generating models share."""
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import registry
from vlm_jax.interop import table
from vlm_jax.interop.families import family
from vlm_jax.interop.safetensors import open_file


def abstract_inputs(model, rows: int = 1) -> dict:
    """Inputs of the shapes that a model says, without values."""
    return {name: jax.ShapeDtypeStruct((rows, *shape), jnp.float32 if name in ("images", "patches") else jnp.int32)
            for name, shape in model.input_shapes().items()}


def parameter_shapes(model) -> dict:
    """The parameter tree as ShapeDtypeStructs."""
    return jax.eval_shape(model.init, jax.random.key(0), abstract_inputs(model))["params"]


def parameter_count(model) -> int:
    """The number of parameters."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(parameter_shapes(model)))


def load(folder: Path):
    """(family, model, parameters) of a directory written by transformers, by the tables alone."""
    config = json.loads((folder / "config.json").read_text())
    found = family(config["model_type"])
    model = registry.build(**found.to_settings(config))
    params = table.read(found.rows(model), open_file(str(folder / "model.safetensors")), parameter_shapes(model), prefix=found.prefix, renames=found.renames)
    return found, model, params

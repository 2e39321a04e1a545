"""The parameters of a model as shapes: nothing is computed."""
import inspect
from typing import Any

import jax
import jax.numpy as jnp

INTEGERS = ("tokens", "targets", "slots")


def inputs_of(model: Any) -> list[Any]:
    """Zeros of the shapes that a model asks for, as the arguments of its `init`: arrays in order, or one dict for models that take `inputs`."""
    shapes = model.input_shapes()
    made = {name: jax.ShapeDtypeStruct((1, *shape), jnp.int32 if name in INTEGERS else jnp.float32) for name, shape in shapes.items()}
    first = list(inspect.signature(type(model).__call__).parameters)[1]
    return [made] if first == "inputs" else list(made.values())


def abstract_params(model: Any) -> Any:
    """The parameter tree of a model as ShapeDtypeStructs."""
    return jax.eval_shape(model.init, jax.random.key(0), *inputs_of(model))["params"]

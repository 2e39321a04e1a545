"""Matrix-product FLOPs counted from the jaxpr, useful FLOPs of a training step, and the peak to compare them with.

XLA's own cost analysis counts the body of a loop once, so these counts are made from what JAX traces: `dot_general` and convolutions, 2 per
multiply-add.
"""
from collections.abc import Callable, Sequence
import math
import time
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
import jax.numpy as jnp
import numpy as np

from vlm_jax.sharding.topologies import chip_of
from vlm_jax.training.trees import flatten


def count_flops(function: Callable, *args: Any) -> float:
    """Returns the matrix-product FLOPs of `function(*args)` as traced; args may be shapes (`jax.ShapeDtypeStruct`).

    Loops count times their length, `cond` its dearest branch, a `shard_map` its body times the devices, a Pallas kernel its body times the grid, a
    `while` of unknown length one turn; what the result does not depend on, nothing. Rematerialised products count as often as they are computed: for
    useful work see `training_flops`.
    """
    jaxpr = jax.make_jaxpr(function)(*args)
    return _count(jaxpr, [False] * len(jaxpr.jaxpr.invars))[0]


def gradient_flops(function: Callable, params: Any, *args: Any, trained: Callable[[str], bool] = lambda path: True) -> float:
    """Returns the useful matrix-product FLOPs of `function(params, *args)` and its gradient with respect to the trained part of `params`.

    A product costs its forward FLOPs once, and once more for each of its two factors that depends on a trained parameter: the familiar factor 3,
    less for products with data or with frozen towers. Computing anything again, by rematerialisation or in the backward pass of a ring, is not
    useful work and does not count.

    Args:
      trained: tells from a parameter's path whether its gradient is wanted.
    """
    jaxpr = jax.make_jaxpr(function)(params, *args)
    active = [bool(trained(path)) for path in flatten(params)]
    active += [False] * (len(jaxpr.jaxpr.invars) - len(active))
    return sum(_count(jaxpr, active))


def training_flops(task: Any, params: Any, state: Any, batch: Any, rules: Any = None) -> float:
    """Returns the useful matrix-product FLOPs of one training step of a task on all devices; arguments may be shapes.

    Args:
      rules: the stage's `Rules`; without them every parameter counts as trained.
    """
    def loss(params, state, batch):
        terms, _, _ = task.loss(params, state, batch, jax.random.key(0), jnp.zeros((), jnp.int32))
        return [value for value, _ in terms.values()]
    moves = (lambda path: rules.leaves[path].moves) if rules is not None else (lambda path: True)
    return gradient_flops(loss, params, state, batch, trained=moves)


def model_flop_utilisation(flops: float, seconds: float, peak: float, devices: int = 1) -> float:
    """Returns the share of the peak, `flops / seconds / (peak * devices)`; `flops` is the useful work of all devices in `seconds`."""
    return flops / seconds / (peak * devices)


def peak_flops(device: Any = None) -> float | None:
    """Returns the bfloat16 matrix-product peak of a device in FLOP/s from the table of chips; on CPU it is measured; None if the kind is unknown."""
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        return measure_matmul_peak()
    chip = chip_of(device)
    return chip.peak() if chip is not None else None


def measure_matmul_peak(dtype: Any = jnp.float32, size: int = 1024, seconds: float = 0.3, device: Any = None) -> float:
    """Measures the FLOP/s of square matrix products on one device: the fastest of repeated runs during about `seconds`."""
    device = device or jax.devices()[0]
    x = jax.device_put(jnp.asarray(np.random.default_rng(0).standard_normal((size, size)), dtype) / math.sqrt(size), device)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    best, until = math.inf, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        product(x).block_until_ready()
        end = time.perf_counter()
        best = min(best, end - start)
        if end >= until:
            return 2.0 * size ** 3 / best


def _count(jaxpr: ClosedJaxpr, active: Sequence[bool]) -> tuple[float, float]:
    outputs = [True] * len(jaxpr.jaxpr.outvars)
    return _walk(jaxpr.jaxpr, active, outputs, outputs)[:2]


def _walk(jaxpr: Jaxpr, active: Sequence[bool], wanted: Sequence[bool], pulled: Sequence[bool]) -> tuple[float, float, list[bool]]:
    """Returns (forward FLOPs, gradient FLOPs, which outputs depend on active inputs) of a jaxpr.

    Args:
      active: which inputs depend on a trained parameter.
      wanted, pulled: which outputs are used at all, and which of them the gradient flows back from; the rest of the work is left out.
    """
    live = {var for var, on in zip(jaxpr.outvars, wanted) if on and not isinstance(var, Literal)}
    pulling = {var for var, on in zip(jaxpr.outvars, pulled) if on and not isinstance(var, Literal)}
    work = []
    for equation in reversed(jaxpr.eqns):
        used, back = [var in live for var in equation.outvars], [var in pulling for var in equation.outvars]
        if not any(used) and not equation.effects:
            continue
        work.append((equation, used, back))
        inputs = {var for var in equation.invars if not isinstance(var, Literal)}
        live |= inputs
        if any(back) and equation.primitive.name != "stop_gradient":
            pulling |= inputs

    depends = dict(zip(jaxpr.invars, active))
    depends.update(dict.fromkeys(jaxpr.constvars, False))
    forward = backward = 0.0
    for equation, used, back in reversed(work):
        inputs = [not isinstance(var, Literal) and depends[var] for var in equation.invars]
        first, second, outputs = _equation(equation, inputs, used, back)
        forward, backward = forward + first, backward + second
        for var, on in zip(equation.outvars, outputs):
            depends[var] = on and jnp.issubdtype(var.aval.dtype, jnp.inexact)
    return forward, backward, [not isinstance(var, Literal) and depends.get(var, False) for var in jaxpr.outvars]


def _equation(equation: Any, inputs: list[bool], used: list[bool], back: list[bool]) -> tuple[float, float, list[bool]]:
    name, values = equation.primitive.name, equation.params
    everywhere = [any(inputs)] * len(equation.outvars)
    if name in ("dot_general", "conv_general_dilated"):
        work = _dot(equation) if name == "dot_general" else _convolution(equation)
        return work, work * sum(inputs[:2]) * any(back), everywhere
    if name == "scan":
        constants, carried = _scan_inputs(values)
        split = constants + carried
        forward, backward, outputs = _loop(values["jaxpr"].jaxpr, inputs[:constants], inputs[constants:split], inputs[split:], used[carried:], back)
        return forward * values["length"], backward * values["length"], outputs
    if name == "while":
        skipped = values["cond_nconsts"]
        split = skipped + values["body_nconsts"]
        return _loop(values["body_jaxpr"].jaxpr, inputs[skipped:split], inputs[split:], [], [], back)
    if name == "cond":
        branches = [_walk(branch.jaxpr, inputs[1:], used, back) for branch in values["branches"]]
        dearest = max(branches, key=lambda branch: branch[0] + branch[1])
        return dearest[0], dearest[1], [any(flags) for flags in zip(*(branch[2] for branch in branches))]
    if name == "stop_gradient":
        return 0.0, 0.0, [False] * len(equation.outvars)
    inner = [value for value in values.values() if isinstance(value, (Jaxpr, ClosedJaxpr))]
    if not inner:
        return 0.0, 0.0, everywhere
    jaxpr = inner[0].jaxpr if isinstance(inner[0], ClosedJaxpr) else inner[0]
    times = 1
    if name == "shard_map":
        times = math.prod(values["mesh"].shape[axis] for axis in values["newly_manual_axes"])
    elif name == "pallas_call":   # works on references, so what depends on what cannot be followed inside
        work = _walk(jaxpr, [False] * len(jaxpr.invars), [], [])[0] * math.prod(values["grid_mapping"].grid)
        return work, 2 * work * (any(inputs) and any(back)), everywhere
    if len(jaxpr.invars) != len(inputs):
        inputs = [any(inputs)] * len(jaxpr.invars)
    if len(jaxpr.outvars) != len(used):
        used, back = [True] * len(jaxpr.outvars), [any(back)] * len(jaxpr.outvars)
    forward, backward, outputs = _walk(jaxpr, inputs, used, back)
    return forward * times, backward * times, outputs if len(outputs) == len(everywhere) else everywhere


def _scan_inputs(values: Any) -> tuple[int, int]:
    """How many inputs of a scan are constants, and how many are carried; from JAX 0.12 on the primitive keeps trees in the place of the two numbers."""
    if "num_consts" in values:
        return values["num_consts"], values["num_carry"]
    constants, carried, _ = values["ft_in"].unpack()
    return len(constants), len(carried)


def _loop(jaxpr: Jaxpr, constants: list[bool], carry: list[bool], rest: list[bool], used: list[bool],
          back: list[bool]) -> tuple[float, float, list[bool]]:
    """Walks a loop's body until what the carry depends on no longer grows; of the carry everything counts as used."""
    used, back = [True] * len(carry) + used, [any(back)] * len(carry) + back[len(carry):]
    while True:
        forward, backward, outputs = _walk(jaxpr, [*constants, *carry, *rest], used, back)
        grown = [old or new for old, new in zip(carry, outputs)]
        if grown == carry:
            return forward, backward, outputs
        carry = grown


def _dot(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / channels

"""FLOP counts against products counted by hand."""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
import pytest

from vlm_jax.training.flops import count_flops, gradient_flops, measure_matmul_peak, model_flop_utilisation, peak_flops, training_flops

X = jax.ShapeDtypeStruct((3, 5), jnp.float32)
W = jax.ShapeDtypeStruct((5, 5), jnp.float32)
ONE = 2 * 3 * 5 * 5   # x @ w


def scanned(w, x, turns=7, remat=False):
    def layer(carry, _):
        return jnp.tanh(carry @ w), None
    return jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, None, length=turns)[0].sum()


def test_products_and_convolutions():
    assert count_flops(lambda x, w: x @ w, X, W) == ONE
    a, b = jax.ShapeDtypeStruct((2, 3, 4, 5), jnp.float32), jax.ShapeDtypeStruct((2, 6, 4, 5), jnp.float32)
    assert count_flops(lambda a, b: jnp.einsum("bqhd,bkhd->bhqk", a, b), a, b) == 2 * 2 * 4 * 3 * 6 * 5
    image, kernel = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((3, 3, 2, 6), jnp.float32)

    def grouped(image, kernel):
        return jax.lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2)
    assert count_flops(grouped, image, kernel) == 2 * (2 * 4 * 4 * 6) * (3 * 3 * 2)
    assert count_flops(lambda x: x + 1, X) == 0
    assert count_flops(jax.jit(lambda x, w: (x @ w, x @ w @ w)[0]), X, W) == ONE


def test_control_flow():
    assert count_flops(scanned, W, X) == 7 * ONE
    assert count_flops(jax.jit(lambda w, x: scanned(w, x)), W, X) == 7 * ONE
    assert count_flops(lambda w, x: jax.lax.cond(x.sum() > 0, lambda a: a @ w @ w, lambda a: a @ w, x), W, X) == 2 * ONE
    assert count_flops(lambda w, x: jax.lax.while_loop(lambda a: a.sum() > 0, lambda a: a @ w, x), W, X) == ONE
    assert count_flops(lambda w, x: jax.lax.map(lambda row: row @ w, x), W, X) == ONE

    @jax.custom_vjp
    def product(x, w):
        return x @ w
    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    assert count_flops(product, X, W) == ONE
    assert count_flops(jax.value_and_grad(lambda w, x: product(x, w).sum()), W, X) == 2 * ONE
    assert gradient_flops(lambda w, x: product(x, w).sum(), W, X) == 2 * ONE


def test_shard_map_counts_every_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct((16, 5), jnp.float32)
    function = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert count_flops(function, x, W) == 2 * 16 * 5 * 5
    assert gradient_flops(lambda w, x: function(x, w), W, x) == 2 * (2 * 16 * 5 * 5)


def test_useful_work_of_a_gradient_is_what_the_gradient_computes_without_rematerialisation():
    gradient = jax.grad(scanned)
    assert gradient_flops(scanned, W, X) == count_flops(gradient, W, X)
    again = functools.partial(scanned, remat=True)
    assert gradient_flops(scanned, W, X) == gradient_flops(again, W, X) == 3 * 7 * ONE
    assert count_flops(jax.grad(again), W, X) > count_flops(gradient, W, X)   # the plain count shows the second forward pass


def test_frozen_parameters_cost_no_gradient():
    params = {"first": W, "second": W}

    def loss(params, x):
        return (jnp.tanh(x @ params["first"]) @ params["second"]).sum()
    assert gradient_flops(loss, params, X) == ONE * 2 + ONE * 3
    assert gradient_flops(loss, params, X) == count_flops(jax.value_and_grad(loss), params, X)
    assert gradient_flops(loss, params, X, trained=lambda path: path == "second") == ONE + ONE * 2
    assert gradient_flops(loss, params, X, trained=lambda path: path == "first") == ONE * 2 + ONE * 2
    assert gradient_flops(lambda p, x: (jax.lax.stop_gradient(x @ p["first"]) @ p["second"]).sum(), params, X) == ONE + ONE * 2


def test_a_training_step_of_a_task():
    class Task:
        def loss(self, params, state, batch, rng, step):
            metric = (batch["x"] @ params["w"] @ params["w"]).sum()   # what only a metric needs is not useful work
            return {"square": (((batch["x"] @ params["w"]) ** 2).sum(), 3.0)}, state, {"metric": metric}

    class Rules:
        class Leaf:
            moves = False
        leaves = {"w": Leaf}
    assert training_flops(Task(), {"w": W}, {}, {"x": X}) == 2 * ONE
    assert training_flops(Task(), {"w": W}, {}, {"x": X}, rules=Rules) == ONE


def test_peaks():
    class Device:
        def __init__(self, kind, platform):
            self.device_kind, self.platform = kind, platform
    assert peak_flops(Device("TPU v5 lite", "tpu")) == 197e12 and peak_flops(Device("TPU v5", "tpu")) == 459e12
    assert peak_flops(Device("NVIDIA H100 80GB HBM3", "gpu")) == 989e12 and peak_flops(Device("NVIDIA H200", "gpu")) == 989e12
    assert peak_flops(Device("Abacus", "gpu")) is None
    assert measure_matmul_peak(size=64, seconds=0.0) > 0 and peak_flops(jax.devices()[0]) > 0
    assert model_flop_utilisation(100.0, 2.0, 25.0, devices=4) == pytest.approx(0.5)

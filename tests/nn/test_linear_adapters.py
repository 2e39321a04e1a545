"""The optional leaves of a `Linear`: adapters and int8 kernels."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.nn import Linear, Stack
from vlm_jax.nn.linear import input_axes

GENERATOR = np.random.default_rng(0)


def normal(*shape):
    return GENERATOR.normal(size=shape).astype(np.float32)


def adapter(rows, columns, rank=2, scaling=1.5, **more):
    return {"a": normal(rows, rank), "b": normal(rank, columns), "scaling": np.float32(scaling), **more}


@pytest.mark.parametrize("inputs, features, contract, equation", [
    ((5,), (3, 4), 1, "bti,ihk->bthk"), ((3, 4), (5,), 2, "bthk,hko->bto"), ((7,), (2,), 1, "bti,io->bto"),
])
def test_an_adapter_and_an_int8_kernel_are_what_they_stand_for(inputs, features, contract, equation):
    x = normal(2, 3, *inputs)
    layer = Linear(features if len(features) > 1 else features[0], contract=contract)
    lora = adapter(int(np.prod(inputs)), int(np.prod(features)))
    kernel, scale, bias = GENERATOR.integers(-127, 128, (*inputs, *features)).astype(np.int8), abs(normal(*features)), normal(*features)
    whole = kernel * scale + (1.5 * lora["a"] @ lora["b"]).reshape(kernel.shape)
    y = layer.apply({"params": {"kernel": kernel, "scale": scale, "bias": bias, "lora": lora}}, x)
    np.testing.assert_allclose(y, np.einsum(equation, x, whole) + bias, rtol=1e-4, atol=1e-3)


def test_a_zero_b_changes_no_bit_and_scaling_has_no_gradient():
    x, layer = normal(4, 5), Linear(3, dtype="bfloat16")
    params = layer.init(jax.random.key(0), x)["params"]
    lora = {**adapter(5, 3), "b": np.zeros((2, 3), np.float32)}
    np.testing.assert_array_equal(layer.apply({"params": params}, x), layer.apply({"params": {**params, "lora": lora}}, x))
    gradient = jax.grad(lambda p: layer.apply({"params": p}, x).astype(jnp.float32).sum())({**params, "lora": adapter(5, 3)})["lora"]
    assert gradient["scaling"] == 0 and np.abs(gradient["a"]).min() > 0 and np.abs(gradient["b"]).min() > 0


def test_dropout_acts_on_the_adapter_alone_and_only_with_a_key():
    x, layer = np.ones((4000, 5), np.float32), Linear(3, use_bias=False)
    params = {"kernel": normal(5, 3), "lora": adapter(5, 3, dropout=np.float32(0.25))}
    still, base = (layer.apply({"params": p}, x) for p in (params, {"kernel": params["kernel"]}))
    drawn = layer.apply({"params": params}, x, rngs={"dropout": jax.random.key(1)})
    assert not np.allclose(drawn, still)
    np.testing.assert_allclose((drawn - base).mean(0), (still - base)[0], rtol=0.1, atol=0.1)
    kept = layer.apply({"params": {**params, "lora": {**params["lora"], "dropout": np.float32(0)}}}, x, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_allclose(kept, still, rtol=1e-6)


@pytest.mark.parametrize("scan, remat", [(True, "none"), (False, "full")])
def test_a_stack_slices_adapters_and_scales(scan, remat):
    x, block = normal(2, 4), lambda parent=None: Linear(4, use_bias=False, parent=parent)
    layers = [{"kernel": GENERATOR.integers(-127, 128, (4, 4)).astype(np.int8), "scale": 0.01 * abs(normal(4)), "lora": adapter(4, 4)} for _ in range(3)]
    expected = x
    for layer in layers:
        expected = Linear(4, use_bias=False).apply({"params": layer}, expected)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    y, _ = Stack(block, 3, scan=scan, remat=remat).apply({"params": stacked}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_no_float_copy_of_an_int8_kernel_outlives_its_product():
    """Neither outside the loop over layers nor outside one over steps: the largest temporary is one layer's kernel, not the stack's. On a TPU there is
    none; on a CPU that one is the matrix routine's own copy."""
    width, depth = 256, 6
    block = lambda parent=None: Linear(width, use_bias=False, parent=parent)    # noqa: E731
    params = {"kernel": jnp.ones((depth, width, width), jnp.int8), "scale": jnp.full((depth, width), 1e-3)}

    def steps(params, x):
        return jax.lax.fori_loop(0, 5, lambda _, h: Stack(block, depth).apply({"params": params}, h)[0], x)
    memory = jax.jit(steps).lower(params, jnp.ones((1, width))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.5 * 4 * width * width < 4 * depth * width * width


def test_input_axes_follow_bias_or_convention():
    assert input_axes("attention/query", 3) == 1 and input_axes("cross_attention/out", 3) == 2 and input_axes("up", 2) == 1
    assert input_axes("patch_embedding", 4) == 3 and input_axes("anything", 3, 1) == 2 and input_axes("out", 3, 2) == 1

"""int8 kernels and adapters on eight simulated devices: logits, gradients of the adapters and answers equal those of one device."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.language.common import made, padded, relative, tokens_of
from vlm_jax.decoding import generate
from vlm_jax.sharding import layout, make_mesh, parameter_shardings
from vlm_jax.training import adapters
from vlm_jax.training.trees import flatten, unflatten

TARGETS = [".*/attention/(query|value|out)", ".*/mlp/(up|down)"]


@functools.cache
def small():
    """A Llama with int8 kernels and adapters that say something."""
    model, params = made("decoder", "llama", width=32, depth=2, num_heads=4, num_kv_heads=2, vocab_size=64)
    params = adapters.add(adapters.quantize(params), TARGETS, rank=3, alpha=5.0, rng=jax.random.key(2))
    rng = np.random.default_rng(0)
    return model, unflatten({path: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32) if path.endswith("lora/b") else leaf
                             for path, leaf in flatten(params).items()})


def on_mesh(params):
    """(mesh, shardings) of 2 x 2 x 2 devices by the rules of the layout fsdp_tensor."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    return mesh, parameter_shardings(mesh, params, layout("fsdp_tensor")["sharding"], min_size=64)


def batch():
    tokens, valid = padded(tokens_of(8, 10), [10, 4, 1, 6, 3, 8, 10, 9], "right")
    return {"tokens": jnp.where(valid, tokens, 0), "valid": valid}


def test_a_mesh_computes_what_one_device_does_and_adapters_follow_the_rules():
    model, params = small()
    inputs, valid = batch(), batch()["valid"]
    names = [path for path in flatten(params) if path.endswith(("lora/a", "lora/b"))]

    def loss(changing, params, inputs):
        logits, _ = model.apply({"params": unflatten({**flatten(params), **changing})}, inputs)
        return jnp.where(valid[..., None], jax.nn.log_softmax(logits), 0).at[..., 3].get().sum(), logits
    both = jax.value_and_grad(loss, has_aux=True)

    def measured(params, inputs):
        with jax.default_matmul_precision("highest"):
            return jax.device_get(jax.jit(both)({name: flatten(params)[name] for name in names}, params, inputs))
    (_, expected), gradient = measured(params, inputs)

    mesh, shardings = on_mesh(params)
    specs = {path: tuple(leaf.spec) for path, leaf in flatten(shardings).items()}
    attention, mlp = "blocks/attention", "blocks/mlp"
    assert specs[f"{attention}/query/kernel"] == (None, "fsdp", "tensor") and specs[f"{attention}/query/scale"] == ()
    assert specs[f"{attention}/query/lora/b"] == (None, None, "tensor") and specs[f"{attention}/query/lora/a"] == (None, "fsdp")
    assert specs[f"{mlp}/down/lora/a"] == (None, "tensor") and specs[f"{mlp}/down/lora/b"] == (None, None, "fsdp")
    spread = jax.device_put(params, shardings)
    with jax.set_mesh(mesh):
        (_, logits), sharded_gradient = measured(spread, jax.device_put(inputs, jax.NamedSharding(mesh, jax.P(("data", "fsdp")))))
    assert relative(logits[valid], expected[valid]) <= 1e-5
    for name in names:
        assert relative(sharded_gradient[name], gradient[name]) <= 1e-5, name


def test_kernels_that_are_spread_stay_so():
    _, params = made("decoder", "llama", width=32, depth=2, num_heads=4, num_kv_heads=2, vocab_size=64)
    params = {"blocks": {"mlp": {name: params["blocks"]["mlp"][name] for name in ("up", "down")}}}
    _, shardings = on_mesh(params)
    spread = jax.device_put(params, shardings)
    for change in (lambda tree: adapters.dequantize(adapters.quantize(tree)), lambda tree: adapters.merge(adapters.add(tree, [".*/up"], rank=2))):
        changed, wanted = flatten(change(spread)), flatten(change(params))
        for path, leaf in changed.items():
            np.testing.assert_array_equal(leaf, wanted[path], err_msg=path)
            assert leaf.sharding == flatten(shardings)[path], path
    kernel = adapters.quantize(spread)["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.int8 and kernel.sharding == flatten(shardings)["blocks/mlp/up/kernel"]


@pytest.mark.slow
def test_a_mesh_gives_the_answers_of_one_device():
    model, params = small()
    mesh, shardings = on_mesh(params)
    alone = generate(model, params, batch(), max_tokens=5)
    together = generate(model, jax.device_put(params, shardings), batch(), max_tokens=5, mesh=mesh)
    np.testing.assert_array_equal(together.tokens, alone.tokens)

"""Language models on eight simulated devices: loss, gradient and decoded tokens equal those of one device."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.language.common import made, padded, relative, tokens_of
from vlm_jax.losses import vocabulary_loss
from vlm_jax.sharding import layout, make_mesh, parameter_shardings

MESHES = {"tensor": (dict(data=2, fsdp=2, tensor=2), "fsdp_tensor"), "sequence": (dict(data=2, fsdp=2, sequence=2), "fsdp"),
          "both": (dict(data=1, fsdp=2, tensor=2, sequence=2), "fsdp_tensor")}
MODELS = {"decoder": dict(width=32, depth=2, num_heads=4, num_kv_heads=2, vocab_size=64),
          "encoder_decoder": dict(width=32, decoder_depth=2, num_heads=4, head_dim=8, vocab_size=64)}
ROWS, LENGTH, STEPS = 8, 10, 4


def model_of(family):
    return made(family, "llama" if family == "decoder" else "umt5", **MODELS[family])


def batch_of(family):
    tokens, valid = padded(tokens_of(ROWS, LENGTH), [10, 4, 1, 6, 3, 8, 10, 9], "right")
    inputs = {"tokens": jnp.where(valid, tokens, 0), "valid": valid}
    return inputs | ({"targets": tokens_of(ROWS, 6, 3)} if family == "encoder_decoder" else {})


@functools.cache
def functions(family):
    model, _ = model_of(family)

    def loss(params, inputs):
        _, out = model.apply({"params": params}, inputs)
        if family == "decoder":
            targets, weight = inputs["tokens"][:, 1:], inputs["valid"][:, 1:].astype(jnp.float32)
            total, count = vocabulary_loss(out["hidden"][:, :-1], targets=targets, weight=weight, **model.head(params))
        else:
            total, count = vocabulary_loss(out["hidden"], targets=inputs["targets"], **model.head(params))
        return total / count

    def greedy(params, inputs):
        logits, cache = model.apply({"params": params}, inputs, LENGTH + STEPS, method="start")

        def step(carry, _):
            token, cache = carry
            logits, cache = model.apply({"params": params}, token[:, None], cache, method="extend")
            return (logits[:, 0].argmax(-1), cache), (token, logits)

        _, (tokens, logits) = jax.lax.scan(step, (logits.argmax(-1), cache), length=STEPS)
        return tokens, logits

    return jax.value_and_grad(loss), greedy


@functools.cache
def one_device(family):
    return measured(family, None, None)


def measured(family, mesh, shardings):
    _, params = model_of(family)
    gradient, greedy = (jax.jit(function) for function in functions(family))
    inputs = batch_of(family)
    with jax.default_matmul_precision("highest"):
        if mesh is None:
            return jax.device_get((gradient(params, inputs), greedy(params, {key: value for key, value in inputs.items() if key != "targets"})))
        params = jax.device_put(params, shardings)
        inputs = jax.device_put(inputs, jax.NamedSharding(mesh, jax.P(("data", "fsdp"))))
        with jax.set_mesh(mesh):
            return jax.device_get((gradient(params, inputs), greedy(params, {key: value for key, value in inputs.items() if key != "targets"})))


@pytest.mark.parametrize("family, name", [
    ("decoder", "tensor"), ("encoder_decoder", "both"),
    *(pytest.param(family, name, marks=pytest.mark.slow) for family, name in
      [("decoder", "sequence"), ("decoder", "both"), ("encoder_decoder", "tensor"), ("encoder_decoder", "sequence")]),
])
def test_loss_gradient_and_tokens_equal_one_device(family, name):
    sizes, rules = MESHES[name]
    mesh = make_mesh(**sizes)
    shardings = parameter_shardings(mesh, model_of(family)[1], layout(rules)["sharding"], min_size=64)
    assert sum(any(entry for entry in leaf.spec) for leaf in jax.tree.leaves(shardings)) >= 8
    (loss, gradient), (tokens, logits) = measured(family, mesh, shardings)
    (expected_loss, expected_gradient), (expected_tokens, expected_logits) = one_device(family)
    assert relative(loss, expected_loss) < 1e-5 and relative(logits, expected_logits) < 1e-5
    assert (np.asarray(tokens) == np.asarray(expected_tokens)).all()
    whole = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected_gradient))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected_gradient), strict=True):
        # Gradients that cancel (a key's bias) are compared with the size of the whole.
        assert np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-4 * whole) < 1e-5, path

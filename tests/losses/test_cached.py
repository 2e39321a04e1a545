"""Gradient caching gives the loss and the gradient of the large batch."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.reference import mesh_of
from vlm_jax.errors import ConfigError
from vlm_jax.losses import cached_value_and_gradients, sigmoid_loss, softmax_loss
from vlm_jax.losses.cached import join_rows, split_rows
from vlm_jax.sharding import put_batch

PAIRS, WIDTH = 24, 6


def unit(x):
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def embed(params, batch, key):
    hidden = jnp.tanh(batch["image"] @ params["image"])
    hidden = hidden * jax.random.bernoulli(key, 1 - params["rate"], hidden.shape) if "rate" in params else hidden
    return {"image": unit(hidden @ params["out"]), "text": unit(batch["text"] @ params["text"])}


def loss(name, params, embeddings, weight, mesh=None):
    scale = jnp.exp(params["logit_scale"])
    if name == "sigmoid":
        total, count = sigmoid_loss(embeddings["image"], embeddings["text"], scale, params["logit_bias"], weight=weight, mesh=mesh)
    else:
        total, count = softmax_loss(embeddings["image"], embeddings["text"], scale, weight=weight, mesh=mesh)
    return total / count, {"count": count}


def problem():
    rng = np.random.default_rng(0)
    params = {"image": rng.normal(size=(5, 7)), "out": rng.normal(size=(7, WIDTH)), "text": rng.normal(size=(4, WIDTH)),
              "logit_scale": 1.5, "logit_bias": -2.0}
    batch = {"image": rng.normal(size=(PAIRS, 5)), "text": rng.normal(size=(PAIRS, 4)), "weight": (rng.random(PAIRS) > 0.2)}
    return jax.tree.map(lambda x: np.asarray(x, np.float32), (params, batch))


def assert_close(got, wanted, tolerance=1e-6):
    for path, b in jax.tree_util.tree_leaves_with_path(wanted):
        a = got
        for key in path:
            a = a[key.key] if hasattr(key, "key") else a[key.idx]
        assert np.max(np.abs(np.asarray(a) - np.asarray(b))) <= tolerance * max(np.max(np.abs(b)), 1e-3), jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_accumulated_equals_large_batch(name, micro_batches):
    params, batch = problem()
    key = jax.random.key(0)

    def cached(params, batch):
        return cached_value_and_gradients(embed, lambda p, e: loss(name, p, e, batch["weight"]), micro_batches)(params, batch, key)

    def large(params, batch):
        return jax.value_and_grad(lambda p: loss(name, p, embed(p, batch, key), batch["weight"]), has_aux=True)(params)

    with jax.default_matmul_precision("highest"):
        assert_close(jax.jit(cached)(params, batch), jax.jit(large)(params, batch))


def test_on_a_mesh_and_every_device_keeps_its_rows():
    params, batch = problem()
    mesh, key = mesh_of(4), jax.random.key(0)

    def cached(params, batch):
        return cached_value_and_gradients(embed, lambda p, e: loss("sigmoid", p, e, batch["weight"], mesh), 3)(params, batch, key)

    with jax.default_matmul_precision("highest"):
        wanted = jax.value_and_grad(lambda p: loss("sigmoid", p, embed(p, batch, key), batch["weight"]), has_aux=True)(params)
        with jax.set_mesh(mesh):
            compiled = jax.jit(cached).lower(params, put_batch(batch, mesh)).compile()
            assert_close(compiled(params, put_batch(batch, mesh)), wanted)
    assert not re.search("all-gather|all-to-all", compiled.as_text())


def test_dropout_is_the_same_in_both_passes():
    """The gradient equals that of a loss whose micro-batches draw by the documented keys."""
    params, batch = problem()
    params["rate"] = np.float32(0.3)
    key = jax.random.key(7)
    trained = {name: value for name, value in params.items() if name != "rate"}

    def with_rate(p, part, key):
        return embed({**p, "rate": params["rate"]}, part, key)

    def large(p):
        parts = [jax.tree.map(lambda x, m=m: x[m::4], batch) for m in range(4)]
        made = [with_rate(p, part, jax.random.fold_in(key, m)) for m, part in enumerate(parts)]
        return loss("sigmoid", p, join_rows(jax.tree.map(lambda *x: jnp.stack(x), *made)), batch["weight"])

    cached = cached_value_and_gradients(with_rate, lambda p, e: loss("sigmoid", p, e, batch["weight"]), 4)
    with jax.default_matmul_precision("highest"):
        assert_close(jax.jit(cached)(trained, batch, key), jax.jit(jax.value_and_grad(large, has_aux=True))(trained))


def test_split_and_join_are_inverse():
    tree = {"a": np.arange(12), "b": np.arange(24).reshape(12, 2)}
    parts = split_rows(tree, 4)
    assert parts["a"].shape == (4, 3) and parts["b"].shape == (4, 3, 2) and np.array_equal(parts["a"][1], [1, 5, 9])
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(join_rows(parts)), jax.tree.leaves(tree)))


def test_a_batch_that_does_not_divide():
    params, batch = problem()
    with pytest.raises(ConfigError, match="micro_batches=5 does not divide the batch of 24"):
        cached_value_and_gradients(embed, lambda p, e: loss("sigmoid", p, e, None), 5)(params, batch, jax.random.key(0))

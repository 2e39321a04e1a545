"""The contrastive task on a tiny model: terms, metrics, streams, masks, randomness, meshes; and on the real dual encoder."""
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.losses import cached_value_and_gradients, sigmoid_loss, softmax_loss
from vlm_jax.sharding import make_mesh, put_batch
from vlm_jax.tasks import build_task
from vlm_jax.tasks.contrastive import ContrastiveTask


class Pair(nn.Module):
    """The smallest dual encoder: a linear image tower and a bag of words."""
    dropout: float = 0.0
    bias: bool = True

    def input_shapes(self):
        return {"image": (2, 3, 3), "tokens": (4,)}

    @nn.compact
    def __call__(self, image, tokens, train=False):
        x = nn.Dense(6, name="image")(image.reshape(len(image), -1))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        y = nn.Embed(11, 6, name="text")(tokens).mean(1)
        x, y = (v / jnp.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
        scalars = {"logit_scale": self.param("logit_scale", nn.initializers.constant(1.5), ())}
        if self.bias:
            scalars["logit_bias"] = self.param("logit_bias", nn.initializers.constant(-2.0), ())
        return (x, y), scalars


def stream(pairs=8, seed=0, **extra):
    rng = np.random.default_rng(seed)
    return {"image": rng.normal(size=(pairs, 2, 3, 3)).astype(np.float32), "tokens": rng.integers(0, 11, (pairs, 4)).astype(np.int32), **extra}


KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def params():
    return ContrastiveTask(Pair()).init(jax.random.key(0))


def run(task, params, batch, step=0):
    return jax.jit(task.loss)(params, {}, batch, KEY, step)


def test_one_stream_is_the_loss_of_its_embeddings(params):
    task = build_task({"name": "contrastive", "loss": "sigmoid"}, Pair())
    batch = {"pairs": stream()}
    terms, state, metrics = run(task, params, batch)
    (image, text), _ = Pair().apply({"params": params}, batch["pairs"]["image"], batch["pairs"]["tokens"])
    wanted = sigmoid_loss(image, text, np.exp(1.5), -2.0, chunked=False)
    assert list(terms) == ["contrastive"] and state == {}
    np.testing.assert_allclose(terms["contrastive"], wanted, rtol=1e-6)
    similar = np.asarray(image @ text.T)
    assert float(metrics["accuracy"]) == np.mean(similar.argmax(1) == np.arange(8))
    np.testing.assert_allclose(metrics["positive_logit"], np.mean(np.exp(1.5) * np.diag(similar) - 2), rtol=1e-5)
    np.testing.assert_allclose([metrics["logit_scale"], metrics["logit_bias"]], [np.exp(1.5), -2], rtol=1e-6)


def test_streams_are_losses_of_their_own(params):
    task = build_task({"name": "contrastive", "stream_weights": {"web": 0.25}}, Pair())
    web, captions = stream(6, 1), stream(4, 2)
    terms, _, metrics = run(task, params, {"web": web, "captions": captions})
    alone = build_task({"name": "contrastive"}, Pair())
    of_web, of_captions = (run(alone, params, {"x": s})[0]["contrastive"] for s in (web, captions))
    np.testing.assert_allclose(terms["contrastive/web"], (0.25 * of_web[0], 6), rtol=1e-6)
    np.testing.assert_allclose(terms["contrastive/captions"], (of_captions[0], 4), rtol=1e-6)
    assert {"accuracy/web", "accuracy/captions", "positive_logit/web", "logit_scale"} <= set(metrics)


def test_bad_records_count_nothing(params):
    task = build_task({"name": "contrastive"}, Pair())
    batch = stream(6)
    good = {name: value[[0, 1, 4, 5]] for name, value in batch.items()}
    masked = dict(batch, mask=np.array([1, 1, 0, 1, 1, 1], bool), weight=np.array([1, 1, 1, 0, 1, 1], np.float32))
    got, wanted = run(task, params, {"x": masked}), run(task, params, {"x": good})
    np.testing.assert_allclose(got[0]["contrastive"], wanted[0]["contrastive"], rtol=1e-6)
    for name, value in wanted[2].items():
        np.testing.assert_allclose(got[2][name], value, rtol=1e-5)
    nothing = run(task, params, {"x": dict(batch, mask=np.zeros(6, bool))})
    assert float(nothing[0]["contrastive"][1]) == 0 and all(np.isfinite(v) for v in nothing[2].values())


def test_softmax_clips_the_multiplier_at_100():
    task = build_task({"name": "contrastive", "loss": "softmax", "chunked": False}, Pair(bias=False))
    params = task.init(jax.random.key(0))
    params["logit_scale"] = jnp.asarray(9.0)
    batch = {"x": stream()}
    terms, _, metrics = run(task, params, batch)
    (image, text), _ = Pair(bias=False).apply({"params": params}, batch["x"]["image"], batch["x"]["tokens"])
    np.testing.assert_allclose(terms["contrastive"][0], softmax_loss(image, text, 100.0)[0], rtol=1e-5)
    np.testing.assert_allclose(metrics["logit_scale"], 100, rtol=1e-6)
    assert "logit_bias" not in metrics


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_the_mesh_changes_neither_loss_nor_dropout(params, sizes):
    model, mesh = Pair(dropout=0.5), make_mesh(**sizes)
    batch = {"pairs": stream(16)}

    def loss(task):
        def total(params, batch):
            terms, _, _ = task.loss(params, {}, batch, KEY, 0)
            return terms["contrastive"][0] / terms["contrastive"][1]
        return jax.jit(jax.value_and_grad(total))

    with jax.default_matmul_precision("highest"):
        wanted = loss(build_task({"name": "contrastive"}, model))(params, batch)
        with jax.set_mesh(mesh):
            got = loss(build_task({"name": "contrastive"}, model, mesh=mesh))(params, put_batch(batch, mesh))
        undropped = loss(build_task({"name": "contrastive"}, Pair()))(params, batch)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert abs(float(undropped[0] - wanted[0])) > 1e-3


def test_streams_draw_differently_and_keys_decide(params):
    task = build_task({"name": "contrastive"}, Pair(dropout=0.5))
    same = stream()
    embed = jax.jit(task.embed, static_argnames="train")
    first = embed(params, {}, {"a": same, "b": same}, KEY, 0)
    assert np.array_equal(first["a"]["image"], embed(params, {}, {"a": same, "b": same}, KEY, 0)["a"]["image"])
    assert not np.allclose(first["a"]["image"], first["b"]["image"])
    assert not np.allclose(first["a"]["image"], embed(params, {}, {"a": same, "b": same}, jax.random.key(4), 0)["a"]["image"])
    still = embed(params, {}, {"a": same, "b": same}, KEY, 0, train=False)
    assert np.array_equal(still["a"]["image"], still["b"]["image"])


def test_gradient_caching_over_streams_equals_the_large_batch(params):
    task = build_task({"name": "contrastive"}, Pair())
    batch = {"a": stream(8, 1, weight=np.array([1, 1, 0, 1, 1, 1, 1, 1], np.float32)), "b": stream(4, 2)}

    def total(params, embeddings):
        terms, state, _ = task.loss_from_embeddings(params, {}, embeddings, batch, 0)
        return sum(value / weight for value, weight in terms.values()), state

    cached = cached_value_and_gradients(lambda p, part, key: task.embed(p, {}, part, key, 0), total, 4)
    with jax.default_matmul_precision("highest"):
        (value, _), gradients = jax.jit(cached)(params, batch, KEY)
        (wanted, _), large = jax.jit(jax.value_and_grad(lambda p: total(p, task.embed(p, {}, batch, KEY, 0)), has_aux=True))(params)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(large)):
        assert np.max(np.abs(a - b)) <= 1e-6 * max(1, np.max(np.abs(b)))


@pytest.mark.parametrize("settings, words", [
    ({"name": "contrastve"}, 'task.name: "contrastve" is unknown. Did you mean "contrastive"'),
    ({}, "task.name is missing"),
    ({"name": "contrastive", "loss": "sigmoidal"}, 'task.loss: "sigmoidal" is unknown. Did you mean "sigmoid"'),
    ({"name": "contrastive", "chunkd": True}, 'task.chunkd: .* Did you mean "chunked"'),
    ({"name": "contrastive", "stream_weights": {"web": -1}}, "task.stream_weights.web is -1"),
    ({"name": "contrastive", "mesh": None}, "task.mesh is set by the program"),
])
def test_settings_that_cannot_work(settings, words):
    with pytest.raises(ConfigError, match=words):
        build_task(settings, Pair())


def test_batches_and_models_that_do_not_fit(params):
    with pytest.raises(ConfigError, match="should hold streams"):
        build_task({"name": "contrastive"}, Pair()).loss(params, {}, stream(), KEY, 0)
    with pytest.raises(ConfigError, match='stream_weights.wb: the batch has no such stream. Did you mean "web"'):
        build_task({"name": "contrastive", "stream_weights": {"wb": 1.0}}, Pair()).loss(params, {}, {"web": stream()}, KEY, 0)
    with pytest.raises(ConfigError, match="needs a model with a logit_bias"):
        task = build_task({"name": "contrastive"}, Pair(bias=False))
        task.loss(task.init(KEY), {}, {"x": stream()}, KEY, 0)


@pytest.mark.parametrize("name, loss", [("siglip", "sigmoid"), ("clip", "softmax")])
def test_the_real_dual_encoder(name, loss):
    from vlm_jax import registry
    model = registry.build(name, "test")
    task = build_task({"name": "contrastive", "loss": loss}, model)
    shapes = task.input_shapes()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 9, (3, *shapes["tokens"])).astype(np.int32)
    batch = {"pairs": {"image": rng.normal(size=(3, *shapes["image"])).astype(np.float32), "tokens": tokens}}

    def total(params):
        terms, _, metrics = task.loss(params, {}, batch, KEY, 0)
        return terms["contrastive"][0] / terms["contrastive"][1], metrics

    params = jax.jit(task.init)(KEY)
    (value, metrics), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert np.isfinite(value) and set(metrics) == {"accuracy", "positive_logit", "logit_scale"} | ({"logit_bias"} if loss == "sigmoid" else set())
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients)) and float(jnp.abs(gradients["logit_scale"])) > 0

"""The task of generating text: its loss against a plain computation, accumulation, meshes, and what it refuses."""
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError, DataError
from vlm_jax.nn import Linear
from vlm_jax.sharding.mesh import batch_sharding, make_mesh
from vlm_jax.tasks import build_task
from vlm_jax.training import adapters
from vlm_jax.training.gradients import value_and_gradients

V, D, B, T = 11, 6, 8, 5


class Small(nn.Module):
    """A generative model of one layer: of a decoder, or with `of="targets"` of an encoder-decoder whose answer depends on the sum of the prompt."""
    of: str = "tokens"
    dropout: bool = False

    @nn.compact
    def __call__(self, inputs, train=False):
        table = self.param("token_embedding", nn.initializers.normal(1.0), (V, D))
        x = table[inputs["tokens"]]
        if self.of == "targets":
            shifted = jnp.pad(inputs["targets"], ((0, 0), (1, 0)))[:, :-1]
            x = table[shifted] + (x * inputs["valid"][..., None]).sum(1, keepdims=True)
        hidden = jnp.tanh(Linear(D, name="layer")(x))
        return Linear(V, use_bias=False, name="head")(hidden), {"hidden": hidden}

    def head(self, params):
        return dict(kernel=params["head"]["kernel"], tied=False, bias=None, soft_cap=None)

    def extend(self, tokens, cache, valid=None):
        raise AssertionError

    def input_shapes(self):
        return {"tokens": (T,), **({"targets": (4,), "valid": (T,)} if self.of == "targets" else {})}


def stream(seed, of="tokens", rows=B):
    generator = np.random.default_rng(seed)
    shape = (rows, 4 if of == "targets" else T)
    arrays = {"tokens": generator.integers(1, V, (rows, T)).astype(np.int32), "loss_weights": generator.integers(0, 3, shape).astype(np.float32),
              "weight": (generator.random(rows) < 0.8).astype(np.float32), "example_id": np.arange(rows) + 100}
    arrays["mask"] = arrays["weight"] > 0
    if of == "targets":
        arrays.update(targets=generator.integers(1, V, shape).astype(np.int32), valid=generator.random((rows, T)) < 0.7)
    return arrays


def expected(model, params, arrays, smoothing=0.0, z=0.0):
    """(sum, weight, accuracy, perplexity) from all logits, in numpy."""
    inputs = {key: value for key, value in arrays.items() if key in ("tokens", "targets", "valid")}
    logits = np.asarray(model.apply({"params": params}, inputs)[0], np.float64)
    weights = arrays["loss_weights"] * arrays["weight"][:, None]
    targets = arrays.get("targets", arrays["tokens"])
    if "targets" not in arrays:
        logits, targets, weights = logits[:, :-1], targets[:, 1:], weights[:, 1:]
    normalizer = np.log(np.exp(logits).sum(-1))
    log_p = logits - normalizer[..., None]
    own = np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    losses = -(1 - smoothing) * own - smoothing * log_p.mean(-1) + z * normalizer ** 2
    total = weights.sum()
    return (weights * losses).sum(), total, (weights * (logits.argmax(-1) == targets)).sum() / total, np.exp(-(weights * own).sum() / total)


@pytest.fixture(scope="module", params=["tokens", "targets"])
def small(request):
    model = Small(request.param)
    params = build_task({"name": "generation"}, model).init(jax.random.key(0))
    return model, params, request.param


def test_loss_and_metrics_are_those_of_all_logits(small):
    model, params, of = small
    task = build_task({"name": "generation", "label_smoothing": 0.1, "z_loss": 1e-2, "stream_weights": {"b": 0.5}}, model)
    batch = {"a": stream(1, of), "b": stream(2, of)}
    terms, state, metrics = jax.jit(task.loss)(params, {}, batch, jax.random.key(0), 0)
    assert set(terms) == {"generation/a", "generation/b"} and state == {}
    for name, factor in (("a", 1.0), ("b", 0.5)):
        total, weight, accuracy, perplexity = expected(model, params, batch[name], 0.1, 1e-2)
        found = [*terms[f"generation/{name}"], metrics[f"token_accuracy/{name}"], metrics[f"perplexity/{name}"]]
        np.testing.assert_allclose(found, [factor * total, weight, accuracy, perplexity], rtol=1e-5)
    alone, _, _ = task.__class__(model).loss(params, {}, {"a": batch["a"]}, jax.random.key(0), 0)
    assert set(alone) == {"generation"}


def test_accumulation_of_unequal_parts_and_a_mesh_give_the_gradient_of_the_batch(small):
    model, params, of = small
    task, batch = build_task({"name": "generation"}, model), {"a": stream(3, of)}
    batch["a"]["loss_weights"][1::2] = 0     # micro-batches of very different weight
    batch["a"]["loss_weights"][0::4] = 2
    (loss, _, _), gradients = jax.jit(value_and_gradients(task))(params, {}, batch, jax.random.key(0), 0)
    total, weight, *_ = expected(model, params, batch["a"])
    np.testing.assert_allclose(loss, total / weight, rtol=1e-5)
    (parts, _, _), summed = jax.jit(value_and_gradients(task, {"micro_batches": 4}))(params, {}, batch, jax.random.key(0), 0)
    np.testing.assert_allclose(parts, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), summed, gradients)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spread = jax.device_put(batch, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        (split, _, _), of_mesh = jax.jit(value_and_gradients(build_task({"name": "generation"}, model, mesh)))(params, {}, spread, jax.random.key(0), 0)
    np.testing.assert_allclose(split, loss, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), of_mesh, gradients)


def test_a_batch_of_bad_records_counts_nothing(small):
    model, params, of = small
    task, batch = build_task({"name": "generation"}, model), {"a": stream(3, of)}
    batch["a"]["weight"][:] = 0
    batch["a"]["mask"][:] = False
    (loss, _, metrics), gradients = jax.jit(value_and_gradients(task))(params, {}, batch, jax.random.key(0), 0)
    assert loss == 0 and metrics["token_accuracy"] == 0 and all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradients))


def test_an_adapted_head_is_what_the_loss_reads(small):
    model, params, of = small
    task, batch = build_task({"name": "generation"}, model), {"a": stream(4, of)}
    adapted = adapters.add(adapters.quantize(params, ["head"]), ["head", "layer"], rank=2)
    adapted["head"]["lora"]["b"] = np.random.default_rng(0).normal(size=(2, V)).astype(np.float32)
    terms, _, _ = task.loss(adapted, {}, batch, jax.random.key(0), 0)
    total, weight, *_ = expected(model, adapted, batch["a"])
    np.testing.assert_allclose(terms["generation"][0], total, rtol=1e-5)


def test_ids_beyond_the_vocabulary_are_errors_of_the_host(small):
    model, params, of = small
    task = build_task({"name": "generation"}, model)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    batch = {"a": stream(5, of)}
    task.check_batch(shapes, batch)
    row = int(np.flatnonzero(batch["a"]["mask"])[1])
    batch["a"][of][row, 2], batch["a"]["loss_weights"][row, 2] = V, 1
    with pytest.raises(DataError, match=rf"stream a, example {100 + row}: {of}\[2\] is {V}, but the model's vocabulary has {V} entries; use the tokenizer"):
        task.check_batch(shapes, batch)
    batch["a"]["mask"][row] = False       # what a bad record left behind does not matter
    task.check_batch(shapes, batch)


class Processor:
    """What a task asks of a processor."""
    class format:
        image_tokens = 0

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


def test_what_does_not_fit_is_refused():
    task = build_task({"name": "generation"}, Small())
    task.check_fit(Processor(V), "processor")
    with pytest.raises(ConfigError, match=f"has {V + 1} entries, the model's table {V}; raise the vocab_size"):
        task.check_fit(Processor(V + 1), "processor")
    bare = Processor(V)
    bare.format = None
    with pytest.raises(ConfigError, match="processor.format is missing"):
        task.check_fit(bare, "processor")
    with pytest.raises(ConfigError, match="needs a model that generates text, Linear does not"):
        build_task({"name": "generation"}, Linear(3))
    for settings, message in (({"label_smoothing": 1.0}, "label_smoothing is 1.0"), ({"z_loss": -1}, "z_loss is -1"),
                              ({"stream_weights": {"a": "x"}}, "stream_weights.a is 'x'"), ({"zloss": 1}, 'Did you mean "z_loss"')):
        with pytest.raises(ConfigError, match=message):
            build_task({"name": "generation", **settings}, Small())
    with pytest.raises(ConfigError, match='stream_weights.b: the batch has no such stream'):
        build_task({"name": "generation", "stream_weights": {"b": 1}}, Small()).loss({}, {}, {"a": stream(0)}, jax.random.key(0), 0)


def test_the_format_says_what_a_stream_holds():
    form = dict(kind="prefix_lm", length=7)
    shapes = build_task({"name": "generation"}, Small()).batch_shapes({"format": form})
    assert {name: shape for name, (shape, _) in shapes.items()} == dict.fromkeys(("tokens", "valid", "prefix", "loss_weights"), (7,))
    shapes = build_task({"name": "generation"}, Small("targets")).batch_shapes({"format": dict(kind="encoder_decoder", length=7, target_length=3)})
    assert shapes["tokens"][0] == (7,) and shapes["targets"][0] == shapes["loss_weights"][0] == (3,) and "prefix" not in shapes
    for wrong, message in (({}, "format.kind is None"), (dict(kind="causal"), "format.length is None"),
                           (dict(kind="encoder_decoder", length=3), "format.target_length is None")):
        with pytest.raises(ConfigError, match=message):
            build_task({"name": "generation"}, Small()).batch_shapes({"format": wrong})

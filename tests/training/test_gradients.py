"""Accumulated gradients, clipping, finiteness, the moving average."""
from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.training.flops import count_flops
from vlm_jax.training.gradients import all_finite, clip_by_global_norm, ema_decay, ema_update, global_norm, total_loss, value_and_gradients


class Regression:
    """Two terms with different weights, and a state that counts examples."""

    def loss(self, params, state, batch, rng, step):
        stream = batch["pairs"]
        error = (stream["x"] @ params["w"] - stream["y"]) ** 2
        terms = {"fit": ((error * stream["weight"]).sum(), stream["weight"].sum()),
                 "positive": (jnp.where(stream["y"] > 0, error, 0).sum(), (stream["y"] > 0).sum())}
        return terms, {"seen": state["seen"] + stream["x"].shape[0]}, {"mean_x": stream["x"].mean()}


class Contrastive(Regression):
    """A task whose loss compares the examples of a batch."""
    embed = loss_from_embeddings = Regression.loss


def batch_of(seed=0, rows=12):
    generator = np.random.default_rng(seed)
    weight = (generator.random(rows) > 0.3).astype(np.float32)
    weight[::4] = 0   # the first of four micro-batches has no weight at all
    x, y = generator.standard_normal((rows, 3)), generator.standard_normal(rows)
    return {"pairs": {"x": x.astype(np.float32), "y": y.astype(np.float32), "weight": weight}}


PARAMS = {"w": jnp.asarray([0.5, -1.0, 2.0])}


def test_micro_batches_add_up_to_the_batch():
    rng, state = jax.random.key(0), {"seen": jnp.zeros((), jnp.int32)}
    (loss, whole_state, metrics), gradients = jax.jit(value_and_gradients(Regression()))(PARAMS, state, batch_of(), rng, 0)
    assert set(metrics) == {"mean_x", "loss/fit", "loss/positive"} and int(whole_state["seen"]) == 12
    assert float(loss) == pytest.approx(float(metrics["loss/fit"] + metrics["loss/positive"]), rel=1e-6)
    for micro_batches in (1, 3, 4):
        function = jax.jit(value_and_gradients(Regression(), {"micro_batches": micro_batches}))
        (ours, ours_state, ours_metrics), summed = function(PARAMS, state, batch_of(), rng, 0)
        np.testing.assert_allclose(ours, loss, rtol=1e-6)
        np.testing.assert_allclose(summed["w"], gradients["w"], rtol=2e-6)
        assert int(ours_state["seen"]) == 12
        for name, value in metrics.items():
            np.testing.assert_allclose(ours_metrics[name], value, rtol=1e-5, err_msg=name)


def test_summing_the_weights_first_costs_no_products():
    arguments = PARAMS, {"seen": jnp.zeros((), jnp.int32)}, batch_of(), jax.random.key(0), 0
    summed, whole = value_and_gradients(Regression(), {"micro_batches": 4}), value_and_gradients(Regression())
    assert count_flops(summed, *arguments) == count_flops(whole, *arguments)


def test_a_batch_without_weight_has_loss_and_gradient_0():
    batch = batch_of()
    batch["pairs"]["weight"] *= 0
    batch["pairs"]["y"] = -np.abs(batch["pairs"]["y"])
    for accumulate in (None, {"micro_batches": 2}):
        function, state = value_and_gradients(Regression(), accumulate), {"seen": jnp.zeros((), jnp.int32)}
        (loss, _, _), gradients = function(PARAMS, state, batch, jax.random.key(0), 0)
        assert float(loss) == 0 and (gradients["w"] == 0).all()


def test_weights_carry_no_gradient():
    assert float(jax.grad(lambda w: total_loss({"a": (3 * w, w)}))(2.0)) == 1.5


def test_gradient_caching_equals_the_large_batch():
    class Matching:
        """Every x is to be near its own y and far from the others; the temperature is a parameter of the loss alone."""

        def embed(self, params, state, batch, rng, step):
            return {name: {"x": jnp.tanh(stream["x"] @ params["w"]), "y": stream["y"]} for name, stream in batch.items()}

        def loss_from_embeddings(self, params, state, embeddings, batch, step):
            pairs = embeddings["pairs"]
            logits = -params["t"] * (pairs["x"][:, None] - pairs["y"][None]) ** 2
            terms = {"match": ((jax.nn.logsumexp(logits, 1) - jnp.diag(logits)).sum(), batch["pairs"]["x"].shape[0])}
            return terms, state, {"logits": logits.mean()}

        def loss(self, params, state, batch, rng, step):
            return self.loss_from_embeddings(params, state, self.embed(params, state, batch, rng, step), batch, step)

    params = {**PARAMS, "t": jnp.asarray(0.7)}
    arguments = params, {}, batch_of(), jax.random.key(0), 0
    (loss, _, metrics), gradients = value_and_gradients(Matching())(*arguments)
    (ours, _, our_metrics), cached = jax.jit(value_and_gradients(Matching(), {"micro_batches": 3, "cached": True}))(*arguments)
    np.testing.assert_allclose(ours, loss, rtol=1e-6)
    np.testing.assert_allclose(our_metrics["logits"], metrics["logits"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), cached, gradients)


@pytest.mark.parametrize("task, accumulate, expected", [
    (Contrastive(), {"micro_batches": 4},
     "a: the loss of Contrastive compares the examples of a batch, so the sum over micro-batches is another loss with fewer negatives; "
     "set accumulate=dict(micro_batches=4, cached=True) for gradient caching."),
    (Regression(), {"micro_batches": 4, "cached": True}, "a.cached=True is for contrastive tasks; the loss of Regression is a sum over examples"),
    (Regression(), {"micro_batch": 4}, 'a.micro_batch: accumulation takes no such setting. Did you mean "micro_batches"?'),
    (Regression(), {"micro_batches": 0}, "accumulate.micro_batches is 0; it must be an integer of at least 1."),
])
def test_messages(task, accumulate, expected):
    with pytest.raises(ConfigError) as caught:
        value_and_gradients(task, accumulate, "a")
    assert str(caught.value).startswith(expected)


def test_a_batch_that_does_not_divide():
    with pytest.raises(ConfigError, match="accumulate.micro_batches=5 does not divide the batch of 12"):
        value_and_gradients(Regression(), {"micro_batches": 5})(PARAMS, {"seen": jnp.zeros((), jnp.int32)}, batch_of(), jax.random.key(0), 0)


@given(scale=st.floats(1e-3, 1e3), limit=st.floats(1e-2, 10))
def test_clipping_equals_optax_and_keeps_the_direction(scale, limit):
    tree = {"a": jnp.asarray([3.0, 4.0]) * scale, "b": {"c": jnp.asarray([[12.0]]) * scale}}
    clipped, norm = clip_by_global_norm(tree, limit)
    assert float(norm) == pytest.approx(13 * scale, rel=1e-5) and float(global_norm(clipped)) <= limit * (1 + 1e-5)
    expected, _ = optax.clip_by_global_norm(limit).update(tree, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, expected)
    same, _ = clip_by_global_norm(tree, None)
    assert same is tree


def test_all_finite_looks_at_every_leaf():
    assert bool(all_finite({"a": jnp.ones(3), "n": jnp.arange(3)})) and bool(all_finite({}))
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not bool(all_finite({"a": jnp.ones(3), "z": jnp.ones((2, 2)).at[1, 0].set(bad)}))


def test_moving_average():
    ema, params = {"a": jnp.asarray([1.0, 2.0]), "n": jnp.asarray(1)}, {"a": jnp.asarray([3.0, 2.0]), "n": jnp.asarray(5)}
    moved = ema_update(ema, params, 0, decay=0.9)
    np.testing.assert_allclose(moved["a"], [1.2, 2.0], rtol=1e-6)
    assert int(moved["n"]) == 5
    assert float(ema_decay(0, 0.99, warmup=True)) == pytest.approx(0.1) and float(ema_decay(10_000, 0.99, warmup=True)) == pytest.approx(0.99)
    frozen = jnp.asarray(np.random.default_rng(0).standard_normal(100), jnp.float32)
    np.testing.assert_array_equal(ema_update({"a": frozen}, {"a": frozen}, 3, decay=0.999)["a"], frozen)

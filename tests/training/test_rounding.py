"""Stochastic rounding and optimiser state in bfloat16: unbiased, deterministic, half the bytes, laid out as the parameters, and it trains."""
from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from vlm_jax.sharding import make_mesh, parameter_shardings, state_shardings
from vlm_jax.training.optimizers import build_optimizer
from vlm_jax.training.rounding import kept_in, random_bits, stochastic_round
from vlm_jax.training.stages import Rules


@given(st.floats(-2.0**100, 2.0**100, width=32, allow_subnormal=False), st.integers(0, 2**16 - 1))
def test_rounds_to_a_neighbour(value, bits):
    x = jnp.float32(value)
    rounded = stochastic_round(x, jnp.uint32(bits)).astype(jnp.float32)
    assert abs(float(rounded) - float(x)) <= abs(float(x)) * 2**-7
    nearest = x.astype(jnp.bfloat16).astype(jnp.float32)
    assert nearest != x or rounded == x


def test_special_values_stay_and_the_expectation_is_exact():
    special = jnp.asarray([0.0, -0.0, jnp.inf, -jnp.inf, 1.5], jnp.float32)
    np.testing.assert_array_equal(stochastic_round(special, jnp.full(5, 0xFFFF, jnp.uint32)).astype(jnp.float32), special)
    assert jnp.isnan(stochastic_round(jnp.float32(jnp.nan), jnp.uint32(0xFFFF)))
    for value in (1.001, -0.7231, 3e-20):
        many = stochastic_round(jnp.full((400, 500), value, jnp.float32), random_bits((400, 500), 7)).astype(jnp.float32)
        step = abs(value) * 2**-7
        assert abs(float(many.mean()) - value) < 5 * step / np.sqrt(many.size)   # five deviations of the mean of a coin of width `step`
        assert len(np.unique(many)) == 2


def test_bits_differ_between_places_and_seeds_and_are_uniform():
    first, second = (np.asarray(random_bits((64, 1000), seed)) for seed in (1, 2))
    assert (first == second).mean() < 1e-3 and len(np.unique(first)) > 0.999 * first.size
    low = (first & 0xFFFF).astype(np.float64)
    assert abs(low.mean() / 65535 - 0.5) < 0.01 and abs(np.corrcoef(low[:, 1:].ravel(), low[:, :-1].ravel())[0, 1]) < 0.02


def test_a_slow_mean_moves_where_the_nearest_would_stand_still():
    gradient = {"a": jnp.full(4096, 1.0)}
    method = kept_in(optax.scale_by_adam(0.9, 0.999), {"mu": jnp.float32, "nu": jnp.bfloat16})
    state = method.init(gradient)._replace(nu={"a": jnp.full(4096, 0.5, jnp.bfloat16)})
    stuck = jnp.bfloat16(0.5) + jnp.bfloat16(0.001) * (jnp.bfloat16(1.0) - jnp.bfloat16(0.5))
    assert stuck == 0.5
    update = jax.jit(method.update)
    for _ in range(100):
        _, state = update(gradient, state)
    assert float(state.nu["a"].astype(jnp.float32).mean()) == pytest.approx(1 - 0.5 * 0.999**100, rel=2e-3)
    assert state.nu["a"].dtype == jnp.bfloat16 and state.mu["a"].dtype == jnp.float32


SHAPES = {"image": {"blocks": {"kernel": jnp.zeros((2, 64, 128))}}, "head": {"kernel": jnp.zeros((256, 64))}, "t": jnp.zeros(())}
LOW = {"adamw": dict(momentum_dtype="bfloat16", second_moment_dtype="bfloat16"), "lion": dict(momentum_dtype="bfloat16"),
       "sgd": dict(momentum_dtype="bfloat16"), "adafactor": dict(momentum_dtype="bfloat16", decay_cap=0.9)}


def optimizer(name, params, **settings):
    return build_optimizer(dict(name=name, **settings), dict(name="constant", peak=0.02), 100, Rules([(".*", {})], params))


@pytest.mark.parametrize("name", LOW)
def test_bytes_halve_and_the_state_lies_as_the_parameters(name):
    full = dict.fromkeys(LOW[name], "float32")
    full.pop("decay_cap", None)
    exact, low = (jax.eval_shape(optimizer(name, SHAPES, **settings).init, SHAPES) for settings in (full, LOW[name]))
    assert jax.tree.structure(exact) == jax.tree.structure(low)
    sizes = [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree) if leaf.size >= 2**14) for tree in (exact, low)]
    assert sizes[0] == 2 * sizes[1] > 0
    mesh = make_mesh(data=2, fsdp=4)
    placed = state_shardings(mesh, low, SHAPES, parameter_shardings(mesh, SHAPES))
    specs = {leaf.spec for leaf, shape in zip(jax.tree.leaves(placed), jax.tree.leaves(low)) if shape.size >= 2**14}
    assert specs == {PartitionSpec(None, None, "fsdp"), PartitionSpec("fsdp")}


@pytest.mark.parametrize("name", LOW)
def test_trains_like_float32_and_the_same_twice(name):
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.standard_normal((64, 12)), jnp.float32)
    y = x @ jnp.asarray(generator.standard_normal((12, 5)), jnp.float32)
    start = {"kernel": jnp.zeros((12, 5))}

    def train(**settings):
        method = optimizer(name, start, **settings)

        @jax.jit
        def step(carry, number):
            params, state = carry
            loss, gradient = jax.value_and_grad(lambda p: jnp.square(x @ p["kernel"] - y).mean())(params)
            params, state, _ = method.update(gradient, state, params, number)
            return (params, state), loss
        (params, state), losses = jax.lax.scan(step, (start, method.init(start)), jnp.arange(150))
        return params["kernel"], losses

    exact, low, again = train(**{**LOW[name], **dict.fromkeys(set(LOW[name]) - {"decay_cap"}, "float32")}), train(**LOW[name]), train(**LOW[name])
    np.testing.assert_array_equal(low[0], again[0])
    assert not np.array_equal(low[0], exact[0])
    assert low[1][-1] < 0.2 * low[1][0] and abs(low[1][-1] - exact[1][-1]) < 0.02 * low[1][0]

from functools import partial
import operator

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.nn import Linear, Stack, TransformerBlock

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 12)), jnp.float32)
BLOCK = partial(TransformerBlock, 3, 20, dropout=0.2)
DEPTH = 3
RNGS = {"dropout": jax.random.key(7)}


@pytest.fixture(scope="module")
def variables():
    return jax.jit(Stack(BLOCK, DEPTH).init)(jax.random.key(0), X)


def run(variables, **settings):
    def loss(params):
        y, every = Stack(BLOCK, DEPTH, **settings).apply({"params": params}, X, train=True, rngs=RNGS)
        return (y * X).sum(), (y, every)
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def test_parameters_are_stacked_and_each_layer_has_its_own_key(variables):
    kernel = variables["params"]["attention"]["query"]["kernel"]
    assert kernel.shape == (DEPTH, 12, 3, 4)
    assert len({float(kernel[i].sum()) for i in range(DEPTH)}) == DEPTH
    unrolled = jax.jit(Stack(BLOCK, DEPTH, scan=False).init)(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, variables, unrolled)


def test_loop_over_slices_equals_blocks_by_hand(variables):
    def by_hand(x):
        outputs = []
        for layer in [jax.tree.map(operator.itemgetter(i), variables["params"]) for i in range(DEPTH)]:
            x, _ = BLOCK(parent=None).apply({"params": layer}, x)
            outputs.append(x)
        return x, outputs

    x, outputs = jax.jit(by_hand)(X)
    for scan in (True, False):
        y, every = jax.jit(Stack(BLOCK, DEPTH, scan=scan).apply)(variables, X)
        np.testing.assert_allclose(y, x, atol=1e-5)
        np.testing.assert_allclose(every["output"], jnp.stack(outputs), atol=1e-5)
        assert every["attention"].shape == every["mlp"].shape == (DEPTH, *X.shape)


@pytest.fixture(scope="module")
def scanned(variables):
    return run(variables)


@pytest.mark.parametrize("settings", [dict(scan=False), dict(scan=False, remat="dots"), dict(remat="full")], ids=str)
def test_scan_and_remat_change_nothing(variables, scanned, settings):
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(run(variables, **settings))):   # values, intermediates and gradients, with dropout
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 1.0)   # the gradient of a key's bias is zero but for rounding


def test_remat_full_computes_the_forward_pass_again(variables):
    def products(remat):
        gradient = jax.grad(lambda p: Stack(BLOCK, DEPTH, scan=False, remat=remat).apply({"params": p}, X)[0].sum())
        return jax.jit(gradient).lower(variables["params"]).as_text().count("stablehlo.dot_general")
    # Six products forward and two for attention; dots keeps their results.
    assert products("none") == products("dots") == products("everything") < products("full")


@pytest.mark.parametrize("remat", ["attention", "mlp", "minimal", "offload"])
def test_named_policies_change_no_gradient(variables, scanned, remat):
    for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(run(variables, remat=remat))):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(a).max(), 1.0)


def test_memory_grows_and_work_shrinks_in_the_order_of_the_table():
    block = partial(TransformerBlock, 2, 256)
    x = jax.ShapeDtypeStruct((16, 32, 64), jnp.float32)
    params = jax.eval_shape(Stack(block, 6).init, jax.random.key(0), x)

    def compiled(remat):
        gradient = jax.jit(jax.grad(lambda p, x: jnp.square(Stack(block, 6, remat=remat).apply(p, x)[0]).sum()))
        return gradient.lower(params, x)
    programs = {remat: compiled(remat) for remat in ("full", "attention", "mlp", "minimal", "none")}
    memory = {remat: program.compile().memory_analysis().temp_size_in_bytes for remat, program in programs.items()}
    products = {remat: program.as_text().count("stablehlo.dot_general") for remat, program in programs.items()}
    assert memory["full"] < min(memory["attention"], memory["mlp"]) and max(memory["attention"], memory["mlp"]) < memory["minimal"] < memory["none"]
    assert {remat: count - products["none"] for remat, count in products.items()} == dict(full=7, attention=3, mlp=6, minimal=1, none=0)


def test_a_backend_without_host_memory_is_named(monkeypatch):
    from vlm_jax.nn import stack
    monkeypatch.setattr(stack, "memory_kinds", lambda: {"device"})
    with pytest.raises(ConfigError, match='remat="offload": the backend "cpu" has no memory "pinned_host"; choose "minimal"'):
        stack.remat_policy("offload")
    assert stack.remat_policy("none") is None


def test_blocks_may_take_more_inputs_and_return_only_x():
    class Adder(nn.Module):
        @nn.compact
        def __call__(self, x, extra):
            return x + Linear(x.shape[-1], name="mix")(extra)

    (y, every), variables = Stack(Adder, 2, scan=False).init_with_output(jax.random.key(0), X, 2 * X)
    assert set(every) == {"output"} and variables["params"]["mix"]["kernel"].shape == (2, 12, 12)
    np.testing.assert_array_equal(every["output"][-1], y)


def test_dropout_differs_between_layers_and_unknown_remat_is_named(variables):
    class Noise(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return jax.random.normal(self.make_rng("dropout"), x.shape) + 0 * self.param("zero", nn.initializers.zeros, ())

    every = {scan: Stack(Noise, 3, scan=scan).init_with_output({"params": jax.random.key(0), **RNGS}, X)[0][1]["output"] for scan in (True, False)}
    assert len(np.unique(every[True][:, 0, 0, 0])) == 3
    np.testing.assert_array_equal(every[True], every[False])
    with pytest.raises(ConfigError, match='Did you mean "full"'):
        Stack(BLOCK, 2, remat="ful").init(jax.random.key(0), X)


class Reader(nn.Module):
    """Adds its own table's entry, and writes what it read into its row of the state."""
    @nn.compact
    def __call__(self, x, per_layer=None, state=None, layer=None, factor=1.0):
        mixed = Linear(x.shape[-1], name="mix")(x) * factor + per_layer["shift"][:, None, None]
        if state is None:
            return mixed, {"mixed": mixed}
        return mixed, {"mixed": mixed}, {"rows": state["rows"].at[layer].set(mixed[0]), "count": state["count"] + 1}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_layers_get_their_own_data_and_pass_a_state_on(remat):
    per_layer = {"shift": jnp.arange(6.0).reshape(3, 2)}
    state = {"rows": jnp.zeros((3, *X.shape[1:])), "count": jnp.zeros((), int)}
    variables = Stack(Reader, 3).init(jax.random.key(0), X, per_layer=per_layer, state=state)
    results = []
    for scan in (True, False):
        def loss(shift, x, scan=scan):
            y, every, after = Stack(Reader, 3, scan, remat).apply(variables, x, per_layer={"shift": shift}, state=state, factor=0.5)
            return (y * X).sum() + after["rows"].sum(), (y, every, after)
        results.append(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(per_layer["shift"], X))
    for a, b in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    (_, (y, every, after)), _ = results[0]
    np.testing.assert_array_equal(after["rows"], every["mixed"][:, 0])
    assert int(after["count"]) == 3
    x = X
    for i in range(3):
        x = 0.5 * (x @ variables["params"]["mix"]["kernel"][i] + variables["params"]["mix"]["bias"][i]) + per_layer["shift"][i][:, None, None]
    np.testing.assert_allclose(y, x, atol=1e-5)
    without, every = Stack(Reader, 3).apply(variables, X, per_layer=per_layer, factor=0.5)   # no state: two results
    np.testing.assert_allclose(without, y, atol=1e-5)


def test_data_of_layers_must_have_all_of_them():
    with pytest.raises(ConfigError, match=r"per_layer\['shift'\] has shape \(2, 2\); its first axis must be the 3 layers"):
        Stack(Reader, 3).init(jax.random.key(0), X, per_layer={"shift": jnp.zeros((2, 2))})

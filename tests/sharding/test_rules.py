"""Parameter rules, checked on the arrays and programs that come out."""
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.sharding import batch_sharding, check_replicated, make_mesh, parameter_shardings, replicated_share, state_shardings

SHAPES = {"image": {"blocks": {"mlp": {"up": {"kernel": (4, 48, 192), "bias": (4, 192)}}}, "embed": {"kernel": (30, 640)}}, "logit_scale": ()}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=2, fsdp=2, tensor=2)


def tree(shapes=SHAPES):
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple))


def specs(shardings):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): s.spec for path, s in jax.tree_util.tree_leaves_with_path(shardings)}


def test_by_default_big_parameters_are_fully_sharded(mesh):
    assert specs(parameter_shardings(mesh, tree())) == {
        "image/blocks/mlp/up/kernel": P(None, None, "fsdp"), "image/blocks/mlp/up/bias": P(),
        "image/embed/kernel": P(None, "fsdp"), "logit_scale": P()}


def test_without_fsdp_everything_is_replicated():
    assert set(specs(parameter_shardings(make_mesh(), tree())).values()) == {P()}


def test_the_layer_axis_is_never_split():
    mesh = make_mesh(data=1, fsdp=8)
    shapes = {"blocks": {"kernel": (64, 5, 8)}, "odd": (7, 9), "kernel": (64, 5, 8)}
    assert specs(parameter_shardings(mesh, tree(shapes), min_size=1)) == {"blocks/kernel": P(None, None, "fsdp"), "odd": P(), "kernel": P("fsdp")}


def test_first_match_wins_and_tactics_combine(mesh):
    out = specs(parameter_shardings(mesh, tree(), [(".*/up/kernel", "tensor:-1,fsdp"), (".*/bias", "tensor:1"), ("image/.*", "replicate")]))
    assert out == {"image/blocks/mlp/up/kernel": P(None, "fsdp", "tensor"), "image/blocks/mlp/up/bias": P(None, "tensor"),
                   "image/embed/kernel": P(), "logit_scale": P()}


@pytest.mark.parametrize("rules, words", [
    ([("imag/.*", "fsdp")], 'rule "imag/.\\*" matches no parameter'),
    ([(".*", "fsdp"), ("image/.*", "fsdp")], "earlier rule"),
    ([(".*", "fsdpp")], 'Did you mean "fsdp"'),
    ([(".*kernel", "tensor:5")], "give an axis from"),
    ([(".*kernel", "tensor:1|x")], "AXIS:K"),
    ([(".*kernel", "tensors")], 'Did you mean "tensor"'),
    ([(".*/embed/kernel", "tensor:x")], "AXIS:K"),
    ([(".*/kernel", "tensor:1,fsdp:1")], "splits axis 1 twice"),
])
def test_rules_that_cannot_work(mesh, rules, words):
    with pytest.raises(ConfigError, match=words):
        parameter_shardings(mesh, tree(), rules)


def test_an_axis_that_does_not_divide_is_an_error(mesh):
    with pytest.raises(ConfigError, match="divides by tensor=2"):
        parameter_shardings(mesh, tree({"kernel": (3, 5)}), [(".*", "tensor:0")])


def test_the_first_axis_that_divides_is_taken_and_a_dash_allows_none(mesh):
    shapes = {"a": (3, 4), "b": (4, 3), "c": (3, 5), "d": (6, 6)}
    assert specs(parameter_shardings(mesh, tree(shapes), [(".*", "tensor:-1|0|-,fsdp")], min_size=1)) == {
        "a": P(None, "tensor"), "b": P("tensor"), "c": P(), "d": P("fsdp", "tensor")}
    with pytest.raises(ConfigError, match="no axis -1|0 of"):
        parameter_shardings(mesh, tree(shapes), [(".*", "tensor:-1|0")])


def test_rules_for_any_model_may_match_nothing(mesh):
    assert specs(parameter_shardings(mesh, tree({"a": (4,)}), [(".*/query/kernel", "tensor:0"), (".*", "replicate")])) == {"a": P()}


def test_replicated_share_counts_elements(mesh):
    shapes = tree({"a": (300, 100), "b": (9_000,), "c": (1_000,)})
    share, paths = replicated_share(shapes, parameter_shardings(mesh, shapes, [("a", "fsdp"), (".*", "replicate")]))
    assert share == pytest.approx(0.25) and paths == ["b", "c"]
    assert replicated_share(shapes, parameter_shardings(make_mesh(), shapes, [(".*", "fsdp:0|-")]))[0] == 1   # an axis of one device splits nothing


def test_a_large_model_that_stays_replicated_is_refused(mesh):
    shapes = tree({"table": (100_001, 1001), "other": (16, 1024)})
    shardings = parameter_shardings(mesh, shapes)
    with pytest.raises(ConfigError, match=r"100.0% of the 100 M parameters stay replicated on data=2 x fsdp=2 x tensor=2 .*table"):
        check_replicated(shapes, shardings)
    check_replicated(shapes, shardings, large=200_000_000)
    check_replicated(shapes, parameter_shardings(make_mesh(), shapes))   # nothing to split it over
    check_replicated(shapes, parameter_shardings(make_mesh(data=1, fsdp=8), tree({"table": (100_000, 1024), "other": (1001,)})))


def test_factored_moments_keep_the_split_of_the_axes_they_have(mesh):
    parameters = tree({"blocks": {"kernel": (3, 64, 512)}, "square": (128, 128), "bias": (512,)})
    shardings = parameter_shardings(mesh, parameters, [("blocks/.*", "fsdp:1,tensor:2"), ("square", "fsdp:0"), ("bias", "replicate")])
    state = tree({"row": {"blocks": {"kernel": (3, 64)}, "square": (128,)}, "column": {"blocks": {"kernel": (3, 512)}, "square": (128,)}, "count": ()})
    assert specs(state_shardings(mesh, state, parameters, shardings)) == {
        "row/blocks/kernel": P(None, "fsdp"), "row/square": P(), "column/blocks/kernel": P(None, "tensor"), "column/square": P(), "count": P()}


def test_the_compiled_step_keeps_parameters_and_moments_sharded(mesh):
    parameters = tree({"kernel": (64, 512), "bias": (512,)})
    shardings = parameter_shardings(mesh, parameters)
    optimizer = optax.adam(1e-3)
    init = jax.jit(lambda: {"kernel": jnp.ones((64, 512)), "bias": jnp.zeros(512)}, out_shardings=shardings)
    moments = state_shardings(mesh, jax.eval_shape(optimizer.init, parameters), parameters, shardings)
    assert moments[0].mu["kernel"].spec == P(None, "fsdp") and moments[0].nu["bias"].spec == P() and moments[0].count.spec == P()

    def step(params, state, x):
        gradients = jax.grad(lambda p: jnp.mean((x @ p["kernel"] + p["bias"]) ** 2))(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, x = init(), jax.device_put(np.ones((8, 64), np.float32), batch_sharding(mesh))
    state = jax.jit(optimizer.init, out_shardings=moments)(params)
    compiled = jax.jit(step, out_shardings=(shardings, moments)).lower(params, state, x).compile()
    assert compiled.input_shardings[0][0]["kernel"].spec == P(None, "fsdp")
    params, state = compiled(params, state, x)
    assert params["kernel"].addressable_shards[0].data.shape == (64, 256)
    assert state[0].mu["kernel"].addressable_shards[0].data.shape == (64, 256)

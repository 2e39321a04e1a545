"""What a bfloat16 model rounds: products read and give bfloat16, rounded once; sums, norms and activations are float32."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.language.decoder import Decoder
from vlm_jax.nn import Linear, Mlp, RmsNorm, TransformerBlock
from vlm_jax.nn.linear import added_dtype
from vlm_jax.nn.precision import rounded_once, wide

LOW = jnp.bfloat16


def numbers(*shape, seed=0, dtype=LOW):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def exact(x):
    return np.asarray(x, np.float64)


def equations(jaxpr):
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_sums_are_float32_or_wider():
    assert [wide(dtype) for dtype in ("bfloat16", "float16", "float32", jnp.dtype("float64"))] == ["float32", "float32", "float32", "float64"]


def test_rounded_once_keeps_its_inputs_alone():
    gate, up = numbers(3, 7), numbers(3, 7, seed=1)

    def function(gate, up):
        return jnp.tanh(gate) * up

    value, pull = jax.vjp(lambda *x: rounded_once(function, *x), gate, up)
    np.testing.assert_array_equal(value, function(gate.astype(jnp.float32), up.astype(jnp.float32)).astype(LOW))
    assert {leaf.dtype for leaf in jax.tree.leaves(pull) if hasattr(leaf, "dtype")} == {jnp.dtype(LOW)}
    d_gate, d_up = pull(jnp.ones_like(value))
    np.testing.assert_array_equal(d_up, jnp.tanh(gate.astype(jnp.float32)).astype(LOW))
    slope = 1 - np.tanh(exact(gate)) ** 2
    np.testing.assert_allclose(exact(d_gate), slope * exact(up), rtol=2 ** -8, atol=1e-6)


def test_float32_is_left_as_it_is():
    x = numbers(3, dtype=jnp.float32)
    assert str(jax.make_jaxpr(lambda x: rounded_once(jnp.tanh, x))(x)) == str(jax.make_jaxpr(jnp.tanh)(x))


def test_a_bias_is_added_before_rounding():
    x, layer = numbers(5, 9), Linear(4, dtype="bfloat16", param_dtype="bfloat16")
    params = {"kernel": numbers(9, 4, seed=1), "bias": numbers(4, seed=2)}
    y = layer.apply({"params": params}, x)
    sums = exact(x) @ exact(params["kernel"]) + exact(params["bias"])
    np.testing.assert_array_equal(y, jnp.asarray(sums, jnp.float32).astype(LOW))
    unrounded = layer.clone(out_dtype="float32").apply({"params": params}, x)
    assert unrounded.dtype == jnp.float32
    np.testing.assert_allclose(unrounded, sums, rtol=1e-5, atol=1e-5)


def test_a_norm_reads_the_stream_unrounded():
    x = numbers(5, 9, dtype=jnp.float32) * 100
    y, variables = RmsNorm(dtype="bfloat16").init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y, RmsNorm(dtype="float32").apply(variables, x).astype(LOW))
    np.testing.assert_allclose(exact(y), exact(x) / np.sqrt((exact(x) ** 2).mean(-1, keepdims=True) + 1e-6), rtol=2 ** -8)
    assert y.dtype == LOW
    assert RmsNorm(dtype="float32").apply(variables, x.astype(LOW)).dtype == jnp.float32


@pytest.mark.parametrize("gated", [False, True])
def test_what_an_mlp_adds_is_not_rounded(gated):
    module = Mlp(7, "silu", gated=gated, dtype="bfloat16", biases=())
    y, variables = module.init_with_output(jax.random.key(0), numbers(2, 3, 5))
    assert y.dtype == jnp.float32 and {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_devices_that_split_a_sum_exchange_bfloat16():
    assert added_dtype("bfloat16", "mlp") == "float32"
    mesh = jax.make_mesh((1, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        assert (added_dtype("bfloat16", "mlp"), added_dtype("float32", "heads")) == ("bfloat16", "float32")


def block():
    module = TransformerBlock(3, 20, dtype="bfloat16")
    x = jax.ShapeDtypeStruct((2, 7, 12), jnp.float32)
    return lambda params, x: module.apply({"params": params}, x)[0], jax.eval_shape(module.init, jax.random.key(0), x)["params"], x


def decoder():
    model = Decoder(vocab_size=31, width=12, depth=2, mlp_dim=20, num_heads=3, num_kv_heads=1, norm="rms_plus_one", norm_place="both", qk_norm="rms",
                    embed_scale=3.4, biases=("query", "up"), dtype="bfloat16")
    tokens = jax.ShapeDtypeStruct((2, 7), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), {"tokens": tokens})["params"]
    return lambda params, tokens: model.apply({"params": params}, {"tokens": tokens})[1]["blocks"]["output"], params, tokens


@pytest.mark.parametrize("made", [block, decoder])
def test_products_read_bfloat16_and_the_stream_is_float32(made):
    """In both passes: a wide product would cost accelerators several narrow ones."""
    function, params, x = made()
    assert jax.eval_shape(function, params, x).dtype == jnp.float32
    traced = jax.make_jaxpr(jax.grad(lambda params, x: function(params, x).sum()))(params, x)
    products = [equation for equation in equations(traced.jaxpr) if equation.primitive.name == "dot_general"]
    assert len(products) >= 24
    assert {variable.aval.dtype for equation in products for variable in equation.invars} == {jnp.dtype(LOW)}


@pytest.mark.parametrize("how", ["start", "extend"])
def test_embeddings_that_are_given_are_not_rounded(how):
    """Two embeddings that bfloat16 cannot tell apart are two to the stream."""
    model = Decoder(vocab_size=11, width=8, depth=1, mlp_dim=12, num_heads=2, dtype="bfloat16")
    tokens = jnp.zeros((1, 3), jnp.int32)
    params = model.init(jax.random.key(0), {"tokens": tokens})

    def logits(embeddings):
        if how == "start":
            return model.apply(params, {"embeddings": embeddings}, 8, method="start")[0]
        _, cache = model.apply(params, {"tokens": tokens}, 8, method="start")
        return model.apply(params, tokens, cache, None, embeddings, method="extend")[0]

    x = numbers(1, 3, 8).astype(jnp.float32)
    close = x * (1 + 1e-3 * numbers(1, 3, 8, seed=1).astype(jnp.float32))
    assert not np.array_equal(x, close) and (close.astype(LOW) == x.astype(LOW)).mean() > 0.7
    rounded = close.astype(LOW).astype(jnp.float32)
    assert not np.array_equal(logits(close), logits(rounded))

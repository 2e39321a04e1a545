import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.nn import NORMS, LayerNorm, layer_norm, norm, rms_norm


def plain(x, scale, bias, eps):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps) * scale + bias


def test_layer_norm_and_its_gradient_equal_the_formula():
    rng = np.random.default_rng(0)
    x, scale, bias, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 7), (7,), (7,), (2, 5, 7)))
    x = 3 * x + 20   # a mean far from zero
    ours = jax.value_and_grad(lambda *a: (weight * layer_norm(*a, 1e-6)).sum(), (0, 1, 2))(x, scale, bias)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in (x, scale, bias)]
        truth = jax.value_and_grad(lambda *a: (np.asarray(weight, np.float64) * plain(*a, 1e-6)).sum(), (0, 1, 2))(*wide)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(truth)):
        assert np.abs(a - np.asarray(b)).max() <= 2e-5 * np.abs(b).max()


def test_statistics_are_float32_whatever_the_dtype():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 300)) + 10, jnp.bfloat16)
    y, variables = LayerNorm(dtype="bfloat16").init_with_output(jax.random.key(0), x)
    assert y.dtype == jnp.bfloat16 and variables["params"]["scale"].dtype == jnp.float32
    exact = plain(x.astype(jnp.float32), 1.0, 0.0, 1e-6)
    assert float(jnp.abs(y.astype(jnp.float32) - exact).max()) <= 2 ** -8 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_and_its_gradient_equal_the_formula(offset):
    rng = np.random.default_rng(0)
    x, scale, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 5, 7), (7,), (2, 5, 7)))

    def formula(x, scale):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-3) * (offset + scale)

    def results(function):
        return jax.tree.leaves(jax.value_and_grad(lambda x, scale: (weight * function(x, scale)).sum(), (0, 1))(x, scale))
    for ours, expected in zip(results(lambda x, scale: rms_norm(x, scale, 1e-3, offset)), results(formula)):
        np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, reference, start", [("rms", "LlamaRMSNorm", 1.0), ("rms_plus_one", "GemmaRMSNorm", 0.0)])
def test_rms_norms_equal_transformers_in_either_dtype(kind, reference, start):
    """In bfloat16 our error is no larger than the reference's own."""
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.models." + {"rms": "llama.modeling_llama", "rms_plus_one": "gemma.modeling_gemma"}[kind])
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(4, 129)).astype(np.float32), rng.normal(size=129).astype(np.float32)
    theirs = getattr(module, reference)(129, eps=1e-5)
    theirs.weight.data = torch.tensor(scale)
    exact = theirs(torch.tensor(x)).detach().numpy()
    variables = norm(kind, 1e-5).init(jax.random.key(0), x)
    np.testing.assert_array_equal(variables["params"]["scale"], np.full(129, start))
    params = {"params": {"scale": scale}}
    np.testing.assert_allclose(norm(kind, 1e-5).apply(params, x), exact, rtol=2e-6, atol=2e-6)
    half = jnp.asarray(x, jnp.bfloat16)
    rounded = theirs(torch.tensor(np.asarray(half.astype(jnp.float32)))).detach().numpy()
    error = np.abs(norm(kind, 1e-5, dtype="bfloat16").apply(params, half).astype(jnp.float32) - rounded).max()
    reference_error = (theirs.bfloat16()(torch.tensor(np.asarray(half.astype(jnp.float32))).bfloat16()).float().detach().numpy() - rounded)
    assert error <= 1.05 * np.abs(reference_error).max()


def test_kinds_by_name():
    x = jnp.ones((2, 3))
    params = {kind: set(norm(kind).init(jax.random.key(0), x).get("params", {})) for kind in NORMS}
    assert params == {"layer": {"scale", "bias"}, "layer_no_bias": {"scale"}, "layer_plain": set(), "rms": {"scale"}, "rms_plus_one": {"scale"}}
    scale = {"params": {"scale": jnp.array([1.0, 2.0, 3.0])}}
    np.testing.assert_allclose(norm("layer_no_bias").apply(scale, jnp.array([1.0, 2.0, 6.0])),
                               layer_norm(jnp.array([1.0, 2.0, 6.0]), scale["params"]["scale"], jnp.zeros(3), 1e-6))
    with pytest.raises(ConfigError, match='norm: "rsm" is unknown. Did you mean "rms"'):
        norm("rsm")

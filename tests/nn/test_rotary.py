import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.nn import apply_rotary, check_rotary, rotary

LONG = dict(factor=4.0, original_max_position_embeddings=24)
SCALINGS = {
    "default": {},
    "linear": dict(factor=3.0),
    "dynamic": dict(factor=2.0),
    "llama3": dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    "yarn": dict(LONG),
    "yarn with all settings": dict(LONG, beta_fast=20.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.9, truncate=False),
    "yarn amplitude": dict(LONG, attention_factor=1.3),
    "longrope": dict(LONG, short_factor=None, long_factor=None),
}


@pytest.mark.parametrize("head_dim, fraction, theta", [(16, 1.0, 10_000.0), (24, 0.5, 500_000.0), (10, 0.4, 1000.0), (6, 1.0, 10_000.0)])
@pytest.mark.parametrize("case", SCALINGS)
def test_equals_transformers(case, head_dim, fraction, theta):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    kind, settings = case.split()[0], dict(SCALINGS[case])
    pairs = int(head_dim * fraction) // 2
    if kind == "longrope":
        rng = np.random.default_rng(0)
        settings.update(short_factor=list(rng.uniform(1, 2, pairs)), long_factor=list(rng.uniform(2, 5, pairs)))
    parameters = dict(rope_type=kind, rope_theta=theta, partial_rotary_factor=fraction, **settings)
    config = transformers.LlamaConfig(hidden_size=3 * head_dim, head_dim=head_dim, num_attention_heads=3, max_position_embeddings=32,
                                      rope_parameters=parameters)
    if kind == "default":
        frequencies = 1.0 / theta ** (torch.arange(0, 2 * pairs, 2).float() / (2 * pairs))
        positions = np.array([[0, 1, 5, 100]])
        cosines, sines = rotary(positions, head_dim, theta=theta, fraction=fraction)
        angles = positions[..., None] * frequencies.numpy()
        np.testing.assert_allclose(cosines, np.cos(angles), atol=2e-5)
        np.testing.assert_allclose(sines, np.sin(angles), atol=2e-5)
        return
    scaling = dict(kind=kind, **settings, **(dict(max_position_embeddings=32) if kind == "dynamic" else {}))
    for last in (7, 40):   # inside and beyond the trained context
        positions = np.array([[0, 1, 3, last], [2, 5, 6, 7]])
        their_cosines, their_sines = llama.LlamaRotaryEmbedding(config)(torch.zeros(1), torch.tensor(positions))
        cosines, sines = jax.jit(lambda p: rotary(p, head_dim, theta=theta, fraction=fraction, scaling=scaling))(positions)
        assert cosines.dtype == jnp.float32 and cosines.shape == (2, 4, pairs)
        np.testing.assert_allclose(cosines, their_cosines[..., :pairs].numpy(), atol=2e-5)
        np.testing.assert_allclose(sines, their_sines[..., :pairs].numpy(), atol=2e-5)


def test_rotation_equals_transformers_and_leaves_the_rest():
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 10)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [7, 7, 9, 11, 20]])
    cosines, sines = rotary(positions, 10, fraction=0.6)
    twice = [torch.tensor(np.concatenate([np.asarray(a), np.asarray(a)], -1)) for a in (cosines, sines)]
    theirs, _ = llama.apply_rotary_pos_emb(torch.tensor(x[..., :6]).transpose(1, 2), torch.zeros(2, 3, 5, 6), *twice)
    ours = apply_rotary(jnp.asarray(x), cosines, sines)
    np.testing.assert_allclose(ours[..., :6], theirs.transpose(1, 2).numpy(), atol=1e-6)
    np.testing.assert_array_equal(ours[..., 6:], x[..., 6:])
    assert apply_rotary(jnp.asarray(x, jnp.bfloat16), cosines, sines).dtype == jnp.bfloat16


def test_only_distances_matter():
    query, key = np.random.default_rng(0).normal(size=(2, 1, 1, 1, 8)).astype(np.float32)

    def product(a, b):
        return float((apply_rotary(query, *rotary(np.array([[a]]), 8)) * apply_rotary(key, *rotary(np.array([[b]]), 8))).sum())
    np.testing.assert_allclose(product(3, 1), product(103, 101), rtol=1e-4)


@pytest.mark.parametrize("settings, message", [
    (dict(head_dim=7, fraction=1.0), "fraction=1.0 of a head of 7 features rotates 7"),
    (dict(head_dim=8, fraction=0.4, scaling=dict(LONG, kind="yarn")), "yarn. needs an even number"),
    (dict(head_dim=8, fraction=1.5), "rotates 12"),
    (dict(head_dim=8, theta=0.0), "theta=0.0"),
    (dict(head_dim=8, scaling=dict(kind="yarm", factor=2.0)), 'the kind "yarm" is unknown.*Did you mean "yarn"'),
    (dict(head_dim=8, scaling=dict(kind="linear")), 'kind "linear" needs factor'),
    (dict(head_dim=8, scaling=dict(kind="linear", factor=2.0, beta_fast=3)), 'kind "linear" takes no beta_fast'),
    (dict(head_dim=8, scaling=dict(LONG, kind="longrope", short_factor=[1.0] * 3, long_factor=[1.0] * 4)), "short_factor has 3 numbers .* give 4"),
    (dict(head_dim=2, scaling=dict(kind="dynamic", factor=2.0, max_position_embeddings=8)), "at least 4 rotated features"),
])
def test_errors_name_the_setting(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_rotary(settings.pop("head_dim"), **settings)

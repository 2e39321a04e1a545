"""The Perceiver Resampler against transformers' and against a NumPy formula; frames; precision; errors."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.connectors.resampler import PerceiverResampler, frame_rows
from vlm_jax.errors import ConfigError

RNG = np.random.default_rng(0)
SIZES = dict(num_latents=5, depth=3, num_heads=3, head_dim=7, mlp_ratio=4)


def relative_error(ours, theirs) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max())


def drawn(resampler: PerceiverResampler, features) -> dict:
    """Parameters, all of them random: ones and zeros would hide swapped ones."""
    shapes = jax.eval_shape(resampler.init, jax.random.key(0), features)["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) * (0.3 if leaf.ndim > 2 else 1)).astype(np.float32), shapes)


def layer_norm(x, p, eps=1e-5):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def reference(params, features, heads, head_dim, act=lambda x: np.maximum(x, 0) ** 2):
    """Appendix A.1.1 in float64, head by head."""
    batch, frames, tokens, _ = features.shape
    x = features.astype(np.float64)
    if "projection" in params:
        x = x @ params["projection"]["kernel"]
    if "frame_embedding" in params:
        known = len(params["frame_embedding"])
        time = np.arange(frames) if frames <= known else np.linspace(0, known - 1, frames)
        table = np.stack([np.interp(time, np.arange(known), column) for column in params["frame_embedding"].T], axis=1)
        x = x + table[:, None]
    x = x.reshape(batch, frames * tokens, -1)
    latents = np.repeat(params["latents"][None].astype(np.float64), batch, axis=0)
    blocks = params["blocks"]
    for i in range(blocks["attention"]["out"]["kernel"].shape[0]):
        p = jax.tree.map(lambda leaf, i=i: leaf[i].astype(np.float64), blocks)
        a = p["attention"]
        own = layer_norm(latents, a["norm_latents"])
        context = np.concatenate([layer_norm(x, a["norm_features"]), own], axis=1)
        added = np.zeros_like(latents)
        for h in range(heads):
            q, k, v = own @ a["query"]["kernel"][:, h], context @ a["key"]["kernel"][:, h], context @ a["value"]["kernel"][:, h]
            if "query_norm" in a:
                q, k = layer_norm(q, a["query_norm"]), layer_norm(k, a["key_norm"])
            logits = np.einsum("brk,bsk->brs", q, k) / np.sqrt(head_dim)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            added += np.einsum("brs,bsk->brk", weights / weights.sum(-1, keepdims=True), v) @ a["out"]["kernel"][h]
        latents = latents + added
        latents = latents + act(layer_norm(latents, p["norm_mlp"]) @ p["mlp"]["up"]["kernel"]) @ p["mlp"]["down"]["kernel"]
    return layer_norm(latents, params["norm"])


@pytest.mark.parametrize("frames, options", [(1, {}), (3, dict(width=9)), (7, dict(qk_norm="layer", scan=False)), (5, dict(frame_embedding=False))])
def test_squared_relu_and_time_follow_the_formula(frames, options):
    resampler = PerceiverResampler(**SIZES, max_frames=4, **options)
    features = RNG.normal(size=(2, frames, 6, 11)).astype(np.float32)
    params = drawn(resampler, features)
    tokens, out = jax.jit(resampler.apply)({"params": params}, features)
    width = options.get("width", 11)
    assert tokens.shape == (2, 5, width) and out["blocks"]["output"].shape == (3, 2, 5, width) and out["features"].shape == (2, frames * 6, width)
    assert relative_error(tokens, reference(params, features, 3, 7)) < 1e-5
    assert ("frame_embedding" in params) == options.get("frame_embedding", True) and ("projection" in params) == ("width" in options)
    assert not any("bias" in name for name in params["blocks"]["mlp"]["up"])


@pytest.mark.parametrize("qk_norm", [None, "layer"])
def test_parity_with_transformers(qk_norm):
    torch = pytest.importorskip("torch")
    idefics = pytest.importorskip("transformers.models.idefics")
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
    config = idefics.IdeficsConfig(vision_config=dict(embed_dim=22), perceiver_config=dict(qk_layer_norms_perceiver=qk_norm is not None))
    torch.manual_seed(0)
    theirs = IdeficsPerceiverResampler(config, 22, 3, 3, 7, 5).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}

    def stacked(name, change=lambda x: x):
        return np.stack([change(state[f"blocks.{i}.{name}"]) for i in range(3)])

    def norm(name):
        return {"scale": stacked(f"{name}.weight"), "bias": stacked(f"{name}.bias")}

    def kernel(name, shape):
        return {"kernel": stacked(f"{name}.weight", lambda x: x.T.reshape(shape))}
    attention = {name: kernel(f"0.{name[0]}_proj", (22, 3, 7)) for name in ("query", "key", "value")}
    attention.update(out=kernel("0.output_proj", (3, 7, 22)), norm_features=norm("0.context_layer_norm"), norm_latents=norm("0.latents_layer_norm"))
    if qk_norm:
        attention.update(query_norm=norm("0.q_layer_norm"), key_norm=norm("0.k_layer_norm"))
    params = dict(latents=state["latents"], norm=dict(scale=state["layer_norm.weight"], bias=state["layer_norm.bias"]),
                  blocks=dict(attention=attention, norm_mlp=norm("1.ln"), mlp=dict(up=kernel("1.fc", (22, 88)), down=kernel("1.c_proj", (88, 22)))))
    resampler = PerceiverResampler(**SIZES, activation="relu", qk_norm=qk_norm, frame_embedding=False)
    features = RNG.normal(size=(2, 1, 13, 22)).astype(np.float32)
    made = jax.eval_shape(resampler.init, jax.random.key(0), features)["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, made) == jax.tree.map(lambda leaf: leaf.shape, params)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(features[:, 0])).numpy()
    assert relative_error(jax.jit(resampler.apply)({"params": params}, features)[0], expected) < 1e-5


def test_frames_have_the_embedding_of_their_time():
    table = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
    np.testing.assert_array_equal(frame_rows(table, 1), table[:1])
    np.testing.assert_array_equal(frame_rows(table, 8), table)
    np.testing.assert_allclose(frame_rows(table, 15)[::2], table, atol=1e-6)
    np.testing.assert_allclose(frame_rows(table, 15)[1::2], (table[:-1] + table[1:]) / 2, atol=1e-6)
    np.testing.assert_allclose(frame_rows(table, 30)[::29], table[::7], atol=1e-6)
    np.testing.assert_array_equal(frame_rows(table[:1], 3), jnp.tile(table[:1], (3, 1)))


def test_the_order_of_frames_matters_and_that_of_places_does_not():
    resampler = PerceiverResampler(**SIZES, max_frames=4)
    features = RNG.normal(size=(1, 3, 6, 11)).astype(np.float32)
    params = drawn(resampler, features)
    apply = jax.jit(lambda x: resampler.apply({"params": params}, x)[0])
    tokens = apply(features)
    np.testing.assert_allclose(apply(features[:, :, ::-1]), tokens, atol=1e-4)
    assert np.abs(apply(features[:, ::-1]) - tokens).max() > 0.01


def test_bfloat16_computes_in_it_and_gives_float32():
    resampler = PerceiverResampler(**SIZES, dtype="bfloat16", width=12)
    features = RNG.normal(size=(2, 2, 6, 11)).astype(np.float32)
    params = drawn(resampler, features)
    tokens, out = jax.jit(resampler.apply)({"params": params}, features)
    assert tokens.dtype == out["blocks"]["output"].dtype == jnp.float32
    exact = PerceiverResampler(**SIZES, width=12).apply({"params": params}, features)[0]
    assert 1e-4 < relative_error(tokens, exact) < 0.1


def test_the_published_size():
    resampler = PerceiverResampler(width=1536, head_dim=128)
    shapes = jax.eval_shape(resampler.init, jax.random.key(0), jnp.zeros((1, 1, 2, 3072)))["params"]
    # The paper's table says 194M, which keys of 128 numbers a head give, those of its first version.
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 6 * (4 * 1536 * 2048 + 8 * 1536 ** 2 + 6 * 1536) + (64 + 8 + 2 + 3072) * 1536 == 193_631_232


@pytest.mark.parametrize("settings, shape, message", [
    ({}, (2, 6, 11), r"features have shape \(2, 6, 11\); give \[batch, frames, tokens, width\]"),
    (dict(qk_norm="rms"), (2, 1, 6, 11), 'qk_norm: "rms" is unknown'),
    (dict(num_latents=0), (2, 1, 6, 11), "num_latents is 0"),
    (dict(activation="squared"), (2, 1, 6, 11), 'activation: "squared" is unknown'),
])
def test_errors(settings, shape, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(PerceiverResampler(**{**SIZES, **settings}).init, jax.random.key(0), jnp.zeros(shape))

"""Small language models for the tests of this folder: every way of the settings in odd sizes, with perturbed parameters."""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax import registry

SIZES = dict(vocab_size=61, width=24, depth=3, mlp_dim=40, num_heads=6, max_positions=40)
LAYER = dict(norm="layer", norm_eps=1e-5, activation="gelu", gated=False, biases=("query", "key", "value", "out", "up", "down"))
DECODERS = {
    "llama": dict(SIZES, num_kv_heads=2, tied=False, biases=("query", "key", "value")),
    "gemma2": dict(SIZES, num_kv_heads=3, head_dim=10, norm="rms_plus_one", norm_place="both", activation="gelu_tanh", window=3, windowed=(True, False),
                   attention_soft_cap=2.0, logits_soft_cap=3.0, attention_scale=0.3, embed_scale=24 ** 0.5),
    "gemma3": dict(SIZES, num_kv_heads=1, head_dim=8, norm="rms_plus_one", norm_place="both", qk_norm="rms_plus_one", window=4, windowed=(True, True, False),
                   rope=dict(theta=500.0, local_theta=30.0, scaling=dict(kind="linear", factor=4.0))),
    "gpt2": dict(SIZES, **LAYER, positions="learned"),
    "opt": dict(SIZES, **LAYER, positions="learned", position_offset=2, embed_dim=14, norm_place="post", final_norm=False),
    "neox": dict(SIZES, **LAYER, head_dim=8, rope=dict(fraction=0.5), parallel=True, tied=False),
    "phi": dict(SIZES, **{**LAYER, "biases": (*LAYER["biases"], "head")}, parallel=True, shared_norm=True, tied=False, clip_qkv=1.5),
    "mpt": dict(SIZES, norm="layer_no_bias", activation="gelu", gated=False, positions="alibi"),
    "mistral": dict(SIZES, num_kv_heads=3, window=4),
}
T5 = dict(vocab_size=61, width=24, encoder_depth=2, decoder_depth=3, mlp_dim=40, num_heads=3, head_dim=10)
ENCODER_DECODERS = {
    "t5": dict(T5, head_scale=24 ** -0.5, relative=dict(buckets=8, max_distance=12)),
    "umt5": dict(T5, tied=False, activation="gelu_tanh", gated=True, relative=dict(buckets=8, max_distance=12, shared=False)),
    "pix2struct": dict(T5, tied=False, relative=dict(encoder=False)),
}


def tokens_of(rows: int, length: int, seed: int = 0) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 61, (rows, length)), jnp.int32)


@functools.cache
def made(family: str, name: str, **settings):
    """(model, parameters) of an entry of the tables above; the parameters are random, so that none is all zeros or ones."""
    table = DECODERS if family == "decoder" else ENCODER_DECODERS
    model = registry.build(family, **{**table[name], **settings})
    inputs = {key: jnp.zeros((1, *shape), jnp.int32) for key, shape in model.input_shapes().items()}
    return model, drawn(jax.eval_shape(model.init, jax.random.key(0), inputs)["params"])


def drawn(shapes, seed=1):
    """Random parameters of these shapes: scales around one, kernels about as large as they begin."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        values = rng.normal(size=leaf.shape) * 0.2
        return jnp.asarray(values + 1.0 if path[-1].key == "scale" else values, jnp.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def padded(tokens, lengths, side):
    """Rows of the given lengths with padding of any ids: (tokens, valid)."""
    place = np.arange(tokens.shape[1])[None]
    lengths = np.asarray(lengths)[:, None]
    valid = {"right": place < lengths, "left": place >= tokens.shape[1] - lengths, "between": (place < lengths - 1) | (place == tokens.shape[1] - 1)}[side]
    out = np.full(tokens.shape, 1000)
    for row in range(len(out)):
        out[row, valid[row]] = np.asarray(tokens[row, :lengths[row, 0]])
    return jnp.asarray(out, jnp.int32), jnp.asarray(valid)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all() and np.isfinite(b).all()
    return np.abs(a - b).max() / np.abs(b).max()

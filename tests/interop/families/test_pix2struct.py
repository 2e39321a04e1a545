"""Pix2Struct beside transformers on random, perturbed weights: logits over padded patches and targets, cache, and the way back."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import parity
from tests.models.generative import load
from vlm_jax.data.images import FlexiblePatches
from vlm_jax.errors import ConfigError
from vlm_jax.interop import table
from vlm_jax.interop.families.pix2struct import FAMILY
from vlm_jax.interop.safetensors import write_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = dict(hidden_size=18, d_kv=6, d_ff=22, num_heads=3, num_layers=2, vocab_size=51, dropout_rate=0.0)
VISION = dict(hidden_size=18, patch_embed_hidden_size=27, d_kv=5, d_ff=30, num_attention_heads=2, num_hidden_layers=3, seq_len=16, layer_norm_eps=1e-5)
SAME = dict(VISION, d_kv=6, d_ff=22, num_attention_heads=3, layer_norm_eps=1e-6)


@pytest.fixture(scope="module", params=["other sizes", "same sizes, tied"])
def pair(request, tmp_path_factory):
    torch.manual_seed(0)
    tied = request.param.endswith("tied")
    config = transformers.Pix2StructConfig(text_config=dict(TEXT), vision_config=dict(SAME if tied else VISION), tie_word_embeddings=tied)
    reference = parity.perturb(transformers.Pix2StructForConditionalGeneration(config))
    folder = tmp_path_factory.mktemp("pix2struct")
    reference.save_pretrained(folder)
    return reference, folder, *load(folder)[1:]


def patches(rows: int) -> np.ndarray:
    rng = np.random.default_rng(rows)
    operation = FlexiblePatches(11, 3)
    return np.stack([operation(rng.integers(0, 256, (*rng.integers(6, 30, 2), 3), np.uint8)) for _ in range(rows)])


@pytest.mark.parametrize("rows", [1, 5])
def test_logits_and_cache_equal(pair, rows):
    reference, _, model, params = pair
    pictures = patches(rows)
    assert rows == 1 or (pictures[..., 0] == 0).any()
    targets = np.random.default_rng(rows).integers(2, 51, (rows, 7))
    valid = np.arange(7) < np.random.default_rng(rows + 1).integers(3, 8, (rows, 1))
    shifted = np.concatenate([np.zeros((rows, 1), int), targets[:, :-1]], 1)
    keep = np.concatenate([np.ones((rows, 1), bool), valid[:, :-1]], 1)
    with torch.no_grad():
        expected = reference(flattened_patches=torch.from_numpy(pictures), attention_mask=torch.from_numpy((pictures[..., 0] > 0).astype(np.float32)),
                             decoder_input_ids=torch.from_numpy(shifted), decoder_attention_mask=torch.from_numpy(keep.astype(np.int64))).logits.numpy()
    variables = {"params": params}
    logits, _ = jax.jit(model.apply)(variables, dict(patches=pictures, targets=targets, target_valid=valid))
    assert parity.relative_error(logits[keep], expected[keep]) <= parity.FLOAT32_MODEL
    first, cache = jax.jit(lambda inputs: model.apply(variables, inputs, 8, method="start"))(dict(patches=pictures))
    assert parity.relative_error(first, expected[:, 0]) <= parity.FLOAT32_MODEL
    rest, _ = jax.jit(lambda tokens, valid, cache: model.apply(variables, tokens, cache, valid, method="extend"))(
        jnp.asarray(targets[:, :-1]), valid[:, :-1], cache)
    assert parity.relative_error(rest[keep[:, 1:]], expected[:, 1:][keep[:, 1:]]) <= parity.FLOAT32_MODEL


def test_the_way_back_is_exact_and_transformers_loads_it(pair, tmp_path):
    from safetensors.numpy import load_file
    _, folder, model, params = pair
    write_file(str(tmp_path / "model.safetensors"), table.write(FAMILY.rows(model), params), {"format": "pt"})
    original, written = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert written.keys() == original.keys() and all(np.array_equal(written[name], original[name]) for name in original)
    config = FAMILY.to_config(model)
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, report = transformers.Pix2StructForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert FAMILY.to_settings(config) == FAMILY.to_settings(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("text, vision, message", [
    (dict(d_kv=5), {}, "d_kv"), ({}, dict(hidden_size=20), "hidden_size is not config.json.text_config.hidden_size=18"),
    ({}, dict(patch_embed_hidden_size=28), "28 values are no square patch"), (dict(num_layers=-1), {}, "num_layers"),
])
def test_config_errors(text, vision, message):
    with pytest.raises(ConfigError, match=message):
        FAMILY.to_settings(dict(model_type="pix2struct", text_config={**TEXT, **text}, vision_config={**VISION, **vision}))

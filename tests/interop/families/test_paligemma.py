"""PaliGemma 1 and 2 beside transformers on random, perturbed weights: logits, masks, padding, cache, and the way back."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import parity
from tests.models.generative import load
from vlm_jax.errors import ConfigError
from vlm_jax.interop import table
from vlm_jax.interop.families.paligemma import FAMILY
from vlm_jax.interop.safetensors import write_file

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE = 60
VISION = dict(model_type="siglip_vision_model", hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3, image_size=21, patch_size=7,
              vision_use_head=False)
TEXTS = {
    "gemma": dict(model_type="gemma", hidden_size=20, intermediate_size=36, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1, head_dim=6,
                  vocab_size=61),
    "gemma2": dict(model_type="gemma2", hidden_size=20, intermediate_size=36, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
                   vocab_size=61, query_pre_attn_scalar=7, sliding_window=5),
}
LENGTH, PREFIX = 16, 12   # nine image tokens, three of the prompt, and the answer


@pytest.fixture(scope="module", params=list(TEXTS))
def pair(request, tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.PaliGemmaConfig(vision_config=dict(VISION), text_config=dict(TEXTS[request.param]), projection_dim=20, hidden_size=20,
                                          image_token_index=IMAGE, vocab_size=61)
    reference = parity.perturb(transformers.PaliGemmaForConditionalGeneration(config)).eval()
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    return reference, folder, *load(folder)[1:]


def sample(rows: int, left: int = 0, right: int = 0):
    rng = np.random.default_rng(rows)
    total = left + LENGTH + right
    tokens = rng.integers(1, 59, (rows, total))
    tokens[:, left:left + 9] = IMAGE
    slots = np.full((rows, total), -1)
    slots[:, left:left + 9] = np.arange(9)
    valid = np.zeros((rows, total), bool)
    valid[:, left:left + LENGTH] = True
    prefix = np.zeros((rows, total), bool)
    prefix[:, :left + PREFIX] = True
    images = rng.normal(size=(rows, 1, 21, 21, 3)).astype(np.float32)
    return dict(tokens=tokens, slots=slots, valid=valid, prefix=prefix & valid, images=images)


def theirs(reference, inputs, types=True):
    pixels = torch.from_numpy(inputs["images"][:, 0].transpose(0, 3, 1, 2).copy())
    kinds = dict(token_type_ids=torch.from_numpy((~inputs["prefix"] & inputs["valid"]).astype(np.int64))) if types else {}
    with torch.no_grad():
        return reference(input_ids=torch.from_numpy(inputs["tokens"]), pixel_values=pixels, attention_mask=torch.from_numpy(inputs["valid"].astype(np.int64)),
                         **kinds).logits.numpy()


@pytest.mark.parametrize("rows, left, right", [(1, 0, 0), (5, 2, 0), (2, 0, 3)])
def test_logits_equal_with_prefix_and_padding(pair, rows, left, right):
    reference, _, model, params = pair
    inputs = sample(rows, left, right)
    logits, _ = jax.jit(model.apply)({"params": params}, inputs)
    expected = theirs(reference, inputs)
    assert parity.relative_error(logits[inputs["valid"]], expected[inputs["valid"]]) <= parity.FLOAT32_MODEL


def test_the_suffix_is_causal_and_the_prefix_is_not(pair):
    _, _, model, params = pair
    inputs = sample(1)
    apply = jax.jit(lambda tokens: model.apply({"params": params}, {**inputs, "tokens": tokens})[0])
    before = apply(inputs["tokens"])
    changed = inputs["tokens"].copy()
    changed[0, 14] = 1 + changed[0, 14] % 50
    np.testing.assert_array_equal(apply(changed)[0, :14], before[0, :14])
    changed = inputs["tokens"].copy()
    changed[0, 11] = 1 + changed[0, 11] % 50
    assert float(np.abs(apply(changed)[0, 8:11] - before[0, 8:11]).max()) > 1e-4


def test_cached_logits_equal_uncached_and_the_reference(pair):
    reference, _, model, params = pair
    inputs = sample(2)
    expected = theirs(reference, inputs)
    prompt = {name: value[:, :PREFIX] if name != "images" else value for name, value in inputs.items()}
    variables = {"params": params}
    logits, cache = jax.jit(lambda inputs: model.apply(variables, inputs, LENGTH, method="start"))(prompt)
    assert parity.relative_error(logits, expected[:, PREFIX - 1]) <= parity.FLOAT32_MODEL
    logits, _ = jax.jit(lambda tokens, cache: model.apply(variables, tokens, cache, method="extend"))(jnp.asarray(inputs["tokens"][:, PREFIX:]), cache)
    assert parity.relative_error(logits, expected[:, PREFIX:]) <= parity.FLOAT32_MODEL


def test_the_way_back_is_exact_and_transformers_loads_it(pair, tmp_path):
    reference, folder, model, params = pair
    tensors = table.write(FAMILY.rows(model), params)
    write_file(str(tmp_path / "model.safetensors"), tensors, {"format": "pt"})
    original = parity_file(folder / "model.safetensors")
    written = parity_file(tmp_path / "model.safetensors")
    assert written.keys() == original.keys()
    assert all(np.array_equal(written[name], original[name]) for name in original)
    (tmp_path / "config.json").write_text(json.dumps(FAMILY.to_config(model)))
    loaded, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert FAMILY.to_settings(FAMILY.to_config(model)) == FAMILY.to_settings(json.loads((folder / "config.json").read_text()))
    inputs = sample(1)
    np.testing.assert_array_equal(theirs(loaded.eval(), inputs), theirs(reference, inputs))


def parity_file(path):
    from safetensors.numpy import load_file
    return load_file(path)


def test_names_of_the_releases_are_read(pair):
    _, folder, model, params = pair
    tensors = parity_file(folder / "model.safetensors")
    older = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in tensors.items()}
    older["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"]
    newer = {"model." + name.replace("language_model.model.", "language_model."): value for name, value in tensors.items()}
    newer["lm_head.weight"] = older["language_model.lm_head.weight"]
    shapes = jax.eval_shape(lambda: params)
    for names in (older, newer):
        read = table.read(FAMILY.rows(model), table.Arrays(names), shapes, renames=FAMILY.renames)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b), read, params)))


@pytest.mark.parametrize("change, message", [
    (dict(projection_dim=21), "projection_dim: 21 is not the width of the text model, 20"),
    (dict(text_config=dict(TEXTS["gemma"], model_type="llama")), 'text_config.model_type: .llama. is not supported'),
    (dict(vision_config=dict(VISION, hidden_size="24")), "vision_config.hidden_size"),
    (dict(vision_config=None), "vision_config is missing"),
])
def test_config_errors(change, message):
    config = dict(model_type="paligemma", projection_dim=20, text_config=TEXTS["gemma"], vision_config=VISION)
    with pytest.raises(ConfigError, match=message):
        FAMILY.to_settings({**config, **change})

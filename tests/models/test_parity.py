"""The same numbers as transformers' SiglipModel and CLIPModel, on random, perturbed weights and odd shapes: outputs, gradients and bfloat16."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import parity
from vlm_jax.encoders.vit import Vit
from vlm_jax.models.dual_encoder import DualEncoder
from vlm_jax.nn import TransformerBlock

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PICTURES = np.random.default_rng(0).normal(size=(3, 23, 23, 3)).astype(np.float32)   # 23 = 3 patches of 7 and two pixels left over
HEADS, WIDTH = 3, 36


def torch_pictures(pictures=PICTURES, dtype=torch.float32):
    return torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()).to(dtype)


@pytest.fixture(scope="module", autouse=True)
def seed():
    torch.manual_seed(0)   # the classes initialise themselves from the global generator


def compare_gradients(ours, reference, tolerance):
    flat = dict(jax.tree_util.tree_flatten_with_path(ours)[0])
    # One scale for the whole tree: the gradient of a key's bias is zero but for rounding.
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(reference))
    for path, leaf in jax.tree_util.tree_flatten_with_path(reference)[0]:
        assert flat.pop(path).shape == leaf.shape, path
    assert not flat
    errors = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()) / max(float(np.abs(b).max()), 1e-3 * scale), ours, reference)
    worst = max(jax.tree_util.tree_flatten_with_path(errors)[0], key=lambda item: item[1])
    assert worst[1] <= tolerance, worst


@pytest.fixture(scope="module")
def siglip_pair():
    sizes = dict(hidden_size=WIDTH, intermediate_size=52, num_attention_heads=HEADS, attention_dropout=0.0)
    config = transformers.SiglipConfig(
        vision_config=dict(sizes, num_hidden_layers=3, image_size=23, patch_size=7),
        text_config=dict(sizes, num_hidden_layers=2, vocab_size=41, max_position_embeddings=5, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    reference = parity.perturb(transformers.SiglipModel(config))
    common = dict(width=WIDTH, mlp_dim=52, num_heads=HEADS)
    model = DualEncoder(image=dict(common, image_size=23, patch_size=7, depth=3), text=dict(common, vocab_size=41, length=5, depth=2),
                        embed_dim=WIDTH, scan=False)
    params = parity.siglip(parity.numpy_state(reference), 3, 2, HEADS)
    tokens = np.random.default_rng(1).integers(0, 41, (3, 5))
    return reference, model, params, tokens


@pytest.fixture(scope="module")
def clip_pair():
    config = transformers.CLIPConfig(
        projection_dim=10,
        vision_config=dict(hidden_size=WIDTH, intermediate_size=52, num_attention_heads=HEADS, num_hidden_layers=2, image_size=23, patch_size=7,
                           projection_dim=10),
        text_config=dict(hidden_size=24, intermediate_size=40, num_attention_heads=2, num_hidden_layers=3, vocab_size=41, max_position_embeddings=6,
                         eos_token_id=40, bos_token_id=0, pad_token_id=1, projection_dim=10))
    reference = parity.perturb(transformers.CLIPModel(config))
    options = dict(activation="quick_gelu", norm_eps=1e-5, projection="linear_no_bias")
    model = DualEncoder(
        image=dict(options, width=WIDTH, mlp_dim=52, num_heads=HEADS, image_size=23, patch_size=7, depth=2, pool="cls", patch_bias=False,
                   norm_before=True),
        text=dict(options, width=24, mlp_dim=40, num_heads=2, vocab_size=41, length=6, depth=3, causal=True, pool="eot", eot_id=40),
        embed_dim=10, loss="softmax")
    params = parity.clip(parity.numpy_state(reference), 2, 3, HEADS, 2)
    tokens = np.random.default_rng(1).integers(2, 40, (3, 6))
    for row, end in enumerate((5, 2, 3)):
        tokens[row, end] = 40
    return reference, model, params, tokens


def sigmoid_loss(embeddings, out):
    image, text = embeddings
    logits = jnp.exp(out["logit_scale"]) * text @ image.T + out["logit_bias"]
    signs = 2 * jnp.eye(len(image)) - 1
    return -jax.nn.log_sigmoid(signs * logits).sum() / len(image)


def softmax_loss(embeddings, out):
    image, text = embeddings
    logits = jnp.exp(out["logit_scale"]) * text @ image.T
    return -0.5 * (jnp.diag(jax.nn.log_softmax(logits, 0)).mean() + jnp.diag(jax.nn.log_softmax(logits, 1)).mean())


@pytest.mark.parametrize("name, loss, convert", [("siglip_pair", sigmoid_loss, lambda s: parity.siglip(s, 3, 2, HEADS)),
                                                 ("clip_pair", softmax_loss, lambda s: parity.clip(s, 2, 3, HEADS, 2))])
def test_model_and_gradients_match_transformers(name, loss, convert, request):
    reference, model, params, tokens = request.getfixturevalue(name)
    reference.zero_grad()
    expected = reference(input_ids=torch.from_numpy(tokens), pixel_values=torch_pictures(), return_loss=True)
    expected.loss.backward()

    def ours(params):
        embeddings, out = model.apply({"params": params}, PICTURES, tokens)
        return loss(embeddings, out), (embeddings, out)

    (value, ((image, text), out)), gradients = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    with torch.no_grad():
        assert parity.relative_error(image, expected.image_embeds) <= parity.FLOAT32_MODEL
        assert parity.relative_error(text, expected.text_embeds) <= parity.FLOAT32_MODEL
        hidden = reference.vision_model(pixel_values=torch_pictures(), output_hidden_states=True).hidden_states
    assert parity.relative_error(out["image"]["blocks"]["output"], torch.stack(hidden[1:]).numpy()) <= parity.FLOAT32_MODEL
    assert abs(float(value) - expected.loss.item()) <= 1e-4 * abs(expected.loss.item())
    compare_gradients(gradients, convert(parity.numpy_state(reference, gradients=True)), parity.FLOAT32_MODEL)


def test_vision_tower_alone_matches_siglip_vision_model():
    config = transformers.SiglipVisionConfig(hidden_size=20, intermediate_size=28, num_attention_heads=5, num_hidden_layers=1, image_size=23,
                                             patch_size=7)
    reference = parity.perturb(transformers.SiglipVisionModel(config), seed=3)
    state = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in parity.numpy_state(reference).items()}
    vit = Vit(image_size=23, patch_size=7, width=20, depth=1, mlp_dim=28, num_heads=5)
    pooled, out = vit.apply({"params": parity.siglip_image(state, 1, 5)}, PICTURES)
    with torch.no_grad():
        expected = reference(pixel_values=torch_pictures())
    assert parity.relative_error(pooled, expected.pooler_output) <= parity.FLOAT32_MODEL
    assert parity.relative_error(out["tokens"], expected.last_hidden_state) <= parity.FLOAT32_MODEL


@pytest.mark.parametrize("causal, activation", [(False, "gelu_tanh"), (True, "quick_gelu")])
def test_block_matches_transformers(causal, activation):
    if causal:
        config = transformers.CLIPTextConfig(hidden_size=WIDTH, intermediate_size=52, num_attention_heads=HEADS, layer_norm_eps=1e-6,
                                             attn_implementation="eager")
        reference = transformers.models.clip.modeling_clip.CLIPEncoderLayer(config)
        mask = torch.full((7, 7), float("-inf")).triu(1)[None, None]
    else:
        config = transformers.SiglipVisionConfig(hidden_size=WIDTH, intermediate_size=52, num_attention_heads=HEADS, attn_implementation="eager")
        reference, mask = transformers.models.siglip.modeling_siglip.SiglipEncoderLayer(config), None
    reference = parity.perturb(reference)
    params = parity.block({f"layer.{k}": v for k, v in parity.numpy_state(reference).items()}, "layer", HEADS)
    x = np.random.default_rng(2).normal(size=(2, 7, WIDTH)).astype(np.float32)
    with torch.no_grad():
        expected = reference(torch.from_numpy(x), attention_mask=mask)
    expected = expected[0] if isinstance(expected, tuple) else expected
    ours, _ = TransformerBlock(HEADS, 52, activation, causal=causal).apply({"params": params}, x)
    assert parity.relative_error(ours, expected.numpy()) <= parity.FLOAT32_BLOCK


@pytest.mark.parametrize("name", ["siglip_pair", "clip_pair"])
def test_bfloat16_is_no_worse_than_the_reference(name, request):
    import copy
    reference, model, params, tokens = request.getfixturevalue(name)
    half = copy.deepcopy(reference).to(torch.bfloat16)
    pictures = np.random.default_rng(3).normal(size=(18, 23, 23, 3)).astype(np.float32)   # enough that the largest error is no accident
    tokens = np.concatenate([np.where(tokens == 40, 40, (tokens + shift) % 40) for shift in range(6)])
    with torch.no_grad():
        exact = reference(input_ids=torch.from_numpy(tokens), pixel_values=torch_pictures(pictures))
        rounded = half(input_ids=torch.from_numpy(tokens), pixel_values=torch_pictures(pictures, torch.bfloat16))
    (image, text), _ = jax.jit(model.clone(dtype="bfloat16").apply)({"params": params}, pictures, tokens)
    assert image.dtype == jnp.float32
    for ours, other, truth in ((image, rounded.image_embeds, exact.image_embeds), (text, rounded.text_embeds, exact.text_embeds)):
        theirs = parity.relative_error(other.float(), truth)
        assert 1e-4 < parity.relative_error(ours, truth) <= parity.BFLOAT16_FACTOR * theirs

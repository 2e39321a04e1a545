"""PaliGemma 1 and 2 as big_vision publishes them: random weights of transformers, turned round into such an .npz, and read back."""
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.interop.families.test_paligemma import IMAGE, LENGTH, VISION, sample, theirs
from tests.models import parity
import vlm_jax
from vlm_jax import convert
from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.interop.directory import read_parameters
from vlm_jax.sharding import make_mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXT = dict(hidden_size=20, intermediate_size=36, num_hidden_layers=3, num_attention_heads=4, head_dim=6, vocab_size=61, hidden_activation="gelu_pytorch_tanh")
TEXTS = {"gemma": dict(TEXT, model_type="gemma", num_key_value_heads=1), "gemma_all_heads": dict(TEXT, model_type="gemma", num_key_value_heads=4),
         "gemma2": dict(TEXT, model_type="gemma2", num_key_value_heads=2, query_pre_attn_scalar=6)}


def as_big_vision(reference, text, stacked=True):
    """{name: array}: transformers' weights under big_vision's names and in its axes."""
    state = {name.replace("vision_tower.vision_model.", "vision_tower.").replace("model.vision_tower", "vision_tower")
             .replace("model.multi_modal_projector", "multi_modal_projector").replace("model.language_model", "language_model"): value.detach().float().numpy()
             for name, value in reference.state_dict().items()}
    width, heads, groups, size = (text[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    tower = dict(width=VISION["hidden_size"], heads=VISION["num_attention_heads"])
    made = {"img/embedding/kernel": state["vision_tower.embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0),
            "img/embedding/bias": state["vision_tower.embeddings.patch_embedding.bias"],
            "img/pos_embedding": state["vision_tower.embeddings.position_embedding.weight"][None],
            "img/Transformer/encoder_norm/scale": state["vision_tower.post_layernorm.weight"],
            "img/Transformer/encoder_norm/bias": state["vision_tower.post_layernorm.bias"],
            "img/head/kernel": state["multi_modal_projector.linear.weight"].T, "img/head/bias": state["multi_modal_projector.linear.bias"],
            "llm/embedder/input_embedding": state["language_model.embed_tokens.weight"], "llm/final_norm/scale": state["language_model.norm.weight"]}

    def image_layer(i):
        layer = {}
        for one, other in (("layer_norm1", "LayerNorm_0"), ("layer_norm2", "LayerNorm_1")):
            layer[f"{other}/scale"], layer[f"{other}/bias"] = (state[f"vision_tower.encoder.layers.{i}.{one}.{kind}"] for kind in ("weight", "bias"))
        for one, other in (("mlp.fc1", "MlpBlock_0/Dense_0"), ("mlp.fc2", "MlpBlock_0/Dense_1")):
            layer[f"{other}/kernel"] = state[f"vision_tower.encoder.layers.{i}.{one}.weight"].T
            layer[f"{other}/bias"] = state[f"vision_tower.encoder.layers.{i}.{one}.bias"]
        for one, other in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
            weight, bias = (state[f"vision_tower.encoder.layers.{i}.self_attn.{one}.{kind}"] for kind in ("weight", "bias"))
            name = f"MultiHeadDotProductAttention_0/{other}"
            shape = (tower["heads"], -1, tower["width"]) if other == "out" else (tower["width"], tower["heads"], -1)
            layer[f"{name}/kernel"], layer[f"{name}/bias"] = weight.T.reshape(shape), bias if other == "out" else bias.reshape(tower["heads"], -1)
        return layer

    def text_layer(i):
        def of(name):
            return state[f"language_model.layers.{i}.{name}.weight"]
        query, key, value = (of(f"self_attn.{part}_proj").reshape(-1, size, width).transpose(0, 2, 1) for part in "qkv")      # [heads, width, head_dim]
        layer = {"attn/attn_vec_einsum/w": of("self_attn.o_proj").reshape(width, heads, size).transpose(1, 2, 0), "mlp/linear": of("mlp.down_proj").T,
                 "mlp/gating_einsum": np.stack([of("mlp.gate_proj").T, of("mlp.up_proj").T]), "pre_attention_norm/scale": of("input_layernorm")}
        if heads == groups:
            layer["attn/qkv_einsum/w"] = np.stack([query, key, value])
        else:
            layer |= {"attn/q_einsum/w": query, "attn/kv_einsum/w": np.stack([key, value])}
        if text["model_type"] == "gemma":
            return layer | {"pre_ffw_norm/scale": of("post_attention_layernorm")}
        return layer | {"post_attention_norm/scale": of("post_attention_layernorm"), "pre_ffw_norm/scale": of("pre_feedforward_layernorm"),
                        "post_ffw_norm/scale": of("post_feedforward_layernorm")}

    for depth, layer, whole, one in ((2, image_layer, "img/Transformer/encoderblock/", "img/Transformer/encoderblock_{i}/"),
                                     (3, text_layer, "llm/layers/", "llm/layers/{i}/")):
        layers = [layer(i) for i in range(depth)]
        for name in layers[0]:
            if stacked:
                made[whole + name] = np.stack([layer[name] for layer in layers])
            else:
                made |= {one.format(i=i) + name: layer[name] for i, layer in enumerate(layers)}
    return made


def reference_of(text, folder):
    torch.manual_seed(0)
    config = transformers.PaliGemmaConfig(vision_config=dict(VISION), text_config=dict(text), projection_dim=20, hidden_size=20, image_token_index=IMAGE,
                                          vocab_size=61)
    reference = parity.perturb(transformers.PaliGemmaForConditionalGeneration(config)).eval()
    reference.save_pretrained(folder)
    return reference


@pytest.mark.parametrize("kind, prefix", [pytest.param("gemma", "params/", marks=pytest.mark.slow), ("gemma2", "")])
def test_the_npz_is_the_model_of_the_directory_and_becomes_one(kind, prefix, tmp_path):
    reference = reference_of(TEXTS[kind], tmp_path / "hf")
    np.savez(tmp_path / "a.npz", **{prefix + name: value for name, value in as_big_vision(reference, TEXTS[kind]).items()})
    ours, directory = vlm_jax.load(tmp_path / "a.npz"), vlm_jax.load(tmp_path / "hf")
    assert jax.tree.structure(ours.params) == jax.tree.structure(directory.params)
    jax.tree.map(np.testing.assert_array_equal, ours.params, directory.params)
    inputs = sample(2)
    logits, _ = jax.jit(ours.model.apply)({"params": ours.params}, inputs)
    assert logits.shape == (2, LENGTH, 61)
    assert parity.relative_error(logits, theirs(reference, inputs)) <= 1e-5
    convert.run([str(tmp_path / "a.npz"), str(tmp_path / "out")])
    again, report = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    np.testing.assert_array_equal(theirs(again.eval(), inputs), theirs(reference, inputs))


def test_bfloat16_as_void_heads_in_one_array_and_a_layer_an_array(tmp_path):
    text = TEXTS["gemma_all_heads"]
    reference = reference_of(text, tmp_path / "hf").to(torch.bfloat16)
    reference.save_pretrained(tmp_path / "hf")
    wanted = read_parameters(tmp_path / "hf")
    mesh = make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
    for stacked in (True, False):
        arrays = {name: value.astype(ml_dtypes.bfloat16).view("V2") for name, value in as_big_vision(reference, text, stacked).items()}
        assert ("llm/layers/attn/qkv_einsum/w" in arrays) == stacked
        np.savez(tmp_path / "a.npz", **arrays)
        loaded = vlm_jax.load(tmp_path / "a.npz", mesh=mesh, sharding=[(".*/mlp/.*kernel", "fsdp:-1")])
        assert loaded.params["language"]["blocks"]["mlp"]["gate"]["kernel"].sharding.shard_shape((3, 20, 36)) == (3, 20, 18)
        for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(loaded.params), jax.tree.leaves(wanted), strict=True):
            assert one.dtype == other.dtype == ml_dtypes.bfloat16 and np.asarray(one).tobytes() == np.asarray(other).tobytes(), path


def test_the_largest_gemma2_scales_queries_in_its_own_way_and_odd_files_are_refused(tmp_path):
    from vlm_jax.interop.families import big_vision

    class Shapes:
        where = "file.npz"

        def __init__(self, **shapes):
            sizes = dict(L=46, V=64, D=4608, M=36_864, H=32, G=16, K=128) | shapes
            self.shapes = {name: tuple(sizes.get(axis, 1) if isinstance(axis, str) else axis for axis in axes) for name, axes in {
                "llm/embedder/input_embedding": "VD", "llm/layers/mlp/linear": "LMD", "llm/layers/attn/attn_vec_einsum/w": "LHKD",
                "llm/layers/attn/kv_einsum/w": ("L", 2, "G", "D", "K"), "llm/layers/post_attention_norm/scale": "LD", "img/head/kernel": (24, "P"),
                "img/embedding/kernel": (7, 7, 3, 24), "img/pos_embedding": (1, 9, 24), "img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel": (2, 24, 40),
                "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel": (2, 24, 3, 8)}.items()}
            self.names, self.shape = lambda: list(self.shapes), self.shapes.get

    def language(**shapes):
        return big_vision.to_settings(Shapes(**{"P": shapes.get("D", 4608), **shapes}))["language"]
    assert language()["attention_scale"] == 144 ** -0.5 and language(L=42)["attention_scale"] == 128 ** -0.5
    found = language(D=20)
    assert found["window"] == 4096 and found["attention_soft_cap"] == 50 and found["logits_soft_cap"] == 30 and found["embed_scale"] == 20 ** 0.5
    with pytest.raises(CheckpointError, match="img/head/kernel gives 21 numbers, llm/embedder/input_embedding has 4608"):
        language(P=21)
    with pytest.raises(ConfigError, match="--from hf"):
        convert.load_any(str(tmp_path / "a.npz"), "hf")
    with pytest.raises(ConfigError, match="has no steps"):
        vlm_jax.load(tmp_path / "a.npz", 3)


def test_a_processor_brings_the_image_token_that_the_table_lacks(tmp_path):
    from tests.data.tokenizer_samples import gemma_model
    from vlm_jax.data.tokenizers import SentencePieceTokenizer
    pieces = SentencePieceTokenizer(gemma_model()).vocab_size
    text = dict(TEXTS["gemma"], vocab_size=pieces)
    reference = reference_of(text, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(gemma_model())
    (tmp_path / "hf" / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "extra_special_tokens":
                                                                       {"image_token": "<image>"}}))
    (tmp_path / "hf" / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "SiglipImageProcessor", "size": {"height": 21, "width": 21}}))
    np.savez(tmp_path / "a.npz", **as_big_vision(reference, text))
    convert.run([str(tmp_path / "a.npz"), str(tmp_path / "out"), "--processor", str(tmp_path / "hf")])
    for again in (tmp_path / "out", tmp_path / "twice"):
        config = json.loads((again / "config.json").read_text())
        assert config["image_token_index"] == pieces and config["text_config"]["vocab_size"] == -(-(pieces + 1) // 64) * 64
        loaded = vlm_jax.load(again)
        assert loaded.processor.tokenizer.token_id("<image>") == pieces
        assert loaded.processor.prompt(np.zeros((9, 9, 3), np.uint8), "red")["images"].shape[1] == 21
        table = loaded.params["language"]["token_embedding"]
        np.testing.assert_array_equal(table[:pieces], vlm_jax.load(tmp_path / "a.npz").params["language"]["token_embedding"])
        np.testing.assert_allclose(table[pieces:], np.broadcast_to(table[:pieces].mean(0), table[pieces:].shape), atol=1e-6)
        vlm_jax.save(loaded, tmp_path / "twice")

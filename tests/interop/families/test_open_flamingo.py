"""OpenFlamingo's state dict with the directories of its language model and CLIP, against a small PyTorch model written here from the description."""
import copy
import json
import sys

import jax
import numpy as np
import pytest

from tests.data.tokenizer_samples import byte_level
from tests.interop.reference import IMAGE
from tests.models.parity import FLOAT32_MODEL, perturb, relative_error
import vlm_jax
from vlm_jax.data.documents import image_segment, text_segment
from vlm_jax.errors import CheckpointError, ConfigError
from vlm_jax.interop.open_flamingo import load_open_flamingo
from vlm_jax.sharding import make_mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

VOCABULARY, KNOWN, WIDTH, DEPTH, HEADS, HEAD_DIM, LATENTS = 40, 35, 24, 4, 2, 5, 3      # the language model's table has 5 rows that no token has
VISION = {**IMAGE, "num_hidden_layers": 1}


class Attention(nn.Module):
    """Heads of HEAD_DIM; keys and values in one map."""

    def __init__(self, width, source):
        super().__init__()
        inner = HEADS * HEAD_DIM
        self.to_q, self.to_kv, self.to_out = (nn.Linear(a, b, bias=False) for a, b in ((width, inner), (source, 2 * inner), (inner, width)))

    def attend(self, x, context, allowed=None):
        query, (key, value) = self.to_q(x), self.to_kv(context).split(HEADS * HEAD_DIM, -1)
        query, key, value = (y.unflatten(-1, (HEADS, HEAD_DIM)).transpose(-2, -3) for y in (query, key, value))
        scores = query @ key.mT / HEAD_DIM ** 0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], -1e30)
        weights = scores.softmax(-1) * (1.0 if allowed is None else allowed.any(-1)[:, None, :, None])
        return self.to_out((weights @ value).transpose(-2, -3).flatten(-2))


class Latent(Attention):
    def __init__(self, width):
        super().__init__(width, width)
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, features, latents):
        latents = self.norm_latents(latents)
        return self.attend(latents, torch.cat([self.norm_media(features), latents], -2))


class Cross(Attention):
    def __init__(self, width, source):
        super().__init__(width, source)
        self.norm = nn.LayerNorm(width)


def feed_forward(width):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False))


class Resampler(nn.Module):
    def __init__(self, width, frames=None):
        super().__init__()
        self.latents, self.norm = nn.Parameter(torch.randn(LATENTS, width)), nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.ModuleList([Latent(width), feed_forward(width)]) for _ in range(2))

    def forward(self, features):
        x = self.latents.expand(*features.shape[:-2], -1, -1)
        for attention, mlp in self.layers:
            x = x + attention(features, x)
            x = x + mlp(x)
        return self.norm(x)


class Gated(nn.Module):
    def __init__(self, width, source):
        super().__init__()
        self.attn, self.attn_gate, self.ff, self.ff_gate = Cross(width, source), nn.Parameter(torch.zeros(1)), feed_forward(width), nn.Parameter(torch.zeros(1))

    def forward(self, x, media, allowed):
        x = x + self.attn_gate.tanh() * self.attn.attend(self.attn.norm(x), media, allowed)
        return x + self.ff_gate.tanh() * self.ff(x)


class Whole(nn.Module):
    """The language model with blocks before the layers every - 1, 2 every - 1, ...; every token reads the last picture at or before it."""

    def __init__(self, language, layers, tower, every):
        super().__init__()
        self.language, self.tower, self.perceiver = language, tower, Resampler(VISION["hidden_size"])
        self.blocks = nn.ModuleDict({str(place): Gated(WIDTH, VISION["hidden_size"]) for place in range(every - 1, DEPTH, every)})
        for place, block in self.blocks.items():
            layers[int(place)].register_forward_pre_hook(lambda _, args, block=block: (block(args[0], self.media, self.allowed), *args[1:]))

    def forward(self, tokens, pictures, mask, image_token):
        rows, number = pictures.shape[:2]
        features = self.tower(pictures.flatten(0, 1)).last_hidden_state[:, 1:]
        self.media = self.perceiver(features).reshape(rows, number * LATENTS, -1)
        read = (tokens == image_token).cumsum(1)
        self.allowed = read[..., None] == torch.arange(1, number + 1).repeat_interleave(LATENTS)
        return self.language(tokens, attention_mask=mask).logits


def language_model(kind):
    if kind == "mpt":
        config = transformers.MptConfig(d_model=WIDTH, n_heads=4, n_layers=DEPTH, vocab_size=VOCABULARY, max_seq_len=64)
        return transformers.MptForCausalLM(config)
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        hidden_size=WIDTH, num_attention_heads=4, num_hidden_layers=DEPTH, intermediate_size=36, vocab_size=VOCABULARY, max_position_embeddings=64,
        use_parallel_residual=False, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}))


def made(kind, every, folder, new=2):
    """The reference, with its three parts in a folder."""
    torch.manual_seed(0)
    base = perturb(language_model(kind), 1, 0.2)
    base.save_pretrained(folder / "language")
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))
    if kind == "mpt":     # a whole CLIP, of which the tower is read
        text = dict(hidden_size=36, intermediate_size=40, num_attention_heads=2, num_hidden_layers=1, vocab_size=41, max_position_embeddings=6)
        clip = transformers.CLIPModel(transformers.CLIPConfig(vision_config=VISION, text_config=text))
    perturb(clip, 2, 0.2).save_pretrained(folder / "vision")
    language, names = copy.deepcopy(base), {}
    table = nn.Parameter(torch.cat([base.get_input_embeddings().weight.detach()[:KNOWN], torch.randn(new, WIDTH)]))
    language.get_input_embeddings().weight = table
    if kind == "mpt":
        language.lm_head.weight = table
        layers, names["lang_encoder.transformer.wte.weight"] = language.transformer.blocks, table
    else:
        language.lm_head.weight = nn.Parameter(torch.cat([base.lm_head.weight.detach()[:KNOWN], torch.randn(new, WIDTH)]))
        layers, names["lang_encoder.gpt_neox.embed_in.weight"] = language.gpt_neox.layers, table
    model = Whole(language, layers, getattr(clip, "vision_model", clip), every).eval()
    perturb(model.perceiver, 3, 0.3), perturb(model.blocks, 4, 0.3)
    names |= {f"perceiver.{name}": value for name, value in model.perceiver.state_dict().items()}
    inside = "lang_encoder.gated_cross_attn_layers.{}." if kind == "mpt" else "lang_encoder.gpt_neox.layers.{}.gated_cross_attn_layer."
    for place, block in model.blocks.items():
        names |= {inside.format(place) + name: value for name, value in block.state_dict().items()}
    return model, {name: value.detach().clone().contiguous() for name, value in names.items()}


RNG = np.random.default_rng(0)
PICTURES = RNG.normal(size=(3, 2, 23, 23, 3)).astype(np.float32)
TOKENS = RNG.integers(0, KNOWN + 1, (3, 9))
TOKENS[0, [0, 4]] = TOKENS[1, 3] = KNOWN + 1        # the third row has no picture
VALID = np.array([[True] * 9, [True] * 7 + [False] * 2, [True] * 9])
INPUTS = dict(tokens=TOKENS, valid=VALID, images=PICTURES, media_index=np.cumsum(TOKENS == KNOWN + 1, 1) - 1)


def expected_logits(model):
    with torch.no_grad():
        logits = model(torch.from_numpy(TOKENS), torch.from_numpy(PICTURES.transpose(0, 1, 4, 2, 3).copy()), torch.from_numpy(VALID).long(), KNOWN + 1)
    return logits.numpy()[VALID]


@pytest.mark.parametrize("kind, every", [("mpt", 2), ("gpt_neox", 1)])
def test_logits(kind, every, tmp_path):
    model, state = made(kind, every, tmp_path)
    if kind == "gpt_neox":
        state["lang_encoder.embed_out.weight"] = model.language.lm_head.weight.detach().clone()
    else:      # as FSDP and an unfiltered state dict name things; frozen parts are not read
        state = {f"module.{name}": value for name, value in state.items()} | {
            "module.lang_encoder.transformer.blocks.1.decoder_layer.norm_1.weight": torch.ones(3), "module.vision_encoder.visual.proj": torch.ones(3),
            "module.lang_encoder.transformer.blocks.1.gated_cross_attn_layer.attn_gate": state["lang_encoder.gated_cross_attn_layers.1.attn_gate"].clone()}
    save_file(state, tmp_path / "checkpoint.safetensors")
    with pytest.raises(CheckpointError, match="heads of 64 do not divide the 10 outputs"):
        vlm_jax.load(tmp_path / "checkpoint.safetensors", language=tmp_path / "language", vision=tmp_path / "vision")
    loaded = load_open_flamingo(tmp_path / "checkpoint.safetensors", tmp_path / "language", tmp_path / "vision", head_dim=HEAD_DIM)
    assert loaded.params["language"]["new_embedding"].shape == (2, WIDTH) and loaded.params["language"]["token_embedding"].shape == (KNOWN, WIDTH)
    assert loaded.model.gated["every"] == every and loaded.model.gated["first"] == every - 1 and ("new_head" in loaded.params["language"]) == (kind != "mpt")
    logits, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, INPUTS)
    assert relative_error(np.asarray(logits)[VALID], expected_logits(model)) <= FLOAT32_MODEL


def test_a_head_without_rows_for_the_new_tokens_gets_the_mean(tmp_path):
    """OpenFlamingo trains no row of the head; the other logits are the reference's. The weights are those of an own file, wholly on eight devices."""
    model, state = made("gpt_neox", 2, tmp_path)
    save_file(state, tmp_path / "checkpoint.safetensors")
    mesh = make_mesh(data=1, fsdp=4, tensor=2)
    loaded = load_open_flamingo(tmp_path / "checkpoint.safetensors", tmp_path / "language", tmp_path / "vision", head_dim=HEAD_DIM, mesh=mesh)
    assert len(loaded.params["gated"]["blocks"]["mlp"]["up"]["kernel"].sharding.device_set) == 8
    params = jax.device_get(loaded.params)
    logits, _ = jax.jit(loaded.model.apply)({"params": params}, INPUTS)
    assert relative_error(np.asarray(logits)[VALID][:, :KNOWN], expected_logits(model)[:, :KNOWN]) <= FLOAT32_MODEL
    kernel = params["language"]["new_head"]["kernel"]
    np.testing.assert_allclose(kernel, np.repeat(model.language.lm_head.weight.detach().numpy()[:KNOWN].mean(0)[:, None], 2, 1), atol=1e-6)
    assert (np.asarray(logits)[VALID][:, KNOWN:].max(1) < np.asarray(logits)[VALID].max(1)).all()


def test_the_tokenizer_says_which_tokens_are_new(tmp_path, monkeypatch):
    """With a tokenizer in the language model's folder there is a processor, and a third new token where the table has room for it."""
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), bos_token="<|endoftext|>", eos_token="<|endoftext|>")  # noqa: S106
    for name, value in {"VOCABULARY": len(fast) + 6, "KNOWN": len(fast), "HEAD_DIM": 64}.items():
        monkeypatch.setattr(sys.modules[__name__], name, value)
    _, state = made("mpt", 4, tmp_path, new=3)
    fast.save_pretrained(tmp_path / "language")
    size = dict(size={"shortest_edge": 23}, crop_size={"height": 23, "width": 23}, image_processor_type="CLIPImageProcessor")
    (tmp_path / "vision" / "preprocessor_config.json").write_text(json.dumps(size))
    save_file(state, tmp_path / "checkpoint.safetensors")
    loaded = vlm_jax.load(tmp_path / "checkpoint.safetensors", language=tmp_path / "language", vision=tmp_path / "vision")
    inputs = loaded.processor.document([image_segment(np.zeros((30, 40, 3), np.uint8)), text_segment("a small"), image_segment(np.zeros((9, 9, 3), np.uint8))])
    words, first = fast.encode("a small"), len(fast)
    assert inputs["tokens"].tolist() == [first + 1, *words, first, first + 1] and loaded.processor.format.decode([words[0], first, 5]) == "a"
    assert inputs["media_index"].tolist() == [0] * (len(words) + 2) + [1]
    assert loaded.model.parts()[1].vocab_size == first and loaded.model.parts()[1].new_tokens == 3 and loaded.model.gated["first"] == 3


def test_files_that_cannot_be(tmp_path):
    _, state = made("gpt_neox", 2, tmp_path)

    def load(changed, language="language", vision="vision", **options):
        save_file(changed, tmp_path / "checkpoint.safetensors")
        return load_open_flamingo(tmp_path / "checkpoint.safetensors", tmp_path / language, tmp_path / vision, **{"head_dim": HEAD_DIM, **options})
    without = {name: value for name, value in state.items() if "gated_cross_attn" not in name}
    cut = {name: value for name, value in state.items() if not name.endswith("layers.3.gated_cross_attn_layer.ff_gate")}
    moved = {name.replace("layers.1.gated", "layers.2.gated"): value for name, value in state.items()}
    for changed, message in ((without, "it has no gated blocks"), ({**state, "proj.weight": torch.ones(2)}, "'proj.weight' is none of its tensors"),
                             (cut, "'gated.1.ff_gate'"), (moved, r"stand before the layers \[2, 3\] of a language model of 4"),
                             ({**state, "perceiver.media_time_embs": torch.ones(2)}, "perceiver.media_time_embs")):
        with pytest.raises(CheckpointError, match=message):
            load(changed)
    with pytest.raises(CheckpointError, match="two or three must be new"):
        load(state, new_tokens=7)
    with pytest.raises(ConfigError, match="is no language model"):
        load(state, language="vision")
    with pytest.raises(ConfigError, match="OpenFlamingo reads pictures by CLIP"):
        load(state, vision="language")
    with pytest.raises(ConfigError, match="language=DIR and vision=DIR"):
        vlm_jax.load(tmp_path / "checkpoint.safetensors")


class Normed(nn.Module):
    """Queries, keys and values of MPT-1B: queries and keys are normalised over all heads together."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.q_ln, self.k_ln = inner, nn.LayerNorm(WIDTH, bias=False), nn.LayerNorm(WIDTH, bias=False)

    def forward(self, x):
        query, key, value = self.inner(x).chunk(3, -1)
        return torch.cat([self.q_ln(query), self.k_ln(key), value], -1)


def test_the_language_model_of_the_smallest(tmp_path):
    """MPT-1B under its own names; transformers has no class for it."""
    torch.manual_seed(0)
    model = language_model("mpt")
    for block in model.transformer.blocks:
        block.attn.Wqkv = Normed(block.attn.Wqkv)
    perturb(model, 1, 0.2)
    state = {}
    for name, value in model.state_dict().items():
        for old, new in ((".norm_", ".ln_"), (".ffn.up_proj", ".mlp.mlp_up"), (".ffn.down_proj", ".mlp.mlp_down"), ("Wqkv.inner.", "Wqkv."), ("Wqkv.q_", "q_"),
                         ("Wqkv.k_", "k_")):
            name = name.replace(old, new)
        state |= {} if name == "lm_head.weight" else {name: value.clone()}
    save_file(state, tmp_path / "model.safetensors")
    config = dict(model_type="mosaic_gpt", d_model=WIDTH, n_heads=4, n_layers=DEPTH, vocab_size=VOCABULARY, max_seq_len=64, mlp_ratio=4, alibi=True,
                  alibi_bias_max=8, attn_qk_ln=True, attn_clip_qkv=None, softmax_scale=None, no_bias=True, low_precision_layernorm=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = vlm_jax.load(tmp_path)
    tokens = np.minimum(TOKENS, VOCABULARY - 1)
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens), attention_mask=torch.from_numpy(VALID).long()).logits.numpy()[VALID]
    logits, _ = jax.jit(loaded.model.apply)({"params": loaded.params}, {"tokens": tokens, "valid": VALID})
    assert relative_error(np.asarray(logits)[VALID], expected) <= FLOAT32_MODEL
    assert loaded.params["blocks"]["attention"]["query_norm"]["scale"].shape == (DEPTH, WIDTH)
    with pytest.raises(ConfigError, match="qk_norm_whole=True cannot be written as mpt"):
        vlm_jax.save(loaded, tmp_path / "again")
    (tmp_path / "config.json").write_text(json.dumps({**config, "alibi": False}))
    with pytest.raises(ConfigError, match="alibi: False is not supported"):
        vlm_jax.load(tmp_path)

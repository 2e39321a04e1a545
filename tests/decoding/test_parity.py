"""Tokens equal to transformers' generate: greedy and beam search of a decoder and of an encoder-decoder, in float32."""
import jax
import numpy as np
import pytest

from tests.decoding.models import trigrams
from vlm_jax.decoding import beam_search, generate, pad_rows, prefix_cache, speculative, stream
from vlm_jax.interop.directory import load_directory

PROMPTS = [[5, 9, 2, 7, 7, 30, 11], [3, 8, 4]]
EOS = (1, 17, 23)   # several, and likely enough to be met
TOKENS = 13


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """{family: (transformers' model, our model, our parameters)}; the weights are large, so that margins are."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    made = {
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
            bos_token_id=None, eos_token_id=None, pad_token_id=0, initializer_range=0.5)),
        "t5": transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=37, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0, eos_token_id=None, pad_token_id=0,
            initializer_factor=2.0)),
    }
    result = {}
    for name, model in made.items():
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model = model.eval()
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        loaded = load_directory(folder)
        result[name] = model, loaded.model, loaded.params
    return result


def theirs(model, prompts, **options):
    """What transformers says: [B * returned, N], zeros behind the end."""
    import torch
    left = max(map(len, prompts))
    tokens = torch.tensor([[0] * (left - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (left - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        made = model.generate(tokens, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, **options)
    made = made[:, 1 if model.config.is_encoder_decoder else left:].numpy()
    made = np.pad(made, [(0, 0), (0, TOKENS - made.shape[1])])
    ended = np.cumsum(np.isin(made, EOS), axis=1) - np.isin(made, EOS) > 0   # a beam search fills with an end mark where padding is token 0
    return np.where(ended, 0, made)


def prompts_of(name):
    # Without its relative positions shifted, an encoder padded on the left reads the same; T5 gets prompts of one length.
    return PROMPTS if name == "llama" else [PROMPTS[0], PROMPTS[0][::-1]]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_greedy(pairs, name):
    model, ours, params = pairs[name]
    wanted = theirs(model, prompts_of(name), eos_token_id=list(EOS))
    made = generate(ours, params, pad_rows(prompts_of(name)), max_tokens=TOKENS, eos=EOS)
    np.testing.assert_array_equal(made.tokens, wanted)


@pytest.mark.parametrize("name, early, penalty, beams", [
    ("llama", False, 1.0, 3), ("llama", "never", 2.0, 3), ("t5", True, 0.6, 4), *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("llama", True, 1.0, 3), ("llama", False, 0.0, 4), ("llama", "never", -0.5, 2), ("t5", False, 1.0, 3), ("t5", "never", 1.0, 3)))])
def test_beams(pairs, name, early, penalty, beams):
    model, ours, params = pairs[name]
    wanted = theirs(model, prompts_of(name), eos_token_id=list(EOS), num_beams=beams, num_return_sequences=2, length_penalty=penalty, early_stopping=early)
    made = beam_search(ours, params, pad_rows(prompts_of(name)), max_tokens=TOKENS, eos=EOS, beams=beams, returned=2, length_penalty=penalty,
                       early_stopping=early)
    np.testing.assert_array_equal(made.tokens.reshape(-1, TOKENS), wanted)


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_every_way_of_decoding_says_the_same(pairs, name):
    """Of a real cache: a draft that is always wrong, a prefix, and text in chunks."""
    _, ours, params = pairs[name]
    prompts = pad_rows(prompts_of(name))
    wanted = generate(ours, params, prompts, max_tokens=TOKENS).tokens
    draft, draft_params = trigrams(vocab_size=37, name="draft")
    for other, other_params in ((draft, draft_params), (ours, params)):
        made = speculative(ours, params, other, other_params, prompts, max_tokens=TOKENS, proposals=3)
        np.testing.assert_array_equal(made.tokens, wanted)
    assert made.accepted.sum() == made.proposed.sum()

    class Numbers:
        def decode(self, ids):
            return "".join(f"{number} " for number in ids)
    pieces = stream(ours, params, prompts, tokenizer=Numbers(), max_tokens=TOKENS, chunk=5)
    assert ["".join(row) for row in zip(*pieces)] == [Numbers().decode(row) for row in wanted]
    if name == "llama":
        shared = prefix_cache(ours, params, pad_rows([[4, 4, 9]]))
        made = generate(ours, params, prompts, max_tokens=TOKENS, prefix=shared)
        np.testing.assert_array_equal(made.tokens, generate(ours, params, pad_rows([[4, 4, 9, *prompt] for prompt in PROMPTS]), max_tokens=TOKENS).tokens)


def test_a_mesh_says_the_same(pairs):
    from vlm_jax.sharding.mesh import make_mesh
    from vlm_jax.sharding.rules import parameter_shardings
    _, ours, params = pairs["llama"]
    wanted = generate(ours, params, pad_rows(PROMPTS), max_tokens=TOKENS, eos=EOS)
    mesh = make_mesh(data=2, tensor=2, devices=jax.devices()[:4])
    placed = jax.device_put(params, parameter_shardings(mesh, params, None))
    made = generate(ours, placed, pad_rows(PROMPTS), max_tokens=TOKENS, eos=EOS, mesh=mesh)
    np.testing.assert_array_equal(made.tokens, wanted.tokens)

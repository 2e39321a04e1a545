"""Candidates ranked in a cache: the log-likelihoods of the whole sequences, whatever the model, the padding and how many are read at once."""
import jax
import numpy as np
import pytest

from tests.models.generative import parameter_shapes
from tests.models.test_cross_attention_lm import INPUTS, LANGUAGE, MODEL, RESAMPLER, perturbed
from vlm_jax import decoding
from vlm_jax.errors import ConfigError
from vlm_jax.evaluation.likelihood import rank
from vlm_jax.language.decoder import Decoder
from vlm_jax.language.encoder_decoder import EncoderDecoder
from vlm_jax.models.prefix_lm import PrefixLM

DECODER = Decoder(vocab_size=29, width=12, depth=2, mlp_dim=20, num_heads=3, num_kv_heads=1, window=4, windowed=(True, False))
ENCODER_DECODER = EncoderDecoder(vocab_size=29, width=12, encoder_depth=1, decoder_depth=1, mlp_dim=20, num_heads=3, head_dim=5)
PREFIX_LM = PrefixLM(dict(image_size=(8, 8), patch_size=4, width=12, depth=1, mlp_dim=20, num_heads=3),
                     dict(vocab_size=31, width=12, depth=1, mlp_dim=20, num_heads=3))
CROSS = MODEL.clone(language=dict(LANGUAGE, depth=2), resampler=dict(RESAMPLER, depth=1))
RNG = np.random.default_rng(2)
TOKENS = RNG.integers(1, 29, (3, 7))
VALID = np.array([[True] * 7, [True] * 4 + [False] * 3, [False, True, True, False, True, True, False]])
TEXT = {"tokens": TOKENS, "valid": VALID}
PICTURES = dict(images=RNG.normal(size=(2, 2, 8, 8, 3)).astype(np.float32), tokens=RNG.integers(1, 29, (2, 11)),
                slots=np.array([[-1, 0, 1, 2, 3, -1, 4, 5, 6, 7, -1], [0, 1, 2, 3, -1, 4, 5, 6, 7, -1, -1]]),
                valid=np.array([[True] * 11, [True] * 10 + [False]]), prefix=np.array([[True] * 5 + [False] * 6] * 2))
SHARED = [[3, 5], [4], [3, 5, 7], [9, 1, 2, 8, 6]]
MODELS = {"decoder": (DECODER, TEXT), "encoder_decoder": (ENCODER_DECODER, TEXT), "prefix_lm": (PREFIX_LM, PICTURES), "cross_attention": (CROSS, INPUTS)}
_made = {}


def made(name):
    """(model, random parameters, inputs)."""
    if name not in _made:
        model, inputs = MODELS[name]
        _made[name] = model, perturbed(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), parameter_shapes(model))), inputs
    return _made[name]


def whole_sequences(model, params, inputs, candidates):
    """The log-probabilities of the candidates' tokens behind each prompt, [B][C] arrays: every prompt and candidate as one sequence, read without a cache."""
    pairs = [(row, one) for row in range(len(inputs["tokens"])) for one in candidates]
    valid = np.asarray(inputs.get("valid", np.ones(inputs["tokens"].shape, bool)))
    longest = max(map(len, candidates))
    if isinstance(model, EncoderDecoder):
        rows = {name: np.stack([value[row] for row, _ in pairs]) for name, value in inputs.items()}
        rows["targets"] = np.array([[*one, *[0] * (longest - len(one))] for _, one in pairs])
        first = [0] * len(pairs)
    else:
        fill, rows, first = {"slots": -1, "prefix": False}, {}, [int(valid[row].sum()) - 1 for row, _ in pairs]
        rows["valid"] = np.array([[True] * (begin + 1 + len(one)) + [False] * (valid.shape[1] + longest - begin - 1 - len(one))
                                  for begin, (_, one) in zip(first, pairs)])
        for name, value in inputs.items():
            if name == "images":
                rows[name] = np.stack([value[row] for row, _ in pairs])
            elif name != "valid":
                read = {row: value[row][valid[row]] for row, _ in pairs}
                made = [[*read[row], *(one if name == "tokens" else [fill.get(name, read[row][-1])] * len(one))] for row, one in pairs]
                rows[name] = np.array([[*one, *[0] * (valid.shape[1] + longest - len(one))] for one in made])
    logits = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, rows)[0])
    scored = [np.asarray(logits[number, begin:begin + len(one)])[np.arange(len(one)), one] for number, (begin, (_, one)) in enumerate(zip(first, pairs))]
    return [scored[row * len(candidates):(row + 1) * len(candidates)] for row in range(len(inputs["tokens"]))]


@pytest.mark.parametrize("name", list(MODELS))
def test_equals_scoring_the_whole_sequence(name):
    model, params, inputs = made(name)
    scores = rank(model, params, inputs, SHARED, at_once=3)
    means = rank(model, params, inputs, SHARED, at_once=3, normalize="mean")
    expected = whole_sequences(model, params, inputs, SHARED)
    np.testing.assert_allclose(scores, [[one.sum() for one in row] for row in expected], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(means, [[one.mean() for one in row] for row in expected], rtol=1e-5, atol=1e-5)
    assert np.ptp(scores, axis=0).max() > 1e-3


def test_every_prompt_may_have_its_own():
    model, params, inputs = made("decoder")
    own = [[0, 1], [3], [2, 1, 3]]
    scores = rank(model, params, inputs, [[SHARED[number] for number in listed] for listed in own], at_once=3)
    assert scores.shape == (3, 3) and np.isneginf(scores).sum() == 3 and np.isneginf(scores[1, 1:]).all() and np.isneginf(scores[0, 2])
    every = rank(model, params, inputs, SHARED, at_once=3)
    for row, listed in enumerate(own):
        np.testing.assert_allclose(scores[row, :len(listed)], every[row, listed], rtol=1e-6)


def test_behind_cached_contexts_with_pictures():
    model, params, inputs = made("cross_attention")
    query = dict(tokens=INPUTS["tokens"][:, :4], images=INPUTS["images"][::-1, :1], media_index=np.array([[0, 0, 0, 0], [-1, 0, 0, 0]]))
    behind = rank(model, params, query, SHARED, prefix=decoding.prefix_cache(model, params, inputs))
    last = inputs["media_index"][:, -1:]
    whole = dict(tokens=np.concatenate([inputs["tokens"], query["tokens"]], 1), images=np.concatenate([inputs["images"], query["images"]], 1),
                 media_index=np.concatenate([inputs["media_index"], np.where(query["media_index"] < 0, last, 3)], 1))
    np.testing.assert_allclose(behind, rank(model, params, whole, SHARED), rtol=1e-5, atol=2e-5)


def test_sharded_rows_give_the_same():
    from vlm_jax.sharding.mesh import make_mesh
    model, params, inputs = made("decoder")
    four = {name: np.concatenate([value, value[:1]]) for name, value in inputs.items()}
    mesh = make_mesh(data=4, devices=jax.devices()[:4])
    np.testing.assert_allclose(rank(model, params, four, SHARED, mesh=mesh), rank(model, params, four, SHARED), atol=1e-5)


def test_candidates_of_other_lengths_and_numbers_share_programs():
    from vlm_jax.evaluation.likelihood import _read, _score
    model, params, inputs = made("decoder")
    rank(model, params, inputs, [[1, 2, 3], [4], [5]])
    before = _read._cache_size(), _score._cache_size()
    rank(model, params, dict(inputs, tokens=inputs["tokens"][:, :5], valid=inputs["valid"][:, :5]), [[1, 2, 3, 4], [4, 4, 4], [5], [6]])
    assert (_read._cache_size(), _score._cache_size()) == before


@pytest.mark.parametrize("candidates, message", [
    ([], "there are none"), ([[3], []], "number 1 has no token"), ([[[3]], [[4]]], "2 lists for 3 prompts"), ([[[3]], [[4]], []], "prompt 2: there are none"),
])
def test_candidates_that_cannot_be_ranked(candidates, message):
    model, params, inputs = made("decoder")
    with pytest.raises(ConfigError, match=message):
        rank(model, params, inputs, candidates)
    with pytest.raises(ConfigError, match="normalize"):
        rank(model, params, inputs, [[1]], normalize="median")


def test_positions_run_out_only_where_they_do():
    model = Decoder(vocab_size=9, width=8, depth=1, mlp_dim=8, num_heads=1, positions="learned", max_positions=10)
    with pytest.raises(ConfigError, match="10 positions"):
        rank(model, {}, {"tokens": TOKENS[:, :6]}, [[1, 2, 3, 4, 5]])
    with pytest.raises(Exception, match="(?i)param"):      # padded to 8 tokens it fits behind a shorter prompt; what is missing then are parameters
        rank(model, {}, {"tokens": TOKENS[:, :5]}, [[1, 2, 3, 4, 5]])

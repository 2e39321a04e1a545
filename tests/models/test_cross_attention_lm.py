"""Cross-attention between the layers of a decoder: gates at 0, what each token may read, caches with pictures, sizes of the published models."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.generative import parameter_shapes
from vlm_jax import decoding, registry
from vlm_jax.errors import ConfigError
from vlm_jax.language.gated_cross_attention import media_segments
from vlm_jax.models.cross_attention_lm import CrossAttentionLM
from vlm_jax.training.flops import gradient_flops

IMAGE = dict(image_size=(8, 12), patch_size=4, width=12, depth=1, mlp_dim=20, num_heads=3)
LANGUAGE = dict(vocab_size=31, width=16, depth=5, mlp_dim=24, num_heads=4, num_kv_heads=2, new_tokens=2)
GATED = dict(every=2, num_heads=2, head_dim=5)
RESAMPLER = dict(num_latents=3, depth=2, num_heads=2, head_dim=4)
MODEL = CrossAttentionLM(IMAGE, LANGUAGE, gated=GATED, resampler=RESAMPLER)
RNG = np.random.default_rng(0)
INPUTS = dict(images=RNG.normal(size=(2, 3, 8, 12, 3)).astype(np.float32), tokens=RNG.integers(0, 33, (2, 9)),
              media_index=np.array([[-1, -1, 0, 0, 1, 1, 1, 2, 2], [-1, -1, -1, 0, 0, 0, 0, 1, 1]]))


def perturbed(params, scale=0.3):
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return structure.unflatten([leaf + scale * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def variables():
    return jax.jit(MODEL.init)(jax.random.key(0), INPUTS)


@pytest.fixture(scope="module")
def opened(variables):
    """All parameters moved, so that the gates are open."""
    return {"params": perturbed(variables["params"])}


@pytest.fixture(scope="module")
def apply():
    return jax.jit(MODEL.apply)


def test_with_gates_at_zero_it_is_the_language_model_exactly(variables, apply):
    language = MODEL.parts()[1]
    alone = jax.jit(language.apply)({"params": variables["params"]["language"]}, {"tokens": INPUTS["tokens"]})[0]
    logits, out = apply(variables, INPUTS)
    assert logits.shape == (2, 9, 33) and out["media"].shape == (2, 3, 3, 12)
    assert out["blocks"]["inserted"]["cross"].shape == (3, 2, 9, 16) and out["blocks"]["output"].shape == (5, 2, 9, 16)
    np.testing.assert_array_equal(logits, alone)
    np.testing.assert_array_equal(apply(variables, {"tokens": INPUTS["tokens"]})[0], alone)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in (variables["params"]["gated"]["blocks"][f"gate_{name}"] for name in ("cross", "mlp")))


@pytest.mark.parametrize("every, first, places", [(1, 0, 5), (2, 1, 2), (3, 0, 2), (7, 4, 1)])
def test_scanned_equals_unrolled_wherever_the_blocks_stand(opened, every, first, places):
    gated = dict(GATED, every=every, first=first)
    model = MODEL.clone(gated=gated)
    params = perturbed(jax.jit(model.init)(jax.random.key(0), INPUTS)["params"])
    assert params["gated"]["blocks"]["gate_cross"].shape == (places,)
    loss = jax.jit(lambda model, params: jnp.sum(jnp.sin(model.apply({"params": params}, INPUTS)[0])), static_argnums=0)
    grad = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)
    other = model.clone(scan=False, remat="full")
    np.testing.assert_allclose(loss(model, params), loss(other, params), rtol=2e-5)
    for a, b in zip(jax.tree.leaves(grad(model, params)), jax.tree.leaves(grad(other, params))):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("every, first", [(2, 0), (2, 1), (3, 2)])
def test_products_of_nested_loops_are_counted_as_often_as_they_run(every, first):
    """Groups of layers with a block before each, and the shorter group behind them: as many products as unrolled."""
    model = MODEL.clone(gated=dict(GATED, every=every, first=first))
    params = parameter_shapes(model)

    def counted(model):
        return gradient_flops(lambda params: jnp.sum(model.apply({"params": params}, INPUTS)[0]), params, trained=lambda path: not path.startswith("language"))
    assert counted(model) == pytest.approx(counted(model.clone(scan=False)), rel=1e-6) and counted(model) > 0


def test_a_picture_changes_nothing_before_its_text(opened, apply):
    logits, _ = apply(opened, INPUTS)
    for row, picture, first in ((0, 0, 2), (0, 1, 4), (0, 2, 7), (1, 0, 3), (1, 1, 7)):
        images = INPUTS["images"].copy()
        images[row, picture] += 1.0
        other, _ = apply(opened, dict(INPUTS, images=images))
        changed = np.abs(np.asarray(other - logits)).max(-1) > 0
        assert not changed[1 - row].any() and not changed[row, :first].any() and changed[row, first:].all()


def test_text_reads_its_own_picture_alone_through_cross_attention(opened):
    """By gradient: what the blocks add at a token depends on no other picture (older ones act through the self-attention of the decoder)."""
    first = MODEL.clone(gated=dict(GATED, every=5))   # one block, before the first layer: there is no self-attention before it
    params = dict(opened["params"], gated=jax.tree.map(lambda leaf: leaf[:1], opened["params"]["gated"]))

    def added(images, token, everything):
        model = first.clone(gated=dict(first.gated, all_previous=everything))
        _, out = model.apply({"params": params}, dict(INPUTS, images=images))
        return jnp.sum(jnp.sin(out["blocks"]["inserted"]["cross"][0, 0, token]))

    reach = jax.jit(jax.grad(added), static_argnums=(1, 2))
    for token, picture in enumerate(INPUTS["media_index"][0]):
        for everything in (False, True):
            touched = np.abs(np.asarray(reach(INPUTS["images"], token, everything))).max((2, 3, 4)) > 0
            expected = np.arange(3) <= picture if everything else np.arange(3) == picture
            np.testing.assert_array_equal(touched, [expected, [False] * 3])


def test_without_a_picture_attention_adds_zero_not_a_mean(opened, apply):
    _, out = apply(opened, INPUTS)
    cross = np.asarray(out["blocks"]["inserted"]["cross"])
    assert (cross[:, INPUTS["media_index"] < 0] == 0).all() and (np.abs(cross[:, INPUTS["media_index"] >= 0]).max(-1) > 0).all()
    assert (np.abs(np.asarray(out["blocks"]["inserted"]["mlp"])).max(-1) > 0).all()
    text, _ = apply(opened, {"tokens": INPUTS["tokens"]})
    unread, _ = apply(opened, dict(INPUTS, media_index=np.full((2, 9), -1)))
    np.testing.assert_allclose(text, unread, atol=1e-5)


@pytest.mark.parametrize("everything", [False, True])
def test_packed_documents_do_not_see_each_other(opened, everything):
    apply = jax.jit(MODEL.clone(gated=dict(GATED, all_previous=everything)).apply)
    segments = np.array([[0] * 4 + [1] * 5] * 2)
    index = np.array([[-1, 0, 0, 0, -1, 1, 1, 2, 2]] * 2)
    packed, _ = apply(opened, dict(INPUTS, media_index=index, segment_ids=segments))
    alone, _ = apply(opened, dict(tokens=INPUTS["tokens"][:, 4:], images=INPUTS["images"][:, 1:], media_index=np.where(index[:, 4:] < 0, -1, index[:, 4:] - 1)))
    np.testing.assert_allclose(packed[:, 4:], alone, atol=2e-5)


def test_documents_of_pictures_follow_from_their_tokens():
    """Pictures 1 and 4 are read by nobody: 1 stands between pictures of one document, 4 between two documents."""
    index, segments = np.array([[0, 0, 2, 3, 3, -1, 5, -1, -1]]), np.array([[7, 7, 7, 7, 7, 3, 3, 9, 0]], np.int32)
    keys = np.array([[0, 1, 2, 3, 3, 4, 5, 6, -1]])
    found = np.asarray(media_segments(index, keys, segments))[0]
    none = np.iinfo(segments.dtype).min
    assert found.tolist() == [7, 7, 7, 7, 7, none, 3, none, none]


def test_cached_with_pictures_that_come_later(opened, apply):
    """A context, then text, then text with further pictures: the logits of the whole."""
    logits, _ = apply(opened, INPUTS)
    run = jax.jit(MODEL.apply, static_argnames=("method", "cache_length"))
    tokens, images, index = (INPUTS[name][:1] for name in ("tokens", "images", "media_index"))
    first, cache = run(opened, dict(tokens=tokens[:, :3], images=images[:, :1], media_index=index[:, :3]), cache_length=12, method="start")
    np.testing.assert_allclose(first, logits[:1, 2], atol=2e-5)
    second, cache = run(opened, tokens[:, 3:4], cache, method="extend")
    np.testing.assert_allclose(second[:, 0], logits[:1, 3], atol=2e-5)
    third, cache = run(opened, tokens[:, 4:], cache, None, images[:, 1:], np.maximum(index[:, 4:] - 1, -1), method="extend")
    np.testing.assert_allclose(third, logits[:1, 4:], atol=2e-5)
    assert cache.encoded[2].shape == (1, 9) and int(cache.media[0]) == 2


@pytest.mark.parametrize("scan", [True, False])
def test_generating_behind_a_cached_context_equals_reading_it_all(opened, scan):
    model = MODEL.clone(scan=scan)
    query = dict(tokens=INPUTS["tokens"][:, :4], images=INPUTS["images"][::-1, :1], media_index=np.array([[0, 0, 0, 0], [-1, 0, 0, 0]]))
    context = {name: value[:1] for name, value in INPUTS.items()}
    prefix = decoding.prefix_cache(model, opened["params"], context)
    behind = decoding.generate(model, opened["params"], query, max_tokens=4, prefix=prefix)
    twice = {name: np.concatenate([value, value]) for name, value in context.items()}
    whole = dict(tokens=np.concatenate([twice["tokens"], query["tokens"]], 1), images=np.concatenate([twice["images"], query["images"]], 1),
                 media_index=np.concatenate([twice["media_index"], np.where(query["media_index"] < 0, 2, 3)], 1))
    at_once = decoding.generate(model, opened["params"], whole, max_tokens=4)
    np.testing.assert_array_equal(behind.tokens, at_once.tokens)
    np.testing.assert_allclose(behind.logprobs, at_once.logprobs, atol=2e-5)
    beams = decoding.beam_search(model, opened["params"], whole, max_tokens=4, beams=1)
    np.testing.assert_array_equal(beams.tokens[:, 0], at_once.tokens)


def test_videos_and_pictures_without_a_resampler(variables):
    frames = RNG.normal(size=(2, 1, 4, 8, 12, 3)).astype(np.float32)
    inputs = dict(tokens=INPUTS["tokens"], images=frames, media_index=np.zeros((2, 9), int))
    media = jax.eval_shape(MODEL.apply, variables, inputs)[1]["media"]
    assert media.shape == (2, 1, 3, 12)   # as many tokens as of one picture
    bare = MODEL.clone(resampler=None)
    assert bare.media_tokens() == 6 and "resampler" not in parameter_shapes(bare)
    with pytest.raises(ConfigError, match="5 axes"):
        jax.eval_shape(MODEL.apply, variables, dict(inputs, images=frames[0, 0]))


@pytest.mark.parametrize("change, message", [
    (dict(gated=dict(GATED, every=0)), "every=0"), (dict(gated=dict(GATED, first=5)), "first=5"), (dict(gated=dict(GATED, gate="both")), "scalar"),
    (dict(image_features="pooled"), "image_features"), (dict(gated=dict(GATED, head=3)), "head"), (dict(resampler=dict(latents=3)), "latents"),
])
def test_settings_that_cannot_be(change, message):
    with pytest.raises(ConfigError, match=message):
        parameter_shapes(MODEL.clone(**change))


def test_inputs_that_do_not_fit(variables):
    with pytest.raises(ConfigError, match="media_index"):
        MODEL.apply(variables, dict(tokens=INPUTS["tokens"], images=INPUTS["images"]))
    with pytest.raises(ConfigError, match="one entry for each token"):
        MODEL.apply(variables, dict(INPUTS, media_index=INPUTS["media_index"][:, :4]))


# In billions. IDEFICS: the parameters of the releases, 8.93 and 80. Flamingo (table 5): blocks 1.2, 1.6 and 10, resampler 0.194, vision 0.435, totals 3.2, 9.3
# and 80; language models of these widths and depths have 1.34, 8.3 and 65 without the matrices of Chinchilla's relative positions.
@pytest.mark.parametrize("name, preset, gated, resampler, total", [
    ("flamingo", "flamingo-3b", 1.158, 0.194, 3.13), ("flamingo", "flamingo-9b", 1.804, 0.194, 10.75), ("flamingo", "flamingo-80b", 8.355, 0.194, 73.93),
    ("open_flamingo", "openflamingo-9b", 1.116, 0.063, 8.13), ("idefics", "idefics-9b", 1.435, 0.126, 8.93), ("idefics", "idefics-80b", 13.925, 0.126, 79.97),
])
def test_published_sizes(name, preset, gated, resampler, total):
    shapes = parameter_shapes(registry.build(name, preset))
    count = {part: sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes[part])) / 1e9 for part in shapes}
    assert count["gated"] == pytest.approx(gated, abs=1e-3) and count["resampler"] == pytest.approx(resampler, abs=1e-3)
    assert sum(count.values()) == pytest.approx(total, abs=0.01)

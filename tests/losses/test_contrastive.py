"""The contrastive losses against open-coded torch, transformers and their own definitions."""
from hypothesis import given, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.reference import LOSSES, SCALARS, assert_same, features, value_and_gradients
from vlm_jax.losses import matching_accuracy, sigmoid_loss, softmax_loss


def torch_losses(image, text, scale, bias):
    """Sigmoid and softmax losses written as in the papers' pseudocode, float64, with gradients by image, text, scale, bias."""
    import torch
    out = {}
    for name in LOSSES:
        x, y, s, b = (torch.tensor(np.asarray(a, np.float64), requires_grad=True) for a in (image, text, scale, bias))
        n = len(x)
        logits = s * x @ y.T
        if name == "sigmoid":
            labels = 2 * torch.eye(n) - torch.ones(n, n)
            loss = -torch.nn.functional.logsigmoid(labels * (logits + b)).sum() / n
        else:
            labels = torch.arange(n)
            loss = (torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(logits.T, labels)) / 2 + 0 * b
        loss.backward()
        out[name] = (loss.item(), [p.grad.numpy() for p in (x, y, s, b)])
    return out


@pytest.mark.parametrize("chunked", [True, False])
def test_losses_match_torch(chunked):
    image, text = features(11)
    wanted = torch_losses(image, text, *SCALARS)
    for name, (loss, gradients) in wanted.items():
        (total, weight), got = value_and_gradients(name, chunked)(image, text, *SCALARS, None)
        assert float(weight) == 11
        np.testing.assert_allclose(float(total / weight), loss, rtol=2e-6)
        for a, b in zip(got, gradients):
            np.testing.assert_allclose(np.asarray(a) * 3 / 11, b, rtol=1e-5, atol=2e-6 * max(1e-3, np.abs(b).max()))


def tiny_reference(name):
    """A tiny SiglipModel or CLIPModel's embeddings, scalars and loss."""
    torch = pytest.importorskip("torch")
    import transformers
    torch.manual_seed(0)
    tower = dict(hidden_size=12, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = dict(tower, vocab_size=20, max_position_embeddings=5, projection_size=12, eos_token_id=1, bos_token_id=2, pad_token_id=3)
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=dict(tower, image_size=8, patch_size=4), projection_dim=12)
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.logit_scale.data.fill_(1.7)
    if name == "Siglip":
        model.logit_bias.data.fill_(-3.1)
    with torch.no_grad():
        out = model(input_ids=torch.randint(0, 20, (7, 5)), pixel_values=torch.randn(7, 3, 8, 8), return_loss=True)
    return jnp.asarray(out.image_embeds.numpy()), jnp.asarray(out.text_embeds.numpy()), float(out.loss)


def test_losses_match_transformers():
    image, text, wanted = tiny_reference("Siglip")
    total, weight = sigmoid_loss(image, text, jnp.exp(1.7), -3.1)
    np.testing.assert_allclose(float(total / weight), wanted, rtol=2e-6)
    image, text, wanted = tiny_reference("CLIP")
    total, weight = softmax_loss(image, text, jnp.exp(1.7))
    np.testing.assert_allclose(float(total / weight), wanted, rtol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunked", [True, False])
def test_rows_of_weight_nought_are_neither_positives_nor_negatives(name, chunked):
    image, text = features(8)
    image[[2, 5]], text[[2, 6]] = np.nan, np.inf     # what is in a bad record must not matter
    weight = np.array([1, 1, 0, 1, 1, 0, 0, 1], np.float32)
    keep = weight > 0
    (total, count), gradients = value_and_gradients(name, chunked)(image, text, *SCALARS, weight)
    (wanted, _), wanted_gradients = value_and_gradients(name, chunked)(image[keep], text[keep], *SCALARS, None)
    assert float(count) == 5
    np.testing.assert_allclose(total, wanted, rtol=1e-6)
    for a, b in zip(gradients[:2], wanted_gradients[:2]):
        assert not np.asarray(a)[~keep].any()
        np.testing.assert_allclose(np.asarray(a)[keep], b, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients[2:], wanted_gradients[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("chunked", [True, False])
def test_a_batch_without_any_good_row_gives_nought(name, chunked):
    (total, weight), gradients = value_and_gradients(name, chunked)(*features(8), *SCALARS, np.zeros(8, np.float32))
    assert float(total) == float(weight) == 0
    assert all(not np.asarray(g).any() for g in gradients)


@given(pairs=st.sampled_from([1, 3, 8]), seed=st.integers(0, 1000), scale=st.floats(0.1, 100), bias=st.floats(-20, 20))
def test_chunked_equals_dense_whatever_the_numbers(pairs, seed, scale, bias):
    rng = np.random.default_rng(seed)
    arguments = (*features(pairs, seed=seed), np.float32(scale), np.float32(bias), rng.choice([0.0, 0.5, 1.0, 2.0], pairs).astype(np.float32))
    for name in LOSSES:
        assert_same(value_and_gradients(name, True)(*arguments), value_and_gradients(name, False)(*arguments), arguments, sure=True)


@given(seed=st.integers(0, 1000), factor=st.floats(0.25, 4))
def test_order_of_rows_and_a_common_weight_do_not_matter(seed, factor):
    image, text = features(8, seed=seed)
    order = np.random.default_rng(seed).permutation(8)
    for name in LOSSES:
        run = value_and_gradients(name, True)
        (total, weight), _ = run(image, text, *SCALARS, np.ones(8, np.float32))
        (shuffled, _), _ = run(image[order], text[order], *SCALARS, np.ones(8, np.float32))
        (scaled, scaled_weight), _ = run(image, text, *SCALARS, np.full(8, factor, np.float32))
        np.testing.assert_allclose(shuffled, total, rtol=2e-6)
        np.testing.assert_allclose(scaled / scaled_weight, total / weight, rtol=2e-6)


def test_softmax_is_symmetric_and_sure_at_the_end_of_training():
    image, text = features(8)
    np.testing.assert_allclose(softmax_loss(image, text, 5.0)[0], softmax_loss(text, image, 5.0)[0], rtol=1e-6)
    eye = jnp.eye(8)
    assert float(softmax_loss(eye, eye, 100.0)[0]) < 1e-6
    assert float(sigmoid_loss(eye, eye, 100.0, -50.0)[0]) < 1e-6


def test_bfloat16_features_are_computed_in_float32():
    image, text = (jnp.asarray(x, jnp.bfloat16) for x in features(8))
    total, gradient = jax.value_and_grad(lambda x: sigmoid_loss(x, text, *SCALARS)[0])(image)
    wanted = sigmoid_loss(image.astype(jnp.float32), text.astype(jnp.float32), *SCALARS)[0]
    assert total.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert float(total) == float(wanted)


def test_matching_accuracy_counts_texts_that_are_nearest_alone():
    image = jnp.eye(4)
    text = jnp.eye(4)[jnp.array([0, 1, 3, 3])]
    hits, weight = matching_accuracy(image, text)
    assert (float(hits), float(weight)) == (2, 4)          # image 2 meets a stranger's text, image 3 a tie
    hits, weight = matching_accuracy(image, text, weight=jnp.array([1.0, 1, 0, 2]))
    assert (float(hits), float(weight)) == (4, 4)
    assert float(matching_accuracy(jnp.ones((4, 2)), jnp.ones((4, 2)))[0]) == 0
    assert not jax.grad(lambda x: matching_accuracy(x, text)[0])(image).any()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="sigmoid_loss: image .* must both be"):
        sigmoid_loss(jnp.ones((4, 3)), jnp.ones((4, 2)), 1.0, 0.0)
    with pytest.raises(ValueError, match="softmax_loss: weight has shape .*3.* for 4 pairs"):
        softmax_loss(jnp.ones((4, 3)), jnp.ones((4, 3)), 1.0, weight=jnp.ones(3))

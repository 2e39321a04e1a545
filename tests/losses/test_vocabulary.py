"""Tiled vocabulary cross-entropy against the formula and PyTorch: any tile, mask and mesh, values, gradients and memory."""
from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from vlm_jax.losses import supervision, token_scores, vocabulary_loss, weighted_loss
from vlm_jax.sharding import make_mesh


def problem(shape=(3, 5), width=8, size=37, seed=0, tied=False, share=0.6):
    """(hidden, kernel, bias, targets, weight): targets of every kind, about `share` of the positions supervised."""
    generator = np.random.default_rng(seed)
    hidden, kernel, bias = (jnp.asarray(generator.normal(size=s), jnp.float32) for s in ((*shape, width), (size, width) if tied else (width, size), (size,)))
    targets = jnp.asarray(generator.integers(0, size, shape), jnp.int32)
    weight = jnp.asarray((generator.random(shape) < share) * generator.uniform(0.5, 2, shape), jnp.float32)
    return hidden, kernel, bias, targets, weight


def value_and_gradients(hidden, kernel, bias, targets, weight, **options):
    def loss(hidden, kernel, bias):
        total, count = vocabulary_loss(hidden, kernel, targets, weight=weight, bias=bias, **options)
        return total / count, count
    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(hidden, kernel, bias)


def assert_equal_to(ours, theirs, rtol=1e-6):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(jnp.abs(b).max()))


@pytest.mark.parametrize("options, size, tile, rows", [
    ({}, 37, 16, 4), (dict(tied=True, soft_cap=2.0), 300, 130, 100), (dict(tied=True, soft_cap=2.0, z_loss=0.1, label_smoothing=0.2), 300, 100, 4)], ids=str)
def test_tiles_equal_the_formula(options, size, tile, rows):
    arguments = problem(size=size, tied=options.get("tied", False))
    assert_equal_to(value_and_gradients(*arguments, **options, tile=tile, rows=rows), value_and_gradients(*arguments, **options, tiled=False))


@given(tile=st.integers(1, 400), rows=st.integers(1, 9), size=st.integers(2, 300), share=st.sampled_from([0.0, 0.1, 0.5, 1.0]), seed=st.integers(0, 9))
@settings(max_examples=6)
def test_any_tile_and_any_mask(tile, rows, size, share, seed):
    hidden, kernel, bias, targets, weight = problem(shape=(7,), width=4, size=size, seed=seed, share=share)

    def score(tiled):
        def value(hidden, kernel):
            scores = token_scores(hidden, kernel, targets, weight=weight, bias=bias, mean=True, tiled=tiled, tile=tile, rows=rows)
            return sum(jnp.sum(jnp.sin(score + i)) for i, score in enumerate(scores[:3])), scores
        (_, scores), gradients = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))(hidden, kernel)
        return scores, gradients

    (ours, our_gradients), (theirs, their_gradients) = score(True), score(False)
    assert_equal_to((ours, our_gradients), (theirs, their_gradients), rtol=1e-5)
    assert not np.asarray(ours.log_probability)[np.asarray(weight) == 0].any()


def test_equals_torch(smoothing=0.1):
    import torch
    hidden, kernel, bias, targets, _ = problem(shape=(4, 6), size=53)
    targets = targets.at[0, :3].set(-100)
    (loss, count), gradients = value_and_gradients(hidden, kernel, bias, targets, None, label_smoothing=smoothing, tile=20, rows=7)
    tensors = [torch.tensor(np.asarray(x), requires_grad=True) for x in (hidden, kernel, bias)]
    logits = (tensors[0] @ tensors[1] + tensors[2]).reshape(-1, 53)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(np.asarray(targets)).reshape(-1).long(), ignore_index=-100, label_smoothing=smoothing)
    expected.backward()
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    assert int(count) == 21
    for ours, theirs in zip(gradients, tensors):
        np.testing.assert_allclose(ours, theirs.grad.numpy(), rtol=2e-5, atol=1e-7)


def test_scores_count_ties_as_wrong_and_keep_small_losses():
    hidden = jnp.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    kernel = jnp.asarray([[10.0, 0.0, 0.0], [0.0, 3.0, 3.0]])
    scores = token_scores(hidden, kernel, jnp.asarray([0, 1, 2]), tile=1, rows=2)
    assert scores.correct.tolist() == [1, 0, 0]
    assert float(scores.log_probability[0]) == pytest.approx(-np.log1p(2 * np.exp(-10.0)), rel=1e-3)
    loss, weight = weighted_loss(scores, supervision(jnp.asarray([0, 1, 2])), z_loss=0.5)
    assert float(weight) == 3
    np.testing.assert_allclose(loss, -scores.log_probability.sum() + 0.5 * np.square(scores.log_normalizer).sum(), rtol=1e-6)


def test_unsupervised_positions_never_spread_and_impossible_targets_do():
    hidden, kernel, bias, targets, weight = problem()
    weight = weight.at[1].set(0.0)
    broken = hidden.at[1].set(jnp.nan)
    (loss, _), gradients = value_and_gradients(broken, kernel, bias, targets.at[1].set(10**6), weight, tile=16, rows=4)
    (expected, _), theirs = value_and_gradients(hidden, kernel, bias, targets, weight, tile=16, rows=4)
    assert float(loss) == float(expected)
    jax.tree.map(np.testing.assert_array_equal, gradients, theirs)
    assert not np.asarray(gradients[0][1]).any()
    weight = weight.at[0, 0].set(1.0)
    assert np.isnan(value_and_gradients(hidden, kernel, bias, targets.at[0, 0].set(37), weight)[0][0])


def test_bfloat16_inputs_are_summed_in_float32():
    hidden, kernel, bias, targets, weight = problem(shape=(2, 64), width=256, size=200)
    low, table = hidden.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    (loss, _), gradients = value_and_gradients(low, kernel, bias, targets, weight, tile=128, rows=50)
    exact, expected = value_and_gradients(low.astype(jnp.float32), table.astype(jnp.float32), bias, targets, weight, tiled=False)
    np.testing.assert_allclose(loss, exact[0], rtol=1e-5)
    assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
    for ours, theirs in zip(gradients, expected):
        assert float(jnp.abs(ours.astype(jnp.float32) - theirs).max()) < 0.01 * float(jnp.abs(theirs).max())


@pytest.mark.parametrize("sizes, shape, width, size, tied", [
    (dict(data=2, fsdp=2, tensor=2), (5, 3), 8, 37, False),        # neither batch nor vocabulary divide
    (dict(data=1, fsdp=4, tensor=2), (4, 6), 6, 300, True),        # fsdp does not divide the width
    (dict(data=2, tensor=2, sequence=2), (4, 6), 8, 64, False),
    (dict(data=2, fsdp=4), (16,), 8, 50, True),
], ids=str)
def test_meshes_equal_one_device(sizes, shape, width, size, tied):
    mesh, options = make_mesh(**sizes), dict(tied=tied, z_loss=0.1, label_smoothing=0.1, soft_cap=5.0)
    arguments = problem(shape=shape, width=width, size=size, tied=tied)
    expected = value_and_gradients(*arguments, **options, tiled=False)
    with jax.set_mesh(mesh):
        assert_equal_to(value_and_gradients(*arguments, **options, tile=20, rows=4), expected)


def temporary_bytes(tiled, mesh=None, share=True):
    """Of the loss of 4 x 512 positions over 30,000 entries and its gradients."""
    def loss(hidden, kernel, targets, weight):
        total, count = vocabulary_loss(hidden, kernel, targets, weight=weight, tiled=tiled, tile=1024, rows=256, mesh=mesh)
        return total / count
    def leaf(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=None if mesh is None else NamedSharding(mesh, PartitionSpec(*spec)))
    split = ("data", "fsdp")
    arguments = (leaf((4, 512, 64), jnp.float32, split), leaf((64, 30_000), jnp.float32, "fsdp", "tensor"), leaf((4, 512), jnp.int32, split),
                 leaf((4, 512), jnp.float32, split))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arguments).compile()


def test_no_array_of_logits_is_left():
    tiled, dense = temporary_bytes(True), temporary_bytes(False)
    logits = 4 * 512 * 30_000 * 4
    assert dense.memory_analysis().temp_size_in_bytes > logits
    assert tiled.memory_analysis().temp_size_in_bytes < 0.1 * logits
    assert "30000" in tiled.as_text() and "2048,30000]" not in tiled.as_text()


def test_the_head_stays_split_over_fsdp_and_tensor():
    """No device gathers the whole head, nor its gradient: the largest buffer of it is the part that lives there, and a tile."""
    program = temporary_bytes(True, make_mesh(data=1, fsdp=4, tensor=2)).as_text()
    assert "f32[16,15000]" in program and "30000]" not in program and "f32[64,15000]" not in program


def test_messages():
    hidden, kernel, bias, targets, weight = problem()
    for change, expected in [
        (dict(kernel=kernel.T), r"hidden \(3, 5, 8\) and kernel \(37, 8\) do not fit; give hidden \[..., D\] and a kernel \[D, V\] \(tied=False\)."),
        (dict(targets=targets[0]), "vocabulary: targets have shape"), (dict(weight=weight[0]), "vocabulary: weight has shape"),
        (dict(bias=bias[1:]), "vocabulary: bias has shape"), (dict(soft_cap=0.0), "soft_cap is 0.0; it must be positive"),
        (dict(z_loss=-1.0), "z_loss is -1.0"), (dict(label_smoothing=1.0), "label_smoothing is 1.0"), (dict(tile=0), "tile=0, rows="),
    ]:
        with pytest.raises(ValueError, match=expected):
            vocabulary_loss(**{**dict(hidden=hidden, kernel=kernel, targets=targets, weight=weight, bias=bias), **change})

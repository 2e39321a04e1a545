"""Networks without normalisation: against PyTorch, published sizes, how a signal travels through them, stochastic depth, training."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax import registry
from vlm_jax.encoders.nfnet import GAMMAS, NFNet, normalized, predicted_deviations
from vlm_jax.encoders.variants import NF_RESNET, variant
from vlm_jax.errors import ConfigError
from vlm_jax.nn.convolution import convolution, standardized

NFNET = dict(widths=(16, 24), depths=(1, 3), strides=(1, 2), group_size=4, image_size=(19, 13))
RESNET = dict(NF_RESNET, widths=(16, 24, 12), depths=(2, 1, 2), strides=(1, 2, 2), image_size=(19, 13))
SMALL = dict(widths=(8,), depths=(3,), strides=(2,), group_size=2, stem="pool", final_ratio=None, image_size=(19, 13))   # compiled with gradients
RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(2, 19, 13, 3)).astype(np.float32)


def shapes(tower, **keys):
    return jax.eval_shape(lambda: tower.init_with_output(jax.random.key(0), jnp.zeros((2, *tower.input_shape())), **keys))


def drawn(tower, seed=1):
    """Parameters, all of them random."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes(tower)[1]["params"])


def count(tower):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes(tower)[1]))


@pytest.mark.parametrize("settings, groups, size", [(NFNET, (2, 3), (19, 13)), (RESNET, (1, 1, 1), (16, 24)),
                                                    (dict(RESNET, squeeze=0.25, activation="silu", final_ratio=1.5), (1, 1, 1), (33, 7))])
def test_parity_with_pytorch(settings, groups, size):
    torch = pytest.importorskip("torch")
    from tests.encoders import nfnet_reference
    tower = NFNet(**settings, pool="none")
    params, image = drawn(tower), RNG.normal(size=(2, *size, 3)).astype(np.float32)
    tokens, out = jax.jit(tower.apply)({"params": params}, image)
    with torch.no_grad():
        expected = nfnet_reference.tower(params, image, depths=tower.depths, strides=tower.strides, activation=tower.activation, alpha=0.2, groups=groups,
                                         transition=tower.shortcut).numpy()
    stride = 4 * math.prod(tower.strides)
    assert tokens.shape == (2, -(-size[0] // stride) * -(-size[1] // stride), tower.width) == expected.shape
    assert np.abs(tokens - expected).max() / np.abs(expected).max() < 1e-5
    np.testing.assert_array_equal(out["tokens"], tokens)


# Of the NFNets: counted in the released code; Flamingo's table has 435M for F6 without its classifier.
@pytest.mark.parametrize("settings, expected", [(dict(variant("F0"), num_classes=1000), 71_489_284), (dict(variant("F6"), num_classes=1000), 438_359_116),
                                                (variant("F6"), 435_286_116), (dict(variant("NF-ResNet-50"), num_classes=1000), 25_556_984)])
def test_published_parameter_counts(settings, expected):
    assert count(NFNet(**settings)) == expected


def test_predicted_deviations_are_those_of_f0():
    stages = predicted_deviations((1, 2, 6, 3), 0.2)
    expected = [1, .98058, .98058, .96225, .98058, .96225, .94491, .92848, .91287, .89803, .98058, .96225]
    np.testing.assert_allclose(1 / np.concatenate(stages), expected, atol=5e-6)


@pytest.mark.parametrize("activation", sorted(GAMMAS))
def test_activations_keep_the_variance(activation):
    z = jnp.asarray(np.random.default_rng(3).normal(size=400_000), jnp.float32)
    assert float(normalized(activation, z).var()) == pytest.approx(1, abs=0.01)


def test_standardised_kernels():
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 5, 7)) * 4 + 2, jnp.float32)
    gain = jnp.linspace(0.5, 2, 7)
    out = standardized(kernel, gain)
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(45 * jnp.square(out).mean((0, 1, 2)), gain ** 2, rtol=1e-5)
    np.testing.assert_array_equal(standardized(jnp.ones_like(kernel), gain), 0)   # without variance: zeros, not nan
    assert np.isfinite(jax.grad(lambda k: standardized(k, gain).sum())(jnp.ones_like(kernel))).all()


@pytest.mark.parametrize("settings", [dict(widths=(64, 96), group_size=16, stem="pool"), dict(NF_RESNET, widths=(128, 160))])
def test_the_signal_has_the_predicted_variance(settings):
    tower = NFNet(**{**settings, "depths": (2, 5), "strides": (1, 1), "alpha": 0.5})
    image = np.random.default_rng(5).normal(size=(3, 48, 48, 3)).astype(np.float32)
    params = jax.jit(tower.init)(jax.random.key(0), image)["params"]
    opened = jax.tree_util.tree_map_with_path(lambda path, leaf: leaf + 1 if path[-1].key == "skip_gain" else leaf, params)
    apply = jax.jit(lambda params: tower.apply({"params": params}, image)[1]["stages"])
    shut = apply(params)   # as initialised: each stage is its first shortcut
    for stage in shut.values():
        np.testing.assert_array_equal(stage["blocks"]["output"], np.broadcast_to(stage["first"]["output"], stage["blocks"]["output"].shape))
    for stage, predicted in zip(apply(opened).values(), predicted_deviations(tower.depths, 0.5)):
        # Places near the edge, whose windows read zeros, are left out; variances are those of single channels.
        found, branches = (np.sqrt(np.concatenate([stage["first"][name][None], stage["blocks"][name]])[:, :, 2:-2, 2:-2].var((1, 2, 3)).mean(-1))
                           for name in ("output", "branch"))
        after = np.asarray([*predicted[1:], (max(predicted[-1], 1) ** 2 + 0.25) ** 0.5])
        np.testing.assert_allclose(found / found[0], after / after[0], rtol=0.03)
        assert (np.abs(found / after - 1) < 0.2).all() and (np.abs(branches - 1) < 0.25).all(), "f keeps variance 1, however large x has become"


def test_stochastic_depth_leaves_out_branches_of_examples_unscaled():
    tower = NFNet(widths=(8,), depths=(4,), strides=(1,), group_size=None, stochastic_depth=0.9, image_size=8)
    image = RNG.normal(size=(64, 8, 8, 3)).astype(np.float32)
    params = drawn(tower)

    def run(train, seed=0):
        x = tower.apply({"params": params}, image, train, rngs={"dropout": jax.random.key(seed)})[1]["stages"]["stages_0"]
        output = jnp.concatenate([x["first"]["output"][None], x["blocks"]["output"]])
        gain = jnp.concatenate([params["stages_0"]["first"]["skip_gain"][None], params["stages_0"]["blocks"]["skip_gain"]])
        added = 0.2 * gain[1:, None, None, None, None] * x["blocks"]["branch"]
        return output, added
    output, added = jax.jit(run, static_argnums=0)(True)
    output, added = np.asarray(output), np.asarray(added)
    moved = np.abs(output[1:] - output[:-1]).max((2, 3, 4)) > 0
    np.testing.assert_allclose(moved.mean(1), 1 - 0.9 * np.arange(1, 4) / 4, atol=0.2)
    np.testing.assert_allclose(output[1:], output[:-1] + added * moved[..., None, None, None], rtol=1e-3, atol=1e-4)
    at_test, added = jax.jit(run, static_argnums=0)(False)
    np.testing.assert_allclose(at_test[1:], at_test[:-1] + added, rtol=1e-3, atol=1e-4)
    assert (output[0] == at_test[0]).all()   # block 0 is never left out


def test_how_it_is_run_changes_nothing():
    params = drawn(NFNet(**SMALL))

    def value(**options):
        tower = NFNet(**SMALL, **options)
        return jax.jit(jax.value_and_grad(lambda params: jnp.square(tower.apply({"params": params}, IMAGE, True)[0]).mean()))(params)
    loss, gradient = value()
    for options in (dict(scan=False, remat="minimal"), dict(remat="full")):
        other, other_gradient = value(**options)
        assert float(other) == pytest.approx(float(loss), rel=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-6), other_gradient, gradient)


def test_bfloat16_products_with_float32_sums():
    tower, exact = NFNet(**SMALL, dtype="bfloat16"), NFNet(**SMALL)
    params = drawn(tower)

    def value(params):
        (low, out), (full, _) = (model.apply({"params": params}, IMAGE) for model in (tower, exact))
        return low.mean(), (low, out, full)
    (_, (low, out, full)), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(params)
    assert low.dtype == out["stem"].dtype == out["stages"]["stages_0"]["blocks"]["output"].dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    assert 1e-4 < np.abs(low - full).max() / np.abs(full).max() < 0.1


@pytest.mark.parametrize("dtype, stride, tolerance", [("float32", 2, 1e-5), ("bfloat16", 2, 0.02), ("float32", 1, 1e-5)])
def test_the_gradient_of_groups_and_kept_sums_is_that_of_jax(dtype, stride, tolerance):
    x, kernel = (jnp.asarray(RNG.normal(size=shape), dtype) for shape in ((2, 7, 6, 4), (3, 3, 2, 6)))
    weight = jnp.asarray(RNG.normal(size=(2, -(-7 // stride), -(-6 // stride), 6)), dtype).astype(jnp.float32)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2)
    ours = jax.grad(lambda x, k: (convolution(x, k, stride, 2, "float32") * weight).sum(), (0, 1))(x, kernel)
    exact = jax.grad(lambda x, k: (plain(x, k) * weight).sum(), (0, 1))(x.astype(jnp.float32), kernel.astype(jnp.float32))
    assert convolution(x, kernel, stride, 2, "float32").dtype == jnp.float32 and ours[0].dtype == ours[1].dtype == dtype
    for a, b in zip(ours, exact):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=tolerance * np.abs(b).max())


def test_a_step_of_training_lowers_the_loss():
    tower = NFNet(**SMALL, num_classes=3, dropout=0.1)
    labels = jnp.array([0, 2])
    params = jax.jit(tower.init)(jax.random.key(0), IMAGE)["params"]

    def loss(params):
        logits, _ = tower.apply({"params": params}, IMAGE, True, rngs={"dropout": jax.random.key(1)})
        return -jax.nn.log_softmax(logits)[jnp.arange(2), labels].mean()
    step = jax.jit(jax.value_and_grad(loss))
    before, gradient = step(params)
    after, _ = step(jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient))
    assert float(after) < float(before)
    assert float(np.abs(gradient["stages_0"]["blocks"]["skip_gain"]).max()) > 0   # what opens the branches


@pytest.mark.parametrize("settings, image, message", [
    (dict(NFNET, pool="map"), (2, 9, 9, 3), 'NFNet.pool: "map" is unknown; choose "gap" or "none"'),
    (dict(NFNET, depths=(1, 2, 3)), (2, 9, 9, 3), "2 widths"),
    (dict(NFNET, group_size=16), (2, 9, 9, 3), "groups of 16 channels do not fit the 8 "),
    (dict(NFNET, activation="gleu"), (2, 9, 9, 3), '"gleu" is unknown. Did you mean "gelu"'),
    (dict(NFNET, pool="none", num_classes=3), (2, 9, 9, 3), "num_classes: a classifier reads the mean"),
    (dict(NFNET, stem="patches"), (2, 9, 9, 3), 'NFNet.stem: "patches" is unknown'),
    (NFNET, (2, 9, 9, 1), r"give \[batch, height, width, 3\]"),
])
def test_errors(settings, image, message):
    with pytest.raises(ConfigError, match=message):
        jax.eval_shape(NFNet(**settings).init, jax.random.key(0), jnp.zeros(image))


@pytest.mark.parametrize("preset, grid, width", [("f6", (14, 14), 3072), ("nf-resnet-50", (7, 7), 2048), ("test", (3, 3), 96)])
def test_presets_say_their_grid_and_width(preset, grid, width):
    tower = registry.build("nfnet", preset, pool="none")
    (tokens, _), _ = shapes(tower)
    assert tower.grid() == grid and tower.out_width == width and tokens.shape == (2, grid[0] * grid[1], width)
    projected = registry.build("nfnet", preset, projection="linear", embed_dim=5)
    assert projected.out_width == 5 == shapes(projected)[0][0].shape[-1]

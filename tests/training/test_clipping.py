"""Adaptive clipping against the paper's formula on every kind of parameter, beside the global norm, as a stage's setting."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.training.clipping import Clip, read_clip, unit_axes
from vlm_jax.training.gradients import global_norm
from vlm_jax.training.optimizers import build_optimizer
from vlm_jax.training.stages import Rules, read_stages
from vlm_jax.training.trees import flatten, unflatten

# path -> (shape, how many axes one unit reaches over behind the layer axis; None: the whole tensor of a layer)
LEAVES = {
    "image/stem/kernel": ((3, 3, 2, 5), 3),                             # a convolution without a bias
    "image/stages_0/first/conv_1/kernel": ((3, 3, 2, 6), 3),
    "image/stages_0/first/conv_1/gain": ((6,), None),
    "image/stages_0/first/conv_1/bias": ((6,), None),
    "image/stages_0/first/skip_gain": ((), None),
    "image/stages_0/blocks/conv_1/kernel": ((4, 3, 3, 2, 6), 3),         # four layers of it
    "image/stages_0/blocks/conv_1/bias": ((4, 6), None),
    "image/stages_0/blocks/skip_gain": ((4,), None),
    "text/blocks/attention/query/kernel": ((2, 5, 3, 4), 1),             # [width, heads, head_dim]
    "text/blocks/attention/query/bias": ((2, 3, 4), None),
    "text/blocks/attention/out/kernel": ((2, 3, 4, 5), 2),               # [heads, head_dim, width], without a bias
    "text/token_embedding": ((7, 5), 1),
    "text/class_token": ((1, 5), None),
    "head/kernel": ((5, 3), 1),
}
SHAPES = {path: shape for path, (shape, _) in LEAVES.items()}
ALL = {"adaptive": [["head/kernel", None], [".*", {"limit": 0.05, "eps": 0.02}]]}


def draw(seed, size):
    rng = np.random.default_rng(seed)
    return unflatten({path: jnp.asarray(rng.normal(size=shape) * size * 10 ** rng.uniform(-2, 1, size=(1,) * (len(shape) - 1) + shape[-1:] if shape else ()),
                                        jnp.float32) for path, shape in SHAPES.items()})


def formula(weight, gradient, reach, limit, eps):
    """Unit by unit, in loops."""
    weight, gradient = np.asarray(weight, np.float64), np.asarray(gradient, np.float64)
    units = [...] if reach is None else [(..., *place) for place in np.ndindex(weight.shape[reach:])]
    out = gradient.copy()
    for unit in units:
        bound, length = limit * max(np.sqrt((weight[unit] ** 2).sum()), eps), np.sqrt((gradient[unit] ** 2).sum())
        if length > bound:
            out[unit] = gradient[unit] * bound / length
    return out


def test_every_kind_of_parameter_follows_the_formula():
    params, gradients = draw(0, 1.0), draw(1, 0.2)
    clipped, norm = jax.jit(Clip(ALL, SHAPES))(gradients, params)
    changed = 0
    for path, (_, reach) in LEAVES.items():
        weight, gradient, ours = (np.asarray(flatten(tree)[path]) for tree in (params, gradients, clipped))
        if path == "head/kernel":
            np.testing.assert_array_equal(ours, gradient)
            continue
        layers = range(weight.shape[0]) if "/blocks/" in path else [slice(None) if weight.ndim else ()]
        for layer in layers:
            np.testing.assert_allclose(ours[layer], formula(weight[layer], gradient[layer], reach, 0.05, 0.02), rtol=1e-5, atol=1e-9, err_msg=path)
        changed += (ours != gradient).any() and (reach is None or ours.ndim < 2 or (ours == gradient).any())
    assert changed > 8, "the draw clips some units and leaves others"
    assert float(norm) == pytest.approx(float(global_norm(gradients)), rel=1e-6)


def test_where_layouts_agree_it_equals_optax():
    paths = ("image/stem/kernel", "image/stages_0/first/conv_1/bias", "image/stages_0/first/skip_gain", "text/token_embedding", "text/class_token")
    params, gradients = ({path: flatten(draw(seed, size))[path] for path in paths} for seed, size in ((2, 1.0), (3, 0.2)))
    expected, _ = optax.adaptive_grad_clip(0.05, 0.02).update(gradients, optax.adaptive_grad_clip(0.05).init(params), params)
    ours, _ = Clip({"adaptive": [[".*", {"limit": 0.05, "eps": 0.02}]]}, {path: SHAPES[path] for path in paths})(unflatten(gradients), unflatten(params))
    for path in paths:
        np.testing.assert_allclose(flatten(ours)[path], expected[path], rtol=1e-5, err_msg=path)


def test_flamingos_recipe_clips_the_tower_adaptively_and_the_rest_together():
    params, gradients = draw(4, 1.0), draw(5, 3.0)
    clip = Clip({"norm": 0.1, "adaptive": [["image/.*", {}]]}, SHAPES)
    clipped, norm = clip(gradients, params)
    rest = {path: leaf for path, leaf in flatten(clipped).items() if not path.startswith("image/")}
    assert float(global_norm(rest)) == pytest.approx(0.1, rel=1e-5) and float(norm) > 1
    alone, _ = Clip({"adaptive": [["image/.*", {}]]}, SHAPES)(gradients, params)
    jax.tree.map(np.testing.assert_array_equal, alone["image"], clipped["image"])
    np.testing.assert_array_equal(alone["head"]["kernel"], gradients["head"]["kernel"])
    both, _ = Clip(0.1, SHAPES)(gradients, params)
    assert float(global_norm(both)) == pytest.approx(0.1, rel=1e-5)


def test_an_optimiser_clips_before_its_statistics():
    shapes = {"a/kernel": (4, 3), "head/kernel": (3, 2)}
    rng = np.random.default_rng(0)
    params, gradient = (unflatten({path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()}) for _ in range(2))
    optimizer = build_optimizer(dict(name="sgd", momentum=None), dict(name="constant", peak=1.0), 1, Rules([(".*", {})], params),
                                clip={"adaptive": [["head/kernel", None], [".*", {"limit": 0.01}]]})
    moved, _, facts = jax.jit(optimizer.update)(gradient, optimizer.init(params), params, 0)
    step = np.linalg.norm(np.asarray(params["a"]["kernel"] - moved["a"]["kernel"]), axis=0)
    np.testing.assert_allclose(step, 0.01 * np.linalg.norm(params["a"]["kernel"], axis=0), rtol=1e-3)
    np.testing.assert_allclose(params["head"]["kernel"] - moved["head"]["kernel"], gradient["head"]["kernel"], rtol=1e-5)
    assert float(facts["gradient_norm"]) == pytest.approx(float(global_norm(gradient)), rel=1e-6)


def test_unit_axes_of_a_tower():
    from vlm_jax import registry
    tower = registry.build("nfnet", "test", num_classes=3)
    shapes = {path: leaf.shape for path, leaf in flatten(jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, 24, 24, 3)))["params"]).items()}
    axes = {path: unit_axes(path, shapes) for path in shapes}
    assert axes["stages_1/blocks/conv_1/kernel"] == (1, 2, 3) and axes["stages_1/first/conv_1/kernel"] == (0, 1, 2) and axes["head/kernel"] == (0,)
    assert axes["stages_1/blocks/conv_1/gain"] == (1,) and axes["stages_1/blocks/skip_gain"] == () and axes["stem_0/bias"] == (0,)


@pytest.mark.parametrize("clip, message", [
    (0, "clip is 0; it must be a positive number, or None"),
    (True, "clip is True"),
    ("1", "clip is '1'"),
    ({"norm": -1}, "clip.norm is -1"),
    ({"nrm": 1}, 'clip.nrm: .*Did you mean "norm"'),
    ({"adaptive": "image"}, "clip.adaptive is 'image'; write a list"),
    ({"adaptive": [["image/.*"]]}, r"clip.adaptive\[0\] is \['image/.\*'\]; write \[regex, settings\]"),
    ({"adaptive": [["(", {}]]}, "is not a regular expression"),
    ({"adaptive": [[".*", 0.01]]}, r"the settings are 0.01; write a mapping such as {\"limit\": 0.01}"),
    ({"adaptive": [[".*", {"limit": 0}]]}, r"clip.adaptive\[0\].limit is 0"),
    ({"adaptive": [[".*", {"clipping": 0.1}]]}, r"clip.adaptive\[0\].clipping"),
    ({"adaptive": [["imag/.*", {}]]}, r'clip.adaptive\[0\]: "imag/.\*" matches no parameter'),
    ({"adaptive": [["text/blocks/0/.*", {}]]}, "the layers of text/blocks/attention/.* are clipped by different rules"),
])
def test_errors(clip, message):
    with pytest.raises(ConfigError, match=message):
        Clip(clip, SHAPES)


def test_stages_check_it_before_anything_is_built():
    config = dict(model={}, processor={}, task={}, mesh={}, dtypes={}, stages=[dict(steps=1, data=dict(a={}), clip={"adaptive": [[".*", {"limit": -1}]]})])
    with pytest.raises(ConfigError, match=r"stages\[0\].clip.adaptive\[0\].limit is -1"):
        read_stages(config)
    assert read_clip(None).norm is None and read_clip(2).norm == 2

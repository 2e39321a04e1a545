"""Optimisers against NumPy, PyTorch and Optax; stacks as their layers; frozen parameters bit for bit."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.errors import ConfigError
from vlm_jax.training.factored import factored_axes, scale_by_factored_rms
from vlm_jax.training.optimizers import OPTIMIZERS, build_optimizer, check_settings, decays
from vlm_jax.training.stages import Rules
from vlm_jax.training.trees import flatten, unflatten

STEPS = 6
SCHEDULE = dict(name="linear", peak=0.1, warmup=2)
RATES = [0.0, 0.05, 0.1, 0.075, 0.05, 0.025]


def random_tree(seed, shapes):
    generator = np.random.default_rng(seed)
    return unflatten({path: jnp.asarray(generator.standard_normal(shape), jnp.float32) for path, shape in shapes.items()})


SHAPES = {"a/kernel": (5, 3), "a/bias": (3,), "table": (4, 3), "t": ()}


def run(settings, params, gradients, train=((".*", {}),), clip=None, schedule=SCHEDULE):
    """Parameters and facts after STEPS steps on given gradients."""
    optimizer = build_optimizer(settings, schedule, STEPS, Rules(train, params), clip=clip)
    state, facts = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for step, gradient in enumerate(gradients):
        params, state, fact = update(gradient, state, params, step)
        facts.append({name: float(value) for name, value in fact.items()})
    return params, state, facts


def gradients_of(shapes, seed=1):
    return [random_tree(seed + step, shapes) for step in range(STEPS)]


def close(ours, theirs, rtol=2e-5):
    for path, value in flatten(ours).items():
        np.testing.assert_allclose(value, flatten(theirs)[path], rtol=rtol, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("name, settings, torch_settings", [
    ("adamw", dict(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.3), dict(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)),
    ("sgd", dict(momentum=0.7, nesterov=True), dict(momentum=0.7, nesterov=True)),
    ("sgd", dict(momentum=None), dict()),
])
def test_adamw_and_sgd_equal_torch(name, settings, torch_settings):
    import torch
    params, gradients = random_tree(0, SHAPES), gradients_of(SHAPES)
    tensors = {path: torch.tensor(np.asarray(value)) for path, value in flatten(params).items()}
    decayed = [tensors["a/kernel"]]
    plain = [tensors[path] for path in ("a/bias", "table", "t")]
    make = torch.optim.AdamW if name == "adamw" else torch.optim.SGD
    theirs = make([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=0.1, **torch_settings)
    for rate, gradient in zip(RATES, gradients):
        for group in theirs.param_groups:
            group["lr"] = rate
        for path, value in flatten(gradient).items():
            tensors[path].grad = torch.tensor(np.asarray(value))
        theirs.step()
    ours, _, facts = run(dict(name=name, **settings), params, gradients)
    close(ours, unflatten({path: tensor.numpy() for path, tensor in tensors.items()}))
    np.testing.assert_allclose([fact["learning_rate"] for fact in facts], RATES, rtol=1e-6)


def test_lion_equals_its_algorithm_in_numpy():
    params, gradients = random_tree(0, SHAPES), gradients_of(SHAPES)
    ours, _, _ = run(dict(name="lion", b1=0.85, b2=0.97, weight_decay=0.2), params, gradients)
    values = {path: np.array(value) for path, value in flatten(params).items()}
    moments = {path: np.zeros_like(value) for path, value in values.items()}
    for rate, gradient in zip(RATES, gradients):
        for path, g in flatten(gradient).items():
            g = np.asarray(g)
            decay = 0.2 if path == "a/kernel" else 0.0
            values[path] = values[path] - rate * (np.sign(0.85 * moments[path] + 0.15 * g) + decay * values[path])
            moments[path] = 0.97 * moments[path] + 0.03 * g
    close(ours, unflatten(values))


def adafactor_in_numpy(value, gradients, rates, *, cap, min_dim, decay, b1=0.9, peak=0.1):
    """Factored Adafactor for one matrix or vector, in float64, written from the papers."""
    value = np.array(value, np.float64)
    rows = columns = full = 0.0
    momentum = np.zeros_like(value)
    for step, (rate, g) in enumerate(zip(rates, gradients)):
        g = np.asarray(g, np.float64)
        beta = min(cap, 1 - (step + 1.0) ** -0.8)
        square = g * g + 1e-30
        if g.ndim == 2 and min(g.shape) >= min_dim:
            rows = beta * rows + (1 - beta) * square.mean(1)
            columns = beta * columns + (1 - beta) * square.mean(0)
            second = np.outer(rows, columns) / rows.mean()
        else:
            full = second = beta * full + (1 - beta) * square
        momentum = b1 * momentum + (1 - b1) * g / np.sqrt(second)
        value = value - rate * momentum - rate / peak * decay * value
    return value


@pytest.mark.parametrize("cap", [0.999, 0.5])
def test_adafactor_equals_its_equations_in_numpy(cap):
    shapes = {"wide/kernel": (5, 9), "small/kernel": (3, 9), "a/bias": (9,)}
    params, gradients = random_tree(0, shapes), gradients_of(shapes)
    settings = dict(name="adafactor", decay_cap=cap, min_dim_factored=4, weight_decay=0.02, momentum_dtype="float32")
    ours, state, _ = run(settings, params, gradients)
    for path, value in flatten(params).items():
        expected = adafactor_in_numpy(value, [flatten(g)[path] for g in gradients], RATES, cap=cap, min_dim=4, decay=0.02 * path.endswith("kernel"))
        np.testing.assert_allclose(flatten(ours)[path], expected, rtol=2e-5, atol=1e-6, err_msg=path)
    factored = state[0]
    assert set(flatten(factored.row)) == {"wide/kernel"} and set(flatten(factored.full)) == {"small/kernel", "a/bias"}


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (2, 6, 5), (6, 2, 5), (5, 5), (3, 2), (7,)])
def test_the_factored_moment_equals_optax(shape):
    params = {"kernel": jnp.zeros(shape)}
    ours = scale_by_factored_rms(decay_rate=0.8, decay_cap=0.7, min_dim=4)
    theirs = optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=4,
                                         decay_rate_fn=lambda step, rate: jnp.minimum(0.7, 1 - (jnp.asarray(step, jnp.float32) + 1) ** -rate))
    state, other = ours.init(params), theirs.init(params)
    for gradient in gradients_of({"kernel": shape})[:4]:
        update, state = ours.update(gradient, state, params)
        expected, other = theirs.update(gradient, other, params)
        np.testing.assert_allclose(update["kernel"], expected["kernel"], rtol=1e-5)


def test_the_layer_axis_is_never_factored_over():
    assert factored_axes((40, 64), stacked=False, min_dim=32) == (0, 1)
    assert factored_axes((40, 64), stacked=True, min_dim=32) is None
    assert factored_axes((40, 64, 48), stacked=True, min_dim=32) == (2, 1)


@pytest.mark.parametrize("settings", [
    dict(name="adafactor", min_dim_factored=2, clip_threshold=0.5, weight_decay=0.01), dict(name="adamw", weight_decay=0.1),
    dict(name="lion"), dict(name="sgd")])
def test_a_stack_trains_as_its_layers_would(settings):
    layers, shapes = 5, {"kernel": (3, 4), "bias": (4,)}
    stacked_shapes = {f"blocks/{path}": (layers, *shape) for path, shape in shapes.items()}
    params, gradients = random_tree(0, stacked_shapes), gradients_of(stacked_shapes)
    together, _, _ = run(settings, params, gradients)

    def apart(tree):
        return unflatten({f"layer_{i}/{path}": flatten(tree)[f"blocks/{path}"][i] for i in range(layers) for path in shapes})
    separately, _, _ = run(settings, apart(params), [apart(gradient) for gradient in gradients])
    close(apart(together), separately, rtol=1e-6)


@pytest.mark.parametrize("settings", [dict(name=name, weight_decay=0.1) for name in sorted(OPTIMIZERS)], ids=sorted(OPTIMIZERS))
def test_frozen_parameters_and_layers_keep_their_bits(settings):
    shapes = {"image/blocks/kernel": (4, 3, 2), "image/norm/scale": (3,), "text/kernel": (3, 2)}
    params = random_tree(0, shapes)
    params["image"]["norm"]["scale"] = jnp.asarray([-0.0, 1e-42, jnp.nan], jnp.float32)
    params["image"]["blocks"]["kernel"] = params["image"]["blocks"]["kernel"].at[1, 0].set(jnp.asarray([-0.0, 1e-42]))
    gradients = gradients_of(shapes)
    for gradient in gradients:   # even a gradient of a frozen parameter that is not finite moves nothing
        gradient["image"]["norm"]["scale"] = gradient["image"]["norm"]["scale"].at[0].set(jnp.nan)
        gradient["image"]["blocks"]["kernel"] = gradient["image"]["blocks"]["kernel"].at[0].set(jnp.inf)
    ours, state, facts = run(settings, params, gradients, train=[("image/blocks/[23]/.*", {}), ("image/.*", None), (".*", {})], clip=1.0)
    before, after = (np.asarray(tree["image"]["blocks"]["kernel"]).view(np.uint32) for tree in (params, ours))
    assert (before[:2] == after[:2]).all() and (before[2:] != after[2:]).all()
    assert np.asarray(ours["image"]["norm"]["scale"]).tobytes() == np.asarray(params["image"]["norm"]["scale"]).tobytes()
    assert np.isfinite(np.asarray(ours["text"]["kernel"])).all() and (ours["text"]["kernel"] != params["text"]["kernel"]).all()
    assert all(np.isfinite(fact["gradient_norm"]) for fact in facts)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not any("norm" in path for path in paths)   # no state for what is wholly frozen


def test_factors_on_learning_rate_and_decay():
    shapes = {"image/kernel": (3, 2), "text/kernel": (3, 2)}
    params = random_tree(0, shapes)
    zeros = [jax.tree.map(jnp.zeros_like, params)] * STEPS
    flat = dict(name="constant", peak=0.1)
    rules = [("image/.*", {"lr": 0.5, "weight_decay": 2.0}), (".*", {})]
    by_rate, _, _ = run(dict(name="sgd", weight_decay=0.3), params, zeros, rules, schedule=flat)
    image, text = params["image"]["kernel"], params["text"]["kernel"]
    close(by_rate, {"image": {"kernel": image * (1 - 0.03) ** STEPS}, "text": {"kernel": text * (1 - 0.03) ** STEPS}})
    by_schedule, _, _ = run(dict(name="sgd", weight_decay=0.3, decay_by="schedule"), params, zeros, rules, schedule=flat)
    close(by_schedule, {"image": {"kernel": image * (1 - 0.6) ** STEPS}, "text": {"kernel": text * (1 - 0.3) ** STEPS}})
    ones = [jax.tree.map(jnp.ones_like, params)] * STEPS
    moved, _, _ = run(dict(name="sgd", momentum=None), params, ones, rules, schedule=flat)
    np.testing.assert_allclose(params["image"]["kernel"] - moved["image"]["kernel"], 0.05 * STEPS, rtol=1e-5)
    np.testing.assert_allclose(params["text"]["kernel"] - moved["text"]["kernel"], 0.1 * STEPS, rtol=1e-5)


def test_layerwise_rates_of_a_stack():
    params = {"blocks": {"kernel": jnp.zeros((3, 2, 2))}}
    rules = [("blocks/0/.*", {"lr": 0.25}), ("blocks/1/.*", {"lr": 0.5}), (".*", {})]
    ones = [jax.tree.map(jnp.ones_like, params)] * STEPS
    moved, _, _ = run(dict(name="sgd", momentum=None), params, ones, rules, schedule=dict(name="constant", peak=1.0))
    np.testing.assert_allclose(moved["blocks"]["kernel"][:, 0, 0], -STEPS * np.array([0.25, 0.5, 1.0]))


def test_what_decays():
    assert decays("a/kernel", 2) and decays("a/kernel", 4)
    assert not decays("a/bias", 2, embeddings=True) and not decays("norm/scale", 1, embeddings=True) and not decays("logit_scale", 0, embeddings=True)
    assert not decays("text/embedding", 2) and decays("text/embedding", 2, embeddings=True)


def test_clipping_and_bfloat16_parameters():
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    gradient = {"kernel": jnp.full((2, 2), 5.0, jnp.bfloat16)}
    moved, _, facts = run(dict(name="sgd", momentum=None), params, [gradient], clip=1.0, schedule=dict(name="constant", peak=0.5))
    assert facts[0]["gradient_norm"] == 10.0 and moved["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved["kernel"].astype(np.float32), 0.75)
    state = build_optimizer(dict(name="adamw"), SCHEDULE, STEPS, Rules([(".*", {})], params)).init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize("settings, expected", [
    (dict(name="adam"), 'o.name: "adam" is unknown. Did you mean "adamw"?'),
    (dict(name="adamw", weight_deacy=1), 'o.weight_deacy: adamw takes no such setting. Did you mean "weight_decay"?'),
    (dict(name="adamw", b2=1.0), "o.b2 is 1.0; it must be at least 0 and below 1."),
    (dict(name="adamw", weight_decay=-1), "o.weight_decay is -1; it must be a number of at least 0."),
    (dict(name="lion", decay_by="rate"), 'o.decay_by: "rate" is unknown.'),
    (dict(name="adafactor", momentum_dtype="bf16"), 'o.momentum_dtype: "bf16" is unknown.'),
    (dict(), "o.name is missing; choose one of adafactor, adamw, lion, sgd."),
])
def test_messages(settings, expected):
    with pytest.raises(ConfigError) as caught:
        check_settings(settings, "o")
    assert str(caught.value).startswith(expected)

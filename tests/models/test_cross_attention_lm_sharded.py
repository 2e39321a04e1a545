"""A CrossAttentionLM on eight simulated devices: loss, gradient and decoded tokens equal those of one device."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.language.common import relative
from tests.models.generative import parameter_shapes
from vlm_jax import registry
from vlm_jax.losses import vocabulary_loss
from vlm_jax.models.cross_attention_lm import CrossAttentionLM
from vlm_jax.sharding import layout, make_mesh, parameter_shardings
from vlm_jax.sharding.mesh import batch_sharding

MESHES = {"data": (dict(data=8), "replicated"), "fsdp": (dict(data=1, fsdp=8), "fsdp"), "fsdp_tensor": (dict(data=2, fsdp=2, tensor=2), "fsdp_tensor"),
          "sequence": (dict(data=2, fsdp=2, sequence=2), "fsdp"), "all": (dict(data=1, fsdp=2, tensor=2, sequence=2), "fsdp_tensor")}
ROWS, LENGTH, STEPS = 8, 10, 4
# Three blocks before five layers, so that the last group is shorter; 41 tokens, two of them new, divide by no axis.
MODEL = CrossAttentionLM(dict(image_size=8, patch_size=4, width=16, depth=1, mlp_dim=32, num_heads=2),
                         dict(vocab_size=39, width=32, depth=5, mlp_dim=48, num_heads=4, num_kv_heads=2, new_tokens=2), gated=dict(every=2, num_heads=4),
                         resampler=dict(num_latents=4, depth=1, num_heads=2, head_dim=8))


@functools.cache
def given():
    """(parameters with open gates, a batch whose rows have zero to three pictures, and padding)"""
    rng = np.random.default_rng(0)
    params = jax.tree.map_with_path(
        lambda path, leaf: np.float32(rng.normal(size=leaf.shape) * (0.3 if leaf.ndim < 3 else 0.15) + (path[-1].key == "scale")), parameter_shapes(MODEL))
    index = np.sort(rng.integers(-1, 3, (ROWS, LENGTH)), axis=1)
    index[3] = -1
    valid = np.arange(LENGTH) < np.array([10, 7, 10, 3, 10, 1, 9, 10])[:, None]
    return params, dict(tokens=rng.integers(0, 41, (ROWS, LENGTH)), valid=valid, media_index=np.where(valid, index, -1),
                        images=rng.normal(size=(ROWS, 3, 8, 8, 3)).astype(np.float32))


def loss(model, params, inputs):
    _, out = model.apply({"params": params}, inputs)
    targets, weight = inputs["tokens"][:, 1:], inputs["valid"][:, 1:].astype(jnp.float32)
    total, count = vocabulary_loss(out["hidden"][:, :-1], targets=targets, weight=weight, **model.head(params))
    return total / count


def greedy(model, params, inputs):
    logits, cache = model.apply({"params": params}, inputs, LENGTH + STEPS, method="start")

    def step(carry, _):
        token, cache = carry
        logits, cache = model.apply({"params": params}, token[:, None], cache, method="extend")
        return (logits[:, 0].argmax(-1), cache), (token, logits)

    return jax.lax.scan(step, (logits.argmax(-1), cache), length=STEPS)[1]


def measured(model, mesh=None, shardings=None):
    gradient, decode = jax.jit(jax.value_and_grad(functools.partial(loss, model))), jax.jit(functools.partial(greedy, model))
    params, inputs = given()
    with jax.default_matmul_precision("highest"):
        if mesh is None:
            return jax.device_get((gradient(params, inputs), decode(params, inputs)))
        params, inputs = jax.device_put(params, shardings), jax.device_put(inputs, batch_sharding(mesh))
        with jax.set_mesh(mesh):
            return jax.device_get((gradient(params, inputs), decode(params, inputs)))


@functools.cache
def one_device():
    return measured(MODEL)


@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["fsdp_tensor", *(pytest.param(name, marks=pytest.mark.slow) for name in MESHES if name != "fsdp_tensor")])
def test_loss_gradient_and_tokens_equal_one_device(name, scan):
    sizes, rules = MESHES[name]
    mesh = make_mesh(**sizes)
    shardings = parameter_shardings(mesh, given()[0], layout(rules)["sharding"], min_size=64)
    assert name == "data" or sum(any(leaf.spec) for leaf in jax.tree.leaves(shardings["gated"])) >= 6
    (value, gradient), (tokens, logits) = measured(MODEL.clone(scan=scan), mesh, shardings)
    (expected_value, expected_gradient), (expected_tokens, expected_logits) = one_device()
    assert relative(value, expected_value) < 1e-5 and relative(logits, expected_logits) < 1e-5
    np.testing.assert_array_equal(tokens, expected_tokens)
    whole = max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(expected_gradient))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(expected_gradient), strict=True):
        # Gradients that cancel (a key's bias) are compared with the size of the whole.
        assert np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-4 * whole) < 1e-5, path


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_of_new_tokens_exchanges_no_table(tied):
    """Joining head and new columns would send the parts of a split vocabulary around; their padded sum moves the edges alone."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    model = registry.build("decoder", vocab_size=400, width=32, depth=1, mlp_dim=32, num_heads=2, new_tokens=2, tied=tied)
    names = ("token_embedding", "new_embedding") if tied else ("head", "new_head")
    shapes = parameter_shapes(model)
    tables = {name: jax.tree.map(lambda leaf: np.random.default_rng(leaf.size).normal(size=leaf.shape).astype(np.float32), shapes[name]) for name in names}
    joined = np.concatenate([jax.tree.leaves(tables[name])[0] for name in names], axis=0 if tied else 1)
    split = jax.NamedSharding(mesh, jax.P("tensor", "fsdp") if tied else jax.P("fsdp", "tensor"))
    tables[names[0]] = jax.device_put(tables[names[0]], split)

    def padded(tables):
        return jax.lax.with_sharding_constraint(jnp.pad(model.head(tables)["kernel"], ((0, 6), (0, 0)) if tied else ((0, 0), (0, 6))), split)
    with jax.set_mesh(mesh):
        program = jax.jit(padded).lower(tables).compile()
        kernel = np.asarray(program(tables))
    np.testing.assert_array_equal(kernel[:402] if tied else kernel[:, :402], joined)
    assert not [kind for kind in ("all-to-all", "all-gather", "all-reduce") if kind in program.as_text()]

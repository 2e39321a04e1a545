"""What the tests of the losses share: features on the sphere, and dense against chunked in value and gradients."""
from functools import lru_cache

import jax
import numpy as np

from vlm_jax.losses import sigmoid_loss, softmax_loss
from vlm_jax.sharding import make_mesh

LOSSES = {"sigmoid": sigmoid_loss, "softmax": lambda image, text, scale, bias, **options: softmax_loss(image, text, scale, **options)}
SCALARS = (np.float32(7.3), np.float32(-4.2))


def features(pairs, width=5, seed=0):
    """Two float32 arrays [pairs, width] with rows of length 1, the second correlated with the first."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(pairs, width))
    text = image + rng.normal(size=(pairs, width))
    return tuple((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image, text))


@lru_cache
def mesh_of(devices, fsdp=1, tensor=1):
    return make_mesh(fsdp=fsdp, tensor=tensor, devices=jax.devices()[:devices])


@lru_cache
def value_and_gradients(name, chunked, mesh=None):
    """Jitted (image, text, scale, bias, weight) -> ((sum, weight), gradients of sum / 3 by image, text, scale, bias)."""
    def third(image, text, scale, bias, weight):
        total, weights = LOSSES[name](image, text, scale, bias, weight=weight, mesh=mesh, chunked=chunked)
        return total / 3, (total, weights)

    def run(*arguments):
        with jax.default_matmul_precision("highest"):
            (_, values), gradients = jax.value_and_grad(third, argnums=(0, 1, 2, 3), has_aux=True)(*arguments)
        return values, gradients

    return jax.jit(run)


def assert_same(got, wanted, arguments, tolerance=1e-6, sure=False):
    """Values and gradients agree relative to their largest entry, the scalars' relative to the size of the terms that they sum (contrastive.py).

    With `sure`, losses and gradients may be almost 0 because probabilities are almost 1: they are as exact as a probability is, relative to 1.
    """
    (values, gradients), (wanted_values, wanted_gradients) = got, wanted
    for a, b in zip(values, wanted_values):
        assert abs(float(a) - float(b)) <= tolerance * max(abs(float(b)), float(wanted_values[1]) if sure else 1e-3), (a, b)
    for a, b in zip(gradients[:2], wanted_gradients[:2]):
        assert np.all(np.isfinite(a))
        assert np.max(np.abs(np.asarray(a) - np.asarray(b))) <= tolerance * max(np.max(np.abs(b)), float(arguments[2]) if sure else 1e-6)
    image, scale = np.asarray(arguments[0]), float(arguments[2])
    terms = np.abs(image * np.asarray(wanted_gradients[0])).sum() / scale      # sum_i x_i . dL/dx_i = scale dL/dscale
    terms = max(terms, float(wanted_values[1])) if sure else terms
    assert abs(float(gradients[2]) - float(wanted_gradients[2])) <= tolerance * max(terms, abs(float(wanted_gradients[2]))), (gradients[2], terms)
    assert abs(float(gradients[3]) - float(wanted_gradients[3])) <= tolerance * max(*map(abs, map(float, (*wanted_values, wanted_gradients[3]))))

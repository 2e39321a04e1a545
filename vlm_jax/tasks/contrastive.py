"""Contrastive training of a dual encoder: SigLIP (Zhai et al. 2023) with the sigmoid loss, CLIP (Radford et al. 2021) and LiT with the softmax loss.

Differs from the papers: CLIP clips the parameter t' after each step so that its multiplier stays at most 100; here the multiplier is clipped where
it is used, which keeps the optimiser free of special cases. Beyond the limit t' has no gradient, and the multiplier stays at 100.
"""
from collections.abc import Mapping
from dataclasses import dataclass
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vlm_jax.errors import ConfigError, did_you_mean
from vlm_jax.losses import matching_accuracy, sigmoid_loss, softmax_loss

OBJECTIVES = ("sigmoid", "softmax")
MAX_LOG_SCALE = math.log(100.0)   # CLIP, section 2.5; the sigmoid loss has no limit

Embeddings = dict[str, dict[str, Array]]


@dataclass(frozen=True)
class ContrastiveTask:
    """Pure functions that train `model` to give matching images and texts similar embeddings.

    A batch is `{stream: {"image": [B, H, W, 3], "tokens": [B, T], "weight": [B], "mask": [B]}}`; weight and mask may be missing. Each stream is a
    loss of its own, without negatives from the others.

    Attributes:
      model: a module with `__call__(image, tokens, train)`, `input_shapes()`, the parameter `logit_scale` and, for the sigmoid loss, `logit_bias`.
      objective: "sigmoid" or "softmax".
      chunked: never hold the matrix of all similarities (losses/ring.py).
      stream_weights: ((stream, factor of its loss), ...); streams that are not named count 1.
      mesh: the device mesh; None is one device, or the mesh entered by `jax.set_mesh`.
    """
    model: Any
    objective: str = "sigmoid"
    chunked: bool = True
    stream_weights: tuple[tuple[str, float], ...] = ()
    mesh: Any = None

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """{"image": (H, W, 3), "tokens": (T,)} of one example."""
        return self.model.input_shapes()

    def batch_shapes(self, processor: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Returns {key: (shape, dtype)} of one example of a stream; the model decides it, whatever the settings of its processor."""
        shapes = self.input_shapes()
        return {"image": (shapes["image"], jnp.float32), "tokens": (shapes["tokens"], jnp.int32)}

    def check_fit(self, processor: Any, where: str) -> None:
        """Raises a ConfigError where the processor's pictures or tokens are not what the model takes."""
        shapes = self.input_shapes()
        if processor.image_size is not None and tuple(processor.image_size) != tuple(shapes["image"][:2]):
            raise ConfigError(f"{where}.image gives pictures of {tuple(processor.image_size)} pixels, the model takes {tuple(shapes['image'][:2])}; "
                              "change the resize or model.image.image_size.")
        if processor.length is not None and processor.length != shapes["tokens"][0]:
            raise ConfigError(f"{where}.text gives {processor.length} tokens, the model takes {shapes['tokens'][0]}; "
                              "change tokenize.length or model.text.length.")
        if processor.vocab_size is not None and processor.vocab_size > self.model.text["vocab_size"]:
            raise ConfigError(f"{where}.text: the tokenizer has {processor.vocab_size} entries, the model's table {self.model.text['vocab_size']}; "
                              "raise model.text.vocab_size.")

    def init(self, rng: Array) -> Any:
        """Returns initial parameters; compiled and sharded by the caller."""
        shapes = self.input_shapes()
        return self.model.init(rng, jnp.zeros((1, *shapes["image"])), jnp.zeros((1, *shapes["tokens"]), jnp.int32))["params"]

    def initial_state(self) -> dict:
        """Returns what is carried from step to step besides the parameters: nothing."""
        return {}

    def embed(self, params: Any, state: Any, batch: Mapping[str, Any], rng: Array, step: Any, train: bool = True) -> Embeddings:
        """Returns `{stream: {"image": [B, D], "text": [B, D]}}`; row i depends on row i of the batch and on the key alone.

        `rng` is the key of this step. Dropout draws one array for the whole batch from it, so the draw of an example depends on its place in the
        global batch and not on the mesh.
        """
        def one(stream: Mapping[str, Any], key: Array) -> dict[str, Array]:
            (image, text), _ = self.model.apply({"params": params}, stream["image"], stream["tokens"], train, rngs={"dropout": key})
            return {"image": image, "text": text}

        return {name: one(stream, jax.random.fold_in(rng, number)) for number, (name, stream) in enumerate(sorted(self._streams(batch).items()))}

    def loss_from_embeddings(self, params: Any, state: Any, embeddings: Embeddings, batch: Mapping[str, Any],
                             step: Any) -> tuple[dict[str, tuple[Array, Array]], Any, dict[str, Array]]:
        """Returns ({term: (sum, weight)}, state, metrics) from the embeddings of the whole batch; of the batch only `weight` and `mask` are read.

        The term of the only stream is `contrastive`, those of several `contrastive/STREAM`; metrics are float32 scalars, named likewise:
        accuracy (images whose own text is the most similar of the batch), positive_logit (mean), logit_scale (the multiplier), logit_bias.
        """
        scale, bias = self._scalars(params)
        terms, metrics = {}, {"logit_scale": scale}
        if bias is not None:
            metrics["logit_bias"] = bias
        streams = self._streams(batch)
        factors = dict(self.stream_weights)
        for name in factors:
            if name not in streams:
                raise ConfigError(f"task.stream_weights.{name}: the batch has no such stream.{did_you_mean(name, streams)}")
        for name, stream in sorted(streams.items()):
            suffix = f"/{name}" if len(streams) > 1 else ""
            image, text = embeddings[name]["image"], embeddings[name]["text"]
            weight = _weight(stream, len(image))
            options = dict(weight=weight, mesh=self.mesh)
            if self.objective == "sigmoid":
                total, count = sigmoid_loss(image, text, scale, bias, chunked=self.chunked, **options)
            else:
                total, count = softmax_loss(image, text, scale, chunked=self.chunked, **options)
            terms[f"contrastive{suffix}"] = (factors.get(name, 1.0) * total, count)

            hits, _ = matching_accuracy(image, text, **options)
            positive = jnp.sum(jnp.where(weight > 0, weight * (scale * jnp.sum(image * text, axis=1) + (0.0 if bias is None else bias)), 0.0))
            safe = jnp.maximum(count, jnp.finfo(jnp.float32).tiny)
            metrics[f"accuracy{suffix}"], metrics[f"positive_logit{suffix}"] = hits / safe, positive / safe
        return terms, state, jax.lax.stop_gradient(metrics)

    def loss(self, params: Any, state: Any, batch: Mapping[str, Any], rng: Array,
             step: Any) -> tuple[dict[str, tuple[Array, Array]], Any, dict[str, Array]]:
        """Returns ({term: (sum, weight)}, state, metrics) of a training batch; see `loss_from_embeddings`."""
        return self.loss_from_embeddings(params, state, self.embed(params, state, batch, rng, step), batch, step)

    def _scalars(self, params: Any) -> tuple[Array, Array | None]:
        """The multiplier of the similarities and the bias."""
        log_scale = params["logit_scale"]
        if self.objective == "softmax":
            return jnp.exp(jnp.minimum(log_scale, MAX_LOG_SCALE)), None
        if "logit_bias" not in params:
            raise ConfigError('task.loss="sigmoid" needs a model with a logit_bias; set model.loss="sigmoid" or task.loss="softmax".')
        return jnp.exp(log_scale), params["logit_bias"]

    def _streams(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        for name, stream in batch.items():
            if not isinstance(stream, Mapping):
                raise ConfigError(f'task: the batch holds "{name}" where it should hold streams; give {{"pairs": {{"image": ..., "tokens": ...}}}}.')
        return batch


def _weight(stream: Mapping[str, Any], rows: int) -> Array:
    """[B] float32: the weight of each pair, 0 where the mask is False."""
    weight = stream["weight"].astype(jnp.float32) if "weight" in stream else jnp.ones(rows, jnp.float32)
    return jnp.where(stream["mask"], weight, 0.0) if "mask" in stream else weight


def contrastive_task(model: Any, loss: str = "sigmoid", chunked: bool = True, stream_weights: Mapping[str, float] | None = None,
                     mesh: Any = None) -> ContrastiveTask:
    """Builds a `ContrastiveTask` from the config's `task` section.

    Raises:
      ConfigError: for an unknown loss, one that differs from the model's, or a factor that is not a number >= 0.
    """
    if loss not in OBJECTIVES:
        raise ConfigError(f'task.loss: "{loss}" is unknown.{did_you_mean(loss, OBJECTIVES)}')
    of_model = getattr(model, "loss", loss)
    if loss == "sigmoid" and of_model != "sigmoid":
        raise ConfigError(f'task.loss="sigmoid" needs a model with a logit_bias, but model.loss="{of_model}"; set both to the same loss.')
    factors = dict(stream_weights or {})
    for name, factor in factors.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
            raise ConfigError(f"task.stream_weights.{name} is {factor!r}; give a number of at least 0.")
    return ContrastiveTask(model, loss, bool(chunked), tuple(sorted(factors.items())), mesh)

"""Text from pictures and text: next-token prediction of decoders and encoder-decoders (captions, answers, boxes, any text).

The cross-entropy of every target token, weighted, over the sum of the weights (Radford et al., "Improving Language Understanding by Generative Pre-Training"
(2018), equation 1; prefix and sequence-to-sequence forms: Raffel et al., "T5" (2020), section 3.2). Logits never exist as a whole (losses/vocabulary.py).
"""
from collections.abc import Mapping
from dataclasses import dataclass
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from vlm_jax.data.interleaved import ALONG as ROW_DTYPES, array_shapes
from vlm_jax.errors import ConfigError, DataError, did_you_mean
from vlm_jax.losses import supervision, token_scores, weighted_loss
from vlm_jax.nn.linear import effective

OF_THE_LOADER = ("mask", "weight", "example_id")     # what a stream holds besides the arrays of its examples
KINDS = ("causal", "prefix_lm", "encoder_decoder", "interleaved")   # of `processor.format`


@dataclass(frozen=True)
class GenerationTask:
    """Pure functions that train a generative `model` to give the targets of its streams.

    A batch is `{stream: arrays}`. Of a decoder `{"tokens", "loss_weights" [B, T]}`, where position t predicts token t + 1 and `loss_weights[t]` weighs
    token t as a target; of an encoder-decoder `{"targets", "loss_weights" [B, T']}`; and the model's inputs ("valid", "prefix", "slots", "images",
    "patches", ...), handed on as they are. "weight" and "mask" [B] of the loader may be missing; a row of weight 0 counts nothing.

    Attributes:
      model: see docs/architecture.md, "Generative models".
      label_smoothing, z_loss: see `losses.vocabulary_loss`.
      stream_weights: ((stream, factor of its loss), ...); streams that are not named count 1. The loss of a step is the sum over streams of factor times the
        mean over the stream's target tokens of their cross-entropy, so that neither batch sizes nor lengths weigh. (Flamingo's objective, section 2.4, has
        the sum over the tokens of a document in the place of the mean: its factors times the target tokens of a document, as they are on average, are ours.)
      mesh: the device mesh; None is one device, or the mesh entered by `jax.set_mesh`.
    """
    model: Any
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    stream_weights: tuple[tuple[str, float], ...] = ()
    mesh: Any = None

    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of one example of the model's inputs."""
        return self.model.input_shapes()

    def init(self, rng: Array) -> Any:
        """Returns initial parameters; compiled and sharded by the caller."""
        inputs = {name: jnp.zeros((1, *shape), jnp.float32 if name in ("images", "patches") else jnp.int32) for name, shape in self.input_shapes().items()}
        return self.model.init(rng, inputs)["params"]

    def initial_state(self) -> dict:
        """Returns what is carried from step to step besides the parameters: nothing."""
        return {}

    def loss(self, params: Any, state: Any, batch: Mapping[str, Any], rng: Array,
             step: Any) -> tuple[dict[str, tuple[Array, Array]], Any, dict[str, Array]]:
        """Returns ({term: (sum, weight)}, state, metrics) of a training batch.

        The term of the only stream is `generation`, those of several `generation/STREAM`; metrics are float32 scalars, named likewise: token_accuracy (target
        tokens whose logit exceeds every other), perplexity (the exponential of the mean negative log-likelihood, without smoothing).
        """
        terms, metrics, factors = {}, {}, dict(self.stream_weights)
        for name in factors:
            if name not in batch:
                raise ConfigError(f"task.stream_weights.{name}: the batch has no such stream.{did_you_mean(name, batch)}")
        for number, (name, stream) in enumerate(sorted(batch.items())):
            if not isinstance(stream, Mapping):
                raise ConfigError(f'task: the batch holds "{name}" where it should hold streams; give {{"captions": {{"tokens": ..., "loss_weights": ...}}}}.')
            hidden, targets, weight = self._hidden(params, stream, jax.random.fold_in(rng, number))
            scores = token_scores(hidden, targets=targets, weight=weight, mean=self.label_smoothing > 0, mesh=self.mesh, **self.model.head(plain_heads(params)))
            weight = supervision(targets, weight)
            total, count = weighted_loss(scores, weight, label_smoothing=self.label_smoothing, z_loss=self.z_loss)
            suffix = f"/{name}" if len(batch) > 1 else ""
            terms[f"generation{suffix}"] = (factors.get(name, 1.0) * total, count)
            safe = jnp.maximum(count, jnp.finfo(jnp.float32).tiny)
            metrics[f"token_accuracy{suffix}"] = jnp.sum(weight * scores.correct) / safe
            metrics[f"perplexity{suffix}"] = jnp.exp(-jnp.sum(jnp.where(weight > 0, weight * scores.log_probability, 0.0)) / safe)
        return terms, state, jax.lax.stop_gradient(metrics)

    def _hidden(self, params: Any, stream: Mapping[str, Any], key: Array) -> tuple[Float[Array, "B T D"], Int[Array, "B T"], Float[Array, "B T"]]:
        """What the head reads, the target of each position and its weight."""
        inputs = {name: value for name, value in stream.items() if name not in (*OF_THE_LOADER, "loss_weights")}
        if "loss_weights" not in stream:
            raise ConfigError(f"task: a stream of generation needs loss_weights, it holds {', '.join(sorted(stream))}; give its processor a format.")
        weight = stream["loss_weights"].astype(jnp.float32)
        if "targets" in stream:
            targets = stream["targets"]
        else:
            # Position t is scored against token t + 1; the last one has nothing to predict.
            targets, weight = (jnp.pad(array[:, 1:], ((0, 0), (0, 1))) for array in (stream["tokens"], weight))
        weight = weight * row_weight(stream, len(targets))[:, None]
        _, out = self.model.apply({"params": params}, inputs, train=True, rngs={"dropout": key})
        return out["hidden"], targets, weight

    def batch_shapes(self, processor: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Returns {key: (shape, dtype)} of one example of a stream whose processor has the settings `processor`; no tokenizer is read."""
        form = dict(processor.get("format") or {})
        kind = form.get("kind")
        if kind not in KINDS:
            raise ConfigError(f'processor.format.kind is {kind!r}; a task that generates text needs {" or ".join(KINDS)}.')
        pictures = {name: (shape, jnp.float32) for name, shape in self.input_shapes().items() if name in ("images", "patches")}
        alone = "patches" in pictures and kind == "encoder_decoder" and not form.get("image_tokens")     # the encoder reads patches and no text
        for key, least in (("length", 0 if alone else 1), *((("target_length", 1),) if kind == "encoder_decoder" else ())):
            if type(form.get(key)) is not int or form[key] < least:
                raise ConfigError(f"processor.format.{key} is {form.get(key)!r}; it must be an integer of at least {least}.")
        if kind == "interleaved":
            known = {key: form[key] for key in ("length", "pictures", "frames", "image_tokens", "pack") if key in form}
            shapes = array_shapes(pictures["images"][0][-3:] if "images" in pictures and form.get("pictures") else None, **known)
            return {key: (shape, ROW_DTYPES.get(key, jnp.float32)) for key, shape in shapes.items()}
        row, target = (form["length"],), (form["target_length" if kind == "encoder_decoder" else "length"],)
        shapes = {"tokens": (row, jnp.int32), "valid": (row, jnp.bool_)} if form["length"] else {}
        if form.get("image_tokens") or alone:
            shapes.update(pictures)
        if form.get("image_tokens"):
            shapes["slots"] = (row, jnp.int32)
        shapes.update({"targets": (target, jnp.int32)} if kind == "encoder_decoder" else {"prefix": (row, jnp.bool_)})
        return {**shapes, "loss_weights": (target, jnp.float32)}

    def check_fit(self, processor: Any, where: str) -> None:
        """Raises a ConfigError where the processor has no format, or its tokens are not those of the model."""
        form = processor.format
        if form is None:
            raise ConfigError(f'{where}.format is missing; a task that generates text needs one, such as dict(kind="prefix_lm", length=64).')
        if (form.image_tokens or getattr(form, "pictures", 0)) and hasattr(self.model, "image_tokens"):
            form.check_model(image_tokens=self.model.image_tokens(), where=f"{where}.format")
        entries = self.vocabulary(jax.eval_shape(self.init, jax.random.key(0)))
        if processor.vocab_size is not None and processor.vocab_size > entries:
            raise ConfigError(f"{where}.text: the tokenizer has {processor.vocab_size} entries, the model's table {entries}; raise the vocab_size of the "
                              "language model, or use the tokenizer of its weights.")

    def vocabulary(self, params: Any) -> int:
        """Entries of the head, from parameters or their shapes."""
        def columns(params: Any) -> Array:
            head = self.model.head(params)
            return head["kernel"].T if head.get("tied") else head["kernel"]
        return jax.eval_shape(columns, params).shape[1]

    def check_batch(self, params: Any, batch: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """Checks a batch on the host, in numpy, before a device sees it.

        Raises:
          DataError: naming stream, example and the number to change, for a token or target beyond the vocabulary, or places for image tokens that are not
            those of the pictures.
        """
        entries = self.vocabulary(params)
        for name, stream in batch.items():
            rows = np.flatnonzero(stream["mask"]) if "mask" in stream else np.arange(len(stream["loss_weights"]))
            ids = stream.get("example_id", np.arange(len(stream["loss_weights"])))
            for key, counts in (("tokens", stream.get("valid")), ("targets", stream["loss_weights"] > 0)):
                if key not in stream:
                    continue
                tokens = stream[key][rows]
                wrong = (tokens < 0) | (tokens >= entries)
                wrong = wrong if counts is None else wrong & counts[rows].astype(bool)
                if wrong.any():
                    row, place = np.argwhere(wrong)[0]
                    raise DataError(f"stream {name}, example {ids[rows[row]]}: {key}[{place}] is {tokens[row, place]}, but the model's vocabulary has "
                                    f"{entries} entries; use the tokenizer of these weights, or raise the vocab_size of the language model.")
            if "media_index" in stream:
                check_media_index(name, stream, rows, ids)
            if "images" in stream and "slots" in stream and hasattr(self.model, "image_tokens"):
                from vlm_jax.models.visual_tokens import check_slots
                check_slots(stream["slots"][rows], stream["images"].shape[1], self.model.image_tokens(), [f"stream {name}, example {ids[row]}" for row in rows])


def check_media_index(name: str, stream: Mapping[str, np.ndarray], rows: np.ndarray, ids: np.ndarray) -> None:
    """Raises a DataError where a token of a stream reads a picture that its example has not."""
    index, pictures = stream["media_index"][rows], stream["images"].shape[1] if "images" in stream else 0
    wrong = (index < -1) | (index >= pictures)
    if wrong.any():
        row, place = np.argwhere(wrong)[0]
        raise DataError(f"stream {name}, example {ids[rows[row]]}: media_index[{place}] is {index[row, place]}, but the example has {pictures} pictures; "
                        "give it the picture, or -1 where the token reads none.")


def plain_heads(params: Any) -> Any:
    """Returns `params` with adapters and int8 scales of the heads worked into their kernels, which the loss reads by themselves."""
    if not isinstance(params, Mapping):
        return params
    return {name: effective(value) if name in ("head", "new_head") and isinstance(value, Mapping) and "kernel" in value else plain_heads(value)
            for name, value in params.items()}


def row_weight(stream: Mapping[str, Any], rows: int) -> Float[Array, "B"]:
    """The weight of each row, 0 where the mask is False."""
    weight = stream["weight"].astype(jnp.float32) if "weight" in stream else jnp.ones(rows, jnp.float32)
    return jnp.where(stream["mask"], weight, 0.0) if "mask" in stream else weight


def generation_task(model: Any, label_smoothing: float = 0.0, z_loss: float = 0.0, stream_weights: Mapping[str, float] | None = None,
                    mesh: Any = None) -> GenerationTask:
    """Builds a `GenerationTask` from the config's `task` section.

    Raises:
      ConfigError: for a model that generates no text, or a number out of range.
    """
    if not hasattr(model, "head") or not hasattr(model, "extend"):
        raise ConfigError(f'task.name="generation" needs a model that generates text, {type(model).__name__} does not; choose another model or task.')
    numbers = {"label_smoothing": label_smoothing, "z_loss": z_loss, **{f"stream_weights.{name}": factor for name, factor in (stream_weights or {}).items()}}
    for name, value in numbers.items():
        limit = 1.0 if name == "label_smoothing" else math.inf
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < limit:
            raise ConfigError(f"task.{name} is {value!r}; give a number of at least 0{' and below 1' if limit == 1 else ''}.")
    return GenerationTask(model, float(label_smoothing), float(z_loss), tuple(sorted((stream_weights or {}).items())), mesh)

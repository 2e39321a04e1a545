"""From lists of pictures and texts to embeddings: batches of one size, padded on the host, every example exactly once."""
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
from jaxtyping import Array, Float
import numpy as np

from vlm_jax.errors import ConfigError
from vlm_jax.evaluation.records import before_batch


class Predictor:
    """The embeddings of a dual encoder.

    Args:
      model: has the Linen methods `encode_image(image)` and `encode_text(tokens)` -> (embedding, intermediates).
      params: its parameters.
      processor: the preprocessing that they were trained with.
      mesh: the devices that share a batch; None is one device.
      batch_size: examples at a time; the last batch is padded, so that only one size is ever compiled. Results do not depend on it beyond rounding.
      on_progress: called before every batch, and by evaluators before every record that they read; what it raises ends the evaluation.

    With several processes each goes through all examples and computes its rows of a batch; every process gets all embeddings, each example once.
    """

    def __init__(self, model: Any, params: Any, processor: Any, mesh: jax.sharding.Mesh | None = None, batch_size: int = 64,
                 on_progress: Callable[[], None] | None = None):
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
        self.model, self.params, self.processor, self.mesh = model, params, processor, mesh
        self.on_progress = on_progress or (lambda: None)
        shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-batch_size // shards) * shards
        self._compiled: dict[str, Callable] = {}

    def embed_images(self, images: Iterable[Any]) -> Float[np.ndarray, "N D"]:
        """Returns the embeddings of pictures (bytes, uint8 arrays, PIL images), float32 of length 1."""
        return self._run("image", (self.processor.image(image) for image in images))

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "N D"]:
        """Returns the embeddings of texts, float32 of length 1."""
        return self._run("text", (self.processor.text(text) for text in texts))

    def features(self, images: Iterable[Any]) -> Float[np.ndarray, "N D"]:
        """Returns the image tower's pooled features before any projection and normalisation: what a linear probe reads."""
        return self._run("features", (self.processor.image(image) for image in images))

    def _run(self, which: str, examples: Iterable[np.ndarray]) -> np.ndarray:
        parts = []
        for batch, count in padded_batches(examples, self.batch_size):
            before_batch(self)
            if self.mesh is not None:
                from vlm_jax.sharding.mesh import batch_sharding
                batch = jax.make_array_from_callback(batch.shape, batch_sharding(self.mesh), lambda index, batch=batch: batch[index])
            parts.append(np.asarray(self.function(which)(self.params, batch))[:count])
        return np.concatenate(parts) if parts else np.zeros((0, self.model.embed_dim), np.float32)

    def function(self, which: str) -> Callable:
        """Returns the jitted (params, batch) -> [B, D] float32 of "image", "text" or "features"."""
        if which not in self._compiled:
            def embed(params: Any, batch: Array) -> Array:
                method = "encode_text" if which == "text" else "encode_image"
                embedding, intermediates = self.model.apply({"params": params}, batch, method=method)
                return (intermediates["pooled"] if which == "features" else embedding).astype(np.float32)
            options = {}
            if self.mesh is not None:
                from vlm_jax.sharding.mesh import replicated
                options["out_shardings"] = replicated(self.mesh)
            self._compiled[which] = jax.jit(embed, **options)
        return self._compiled[which]


def padded_batches(examples: Iterable[np.ndarray], batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yields (batch [batch_size, ...], how many of its rows are examples); the last one repeats its last example to be full."""
    rows: list[np.ndarray] = []
    for example in examples:
        rows.append(example)
        if len(rows) == batch_size:
            yield np.stack(rows), batch_size
            rows = []
    if rows:
        yield np.stack(rows + [rows[-1]] * (batch_size - len(rows))), len(rows)

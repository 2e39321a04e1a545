"""From logits to a token: processors as pure functions in transformers' order, and keys that depend on seed, row and step alone.

Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020), nucleus sampling; Keskar et al., "CTRL" (2019), the repetition penalty;
Nguyen et al., "Turning Up the Heat: Min-p Sampling" (2024).
"""
from collections.abc import Sequence
import dataclasses

import flax.struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from vlm_jax.errors import ConfigError


def apply_temperature(logits: Float[Array, "... V"], temperature: float) -> Float[Array, "... V"]:
    """logits / temperature: below 1 the likely tokens gain, above 1 they lose."""
    return logits / temperature


def apply_top_k(logits: Float[Array, "... V"], k: int) -> Float[Array, "... V"]:
    """Keeps the k largest logits, and those equal to the k-th; the others become -inf."""
    kth = lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits < kth, -jnp.inf, logits)


def apply_top_p(logits: Float[Array, "... V"], p: float) -> Float[Array, "... V"]:
    """Keeps the smallest set of likeliest tokens whose probability reaches p, at least one; the others become -inf."""
    order = jnp.argsort(-logits, axis=-1, stable=True)
    probabilities = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), order, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = jnp.where((before < p) | (jnp.arange(logits.shape[-1]) == 0), True, False)
    kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def apply_min_p(logits: Float[Array, "... V"], p: float) -> Float[Array, "... V"]:
    """Keeps the tokens whose probability is at least p times that of the likeliest; the others become -inf."""
    return jnp.where(logits < logits.max(axis=-1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


def apply_repetition_penalty(logits: Float[Array, "... V"], seen: Bool[Array, "... V"], penalty: float) -> Float[Array, "... V"]:
    """Makes tokens that occurred (prompt or answer) less likely: positive logits are divided by the penalty, negative ones multiplied."""
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How the next token is chosen from the logits.

    Attributes:
      temperature: 0 takes the likeliest token; above, a token is drawn.
      top_k, top_p, min_p: restrict the draw; None does not.
      repetition_penalty: 1 changes nothing; it works without drawing, too.
    Raises:
      ConfigError: for a value outside its range.
    """
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        checks = (("temperature", 0 <= self.temperature < float("inf"), "0 (the likeliest token) or more"),
                  ("top_k", self.top_k is None or (self.top_k == int(self.top_k) and self.top_k >= 1), "a whole number from 1, or None"),
                  ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1, or None"),
                  ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1, or None"),
                  ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0; 1 is none"))
        for name, fits, wanted in checks:
            if not fits:
                raise ConfigError(f"sampler.{name} is {getattr(self, name)}; it must be {wanted}.")

    def rules(self) -> "Rules":
        """What a program is given: the settings that do something. Their values are arguments, so that changing one compiles nothing again."""
        drawn = self.temperature > 0
        return Rules(temperature=self.temperature if drawn else None, top_k=self.top_k if drawn else None,
                     top_p=self.top_p if drawn and self.top_p not in (None, 1.0) else None, min_p=self.min_p if drawn and self.min_p else None,
                     repetition_penalty=self.repetition_penalty if self.repetition_penalty != 1.0 else None)


GREEDY = Sampler()


@flax.struct.dataclass
class Rules:
    """The active settings of a `Sampler`; None is absent. `top_k` is part of the program, the others are its arguments."""
    temperature: float | None = None
    top_k: int | None = flax.struct.field(pytree_node=False, default=None)
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def processed(self, logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None = None) -> Float[Array, "B V"]:
        """The logits after all active processors, in transformers' order: penalty, temperature, top-k, nucleus, min-p."""
        if self.repetition_penalty is not None:
            logits = apply_repetition_penalty(logits, seen, self.repetition_penalty)
        if self.temperature is not None:
            logits = apply_temperature(logits, self.temperature)
        if self.top_k is not None:
            logits = apply_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = apply_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = apply_min_p(logits, self.min_p)
        return logits

    def choose(self, logits: Float[Array, "B V"], keys: Array, seen: Bool[Array, "B V"] | None = None) -> Int[Array, "B"]:
        """The next token of every row; `keys` [B] are its random keys, unused where nothing is drawn."""
        logits = self.processed(logits, seen)
        if self.temperature is None:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def row_numbers(rows: Sequence[int] | None, batch: int) -> Int[np.ndarray, "B"]:
    """The numbers that rows have in their random keys: 0, 1, ... unless `rows` says otherwise.

    Raises:
      ConfigError: where `rows` are not one for each of the batch.
    """
    numbers = np.arange(batch) if rows is None else np.asarray(rows)
    if numbers.shape != (batch,):
        raise ConfigError(f"rows: {numbers.size} numbers for a batch of {batch}; give one number a row.")
    return numbers.astype(np.uint32)


def row_keys(seed: Int[Array, ""], rows: Int[Array, "B"]) -> Array:
    """One key a row, folded from the seed and the row's number: the same in whatever batch the row is computed."""
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(rows)


def step_keys(keys: Array, step: Int[Array, "#B"]) -> Array:
    """The rows' keys of one step (a number, or one a row)."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(step, keys.shape))

"""Rotary position embeddings and the ways in which published models stretch them to longer texts.

Su et al., "RoFormer" (2021); linear and dynamic scaling: Chen et al. (2023) and the NTK-aware rule; "YaRN": Peng et al. (2023); "LongRoPE": Ding et al. (2024);
"llama3": Dubey et al., "The Llama 3 Herd of Models" (2024). The first half of the rotated features is paired with the second, as in the Hugging Face layout.
"""
from collections.abc import Mapping
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from vlm_jax.errors import ConfigError, did_you_mean

# What each kind of scaling must and may be told.
SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("factor",), ()),
    "dynamic": (("factor", "max_position_embeddings"), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("factor", "original_max_position_embeddings"), ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("short_factor", "long_factor", "factor", "original_max_position_embeddings"), ("attention_factor",)),
}


def rotary(positions: Int[Array, "B T"], head_dim: int, *, theta: float = 10_000.0, fraction: float = 1.0,
           scaling: Mapping[str, Any] | None = None) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """Cosines and sines of the angles by which `apply_rotary` turns the pairs of features, in float32; R = rotated features / 2.

    Args:
      positions: of the tokens; what stands at -1 (padding) is of no consequence. "dynamic" and "longrope" follow the largest of all of them.
      theta: the base of the wavelengths.
      fraction: the share of a head's features that is rotated, the first int(fraction * head_dim); an odd number takes the next one along, as in GPT-NeoX.
      scaling: dict(kind=..., and the settings that `SCALINGS` lists for the kind), named as in published configs:
        "linear" divides all frequencies by `factor`; "dynamic" raises theta once the text is longer than `max_position_embeddings`; "llama3" divides the low
        ones by `factor`, with a smooth passage; "yarn" interpolates those that turn less than `beta_slow` times in the original context, and scales cosines
        and sines by `attention_factor`; "longrope" divides each by its own factor, of `short_factor` or, beyond the original context, `long_factor`.
    Raises:
      ConfigError: for an odd number of features that are all rotated, an unknown kind, or settings that a kind lacks or does not take.
    """
    frequencies, amplitude = _frequencies(positions, head_dim, theta, fraction, scaling)
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def apply_rotary(x: Float[Array, "B T H K"], cosines: Float[Array, "B T R"], sines: Float[Array, "B T R"]) -> Float[Array, "B T H K"]:
    """Turns features i and i + R of each head, of the first 2 R, by the angle of position and i; computed in float32, in the dtype of x."""
    half = cosines.shape[-1]
    cosines, sines = cosines[:, :, None], sines[:, :, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:2 * half].astype(jnp.float32)
    turned = [(first * cosines - second * sines).astype(x.dtype), (second * cosines + first * sines).astype(x.dtype)]
    return jnp.concatenate([*turned, x[..., 2 * half:]] if x.shape[-1] > 2 * half else turned, axis=-1)


def check_rotary(head_dim: int, *, theta: float = 10_000.0, fraction: float = 1.0, scaling: Mapping[str, Any] | None = None) -> int:
    """int(fraction * head_dim), the number of rotated features; raises what `rotary` raises for these settings."""
    rotated = int(head_dim * fraction)
    if not 0 <= rotated + rotated % 2 <= head_dim:
        raise ConfigError(f"rope: fraction={fraction} of a head of {head_dim} features rotates {rotated}; choose a fraction that gives an even number.")
    if not theta > 0:
        raise ConfigError(f"rope: theta={theta} is no base of wavelengths; choose a positive number, usually 10000.")
    if scaling is None:
        return rotated
    kind = scaling.get("kind")
    if kind not in SCALINGS:
        raise ConfigError(f'rope.scaling: the kind "{kind}" is unknown; choose another.{did_you_mean(str(kind), SCALINGS)}')
    needed, optional = SCALINGS[kind]
    for name in needed:
        if scaling.get(name) is None:
            raise ConfigError(f'rope.scaling: kind "{kind}" needs {name}; add it.')
    for name in scaling:
        if name not in ("kind", *needed, *optional):
            raise ConfigError(f'rope.scaling: kind "{kind}" takes no {name}.{did_you_mean(name, (*needed, *optional))}')
    for name in ("short_factor", "long_factor"):
        if name in needed and len(scaling[name]) != (rotated + 1) // 2:
            raise ConfigError(f"rope.scaling: {name} has {len(scaling[name])} numbers for {rotated} rotated features; give {(rotated + 1) // 2}.")
    if kind == "yarn" and rotated % 2:
        raise ConfigError(f'rope.scaling: kind "yarn" needs an even number of rotated features, fraction={fraction} gives {rotated}; choose another fraction.')
    if kind == "dynamic" and rotated == 2:
        raise ConfigError('rope.scaling: kind "dynamic" needs at least 4 rotated features; use "linear".')
    return rotated


def _frequencies(positions, head_dim, theta, fraction, scaling):
    """Radians a position of each pair of features [R], and the factor of cosines and sines."""
    rotated = check_rotary(head_dim, theta=theta, fraction=fraction, scaling=scaling)
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    wavelengths = np.power(np.float32(theta), exponents)   # of one radian, in positions
    if scaling is None:
        return jnp.asarray(1 / wavelengths), 1.0
    kind, factor = scaling["kind"], scaling["factor"]
    if kind == "linear":
        return jnp.asarray(1 / wavelengths / np.float32(factor)), 1.0
    if kind == "llama3":
        return jnp.asarray(_llama3(1 / wavelengths, scaling), jnp.float32), 1.0
    if kind == "yarn":
        return jnp.asarray(_yarn(wavelengths, rotated, theta, scaling), jnp.float32), _yarn_amplitude(scaling)
    length = positions.max() + 1
    if kind == "dynamic":
        trained = scaling["max_position_embeddings"]
        length = jnp.maximum(length, trained).astype(jnp.float32)
        stretched = theta * ((factor * length / trained) - (factor - 1)) ** (rotated / (rotated - 2))
        return 1.0 / stretched ** exponents, 1.0
    original = scaling["original_max_position_embeddings"]
    factors = jnp.where(length > original, jnp.asarray(scaling["long_factor"], jnp.float32), jnp.asarray(scaling["short_factor"], jnp.float32))
    amplitude = scaling.get("attention_factor")
    if amplitude is None:
        amplitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0 / (factors * wavelengths), amplitude


def _llama3(frequencies, scaling):
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)   # in the original context
    share = np.clip((turns - low) / (high - low), 0, 1) if high != low else (turns >= low).astype(np.float32)
    return (1 - share) * frequencies / factor + share * frequencies


def _yarn(wavelengths, rotated, theta, scaling):
    original = scaling["original_max_position_embeddings"]

    def pair_that_turns(times):
        return rotated * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_that_turns(scaling.get("beta_fast") or 32), pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    slow = np.clip((np.arange(rotated // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001), 0, 1)
    return slow / (scaling["factor"] * wavelengths) + (1 - slow) / wavelengths


def _yarn_amplitude(scaling):
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def of(weight):
        return 1.0 if scaling["factor"] <= 1 else 0.1 * weight * math.log(scaling["factor"]) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return of(scaling["mscale"]) / of(scaling["mscale_all_dim"])
    return of(1.0)

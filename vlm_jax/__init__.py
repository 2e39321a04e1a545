"""vlm_jax: vision-language and multimodal generative models in JAX/Flax.

    import vlm_jax
    run = vlm_jax.load("runs/emoji")           # model, params, processor, config, step

Importing the package is quick and imports nothing heavy; attributes are loaded on first use.
"""
import importlib

__version__ = "0.1.0"

_LAZY = {"load": "vlm_jax.restore", "save": "vlm_jax.restore", "Loaded": "vlm_jax.restore"}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module vlm_jax has no attribute {name!r}")

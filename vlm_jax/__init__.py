"""vlm_jax: vision-language and multimodal generative models in JAX/Flax."""
__version__ = "0.1.0"

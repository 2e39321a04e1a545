"""Losses are pure functions on arrays that return (sum, weight), so that accumulation, masks and hosts are exact."""
from vlm_jax.losses.contrastive import matching_accuracy, sigmoid_loss, softmax_loss

__all__ = ["matching_accuracy", "sigmoid_loss", "softmax_loss"]

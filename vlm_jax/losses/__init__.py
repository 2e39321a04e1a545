"""Losses are pure functions on arrays that return (sum, weight), so that accumulation, masks and hosts are exact."""
from vlm_jax.losses.cached import cached_value_and_gradients
from vlm_jax.losses.contrastive import matching_accuracy, sigmoid_loss, softmax_loss
from vlm_jax.losses.vocabulary import TokenScores, supervision, token_scores, vocabulary_loss, weighted_loss

__all__ = ["TokenScores", "cached_value_and_gradients", "matching_accuracy", "sigmoid_loss", "softmax_loss", "supervision", "token_scores",
           "vocabulary_loss", "weighted_loss"]

"""Decoding: greedy, sampling, beam search, speculative decoding and streaming, conversations, over an explicit cache."""
from vlm_jax.decoding.beam import Beams, beam_search
from vlm_jax.decoding.generate import Generated, generate, prefix_cache
from vlm_jax.decoding.prompts import pad_rows
from vlm_jax.decoding.sampling import Sampler
from vlm_jax.decoding.session import Session
from vlm_jax.decoding.speculative import Speculated, speculative
from vlm_jax.decoding.streaming import stream

__all__ = ["Beams", "Generated", "Sampler", "Session", "Speculated", "beam_search", "generate", "pad_rows", "prefix_cache", "speculative", "stream"]

"""A model small enough to see through: the next token depends on the last two, of which the elder is found in the cache."""
from collections import Counter

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlm_jax.nn.cache import Cache

TRACED = Counter()   # {(method, shape of the tokens): how often it was traced}


class Trigrams(nn.Module):
    """logits = table[elder token, last token]; nothing before the prompt counts as token 0."""
    vocab_size: int = 11
    name_in_counter: str = "trigrams"

    def setup(self):
        self.table = self.param("table", nn.initializers.normal(2.0), (self.vocab_size,) * 3)

    def start(self, inputs, cache_length):
        tokens = inputs["tokens"]
        TRACED[self.name_in_counter, "start", tokens.shape] += 1
        cache = Cache.create(1, tokens.shape[0], cache_length, 1, 1)
        logits, cache = self._read(tokens, cache, inputs["valid"])
        last = jnp.where(inputs["valid"], jnp.arange(tokens.shape[1]), -1).max(1)
        return jnp.take_along_axis(logits, last[:, None, None], 1)[:, 0], cache

    def extend(self, tokens, cache, valid=None):
        TRACED[self.name_in_counter, "extend", tokens.shape] += 1
        return self._read(tokens, cache, jnp.ones(tokens.shape, bool) if valid is None else valid)

    def _read(self, tokens, cache, valid):
        cache, slots = cache.extend(valid)
        values = tokens.astype(jnp.float32)[..., None, None]
        cache, keys, _ = cache.write(0, values, values, slots)
        before = (slots.position[:, :, None] - 1 == slots.key_position[:, None, :]) & (slots.position[:, :, None] > 0)
        elder = jnp.where(before, keys[:, None, :, 0, 0], 0).sum(-1).astype(jnp.int32)
        return self.table[elder, tokens], cache

    def input_shapes(self):
        return {"tokens": (4,)}


def trigrams(seed=0, vocab_size=11, name="trigrams"):
    """(model, parameters as a numpy table in a dict)."""
    table = np.random.default_rng(seed).normal(scale=2.0, size=(vocab_size,) * 3).astype(np.float32)
    return Trigrams(vocab_size, name), {"table": jnp.asarray(table)}


def walk(params, prompt, count, eos=()):
    """What greedy decoding must say after a prompt, by hand."""
    table = np.asarray(params["table"])
    text = [0, *prompt] if len(prompt) < 2 else list(prompt)
    said = []
    while len(said) < count and (not said or said[-1] not in eos):
        said.append(int(table[text[-2], text[-1]].argmax()))
        text.append(said[-1])
    return said


def logprobs(params, prompt, said):
    """Their log-probabilities."""
    table = np.asarray(jax.nn.log_softmax(params["table"]))
    text = ([0, *prompt] if len(prompt) < 2 else list(prompt)) + list(said)
    start = len(text) - len(said)
    return np.array([table[text[i - 2], text[i - 1], text[i]] for i in range(start, len(text))])

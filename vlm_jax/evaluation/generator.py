"""From pictures and prompts to answers: batches of one size, decoded greedily (or as asked), every example exactly once."""
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation.records import before_batch


class Generator:
    """The answers of a generative model.

    Args:
      model: a generative model (docs/architecture.md); params: its parameters.
      processor: the preprocessing that they were trained with; it has a format, which turns prompts into inputs.
      mesh: the devices that share a batch; None is one device.
      batch_size: examples at a time; the last batch is filled up with its last example, so that only the lengths of prompts make programs differ.
      sampler: a `decoding.Sampler`; None takes the likeliest token. beams: 2 or more search with so many beams.
      seed: of a sampler's draws; each example has its own, whatever its batch.
      on_progress: called before every batch, and by evaluators before every record that they read; what it raises ends the evaluation.

    With several processes each goes through all examples and every process gets all answers.
    """

    def __init__(self, model: Any, params: Any, processor: Any, mesh: jax.sharding.Mesh | None = None, batch_size: int = 16, *, sampler: Any = None,
                 beams: int = 1, seed: int = 0, on_progress: Callable[[], None] | None = None):
        if batch_size < 1 or beams < 1:
            raise ConfigError(f"batch_size is {batch_size} and beams {beams}; both must be at least 1.")
        if not hasattr(model, "extend") or getattr(processor, "format", None) is None:
            raise ConfigError(f"{type(model).__name__} answers no prompts: that needs a model that generates text, and a processor with a format.")
        if beams > 1 and sampler is not None:
            raise ConfigError("beams and a sampler exclude each other; choose one of them.")
        self.model, self.params, self.processor, self.mesh = model, params, processor, mesh
        self.sampler, self.beams, self.seed, self.on_progress = sampler, beams, seed, on_progress or (lambda: None)
        shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.batch_size = -(-batch_size // shards) * shards

    def answer(self, images: Sequence[Any] | None, prompts: Sequence[str], max_tokens: int = 32, names: Sequence[str] | None = None) -> list[str]:
        """Returns one text for each prompt.

        Args:
          images: one for each prompt (bytes, uint8 arrays, PIL images; None for a prompt without picture), or None: texts alone.
          max_tokens: the longest answer, its end mark included.
          names: what error messages call the prompts; by default their numbers.
        Raises:
          DataError: for a prompt or picture that the processor refuses, with its name.
          ConfigError: for lists of different lengths, or an answer that does not fit the model.
        """
        if images is not None and len(images) != len(prompts):
            raise ConfigError(f"answer: {len(images)} images for {len(prompts)} prompts; give one for each, None where there is none.")
        texts: list[str] = []
        for start in range(0, len(prompts), self.batch_size):
            before_batch(self)
            rows = []
            for number in range(start, min(start + self.batch_size, len(prompts))):
                try:
                    rows.append(self.processor.prompt(None if images is None else images[number], prompts[number]))
                except DataError as error:
                    raise DataError(f"{names[number] if names is not None else f'prompt {number}'}: {error}") from error
            count = len(rows)
            batch = self.processor.format.batch(rows + [rows[-1]] * (self.batch_size - count))
            # A model's table may be longer than its tokenizer; entries beyond it have no text.
            texts += [self.processor.decode([number for number in ids if number < self.processor.vocab_size])
                      for ids in self._decode(batch, max_tokens, start)[:count]]
        return texts

    def _decode(self, batch: dict[str, np.ndarray], max_tokens: int, start: int) -> list[list[int]]:
        """The ids of each answer."""
        from vlm_jax.decoding import Sampler, beam_search, generate
        options = dict(max_tokens=max_tokens, eos=self.processor.format.end, mesh=self.mesh)
        if self.beams > 1:
            return beam_search(self.model, self.params, batch, beams=self.beams, **options).answers()
        made = generate(self.model, self.params, batch, sampler=self.sampler or Sampler(temperature=0.0), seed=self.seed,
                        rows=range(start, start + self.batch_size), **options)
        return made.answers()


def generator_of(predictor: Any, batch_size: int | None = None) -> Any:
    """Returns a `Generator` of what an evaluator is given: itself if it has `answer`, else one of the model, parameters and processor of a `Predictor`."""
    if hasattr(predictor, "answer"):
        return predictor
    size = batch_size or min(16, predictor.batch_size)
    return Generator(predictor.model, predictor.params, predictor.processor, predictor.mesh, size, on_progress=predictor.on_progress)

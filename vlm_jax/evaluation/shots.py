"""The examples in front of a question: how they are laid out, which are chosen, and what features make pictures alike.

Alayrac et al., "Flamingo" (2022), section 3.1 and appendix B.1.5; retrieval of examples (RICES): Yang et al., "An Empirical Study of GPT-3 for Few-Shot
Knowledge-Based VQA" (2021), section 3.2.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import os
from typing import Any

from jaxtyping import Float
import numpy as np

from vlm_jax.data.documents import PICTURES, Segment, frames_of, plain_segments
from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation.predictor import Predictor

# Layouts of a plain record's prompt and answer; the answer is tokenised by itself, as in training.
TEMPLATES = {"plain": "{prompt}{answer}", "output": "Output: {answer}", "question": "Question: {prompt} Answer: {answer}"}
CHUNK_END = {"kind": "chunk_end"}
_FIXED_DRAW, _QUERY_DRAW, _ORDER_DRAW, _SHUFFLE_DRAW = 301, 302, 303, 304
Example = list[Segment]


@dataclass(frozen=True)
class Layout:
    """How plain records {image or frames, prompt, texts} become segments: what stands before the answer, and what joins the answer to it."""
    before: str
    blank: str

    @classmethod
    def of(cls, template: str, tokenizer: Any) -> "Layout":
        """The layout of a template, see `check_template`."""
        before = check_template(template)
        # Tokenizers of words put the blank before a word themselves; others would lose it between the two texts.
        own = tokenizer.encode("a b") == [*tokenizer.encode("a"), *tokenizer.encode("b")]
        return cls(before.rstrip(), " " if before.endswith(" ") and not own else "")

    def segments(self, record: Mapping[str, Any], answer: str | None = None) -> Example:
        """Picture, text and answer of a record; without the answer it is a question."""
        prompt = self.before.replace("{prompt}", record.get("prompt", ""))
        return plain_segments({**record, "prompt": prompt}, None if answer is None else self.blank + answer)


def check_template(template: str) -> str:
    """Returns what a template, a name of `TEMPLATES` or a text with {answer} at its end and perhaps {prompt}, says before the answer.

    Raises:
      ConfigError: for a template without {answer}, or with something behind it.
    """
    before, mark, after = TEMPLATES.get(template, template).partition("{answer}")
    if not mark or after:
        raise ConfigError(f'template {template!r} does not end in {{answer}}; choose one of {", ".join(TEMPLATES)} or write one that does.')
    return before


def without_pictures(segments: Sequence[Segment]) -> Example:
    """The texts of an example alone."""
    return [segment for segment in segments if segment["kind"] not in PICTURES]


def shuffled_pictures(examples: Sequence[Example], rng: np.random.Generator) -> list[Example]:
    """The examples with their pictures moved along one random cycle, so that each of two or more stands with another's text."""
    examples = [list(example) for example in examples]
    places = [(k, j) for k, example in enumerate(examples) for j, segment in enumerate(example) if segment["kind"] in PICTURES]
    order = rng.permutation(len(places))
    pictures = [examples[k][j] for k, j in places]
    for of, to in zip(order, np.roll(order, 1)):
        k, j = places[to]
        examples[k][j] = pictures[of]
    return examples


def context(opening: Sequence[Segment], examples: Sequence[Example]) -> Example:
    """What stands before a question: every example ends its chunk."""
    return [segment for example in ([list(opening)] if opening else []) + list(examples) for segment in (*example, CHUNK_END)]


def pictures_of(segments: Sequence[Segment]) -> int:
    """The number of pictures and videos."""
    return sum(segment["kind"] in PICTURES for segment in segments)


def first_picture(segments: Sequence[Segment], name: str) -> Any:
    """The picture that features are made of: the first, of a video the frame in its middle.

    Raises:
      DataError: where there is none.
    """
    found = next((segment for segment in segments if segment["kind"] in PICTURES), None)
    if found is None:
        raise DataError(f'{name}: there is no picture to compare; use choice="random".')
    return frames_of(found, 1)[0]


class Chooser:
    """Which of a pool of examples stand before a query, as their numbers, in their order.

    Args:
      how: "random": drawn anew for each query; "fixed": the same for all; "rices": those whose pictures are most like the query's, the most similar last;
        "first": the pool's own order.
      seed: of the draws, which depend on it and the query's number alone; what is drawn for few shots is the beginning of what is drawn for more.
    """

    def __init__(self, how: str, seed: int):
        self.how, self.seed = how, seed

    def __call__(self, number: int, size: int, query: int, itself: int | None = None, similarity: Float[np.ndarray, "S"] | None = None) -> list[int]:
        """`number` of `size` examples for query number `query`, never `itself`."""
        if self.how == "first":
            return list(range(number))
        if self.how == "rices":
            order = [int(place) for place in np.argsort(-similarity, kind="stable") if place != itself]
            return order[:number][::-1]
        draw = (_FIXED_DRAW,) if self.how == "fixed" else (_QUERY_DRAW, query)
        order = np.random.default_rng((self.seed, *draw)).permutation(size)
        return [int(place) for place in order if place != itself][:number]

    def orders(self, number: int, query: int, permutations: int) -> list[list[int]]:
        """The orders in which `number` examples are shown: as they were chosen, then drawn ones."""
        rng = np.random.default_rng((self.seed, _ORDER_DRAW, 0 if self.how == "fixed" else query))
        more = permutations - 1 if number > 1 else 0
        return [list(range(number)), *(rng.permutation(number).tolist() for _ in range(more))]

    def shuffle(self, query: int) -> np.random.Generator:
        """The draws of `shuffled_pictures` for a query."""
        return np.random.default_rng((self.seed, _SHUFFLE_DRAW, 0 if self.how == "fixed" else query))


class Features:
    """Features of pictures, of length 1, whose products say how alike they are: what a tower gives before any projection, pooled by its head or averaged.

    Args:
      source: a workdir, directory or file that `vlm_jax.load` takes (a SigLIP of our own, say), or None: the tower of the model itself.
      generator: of the model that is evaluated, with its batch size and mesh.
    """

    def __init__(self, source: str | os.PathLike | None, generator: Any):
        made_of = generator
        if source is not None:
            from vlm_jax import load
            made_of = load(source)
        model, params = made_of.model, made_of.params
        if not hasattr(model, "encode_image"):
            if not hasattr(model, "parts") or "image" not in params:
                raise ConfigError(f"features: {type(model).__name__} has no tower of pictures; name a run of a model that has one.")
            model, params = _Tower(model.parts()[0]), params["image"]
        self._predictor = Predictor(model, params, made_of.processor, generator.mesh, generator.batch_size, generator.on_progress)

    def __call__(self, pictures: Sequence[Any]) -> Float[np.ndarray, "N D"]:
        """The features of pictures (bytes, uint8 arrays, PIL images)."""
        made = self._predictor.features(pictures)
        return made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-12)


class _Tower:
    """A tower without a head, as `Predictor` asks for its features: the mean of its tokens."""

    def __init__(self, tower: Any):
        self.tower = tower

    def apply(self, variables: Mapping[str, Any], batch: Any, method: str) -> tuple[Any, dict[str, Any]]:
        mean = self.tower.apply(variables, batch)[1]["tokens"].mean(1)
        return mean, {"pooled": mean}

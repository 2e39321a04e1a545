"""Few-shot evaluation: questions about pictures behind a number of answered examples, by ranking all answers or by writing one.

Alayrac et al., "Flamingo" (2022), sections 2.5 and 3.1, appendix B.1.5: no parameter changes; the examples stand before the question in one document.
Where all queries share their examples, these are read into a cache once; where they do not, all candidates of a query share one reading.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
import os
from typing import Any

import numpy as np

from vlm_jax.data.documents import text_segment
from vlm_jax.data.interleaved import InterleavedFormat
from vlm_jax.errors import ConfigError, DataError, did_you_mean
from vlm_jax.evaluation import metrics as text_metrics, pictures, records
from vlm_jax.evaluation.generator import generator_of
from vlm_jax.evaluation.likelihood import NORMALIZERS, rank
from vlm_jax.evaluation.shots import (
    Chooser,
    Example,
    Features,
    Layout,
    check_template,
    context,
    first_picture,
    pictures_of,
    shuffled_pictures,
    without_pictures,
)
from vlm_jax.settings import choose, plain

CHOICES, METHODS, ZERO_SHOT = ("random", "fixed", "rices"), ("rank", "generate"), ("text_examples", "none")
SHOTS = (0, 4, 8, 16, 32)
TEXT_EXAMPLES = 2      # stand, without their pictures, before a question without shots


@dataclass(frozen=True)
class Query:
    """A question: its segments, what stands before all examples, what is right, what could be said, and the examples that its record brings."""
    index: int
    name: str
    segments: Example
    opening: Example
    references: list[str]
    candidates: list[str]
    support: list[Example] | None
    task: str | None


def few_shot(predictor: Any, folder: str | os.PathLike, source: Mapping[str, Any], support: Mapping[str, Any] | None = None,
             shots: Sequence[int] = SHOTS, choice: str = "random", method: str = "rank", candidates: Sequence[str] | None = None,
             template: str = "plain", zero_shot: str = "text_examples", permutations: int = 1, repeats: int = 1, normalize: str = "sum",
             metrics: Sequence[str] = (), beams: int = 1, max_tokens: int = 16, images: bool = True, shuffled: bool = False,
             features: str | os.PathLike | None = None, seed: int = 0, batch_size: int | None = None) -> dict[str, float]:
    """Asks about every record of a source behind 0, 4, 8, ... examples.

    Args:
      source: the queries: records that bring their own examples (`support`, `query`, perhaps `opening`: the episodes of worlds), or plain ones, {image, prompt,
        texts}.
      support: where the examples of plain records come from; None for records that bring their own.
      shots: the numbers of examples, each a row of metrics.
      choice: "random" examples for each query (of a record that brings its own: the first), "fixed" ones for all, which are then read once, or "rices": those
        whose pictures are most similar to the query's, the most similar last.
      method: "rank": the likeliest of the candidates is the answer (closed-ended); "generate": the model writes it (open-ended).
      candidates: of all records; by default those of each record.
      template: of plain records, a name of `shots.TEMPLATES` or a text such as "Question: {prompt} Answer: {answer}".
      zero_shot: what stands before a question without shots: "text_examples", two examples without their pictures as in the paper, or "none".
      permutations: with "rank", orders of the examples whose log-likelihoods are averaged (the paper: 6).
      repeats: how often each example comes, one after the other (Frozen, section 4.2).
      normalize: of `likelihood.rank`.
      metrics: with "generate", names of `metrics.ANSWER_METRICS` besides the accuracy, which is exact match.
      beams, max_tokens: of the written answer (the paper: 3 beams); it ends at the end of a chunk.
      images: False keeps all pictures from the model.
      shuffled: the pictures of the examples change places: what is left when they do not belong to their texts.
      features: what "rices" compares, see `shots.Features`: a run of a SigLIP, or None for the model's own tower.
      seed: of the examples and orders drawn.
      batch_size: queries at a time.
    Returns:
      {"accuracy/8_shots", "standard_error/8_shots" (over the queries), "accuracy/8_shots/TASK" where records name several tasks, "METRIC/8_shots", "queries",
      and with "rank" "chance"}. Ties count against the model.
    Raises:
      ConfigError: for settings that exclude each other. DataError: for a record that cannot be asked, or too few examples.
    """
    shots = check_settings(support, shots, choice, method, template, zero_shot, permutations, repeats, normalize, metrics, beams, features)
    generator = generator_of(predictor, batch_size)
    if not isinstance(getattr(generator.processor, "format", None), InterleavedFormat):
        raise ConfigError('few_shot: examples and question are one document, so the processor needs a format with kind="interleaved".')
    layout = Layout.of(template, generator.processor.tokenizer)
    queries = _queries(source, predictor, layout, candidates if candidates is None else list(candidates), method, support is None)
    pool, itself = (None, [None] * len(queries)) if support is None else _pool(source, support, predictor, layout, queries)
    if choice == "fixed" and any(number is not None for number in itself):
        raise ConfigError('choice="fixed": the examples are among the queries; give support another split or seed, or use choice="random".')
    alike = _similarities(Features(features, generator), queries, pool) if choice == "rices" else None
    asker = _Asker(generator, method, normalize, beams, max_tokens, layout.blank)
    lines: list[dict[str, Any]] = []
    shown: list[list[Example]] = []
    for number in shots:
        how = ("first" if choice == "random" else choice) if pool is None else "fixed" if number == 0 and not any(n is not None for n in itself) else choice
        chooser = Chooser(how, seed)
        chosen = [_chosen(query, place, number, pool, itself[place], chooser, None if alike is None else alike[place], zero_shot)
                  for place, query in enumerate(queries)]
        if not images or number == 0:
            chosen = [[without_pictures(example) for example in examples] for examples in chosen]
        if shuffled:
            chosen = [shuffled_pictures(examples, chooser.shuffle(place)) for place, examples in enumerate(chosen)]
        asked = [query.segments if images else without_pictures(query.segments) for query in queries]
        shared = pool is not None and how == "fixed" and not any(query.opening for query in queries)
        made = []
        orders = [chooser.orders(len(examples), place, permutations if method == "rank" and number else 1) for place, examples in enumerate(chosen)]
        for turn in range(len(orders[0])):
            before = [context(query.opening, [examples[place] for place in order[turn] for _ in range(repeats)])
                      for query, examples, order in zip(queries, chosen, orders)]
            made.append(asker(queries, before, asked, shared))
        lines += _lines(queries, number, made, method, list(metrics))
        shown = chosen
    found = records.write(folder, score(lines), lines)
    with records.writing(folder) as writes:
        if writes:
            last = lines[-len(queries):][:pictures.QUERIES]
            pictures.episodes(os.path.join(folder, "episodes.png"), [
                {**line, "right": _value(line) == 1, "shots": [_panel(example) for example in examples], "query": _panel(query)}
                for line, query, examples in zip(last, asked, shown)])
    return found


def check_settings(support: Any = None, shots: Any = SHOTS, choice: str = "random", method: str = "rank", template: str = "plain",
                   zero_shot: str = "text_examples", permutations: int = 1, repeats: int = 1, normalize: str = "sum", metrics: Sequence[str] = (),
                   beams: int = 1, features: Any = None, **others: Any) -> list[int]:
    """Returns the numbers of shots of the settings of `few_shot`, after all that can be wrong without data or model.

    Raises:
      ConfigError: for an unknown name, a number out of range, or settings that exclude each other.
    """
    for name, value, known in (("choice", choice, CHOICES), ("method", method, METHODS), ("zero_shot", zero_shot, ZERO_SHOT),
                               ("normalize", normalize, NORMALIZERS)):
        choose(dict.fromkeys(known), value, name)
    check_template(template)
    shots = [shots] if isinstance(shots, int) else list(shots)
    if not shots or any(isinstance(number, bool) or not isinstance(number, int) or number < 0 for number in shots):
        raise ConfigError(f"shots is {shots!r}; give numbers of examples such as [0, 4, 8].")
    for name, value in (("permutations", permutations), ("repeats", repeats), ("beams", beams)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} is {value!r}; give a number of at least 1.")
    for setting, value, other in (("permutations", permutations > 1, "rank"), ("beams", beams > 1, "generate"), ("metrics", bool(metrics), "generate")):
        if value and method != other:
            raise ConfigError(f'{setting} is of method="{other}"; leave it out, or choose that method.')
    for name in metrics:
        if name not in text_metrics.ANSWER_METRICS:
            raise ConfigError(f'metrics: "{name}" is unknown.{did_you_mean(name, text_metrics.ANSWER_METRICS)}')
    if choice == "fixed" and support is None:
        raise ConfigError('choice="fixed" takes the examples of all queries from support; name its source.')
    if features is not None and choice != "rices":
        raise ConfigError('features are what choice="rices" compares; leave them out, or choose that.')
    return list(dict.fromkeys(shots))


def score_predictions(path: str | os.PathLike) -> dict[str, float]:
    """Computes the metrics again from a predictions.jsonl: from the scores or the answers in it."""
    lines = records.read_predictions(path)
    if not lines:
        raise DataError(f"{path}: there are no predictions in it; evaluate again.")
    return score(lines)


def score(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The metrics of prediction lines {"shots", "references", "task", and "candidates" with "scores", or "prediction" with "metrics"}."""
    found: dict[str, float] = {}
    for number in dict.fromkeys(line["shots"] for line in lines):
        part = [line for line in lines if line["shots"] == number]
        values = np.array([_value(line) for line in part])
        name = f"{number}_shots"
        found[f"accuracy/{name}"], found[f"standard_error/{name}"] = float(values.mean()), float(values.std() / np.sqrt(len(values)))
        tasks = [task for task in dict.fromkeys(line["task"] for line in part) if task]
        for task in tasks if len(tasks) > 1 else []:
            found[f"accuracy/{name}/{task}"] = float(np.mean([value for value, line in zip(values, part) if line["task"] == task]))
        for metric in part[0].get("metrics", ()):
            found[f"{metric}/{name}"] = float(np.mean([text_metrics.ANSWER_METRICS[metric](line["prediction"], line["references"]) for line in part]))
    every = [line for line in lines if line["shots"] == lines[0]["shots"]]
    if "scores" in lines[0]:
        found["chance"] = float(np.mean([len(set(line["candidates"]) & set(line["references"])) / len(line["candidates"]) for line in every]))
    return {**found, "queries": len(every)}


class _Asker:
    """Asks a model about all queries, each behind its context."""

    def __init__(self, generator: Any, method: str, normalize: str, beams: int, max_tokens: int, blank: str):
        self.generator, self.method, self.normalize, self.beams, self.max_tokens, self.blank = generator, method, normalize, beams, max_tokens, blank
        self.processor = generator.processor
        self._ids: dict[str, list[int]] = {}

    def __call__(self, queries: Sequence[Query], before: Sequence[Example], asked: Sequence[Example], shared: bool) -> list[Any]:
        """The scores of each query's candidates, or its answer; `shared`: all contexts are the same, so that it is read once."""
        from vlm_jax.decoding import prefix_cache
        generator, size, made = self.generator, self.generator.batch_size, []
        prefix = None
        if shared and before[0]:
            one = self.processor.format.batch([self._document(before[0], f"the examples of {queries[0].name}")])
            prefix = prefix_cache(generator.model, generator.params, one, mesh=generator.mesh)
        documents = asked if prefix is not None else [[*first, *then] for first, then in zip(before, asked)]
        most = max(1, *map(pictures_of, documents))
        for start in range(0, len(queries), size):
            records.before_batch(generator)
            part = queries[start:start + size]
            rows = [self._document(document, query.name, prefix is None) for document, query in zip(documents[start:start + size], part)]
            fill = size - len(rows)
            batch = self.processor.format.batch(rows + [rows[-1]] * fill)
            if "images" in batch:      # as many pictures in every batch, so that one program does
                batch["images"] = np.pad(batch["images"], [(0, 0), (0, most - batch["images"].shape[1])] + [(0, 0)] * (batch["images"].ndim - 2))
            made += (self._ranked if self.method == "rank" else self._written)(batch, [*part, *[part[-1]] * fill], prefix)[:len(part)]
        return made

    def _document(self, segments: Example, name: str, begin: bool = True) -> dict[str, np.ndarray]:
        try:
            return self.processor.document(segments, begin)
        except DataError as error:
            raise DataError(f"{name}: {error}") from error

    def _ranked(self, batch: Mapping[str, np.ndarray], queries: Sequence[Query], prefix: Any) -> list[np.ndarray]:
        ids = [[self._target(text) for text in query.candidates] for query in queries]
        generator = self.generator
        scores = rank(generator.model, generator.params, batch, ids, prefix=prefix, mesh=generator.mesh, normalize=self.normalize)
        return [row[:len(listed)] for row, listed in zip(scores, ids)]

    def _target(self, text: str) -> list[int]:
        """An answer as training writes it: tokenised by itself, with the mark that ends it (of a chunk, or else of the document)."""
        if text not in self._ids:
            ids = self._document([text_segment(self.blank + text)], f"candidate {text!r}", begin=False)["tokens"]
            self._ids[text] = [*map(int, ids), *self.processor.format.end[-1:]]
        return self._ids[text]

    def _written(self, batch: Mapping[str, np.ndarray], queries: Sequence[Query], prefix: Any) -> list[str]:
        from vlm_jax.decoding import beam_search
        generator, processor = self.generator, self.processor
        made = beam_search(generator.model, generator.params, batch, max_tokens=self.max_tokens, beams=self.beams, eos=processor.format.end,
                           mesh=generator.mesh, prefix=prefix)
        return [processor.decode([number for number in ids if number < processor.vocab_size]).strip() for ids in made.answers()]


def _queries(settings: Mapping[str, Any], predictor: Any, layout: Layout, candidates: list[str] | None, method: str, own: bool) -> list[Query]:
    data, rows, _ = records.read(settings, predictor)
    queries = []
    for row in rows:
        name, texts = data.describe(row["index"]), row.get("texts")
        if isinstance(texts, str) or not texts:
            raise DataError(f"{name}: it has no list of texts to compare an answer with; give the record texts, or leave it out.")
        could = list(dict.fromkeys(candidates if candidates is not None else row.get("candidates", ())))
        if method == "rank" and not set(could) & set(texts):
            raise DataError(f"{name}: its answer {texts[0]!r} is none of its {len(could)} candidates; list it, or use method=\"generate\".")
        if "query" in row and layout != Layout("{prompt}", ""):
            raise ConfigError(f"template is of plain records, but {name} says itself how it is written; leave template out.")
        segments, brought = row["query"] if "query" in row else layout.segments(row), row.get("support", []) if own else None
        queries.append(Query(row["index"], name, segments, row.get("opening", []), list(texts), could, brought, row.get("task")))
    return queries


def _pool(source: Mapping[str, Any], settings: Mapping[str, Any], predictor: Any, layout: Layout,
          queries: Sequence[Query]) -> tuple[list[Example], list[int | None]]:
    """(the examples of a source, the number of each query among them where it is the source of the queries)."""
    data, rows, _ = records.read(settings, predictor)
    for row in rows:
        if isinstance(row.get("texts"), str) or not row.get("texts"):
            raise DataError(f"{data.describe(row['index'])}: it has no list of texts, so it is no example; give the record texts, or leave it out.")
    places = {row["index"]: place for place, row in enumerate(rows)} if plain(source) == plain(settings) else {}
    return [layout.segments(row, row["texts"][0]) for row in rows], [places.get(query.index) for query in queries]


def _chosen(query: Query, place: int, number: int, pool: list[Example] | None, itself: int | None, chooser: Chooser, similarity: Any,
            zero_shot: str) -> list[Example]:
    """The examples that stand before a query, in their order."""
    have = query.support if pool is None else pool
    wanted = number if number or zero_shot == "none" else TEXT_EXAMPLES
    room = len(have) - (itself is not None)
    if wanted > room:
        remedy = "lower shots" if number else 'set zero_shot="none"'
        raise DataError(f"{query.name}: {wanted} examples are asked for, but there are {room}; {remedy}, or give more (the setting support names a source).")
    return [list(have[k]) for k in chooser(wanted, len(have), place, itself, similarity)]


def _similarities(features: Features, queries: Sequence[Query], pool: list[Example] | None) -> list[np.ndarray]:
    """How alike the picture of each query is to those of its examples."""
    asked = features([first_picture(query.segments, query.name) for query in queries])
    if pool is not None:
        return list(asked @ features([first_picture(example, f"example {number} of support") for number, example in enumerate(pool)]).T)
    every = [first_picture(example, query.name) for query in queries for example in query.support]
    made = iter(features(every)) if every else iter(())
    return [np.array([feature @ next(made) for _ in query.support]) for query, feature in zip(queries, asked)]


def _lines(queries: Sequence[Query], number: int, made: Sequence[Sequence[Any]], method: str, metrics: list[str]) -> list[dict[str, Any]]:
    lines = []
    for place, query in enumerate(queries):
        line = {"index": query.index, "shots": number, "references": query.references, "task": query.task}
        if method == "rank":
            scores = np.mean([turn[place] for turn in made], axis=0, dtype=np.float64)
            wrong_first = sorted(range(len(scores)), key=lambda i, s=scores, q=query: (-s[i], q.candidates[i] in q.references))
            line.update(prediction=query.candidates[wrong_first[0]], candidates=query.candidates, scores=[float(score) for score in scores])
        else:
            line.update(prediction=made[0][place], metrics=metrics)
        lines.append(line)
    return lines


def _value(line: Mapping[str, Any]) -> float:
    """1 where the answer is right: above every wrong candidate, or written word for word."""
    if "scores" not in line:
        return text_metrics.exact_match(line["prediction"], line["references"])
    right = [candidate in line["references"] for candidate in line["candidates"]]
    best = max(score for score, hit in zip(line["scores"], right) if hit)
    return float(all(best > score for score, hit in zip(line["scores"], right) if not hit))


def _panel(segments: Example) -> dict[str, Any]:
    """{"picture": a thumbnail or None, "text"} of an example, to draw."""
    from vlm_jax.data.decode import decode_image
    text = " ".join(segment["text"].strip() for segment in segments if segment["kind"] == "text")
    picture = decode_image(first_picture(segments, "example")) if pictures_of(segments) else None
    return {"picture": None if picture is None else records.thumbnail(picture), "text": text}

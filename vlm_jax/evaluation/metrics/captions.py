"""BLEU-1..4, ROUGE-L and CIDEr-D of captions, equal to the COCO caption server's (pycocoevalcap) to 1e-12 on the same words.

METEOR and SPICE are Java programs with databases and are not computed here, by no substitute either.
"""
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import math

from vlm_jax.errors import ConfigError, DataError
from vlm_jax.evaluation.metrics.tokens import TOKENIZERS
from vlm_jax.settings import choose

Words = Sequence[str]
ORDERS = 4
SMALL, TINY = 1e-9, 1e-15     # of the server: they keep quotients of zeros finite
ROUGE_BETA, CIDER_SIGMA = 1.2, 6.0
ELSEWHERE = ("meteor", "spice")


def caption_scores(predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = "ptb_like",
                   metrics: Sequence[str] = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")) -> dict[str, float]:
    """Scores captions against the captions that people wrote.

    Args:
      predictions: one caption a picture; references: of each picture the right ones.
      tokenizer: a name of `TOKENIZERS`; it is part of every key.
    Returns:
      {"cider_d/tokenizer=ptb_like": ..., ...}.
    Raises:
      ConfigError: for an unknown metric or tokeniser, or METEOR and SPICE.
      DataError: for a picture without references.
    """
    words = choose(TOKENIZERS, tokenizer, "tokenizer")
    _check(predictions, references)
    hypotheses, sets = [words(text) for text in predictions], [[words(text) for text in texts] for texts in references]
    scores: dict[str, float] = {}
    known: dict[str, Callable[[], float]] = {f"bleu_{n + 1}": lambda n=n: bleu(hypotheses, sets)[n] for n in range(ORDERS)}
    known.update(rouge_l=lambda: rouge_l(hypotheses, sets)[0], cider_d=lambda: cider_d(hypotheses, sets)[0])
    for metric in metrics:
        if metric in ELSEWHERE:
            raise ConfigError(f'metrics: "{metric}" needs the Java program of that name; write the predictions and score them with pycocoevalcap.')
        scores[f"{metric}/tokenizer={tokenizer}"] = choose(known, metric, "metrics")()
    return scores


def bleu(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus: clipped counts summed over it, brevity penalty by the closest reference length (the shorter of two equally close).

    Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation" (2002), section 2.3.
    """
    _check(hypotheses, references)
    guessed, correct, length, reference_length = [0] * ORDERS, [0] * ORDERS, 0, 0
    for words, texts in zip(hypotheses, references):
        counts, most = ngrams(words), Counter()
        for text in texts:
            most |= ngrams(text)
        length += len(words)
        reference_length += min((abs(len(text) - len(words)), len(text)) for text in texts)[1]
        for n in range(ORDERS):
            guessed[n] += max(0, len(words) - n)
        for ngram, count in counts.items():
            correct[len(ngram) - 1] += min(most[ngram], count)
    scores, product = [], 1.0
    ratio = (length + TINY) / (reference_length + SMALL)
    for n in range(ORDERS):
        product *= (correct[n] + TINY) / (guessed[n] + SMALL)
        scores.append(product ** (1.0 / (n + 1)) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0))
    return scores


def rouge_l(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float, list[float]]:
    """ROUGE-L, its mean and that of each picture: an F-measure of the longest common subsequence whose precision and recall are the best over the references,
    each for itself. Lin, "ROUGE: A Package for Automatic Evaluation of Summaries" (2004), section 3."""
    _check(hypotheses, references)
    scores = []
    for words, texts in zip(hypotheses, references):
        common = [(_common(words, text), len(text)) for text in texts]
        precision = max(count / max(1, len(words)) for count, _ in common)
        recall = max(count / max(1, size) for count, size in common)
        squared = ROUGE_BETA ** 2
        scores.append((1 + squared) * precision * recall / (recall + squared * precision) if precision and recall else 0.0)
    return math.fsum(scores) / len(scores), scores


def cider_d(hypotheses: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[float, list[float]]:
    """CIDEr-D, its mean and that of each picture, ten times the similarity. Vedantam et al., "CIDEr" (2015), sections 4 and 6.

    Document frequencies are those of the reference sets that are given, so the score is one of the corpus: a single picture scores 0, and means over parts of
    a corpus are another metric. As in the server's code the lengths of the penalty count pairs of words.
    """
    _check(hypotheses, references)
    counted = [[ngrams(text) for text in texts] for texts in references]
    documents = Counter(ngram for texts in counted for ngram in set().union(*texts))
    total = math.log(len(references))

    def weighted(counts: Mapping[tuple[str, ...], int]) -> tuple[list[dict], list[float], int]:
        vectors: list[dict] = [{} for _ in range(ORDERS)]
        for ngram, count in counts.items():
            vectors[len(ngram) - 1][ngram] = count * (total - math.log(max(1, documents[ngram])))
        return vectors, [math.sqrt(math.fsum(value * value for value in vector.values())) for vector in vectors], sum(
            count for ngram, count in counts.items() if len(ngram) == 2)

    scores = []
    for words, texts in zip(hypotheses, counted):
        ours, our_norms, our_length = weighted(ngrams(words))
        similarity = 0.0
        for text in texts:
            theirs, their_norms, their_length = weighted(text)
            penalty = math.exp(-(our_length - their_length) ** 2 / (2 * CIDER_SIGMA ** 2))
            for n in range(ORDERS):
                product = math.fsum(min(value, theirs[n][ngram]) * theirs[n][ngram] for ngram, value in ours[n].items() if ngram in theirs[n])
                norms = our_norms[n] * their_norms[n]
                similarity += penalty * (product / norms if norms else product)
        scores.append(10.0 * similarity / ORDERS / len(texts))
    return math.fsum(scores) / len(scores), scores


def ngrams(words: Words) -> Counter:
    """How often each sequence of one to four words occurs."""
    return Counter(tuple(words[start:start + n]) for n in range(1, ORDERS + 1) for start in range(len(words) - n + 1))


def _common(a: Words, b: Words) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        corner = 0
        for place, other in enumerate(b, 1):
            corner, row[place] = row[place], corner + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


def _check(hypotheses: Sequence, references: Sequence[Sequence]) -> None:
    if len(hypotheses) != len(references) or not references:
        raise DataError(f"captions: {len(hypotheses)} predictions for {len(references)} pictures; give one for each of at least one picture.")
    for number, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise DataError(f"captions: picture {number} has no list of references ({texts!r:.40}); give it captions, or leave it out.")

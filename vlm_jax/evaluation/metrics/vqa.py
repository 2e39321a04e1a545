"""VQA accuracy in the ways that are in use; they differ by up to everything on single answers, so the way is part of the metric's name.

    official    Antol et al., "VQA" (2015): the code of the challenge with its quirks. The prediction is normalised always; of the answers, if they differ
                among themselves, punctuation alone. Mean over leave-one-out subsets of min(matches / 3, 1): of ten answers 0, 1, 2, 3, 4 matches give
                0, .3, .6, .9, 1.
    lenient     as official, with both sides normalised always (as lmms-eval does)
    paligemma   as official, with both sides normalised if the answers differ, and neither if not (as big_vision does)
    molmo       min(matches / 3, 1) with both sides normalised always
    simple      min(matches / 3, 1) without normalisation
"""
from collections.abc import Sequence
import re

from vlm_jax.errors import DataError
from vlm_jax.settings import choose

PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
NUMBERS = {word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
ARTICLES = ("a", "an", "the")
# The challenge's code tests `(?!<=\d)`, which is a mistyped look-behind and always true, and passes a flag (32) as the number of dots to remove.
PERIOD, PERIODS = re.compile(r"\.(?!\d)"), 32
COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Contractions that are written without (one of) their apostrophes get it back. Those that begin with a capital there never match, as text is lower-cased first.
_CONTRACTED = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd how'll how's
    isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
    shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've""".split()
CONTRACTIONS = {word[:place] + word[place + 1:]: word for word in _CONTRACTED for place, mark in enumerate(word) if mark == "'"} | {"somebody'd": "somebodyd"}


def clean(text: str) -> str:
    """Line breaks and tabs become blanks; blanks at the ends go."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def punctuation(text: str) -> str:
    """Marks next to a blank, or all of them where the text has a comma between digits, are deleted, others become blanks; then full stops go, except before
    a digit."""
    number, result = bool(COMMA_IN_NUMBER.search(text)), text
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside or number else " ")
    return PERIOD.sub("", result, count=PERIODS)


def digits_and_articles(text: str) -> str:
    """Lower case, number words as digits, without articles, contractions with their apostrophes."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize(text: str) -> str:
    """Punctuation, then digits and articles."""
    return digits_and_articles(punctuation(text))


def _leave_one_out(matches: Sequence[bool]) -> float:
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def _at_once(matches: Sequence[bool]) -> float:
    return min(1.0, sum(matches) / 3)


def _official(prediction: str, answers: list[str]) -> float:
    truth = [punctuation(answer) for answer in answers] if len(set(answers)) > 1 else answers
    return _leave_one_out([answer == normalize(prediction) for answer in truth])


def _lenient(prediction: str, answers: list[str]) -> float:
    return _leave_one_out([normalize(answer) == normalize(prediction) for answer in answers])


def _paligemma(prediction: str, answers: list[str]) -> float:
    change = normalize if len(set(answers)) > 1 else str
    return _leave_one_out([change(answer) == change(prediction) for answer in answers])


def _molmo(prediction: str, answers: list[str]) -> float:
    return _at_once([normalize(answer) == normalize(prediction) for answer in answers])


def _simple(prediction: str, answers: list[str]) -> float:
    return _at_once([answer == prediction for answer in answers])


VQA_VARIANTS = {"official": _official, "lenient": _lenient, "paligemma": _paligemma, "molmo": _molmo, "simple": _simple}


def vqa_accuracy(prediction: str, answers: Sequence[str], variant: str = "official") -> float:
    """Returns the accuracy of one answer, from 0 to 1, against the answers of (usually ten) people.

    Raises:
      ConfigError: for an unknown variant.
      DataError: for fewer than two answers, with which leaving one out leaves none; exact match is meant for those.
    """
    score = choose(VQA_VARIANTS, variant, "variant")
    if isinstance(answers, str) or len(answers) < 2:
        raise DataError(f'vqa_accuracy needs the answers of several people, got {answers!r:.60}; use "exact_match" for a single one.')
    return score(clean(prediction), [clean(answer) for answer in answers])

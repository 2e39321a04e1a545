"""Words of captions. The name of the tokeniser is part of the name of every score that depends on it.

`ptb_like` follows the conventions of the Penn Treebank that the COCO caption server uses (Chen et al., "Microsoft COCO Captions" (2015), section 3): lower
case, clitics split off (does n't, dog 's), marks apart from words, and then 18 marks dropped. The server's tokeniser is a Java program with lists of
abbreviations; this one keeps the dots of single letters (u.s.) and numbers, and drops any other dot at the end of a word.
"""
from collections.abc import Callable
import re
import unicodedata

DROPPED = frozenset(["''", "'", "``", "`", "-lrb-", "-rrb-", "-lcb-", "-rcb-", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'])
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-"}
_JOINED = {"cannot": ["can", "not"], "gonna": ["gon", "na"], "gotta": ["got", "ta"], "wanna": ["wan", "na"], "gimme": ["gim", "me"], "lemme": ["lem", "me"]}
_CLITIC = re.compile(r"(.+?)(n't|'s|'re|'ve|'ll|'d|'m)")
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2026": "...", "\u2014": "--", "\u2013": "-"})
_PIECE = re.compile(r"""
    \.\.\.+ | --+ | ``|''
    | (?:[^\W\d_]\.){2,}                        # u.s.
    | [$\u20ac\u00a3]?\d+(?:[.,:]\d+)*%?        # 3.5, 1,000, 10:30
    | [^\W_]+(?:['\-/&.][^\W_]+)*               # word, t-shirt, dog's, and/or
    | '(?:s|re|ve|ll|d|m)\b
    | \S
    """, re.VERBOSE)


def ptb_like(text: str) -> list[str]:
    """Returns the words of a caption, see above."""
    words = []
    for piece in _PIECE.findall(text.translate(_QUOTES).lower()):
        for word in _split(piece):
            word = _BRACKETS.get(word, word)
            if word not in DROPPED and word.strip(".") and word.strip("-"):
                words.append(word)
    return words


def _split(piece: str) -> list[str]:
    if piece in _JOINED:
        return _JOINED[piece]
    clitics: list[str] = []
    while match := _CLITIC.fullmatch(piece):
        piece = match[1]
        clitics.insert(0, match[2])
    return [piece, *clitics]


def whitespace(text: str) -> list[str]:
    """Returns what blanks separate: for captions that are tokenised already."""
    return text.split()


def characters(text: str) -> list[str]:
    """Returns the letters and digits of a text one by one, with their combining marks: for languages that are written without blanks."""
    found: list[str] = []
    for mark in unicodedata.normalize("NFC", text.lower()):
        kind = unicodedata.category(mark)
        if kind[0] == "M" and found:
            found[-1] += mark
        elif kind[0] in "LN":
            found.append(mark)
    return found


TOKENIZERS: dict[str, Callable[[str], list[str]]] = {"ptb_like": ptb_like, "whitespace": whitespace, "characters": characters}
WITHOUT_BLANKS = ("ja", "th", "zh", "lo", "km", "my")   # languages whose captions `characters` takes apart by default


def tokenizer_of(language: str | None) -> str:
    """The name of the tokeniser for captions in a language, such as "zh" or "zh-Hant"; None is English."""
    return "characters" if language is not None and re.split("[-_]", language)[0] in WITHOUT_BLANKS else "ptb_like"

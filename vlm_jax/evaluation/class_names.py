"""Readable names of classes, and the prompts they stand in, for zero-shot classification.

ImageNet's classes are called by WordNet ids (n01440764), which no text tower has read. `read_class_names` takes readable ones from a file of yours; it
reads WordNet's own database, where the digits of an id are the byte at which its entry stands (WordNet 3.0; in Debian the package wordnet-base).
"""
from collections import Counter
from collections.abc import Mapping, Sequence
import json
import os
import re
from typing import BinaryIO

from vlm_jax.errors import ConfigError

WORDNET = "/usr/share/wordnet/data.noun"   # where Debian's wordnet-base puts it
ENSEMBLE = "ensemble"
MAX_BYTES = 16 * 2**20
_ID = re.compile(r"n\d{8}")
_REMEDY = ("set class_names to a file: one name a line in the order of the labels, lines of ID and name, a config.json with id2label, or the data.noun of "
           "WordNet 3.0 (apt-get install wordnet-base)")

_LOOKS = ("", "blurry ", "sharp ", "dark ", "bright ", "cropped ", "close-up ", "grainy ", "black and white ", "colorful ")
_WORKS = ("drawing", "pencil sketch", "painting", "cartoon", "sculpture", "toy", "poster", "computer rendering", "embroidery", "video frame")
_ARTICLES = ("a", "the", "one", "my")


def ensemble() -> list[str]:
    """Returns 80 prompts: 10 looks of a photo and 10 other ways to show a thing, times 4 articles.

    The number and the idea of Radford et al. 2021, section 3.1.4, who average over 80 prompts on ImageNet. The wording is our own, by these rules; published
    accuracies were measured with theirs, of which a file can be given.
    """
    photos = [f"a {look}photo of {article} {{}}." for look in _LOOKS for article in _ARTICLES]
    return photos + [f"{'an' if work[0] in 'aeiou' else 'a'} {work} of {article} {{}}." for work in _WORKS for article in _ARTICLES]


def read_templates(templates: str | Sequence[str]) -> list[str]:
    """Returns the prompts of a list, of `"ensemble"`, or of a file with one prompt a line.

    Raises:
      ConfigError: for a prompt that does not hold `{}` once, a file that cannot be read, or none at all.
    """
    if isinstance(templates, (str, os.PathLike)):
        templates = ensemble() if templates == ENSEMBLE else _lines(templates, "templates", f'; write a list, "{ENSEMBLE}" or the path of a file')
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ConfigError(f'templates: "{template}" must hold {{}} once, where the class name goes.')
    if not templates:
        raise ConfigError("templates: there are none; give at least one, such as \"a photo of a {}.\"")
    return list(templates)


def read_class_names(names: str | os.PathLike | Sequence[str] | None, ids: Sequence[str] | None, source: str) -> list[str]:
    """Returns the readable names of the labels 0, 1, ...

    Args:
      names: a list; or a file: one name a line (or a JSON list) in the order of the labels; lines `ID NAME` or a JSON object {ID: NAME}, found by the
        source's own names; a config.json with `id2label`; WordNet's data.noun. Of synonyms separated by commas in a table by id the first is the name, unless
        two classes share it; an entry of WordNet then gets its superordinate in brackets. None takes the source's.
      ids: what the source calls its classes, if it calls them anything.
      source: the source's name, for errors.
    Raises:
      ConfigError: for WordNet ids and nothing to read them by, for a file that cannot be read or does not name every class, or less than two classes.
    """
    ids = [str(name) for name in ids or ()]
    if names is None:
        if len(ids) < 2:
            raise ConfigError(f"{source} has no class names; give class_names, a list of at least two or the path of a file.")
        if all(map(_ID.fullmatch, ids)):
            raise ConfigError(f"{source}: its classes are called by WordNet ids ({ids[0]}, ...), which say nothing to a text tower; {_REMEDY}.")
        return ids
    where = "class_names"
    if isinstance(names, (str, os.PathLike)):
        where = f"class_names {names}"
        names = _read(os.fspath(names), ids, source)
        if isinstance(names, Mapping):
            names = _by_id(names, ids, where, source)
    names = [str(name).strip() for name in names]
    if len(names) < 2 or not all(names):
        raise ConfigError(f"{where}: {len(names)} names, of which {sum(not name for name in names)} are empty; at least two are needed and none may be empty.")
    if ids and len(names) != len(ids):
        raise ConfigError(f"{where}: {len(names)} names, but {source} has {len(ids)} classes; give one for each, in the order of the labels.")
    return names


def _read(path: str, ids: Sequence[str], source: str) -> list[str] | dict[str, str]:
    """Returns the names of a file in order, or {id: name}."""
    if os.path.basename(path).startswith("data.noun"):
        return _wordnet(path, ids, source)
    lines = _lines(path, "class_names", "; " + _REMEDY)
    if path.endswith(".json"):
        return _json("\n".join(lines), path)
    if lines and all(_ID.match(line) for line in lines):
        pairs = [line.split(maxsplit=1) for line in lines]
        if all(len(pair) == 2 for pair in pairs):
            return dict(pairs)
        if all(len(pair) == 1 for pair in pairs):
            raise ConfigError(f"class_names {path}: it holds WordNet ids alone ({lines[0]}), no names; {_REMEDY}.")
    return lines


def _json(text: str, path: str) -> list[str] | dict[str, str]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"class_names {path}: it is not JSON ({error}); correct it.") from None
    content = content.get("id2label", content) if isinstance(content, dict) else content
    found = content.values() if isinstance(content, dict) else content
    if not isinstance(content, (dict, list)) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"class_names {path}: it is neither a JSON list of names, nor an object of them, nor one with id2label; correct it.")
    if isinstance(content, dict) and all(key.isascii() and key.isdigit() and len(key) < 10 for key in content):
        numbered = {int(key): name for key, name in content.items()}
        if set(numbered) != set(range(len(content))):
            raise ConfigError(f"class_names {path}: its numbers are not 0 to {len(content) - 1}; name every class once.")
        return _first_synonyms([numbered[number] for number in range(len(numbered))])
    return content


def _by_id(table: Mapping[str, str], ids: Sequence[str], where: str, source: str) -> list[str]:
    missing = [name for name in ids if name not in table]
    if not ids or missing:
        cause = f"it does not name {missing[0]} ({len(missing)} of {len(ids)} are missing)" if ids else f"it names classes by id, and {source} has no ids"
        raise ConfigError(f"{where}: {cause}; complete it, or give one name a line in the order of the labels.")
    return _first_synonyms([table[name] for name in ids])


def _first_synonyms(names: Sequence[str]) -> list[str]:
    """Returns the first of the synonyms of each class; all of them where another class begins alike."""
    firsts = [name.split(",")[0].strip() for name in names]
    count = Counter(firsts)
    return [first if count[first] == 1 else name for first, name in zip(firsts, names)]


def _wordnet(path: str, ids: Sequence[str], source: str) -> list[str]:
    """Returns the first lemma of every id; where two classes share it, with the first lemma of what stands above it, as in `crane (wading bird)`."""
    if not ids or not all(map(_ID.fullmatch, ids)):
        raise ConfigError(f"class_names {path}: WordNet names classes by ids such as n01440764, and {source} calls its own {ids[:1] or 'nothing'}; {_REMEDY}.")
    try:
        with open(path, "rb") as file:
            entries = [_entry(file, name[1:], path) for name in ids]
            count = Counter(lemma for lemma, _ in entries)
            return [lemma if count[lemma] == 1 or above is None else f"{lemma} ({_entry(file, above, path)[0]})" for lemma, above in entries]
    except OSError as error:
        raise ConfigError(f"class_names {path}: it cannot be read ({error.strerror}); {_REMEDY}.") from None


def _entry(file: BinaryIO, offset: str, path: str) -> tuple[str, str | None]:
    """Returns (first lemma, offset of the first superordinate) of the entry at a byte; `man wndb` describes the line."""
    file.seek(int(offset))
    fields = file.readline(2**16).decode("utf-8", "replace").split(" | ")[0].split()
    if len(fields) < 5 or fields[0] != offset or fields[2] != "n":
        raise ConfigError(f"class_names {path}: there is no entry n{offset}, so it is not WordNet 3.0's data.noun, or the id is none of it; {_REMEDY}.")
    above = next((fields[place + 1] for place, field in enumerate(fields[:-1]) if field in ("@", "@i")), None)
    return fields[4].replace("_", " "), above


def _lines(path: str | os.PathLike, what: str, remedy: str) -> list[str]:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} {path}: it cannot be read ({getattr(error, 'strerror', None) or error}){remedy}.") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{what} {path}: it has more than {MAX_BYTES} bytes, too many for a list of names; name another file.")
    return [line.strip() for line in text.strip().splitlines()]

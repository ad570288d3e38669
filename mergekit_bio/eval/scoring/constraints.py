"""Constraints on an answer's format that code can check, such as ``words: 3`` or ``one_of: Yes | No``.

What is kept by these rules is pinned by tests: ``RULES_VERSION`` changes with any of them.

Strict and loose are those of IFEval (Zhou et al. 2023, arXiv:2311.07911): strictly the answer counts as it is written;
loosely it counts too if it keeps the constraint without its first line, its last line or both, or without asterisks.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import product

from mergekit_bio.outside_data import nearest

RULES_VERSION = 1
#: Whether an answer, without white space around it and not empty, keeps a constraint.
Check = Callable[[str], bool]

#: What Unicode calls the letters of languages that have a script of their own, as the checks tell them apart.
SCRIPTS = {
    "Arabic": "ARABIC",
    "English": "LATIN",
    "Greek": "GREEK",
    "Hindi": "DEVANAGARI",
    "Korean": "HANGUL",
    "Russian": "CYRILLIC",
    "Thai": "THAI",
}
#: The mark of a list item and what stands behind it; a line of marks alone is Markdown's rule.
_BULLET = re.compile(r"[^\S\n]*([-*•+])[^\S\n]+(?![-*\s]*$)\S.*")
_MARKS = "-*•+"
#: Between these and a phrase a word ends; an underscore is Markdown's.
_BEFORE_WORD, _AFTER_WORD = r"(?<![^\W_])", r"(?![^\W_])"


def followed(text: str, constraint: str) -> tuple[bool, bool]:
    """Whether an answer keeps a constraint: strictly, and loosely.

    Raises:
        ValueError: There is no such constraint.
    """
    _, check = parse_constraint(unicodedata.normalize("NFC", constraint))
    text = unicodedata.normalize("NFC", text)
    strict = _kept(text, check)
    return strict, strict or any(_kept(variant, check) for variant in _variants(text))


def _kept(text: str, check: Check) -> bool:
    return bool(text.strip()) and check(text.strip())


def _variants(text: str) -> Iterator[str]:
    """The answer as the loose rule reads it."""
    lines = text.split("\n")
    for first, last, asterisks in product((0, 1), (0, 1), (True, False)):
        variant = "\n".join(lines[first : len(lines) - last])
        yield variant if asterisks else variant.replace("*", "")


def parse_constraint(text: str) -> tuple[str, Check]:
    """The kind of a constraint, a key of ``KINDS``, and its check.

    Args:
        text: ``KIND``, or ``KIND: ARGUMENT | ARGUMENT``.

    Raises:
        ValueError: There is no such kind, or its arguments are wrong; says which and what it takes.
    """
    kind, _, rest = (part.strip() for part in text.partition(":"))
    if kind not in KINDS:
        raise ValueError(f"unknown constraint '{kind}'{nearest(kind, list(KINDS))}")
    takes, check_of = KINDS[kind]
    arguments = [argument.strip() for argument in rest.split("|")] if rest else []
    try:
        if not all(arguments):
            raise ValueError
        return kind, check_of(*arguments)
    except (TypeError, ValueError):
        raise ValueError(f"'{text}': write {kind}{': ' if takes else ''}{takes}") from None


# ---- the kinds; a check is called with the text alone


def _one_of(*options: str) -> Check:
    _need(len(options) > 1)
    return options.__contains__


def _number(lowest: str = "-999999999", highest: str = "999999999") -> Check:
    numbers = range(int(lowest), int(highest) + 1)
    _need(len(numbers))
    return lambda text: bool(re.fullmatch(r"0|-?[1-9][0-9]{0,8}", text)) and int(text) in numbers


def _words(count: str) -> Check:
    wanted = _positive(count)
    return lambda text: sum(any(map(str.isalnum, word)) for word in text.split()) == wanted


def _bullets(count: str, mark: str = _MARKS) -> Check:
    wanted = _positive(count)
    _need(mark == _MARKS or (len(mark) == 1 and mark in _MARKS))

    def check(text: str) -> bool:
        marks = [found[1] for found in map(_BULLET.fullmatch, text.split("\n")) if found]
        return len(marks) == wanted and all(found in mark for found in marks)

    return check


def _parts(count: str, separator: str) -> Check:
    wanted = _positive(count)

    def check(text: str) -> bool:
        parts = text.split(separator)
        return "\n" not in text and len(parts) == wanted and all(map(str.strip, parts))

    return check


def _json(*keys: str) -> Check:
    _need(keys)

    names = [key.removesuffix("[]") for key in keys]

    def no_number(name: str) -> None:  # NaN and Infinity are Python's, not JSON's
        raise ValueError(name)

    def check(text: str) -> bool:
        try:
            pairs = json.loads(text, object_pairs_hook=_Pairs, parse_constant=no_number)
        except (ValueError, RecursionError):
            return False
        if not isinstance(pairs, _Pairs) or Counter(key for key, _ in pairs) != Counter(names):
            return False
        return all(type(value) is list for key, value in pairs if f"{key}[]" in keys)

    return check


class _Pairs(list[tuple[str, object]]):
    """A JSON object with every key that stands in it."""


_QUOTES = '"“”„‟«»'


def _quotes() -> Check:
    return lambda text: text[0] in _QUOTES and text[-1] in _QUOTES and bool(text[1:-1].strip(_QUOTES + " \n"))


def _ends_with(phrase: str) -> Check:
    pattern = re.compile(rf"{_BEFORE_WORD if phrase[0].isalnum() else ''}{re.escape(phrase)}\Z")
    return lambda text: bool(pattern.search(text))


def _without(*phrases: str) -> Check:
    _need(phrases)
    # A word is looked for as a word, a punctuation mark wherever it stands.
    patterns = [
        re.compile(
            f"{_BEFORE_WORD}{re.escape(phrase)}{_AFTER_WORD}" if phrase[0].isalnum() else _alike(phrase),
            re.IGNORECASE,
        )
        for phrase in phrases
    ]
    return lambda text: not any(pattern.search(text) for pattern in patterns)


def _alike(mark: str) -> str:
    """A pattern for a punctuation mark and the same of other scripts."""
    return {",": "[,，、،]", ";": "[;；؛]", ".": "[.。]", "!": "[!！]"}.get(mark, re.escape(mark))


def _languages(*names: str) -> Check:
    _need(len(names) > 1 and all(name in SCRIPTS for name in names))

    def check(text: str) -> bool:
        lines = [line for line in text.split("\n") if line.strip()]
        return len(lines) == len(names) and all(
            _mostly(line, SCRIPTS[name]) for line, name in zip(lines, names, strict=True)
        )

    return check


def _mostly(line: str, script: str) -> bool:
    """Whether more than half of a line's letters are of a script; how it is read may stand behind it in brackets."""
    line = re.sub(r"(?<=\S)\s*\([^()]*\)", "", line)
    letters = [unicodedata.name(c, "").split(" ")[0] for c in line if unicodedata.category(c)[0] in "LM"]
    return 2 * letters.count(script) > len(letters)


def _positive(number: str) -> int:
    _need(int(number) > 0)
    return int(number)


def _need(condition: object) -> None:
    if not condition:
        raise ValueError


#: Kind -> what it takes, as an error shows it, and what makes its check of that.
KINDS: dict[str, tuple[str, Callable[..., Check]]] = {
    "one_of": ("Yes | No", _one_of),
    "number": ("LOWEST | HIGHEST, or nothing", _number),
    "words": ("NUMBER", _words),
    "upper_case": ("", lambda: str.isupper),
    "lower_case": ("", lambda: str.islower),
    "quotes": ("", _quotes),
    "ends_with": ("PHRASE", _ends_with),
    "without": ("WORD | MARK", _without),
    "bullets": ("NUMBER, or NUMBER | MARK", _bullets),
    "parts": ("NUMBER | SEPARATOR", _parts),
    "json": ("KEY | KEY, with [] behind one whose value is a list", _json),
    "languages": (f"two or more of {', '.join(SCRIPTS)}, with | between them", _languages),
}


def kinds_of(constraints: Sequence[str]) -> list[str]:
    """The kinds that constraints are of, each once, in the order of ``KINDS``."""
    there = {parse_constraint(text)[0] for text in constraints}
    return [kind for kind in KINDS if kind in there]

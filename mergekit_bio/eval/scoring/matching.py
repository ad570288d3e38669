"""From an answer's text to a label: what the scorers have in common."""

import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mergekit_bio.eval.records.predictions import Prediction

END_OF_TEXT = "<|end_of_text|>"
#: What the published scorers call an answer that matches no label; a label of that name cannot be told from it.
NO_LABEL = "None"
#: What ``exact`` and ``choice`` call it: no label is empty.
NO_MATCH = ""
#: Beyond this many edits the paper's scorer says "None" (``max_levenstein_distance`` of beans-zero).
MAX_EDITS = 5

_QUOTES = "\"'`“”‘’«»*"


@dataclass(frozen=True, slots=True)
class Match:
    """The labels nearest to a text.

    Attributes:
        nearest: All labels at the smallest distance, in order; the first is the one taken.
        edits: That distance (case-sensitive Levenshtein), 0 for the label itself.
    """

    nearest: tuple[str, ...]
    edits: int

    def within(self, limit: int) -> str:
        """The first nearest label, or "None" beyond ``limit`` edits."""
        return self.nearest[0] if self.edits <= limit else NO_LABEL


def given_text(row: Prediction, dataset: str) -> str:
    """The answer as it was given; for zf-indiv as :func:`birds_counted` says it."""
    return birds_counted(row.prediction) if dataset == "zf-indiv" else row.prediction


def birds_counted(text: str) -> str:
    """For zf-indiv: a bare number as the label it means, every other text unchanged.

    The published figures of both scorers are made with it.
    """
    # isdecimal, not isdigit: the latter also holds for digits that int() refuses, such as a superscript two.
    if not text.isdecimal():
        return text
    return "One" if len(text) < 20 and int(text) < 2 else "More"


def nearest_labels(texts: Sequence[str], labels: Iterable[str]) -> list[Match]:
    """Match every text, cut at the end-of-text token, against the labels.

    Ties are broken by the labels' sorted order, "None" before all; the reference takes whichever comes first in a
    Python set. There must be a label.
    """
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    ordered = sorted(set(labels), key=lambda label: (label != NO_LABEL, label))
    cut = [text.split(END_OF_TEXT)[0] for text in texts]
    unique = list(dict.fromkeys(cut))
    distances = cdist(unique, ordered, scorer=Levenshtein.distance)
    found = {}
    for text, row in zip(unique, distances, strict=True):
        smallest = int(row.min())
        found[text] = Match(tuple(ordered[index] for index in (row == smallest).nonzero()[0]), smallest)
    return [found[text] for text in cut]


def match_lists(texts: Sequence[str], labels: Iterable[str]) -> list[str]:
    """Match texts as comma-separated lists: each part to a label or "None", joined again with ", ".

    This is how beans-zero reads detection answers, and what the paper's error breakdown is made with. As there,
    the candidates are the labels as given plus "None".
    """
    parts = [[part.strip() for part in text.split(",")] for text in texts]
    matches = iter(nearest_labels([part for row in parts for part in row], [*labels, NO_LABEL]))
    return [", ".join(next(matches).within(MAX_EDITS) for _ in row) for row in parts]


def match_lists_exactly(texts: Sequence[str], labels: Iterable[str]) -> list[str]:
    """Match texts as comma-separated lists, each part by ``match_exactly`` to one of the labels that the lists name."""
    known = sorted(frozenset().union(*map(label_set, labels)))
    return [", ".join(match_exactly(part, known) for part in text.split(",")) for text in texts]


def label_set(text: str) -> frozenset[str]:
    """The labels of a comma-separated text; "None" in any case, and nothing, are no label."""
    parts = (part.strip() for part in text.split(","))
    return frozenset(part for part in parts if part and part.casefold() != NO_LABEL.casefold())


def match_exactly(text: str, labels: Iterable[str]) -> str:
    """The label that the text is, or that a sentence around it states; else ``NO_MATCH``.

    Case, white space, quotation marks and trailing dots are ignored, but of labels that differ in nothing else the one
    that is there to the letter is taken. Of a longer answer the first line counts, and in it what follows "is", "are"
    or a colon ("The answer is a Coruro." is "Coruro").
    """
    known = _known(tuple(labels))
    cut = text.split(END_OF_TEXT)[0]
    first = (cut.strip().splitlines() or [""])[0]
    stated = [first[found.end() :] for found in re.finditer(r"\b(?:is|are)\b(?:\s+(?:an?|the)\b)?|:", first, re.I)]
    for candidate in (cut, first, *stated):
        for form, label_of in zip(_FORMS, known, strict=True):
            if label := label_of.get(form(candidate)):
                return label
    return NO_MATCH


def normalised(text: str) -> str:
    """What ``match_exactly`` compares: without case, quotation marks around it, dots after it and doubled spaces."""
    return _bare(text).casefold()


def _bare(text: str) -> str:
    return " ".join(text.split()).strip(_QUOTES + string.whitespace + ".")


#: From the letter to what is left of it: the first form in which a text is a label decides.
_FORMS: tuple[Callable[[str], str], ...] = (str, _bare, normalised)


@lru_cache(16)
def _known(labels: tuple[str, ...]) -> list[dict[str, str]]:
    """For each form the label that a text is; of several the first in order, and never one of which nothing is left."""
    ordered = sorted(labels, reverse=True)
    return [{key: label for label in ordered if (key := form(label))} for form in _FORMS]

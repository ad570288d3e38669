"""From an answer's text to a label: what the scorers have in common."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
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

#: Code points for one character to a reader: apostrophes and quotation marks, hyphens and minus signs.
_ALIKE = {ord(c): "'" for c in "‘’‚‛′´`ʻʼʹ＇"} | {ord(c): '"' for c in "“”„‟″«»＂"} | {ord(c): "-" for c in "‐‑‒–−﹣－"}
#: What may stand around a label: quotation marks, Markdown's emphasis and TeX's maths; and what may stand after it.
_AROUND, _AFTER = "\"'*_~$‹›「」『』", ".!。"
_BRACKETS = {"(": ")", "[": "]", "{": "}"}
#: The mark of a list item: a bullet, or a number with a dot or a bracket.
_ITEM = re.compile(r"(?:[-•·–—+]|\(?\d{1,3}[.)])\s+")
_TEX = re.compile(r"\\(?:boxed|text|textbf|textit|mathrm|mathbf)\s*\{(.*)\}")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
#: What leads up to an answer within its sentence.
_LEADS = re.compile(r"\b(?:is|are)\b(?:\s+(?:an?|the)\b)?|:", re.I)
#: Where a clause ends that has its own say about an answer.
_CLAUSE = re.compile(r"[,.;!?\n]|\b(?:and|but|however|yet|so|because|therefore)\b", re.I)
#: In the clause before an answer these say that it is not the answer, and a question leaves it open.
_NEGATION = re.compile(
    r"\b(?:not|no|none|nothing|never|neither|nor|cannot|without|except|hardly|unlike|unlikely|impossible|doubt\w*"
    r"|wrong|incorrect|false)\b|n['’]t\b",
    re.I,
)
_QUESTION = re.compile(r"(?:is|are|was|were|can|could|may|might|would)\s+(?:it|this|that|these|they|the|there)\b", re.I)
#: These do not, though they hold such a word: what is beyond doubt, and what is said of the animal by the way.
_NO_DENIAL = re.compile(
    r"\b(?:no|without(?:\s+an?y?)?)\s+doubts?\b|\bnot\s+only\b"
    r"|\b(?:that|which|who)\s+(?:never|cannot|not|(?:do|does|did|can|could|will)(?:\s+not|n['’]t))\s+\w+",
    re.I,
)
#: What precedes a name in brackets and makes it no answer: a name may hold "False", a denial is plainer.
_NOT = re.compile(r"\b(?:not|never|neither|nor|cannot)\b|n['’]t\b", re.I)
_WITH_BRACKET = re.compile(r"(.*\S)\s*\(([^()]+)\)")


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

    What :func:`normalised` leaves out does not matter, but of labels that differ in nothing else the one that is there
    to the letter is taken. Of a longer answer the first line counts, and in it what follows "is", "are" or a colon
    ("The answer is a Coruro." is "Coruro") unless it is denied ("It is not: Coruro"); or else what stands in the last
    ``\\boxed{}``. A label may have something in brackets after it, or stand there: "Red Fox (Vulpes vulpes)" is either,
    whichever is a label, and none if both are.
    """
    known = _known(tuple(labels))
    for reading in _readings(text.split(END_OF_TEXT)[0]):
        if label := _label(reading, known):
            return label
        if beside := _WITH_BRACKET.fullmatch(_bare(reading)):
            stated = {label for part in beside.groups() if (label := _label(part, known))}
            if len(stated) == 1 and not _NOT.search(beside[1]):
                return stated.pop()
    return NO_MATCH


def _readings(text: str) -> Iterator[str]:
    """What an answer may state, the whole of it first."""
    first = (text.strip().splitlines() or [""])[0]
    yield text
    yield first
    for lead in _LEADS.finditer(first):
        if not _denied(first[: lead.end()]):
            yield first[lead.end() :]
    for box in reversed([*_BOXED.finditer(text)]):
        if not _denied(text[: box.start()]):
            yield box[1]
        return


def _denied(before: str) -> bool:
    """Whether the clause that leads up to an answer says that it is not the answer, or asks whether it is."""
    clause = _NO_DENIAL.sub(" ", _CLAUSE.split(before)[-1]).strip()
    return bool(_NEGATION.search(clause) or (clause.endswith(":") and _QUESTION.match(clause)))


def _label(text: str, known: "Sequence[dict[str, str]]") -> str:
    """The label that a text is, in the first of ``_FORMS`` in which it is one; else ``NO_MATCH``."""
    for form, label_of in zip(_FORMS, known, strict=True):
        if label := label_of.get(form(text)):
            return label
    return NO_MATCH


def normalised(text: str) -> str:
    """What ``match_exactly`` compares: what a reader sees of a label, without what writers put around it.

    Without case and doubled spaces; accents, apostrophes, hyphens and wide letters in one encoding (NFKC); no character
    that cannot be seen; and without quotation marks, brackets, Markdown, ``\\boxed{}`` and the mark of a list item
    around it, and dots and exclamation marks after it.
    """
    return _bare(text).casefold()


def _bare(text: str) -> str:
    # 1. One encoding for what looks alike. Accents are composed last: folding may leave them apart.
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_ALIKE)).translate(_ALIKE)
        text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = " ".join(text.replace("`", "'").split())
    # 2. Layer by layer what stands around it, until nothing does.
    while True:
        peeled = text.strip(_AROUND + " ").rstrip(_AFTER + _AROUND + " ")
        if item := _ITEM.match(peeled):
            peeled = peeled[item.end() :]
        if inside := _TEX.fullmatch(peeled):
            peeled = inside[1]
        if peeled and _BRACKETS.get(peeled[0]) == peeled[-1] and not set("()[]{}") & set(peeled[1:-1]):
            peeled = peeled[1:-1]
        if peeled == text:
            return text
        text = peeled


#: From the letter to what is left of it: the first form in which a text is a label decides.
_FORMS: tuple[Callable[[str], str], ...] = (str, _bare, normalised)


@lru_cache(16)
def _known(labels: tuple[str, ...]) -> list[dict[str, str]]:
    """For each form the label that a text is; of several the first in order, and never one of which nothing is left."""
    ordered = sorted(labels, reverse=True)
    return [{key: label for label in ordered if (key := form(label))} for form in _FORMS]

"""The scorer of the beans-zero library."""

from collections.abc import Sequence

from mergekit_bio.eval.scoring.matching import match_lists, nearest_labels
from mergekit_bio.eval.scoring.scorer import Matched, Scorer


def match(texts: Sequence[str], labels: Sequence[str]) -> Matched:
    """The nearest label, however far; the error breakdown reads each text as a list."""
    matches = nearest_labels(texts, labels)
    return Matched([match.nearest[0] for match in matches], match_lists(texts, labels), matches)


SCORER = Scorer(
    description="nearest label at any distance, as the beans-zero library (zf-indiv: a number counts the birds)",
    match=match,
    match_lists=match_lists,
    caption_words=str.split,
    label_none="counts every answer without a label as it in the error breakdown",
)

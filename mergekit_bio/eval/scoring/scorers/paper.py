"""The scorer of the paper's scripts (arXiv 2511.05171)."""

from collections.abc import Sequence

from mergekit_bio.eval.paper_questions import NAMED_COMPONENTS
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.scoring.matching import MAX_EDITS, given_text, match_lists, nearest_labels
from mergekit_bio.eval.scoring.scorer import Matched, Scorer

_COMMON_OPENING = "The common name for the focal species in the audio is"
_SCIENTIFIC_OPENING = "The scientific name for the focal species in the audio is"


def clean(row: Prediction, dataset: str) -> str:
    """What the paper's scripts leave of an answer before it is matched (nothing is trimmed)."""
    text = given_text(row, dataset).replace(_COMMON_OPENING, "")
    if dataset in NAMED_COMPONENTS:
        text = text.replace(_SCIENTIFIC_OPENING, "").split(",")[0]
    return text


def match(texts: Sequence[str], labels: Sequence[str]) -> Matched:
    """The nearest label within the limit; the error breakdown reads each text as a list."""
    matches = nearest_labels(texts, labels)
    return Matched([match.within(MAX_EDITS) for match in matches], match_lists(texts, labels), matches)


SCORER = Scorer(
    description="sentence openings removed, nearest label within 5 edits, else None (arXiv 2511.05171)",
    clean=clean,
    match=match,
    match_lists=match_lists,
    caption_words=str.split,
    label_none="counts every answer without a label as it",
)

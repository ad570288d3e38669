"""The scorer for which an answer is a label only where it says that label."""

from collections.abc import Sequence

from mergekit_bio.eval.scoring.matching import match_exactly
from mergekit_bio.eval.scoring.scorer import Matched, Scorer


def match(texts: Sequence[str], labels: Sequence[str]) -> Matched:
    """The label that each text is or states."""
    stated = {text: match_exactly(text, labels) for text in dict.fromkeys(texts)}
    answers = [stated[text] for text in texts]
    return Matched(answers, listed=answers)


SCORER = Scorer(
    description="the label itself; case, punctuation around it and a wrapping sentence do not matter",
    match=match,
    asked_labels=True,
)

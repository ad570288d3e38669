"""The scorer for which an answer is a label only where it says that label."""

from collections.abc import Sequence

from mergekit_bio.eval.scoring.captioning import plain_words
from mergekit_bio.eval.scoring.matching import given_text, match_exactly, match_lists_exactly
from mergekit_bio.eval.scoring.scorer import Matched, Scorer


def match(texts: Sequence[str], labels: Sequence[str]) -> Matched:
    """The label that each text is or states."""
    answers = [match_exactly(text, labels) for text in texts]
    return Matched(answers, listed=answers)


SCORER = Scorer(
    description="the label itself; case, quotes, trailing dots and a wrapping sentence do not matter",
    clean=given_text,
    match=match,
    match_lists=match_lists_exactly,
    caption_words=plain_words,
)

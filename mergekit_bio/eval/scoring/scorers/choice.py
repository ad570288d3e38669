"""The scorers for answers that were chosen among options: by their summed log-probability, or that per character."""

from collections.abc import Sequence
from dataclasses import replace

from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.scoring.matching import END_OF_TEXT, NO_MATCH, given_text
from mergekit_bio.eval.scoring.scorer import Matched, Scorer


def clean(row: Prediction, dataset: str) -> str:
    """The option with the highest log-probability where there is one (the first of equals by name), else the text."""
    if not row.choice_logprobs:
        return given_text(row, dataset)
    return max(sorted(row.choice_logprobs), key=row.choice_logprobs.__getitem__)


def match(texts: Sequence[str], labels: Sequence[str]) -> Matched:
    """The label that each text is, verbatim."""
    options = set(labels)
    cut = [text.split(END_OF_TEXT)[0] for text in texts]
    answers = [text if text in options else NO_MATCH for text in cut]
    return Matched(answers, listed=answers)


def clean_normalised(row: Prediction, dataset: str) -> str:
    """The option with the highest log-probability per character (the first of equals by name), else the text.

    The sum falls with every token, so that it favours short options; this is ``acc_norm`` of lm-evaluation-harness.
    """
    if not row.choice_logprobs:
        return given_text(row, dataset)
    per_character = {label: value / max(len(label), 1) for label, value in row.choice_logprobs.items()}
    return max(sorted(per_character), key=per_character.__getitem__)


SCORER = Scorer(
    description="the option with the highest summed log-probability where there is one, else the text verbatim",
    clean=clean,
    match=match,
    asked_labels=True,
)
NORMALISED = replace(
    SCORER,
    description="the option with the highest log-probability per character where there is one, else the text verbatim",
    clean=clean_normalised,
)

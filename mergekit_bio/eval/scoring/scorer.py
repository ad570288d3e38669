"""What a scorer must provide. Each is an object in a file of its own in ``scorers/``, and a line in its table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.scoring.captioning import plain_words
from mergekit_bio.eval.scoring.matching import Match, given_text, match_lists_exactly


@dataclass(frozen=True)
class Matched:
    """Texts matched with labels.

    Attributes:
        answers: The label of each text; where there is none, "None" or "".
        listed: Each text for the error breakdown, where the published scorers read it as a list of labels.
        matches: The nearest labels of each text, where they were looked for by edit distance.
    """

    answers: list[str]
    listed: list[str]
    matches: list[Match] | None = None


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How answers become labels, or for instructions whether they were followed; what it does not say is exact.

    Attributes:
        description: What it does, in words for the report.
        clean: Prediction, dataset name -> the text that is matched.
        match: n texts, the labels that an answer may be -> what the texts are, for classification; None where it scores
            instructions only.
        match_lists: n texts, the labels of all clips as they stand -> for each text its labels, joined with ", ", for
            detection.
        caption_words: Splits a caption into the words that CIDEr counts.
        follows: An answer, its constraint -> whether it was kept strictly and loosely, for instructions; None where it
            scores everything else.
        asked_labels: Whether an answer may be any label of the closed list that was asked, where there was one. Else
            the labels are those that the clips have, whatever was asked.
        label_none: What it does where a label is called "None", after "the scorer NAME "; None where nothing is
            mistaken for it.
    """

    description: str
    match: Callable[[Sequence[str], Sequence[str]], Matched] | None = None
    clean: Callable[[Prediction, str], str] = given_text
    match_lists: Callable[[Sequence[str], Sequence[str]], list[str]] = match_lists_exactly
    caption_words: Callable[[str], list[str]] = plain_words
    follows: Callable[[str, str], tuple[bool, bool]] | None = None
    asked_labels: bool = False
    label_none: str | None = None

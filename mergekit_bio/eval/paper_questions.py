"""What the paper's questions about watkins and cbi ask for, and the scientific names it scored them with.

Neither the reference's YAML nor its predictions files say what the right answer to a question is: the paper's scripts
know it (arXiv 2511.05171). What they know stands here, for every way that questions and predictions come in.
"""

from collections.abc import Sequence
from pathlib import Path

from mergekit_bio.eval.label_map import Target
from mergekit_bio.eval.package_files import recipe_folder
from mergekit_bio.eval.prompt import question

#: The components whose clips the paper asked for more than the label.
NAMED_COMPONENTS = ("watkins", "cbi")

#: The questions in the paper's order: the number of a question in the name of a predictions file.
PAPER_QUESTIONS: dict[str, Target] = {
    "What is the common name for the focal species in the audio?": "label",
    "What is the scientific name for the focal species in the audio?": "scientific",
    "Identify the focal species in the audio and provide its taxonomic name followed by a colon and its common name.": (
        "combined"
    ),
}

_WORDS: dict[Target | None, str] = {
    "label": "the label",
    "scientific": "the scientific name",
    "combined": 'both ("scientific : label")',
    None: "the label (it is none of them)",
}


def paper_target(component: str, *, query: str | None, number: int) -> Target | None:
    """What the paper scores a question against; None where it does not ask it.

    Args:
        component: The BEANS-Zero component that is asked about.
        query: The question's text, with or without flags and audio slot. It decides, whatever the number.
        number: Of the question, in the paper's order. It decides where nobody has the text.
    """
    if component not in NAMED_COMPONENTS:
        return None
    if query is not None:
        return PAPER_QUESTIONS.get(" ".join(question(query).split()))
    targets = list(PAPER_QUESTIONS.values())
    return targets[number] if number < len(targets) else None


def paper_names(component: str) -> Path:
    """The label map with the scientific names that the paper scored one of ``NAMED_COMPONENTS`` with."""
    return recipe_folder() / "labels" / f"{component}.csv"


def targets_in_words(targets: Sequence[Target | None]) -> str:
    """Say what queries are scored against: "query 0 against the label, query 1 against the scientific name"."""
    return ", ".join(f"query {number} against {_WORDS[target]}" for number, target in enumerate(targets))

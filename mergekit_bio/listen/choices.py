"""Answers from a list: which they are, and how likely each is beside the others."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mergekit_bio.engine.decoding.labels import log_sum_exp
from mergekit_bio.errors import PromptError
from mergekit_bio.outside_data import read_rows, read_text

#: The answer that ``--none`` adds.
NONE = "none of these"

#: Where this stands in a prompt, it is replaced by the choices, as in a recipe's queries.
FLAG = "{species_list}"

#: Choices that together are less likely than this are not told apart: of a long list few need to be asked about.
NEGLIGIBLE = 1e-6

_TABLES = (".csv", ".tsv", ".jsonl")
#: The column of a table that is taken where none is named.
_USUAL_COLUMN = "label"


def read_choices(file: str, *, none: bool, note: Callable[[str], None]) -> tuple[str, ...]:
    """Read a list of choices.

    Args:
        file: A text with one a line, where lines that begin with ``#`` are comments; or a table (``.csv``, ``.tsv``,
            ``.jsonl``) with a column ``label``, a single one, or the one named behind a colon: ``birds.csv:species``.
        none: Whether ``none of these`` is one of them, the last.
        note: Is told of choices that stand in the file more than once.

    Raises:
        PromptError: There are fewer than two, or two differ in case or white space only, or the file cannot be read.
    """
    path, column = Path(file), None
    if not path.is_file() and path.name.count(":"):
        before, _, column = file.rpartition(":")
        path = Path(before)
    if path.suffix.lower() in _TABLES:
        written = _of_column(path, column)
    elif column is not None and path.is_file():
        raise PromptError(f"--choices {file}: only a table ({', '.join(_TABLES)}) has columns")
    else:
        lines = read_text(Path(file), error=PromptError).splitlines()
        written = [line.strip() for line in lines if not line.lstrip().startswith("#")]
    written = [choice for choice in written if choice]
    choices = _distinct([*written, *[NONE] * none], path)
    repeated = len(written) + none - len(choices)
    # A column of a table of recordings holds its labels again and again, which surprises nobody.
    if repeated and path.suffix.lower() not in _TABLES:
        note(f"{path}: {repeated} of the choices stand in it more than once; each counts once")
    if len(choices) < 2:
        raise PromptError(f"{path}: {'one choice' if choices else 'no choice'} in it; give two or more, one a line")
    return choices


def with_choices(prompt: str, choices: Sequence[str]) -> str:
    """The prompt with the choices, separated by commas, where it says ``{species_list}``.

    Raises:
        PromptError: It says so, and there are no choices.
    """
    if FLAG not in prompt:
        return prompt
    if not choices:
        raise PromptError(f"the prompt says {FLAG}; give the list with --choices FILE")
    return prompt.replace(FLAG, ", ".join(choices))


def likeliest(scores: Mapping[str, float], count: int = 3) -> list[tuple[str, float]]:
    """The likeliest choices and their probabilities among all choices, the likeliest first, equals in their order.

    Args:
        scores: Choice -> natural log-probability as a whole answer; minus infinity where it was not asked for.
        count: How many at most.
    """
    total = log_sum_exp([*scores.values()])
    probabilities = [(choice, math.exp(score - total)) for choice, score in scores.items() if score > -math.inf]
    return sorted(probabilities, key=lambda item: -item[1])[:count]


def _of_column(path: Path, column: str | None) -> list[str]:
    values = []
    for row in read_rows(path, error=PromptError):
        columns = [str(name) for name in row.data]
        wanted = column or (columns[0] if len(columns) == 1 else _USUAL_COLUMN)
        if wanted not in columns:
            named = f"column '{column}'" if column else f"column '{_USUAL_COLUMN}'; name one, {path}:COLUMN"
            raise PromptError(f"{path}: has no {named}; it has {', '.join(columns)[:200]}")
        value = row.data[wanted]
        values.append("" if value is None else str(value).strip())
    return values


def _distinct(written: Sequence[str], path: Path) -> tuple[str, ...]:
    known: dict[str, str] = {}
    for choice in written:
        first = known.setdefault(" ".join(choice.split()).casefold(), choice)
        if first != choice:
            raise PromptError(f"{path}: '{first}' and '{choice}' differ only in case or white space; write one of them")
    return tuple(known.values())

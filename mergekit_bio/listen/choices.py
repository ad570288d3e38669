"""Answers from a list that a file holds."""

import re
from collections.abc import Callable
from pathlib import Path

from mergekit_bio.engine.decoding.choices import NONE, distinct_choices
from mergekit_bio.errors import PromptError
from mergekit_bio.outside_data import read_rows, read_text

_TABLES = (".csv", ".tsv", ".jsonl")
#: The column of a table that is taken where none is named.
_USUAL_COLUMN = "label"
#: What the name of a column of choices has in it; another may be the first choice of a list without a header.
_A_HEADER = re.compile("label|species|name|choice|answer|class|taxon", re.IGNORECASE)


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
        written = _of_column(path, column, note)
    elif column is not None and path.is_file():
        raise PromptError(f"--choices {file}: only a table ({', '.join(_TABLES)}) has columns")
    else:
        lines = read_text(Path(file), error=PromptError).splitlines()
        written = [line.strip() for line in lines if not line.lstrip().startswith("#")]
    written = [choice for choice in written if choice]
    choices = distinct_choices([*written, *[NONE] * none], where=str(path))
    repeated = len(written) + none - len(choices)
    # A column of a table of recordings holds its labels again and again, which surprises nobody.
    if repeated and path.suffix.lower() not in _TABLES:
        note(f"{path}: {repeated} of the choices stand in it more than once; each counts once")
    return choices


def _of_column(path: Path, column: str | None, note: Callable[[str], None]) -> list[str]:
    values, columns = [], []
    for row in read_rows(path, error=PromptError):
        columns = [str(name) for name in row.data]
        wanted = column or (columns[0] if len(columns) == 1 else _USUAL_COLUMN)
        if wanted not in columns:
            named = f"column '{column}'" if column else f"column '{_USUAL_COLUMN}'; name one, {path}:COLUMN"
            raise PromptError(f"{path}: has no {named}; it has {', '.join(columns)[:200]}")
        value = row.data[wanted]
        values.append("" if value is None else str(value).strip())
    if column is None and len(columns) == 1 and path.suffix != ".jsonl" and not _A_HEADER.search(columns[0]):
        note(f"{path}: its first line, '{columns[0][:60]}', is taken for the column's name and is no choice")
    return values

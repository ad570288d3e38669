"""A folder of instructions whose answers' format code can check: metadata.csv or metadata.jsonl, and recordings."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from mergekit_bio.audio.clip import CLIP_SECONDS
from mergekit_bio.errors import DatasetError
from mergekit_bio.eval.data.audio_folder import FILE, inside, metadata_file, plain_text, recordings_of
from mergekit_bio.eval.data.dataset import Dataset, DatasetRow, unique_rows
from mergekit_bio.eval.scoring.constraints import parse_constraint
from mergekit_bio.outside_data import Document, is_text, read_rows

COLUMNS = ("id", "prompt", "constraint")


def open_instructions(folder: Path, *, name: str, channel: int | None = None) -> Dataset:
    """Open instructions.

    Args:
        folder: Holds ``metadata.csv`` or ``metadata.jsonl`` with the columns ``id``, ``prompt``, ``constraint`` (of
            :mod:`mergekit_bio.eval.scoring.constraints`) and, if wanted, ``file_name``: the recording that a prompt is
            about, relative to the folder. A prompt without one is asked without audio.
        name: The dataset's name.
        channel: The channel that is heard, counted from 1; None for the mean of all.

    Raises:
        DatasetError: The metadata is missing, damaged, or names a recording or a constraint that does not exist; the
            file and the line are named.
    """
    metadata = metadata_file(folder)
    if metadata is None:
        raise DatasetError(f"{folder}: has no metadata.csv or metadata.jsonl with {', '.join(COLUMNS)}")
    rows = unique_rows(list(_rows(folder, read_rows(metadata, error=DatasetError))), str(metadata))
    recording, recordings = recordings_of(rows, channel)
    return Dataset(
        name=name,
        task="instructions",
        asked=rows,
        examples=(),
        labels=None,
        seconds=CLIP_SECONDS,
        source=str(folder),
        recording=recording,
        recordings=recordings,
        channel=channel,
    )


def _rows(folder: Path, documents: Iterable[Document]) -> Iterator[DatasetRow]:
    for document in documents:
        values = {plain_text(column): plain_text(value) for column, value in document.data.items()}
        # A prompt is asked as it is written: what cannot be seen may join its letters.
        values |= {
            key: text.strip() for key, text in document.data.items() if key == "prompt" and isinstance(text, str)
        }
        for column in COLUMNS:
            if column not in values:
                raise document.problem((), f"no column '{column}'; it has {', '.join(map(str, values)) or 'none'}")
            if not is_text(values[column]) or not values[column]:
                raise document.problem((), f"'{column}' must be a text without a lone surrogate, and not empty")
        try:
            parse_constraint(values["constraint"])
        except ValueError as error:
            raise document.problem((), f"constraint: {error}") from None
        file = values.get(FILE)
        if file is not None and not is_text(file):
            raise document.problem((), f"'{FILE}' must be a text without a lone surrogate")
        yield DatasetRow(
            id=values["id"],
            label=values["constraint"],
            instruction=values["prompt"],
            path=inside(folder, file, document) if file else None,
        )

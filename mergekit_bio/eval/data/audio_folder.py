"""A folder of one's own recordings with metadata.csv or metadata.jsonl (the Hub's AudioFolder convention)."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_bio.audio.clip import CLIP_SECONDS
from mergekit_bio.audio.decoding import Note
from mergekit_bio.audio.recording import read_samples
from mergekit_bio.errors import DatasetError
from mergekit_bio.eval.components import Task
from mergekit_bio.eval.data.dataset import Dataset, DatasetRow, checked_samples, unique_rows
from mergekit_bio.eval.scoring.matching import label_set, normalised
from mergekit_bio.outside_data import is_text, read_rows

METADATA = ("metadata.csv", "metadata.jsonl")
REQUIRED = ("file_name", "label")
#: Values of the column ``split``: rows of the first are examples only, rows of the second are asked only.
EXAMPLES, ASKED = ("examples", "train"), ("", "test")


def open_audio_folder(folder: Path, *, name: str, task: Task, channel: int | None = None) -> Dataset:
    """Open a folder of recordings.

    Args:
        folder: Holds the recordings and one of ``METADATA`` with the columns ``file_name`` (relative to the folder),
            ``label`` and, if wanted, ``split``: "examples" (or "train") sets a row apart for in-context examples.
            Without such rows examples are drawn from the rows that are asked.
        name: The dataset's name.
        task: What is asked of it.
        channel: The channel that is heard, counted from 1; None for the mean of all.

    Raises:
        DatasetError: The metadata is missing, damaged or names a file that is not there, or two labels differ only in
            what scoring does not look at; the file, and where there is one the line, is named.
    """
    metadata = [folder / file for file in METADATA if (folder / file).is_file()]
    if not metadata:
        raise DatasetError(f"{folder}: no metadata.csv or metadata.jsonl in it; it needs the columns file_name,label")
    if len(metadata) > 1:
        raise DatasetError(f"{folder}: has both metadata.csv and metadata.jsonl; keep one")
    asked: list[DatasetRow] = []
    examples: list[DatasetRow] = []
    for split, row in _rows(folder, metadata[0]):
        (examples if split in EXAMPLES else asked).append(row)
    rows = unique_rows([*asked, *examples], str(metadata[0]))
    if task != "captioning":
        _check_distinct_labels(rows, task, metadata[0])
    unique = unique_rows(asked, f"{metadata[0]} (rows that are asked)")
    return Dataset(
        name=name,
        task=task,
        asked=unique,
        examples=tuple(examples) or unique,
        labels=len({row.label for row in unique}),
        seconds=CLIP_SECONDS,
        source=str(folder),
        recording=partial(_recording, {row.id: row.path for row in rows if row.path}, channel),
        channel=channel,
    )


def _check_distinct_labels(rows: Sequence[DatasetRow], task: Task, file: Path) -> None:
    """Refuse two labels that one answer could be both of."""
    known: dict[str, str] = {}
    for row in rows:
        for label in sorted(label_set(row.label)) if task == "detection" else [row.label]:
            first = known.setdefault(normalised(label), label)
            if first != label:
                raise DatasetError(
                    f"{file}: the labels {first!r} and {label!r} differ only in case, white space, quotation marks or "
                    "dots; write one of them"
                )


def _rows(folder: Path, file: Path) -> Iterator[tuple[str, DatasetRow]]:
    """Every row, after its value of the column ``split``; texts without white space around them."""
    for document in read_rows(file, error=DatasetError):
        values = {_stripped(column): _stripped(value) for column, value in document.data.items()}
        for column in REQUIRED:
            if column not in values:
                raise document.problem((), f"no column '{column}'; it has {', '.join(map(str, values)) or 'none'}")
        for column in (*REQUIRED, "split"):
            if values.get(column) is not None and not is_text(values[column]):
                raise document.problem((), f"'{column}' must be a text without a lone surrogate")
        split = values.get("split") or ""
        if split not in EXAMPLES + ASKED:
            raise document.problem((), f"split '{split}' is none of {', '.join(filter(None, ASKED + EXAMPLES))}")
        for column in REQUIRED:
            if not values[column]:
                raise document.problem((), f"no {column}")
        name = values["file_name"]
        path = folder / name
        if "\0" in name or not path.resolve().is_relative_to(folder.resolve()):
            raise document.problem((), f"'{name}' is outside the folder")
        if not path.is_file():
            raise document.problem((), f"the recording '{name}' does not exist")
        yield split, DatasetRow(id=name, label=values["label"], path=path)


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _recording(paths: dict[str, Path], channel: int | None, row_id: str, note: Note) -> tuple[np.ndarray, int]:
    samples, rate = read_samples(paths[row_id], seconds=CLIP_SECONDS, channel=channel, note=note)
    return checked_samples(samples, str(paths[row_id])), rate

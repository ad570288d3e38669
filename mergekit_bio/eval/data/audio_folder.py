"""A folder of recordings with metadata.csv or metadata.jsonl (the Hub's AudioFolder convention), or Raven's tables."""

import json
import posixpath
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_bio.audio.clip import CLIP_SECONDS
from mergekit_bio.audio.decoding import Note
from mergekit_bio.audio.recording import read_parts, read_samples
from mergekit_bio.audio.selections import parse_seconds
from mergekit_bio.errors import AudioError, DatasetError
from mergekit_bio.eval.components import Task
from mergekit_bio.eval.data.annotations import annotated_stretches
from mergekit_bio.eval.data.dataset import (
    Dataset,
    DatasetRow,
    Recording,
    Recordings,
    checked_samples,
    unique_rows,
)
from mergekit_bio.eval.scoring.matching import label_set, normalised
from mergekit_bio.outside_data import Document, is_text, read_rows

METADATA = ("metadata.csv", "metadata.jsonl")
#: The column that names a row's recording, and the one that holds its label where nobody names another.
FILE, LABEL = "file_name", "label"
#: The columns that are read, beside that of the label.
_READ = frozenset({FILE, "start", "end", "split"})
#: Values of the column ``split``: rows of the first are examples only, rows of the second are asked only.
EXAMPLES, ASKED = ("examples", "train"), ("", "test")
#: Characters that nobody sees and copying brings along: joiners, marks of direction and of byte order.
_NO_WIDTH = re.compile("[\u200b-\u200f\u2060\ufeff]")


def open_audio_folder(
    path: Path, *, name: str, task: Task, label_column: str | None = None, channel: int | None = None
) -> Dataset:
    """Open recordings with their labels.

    Args:
        path: A folder that holds the recordings, and says what is in them in one of two ways. One of ``METADATA`` has
            the columns ``file_name`` (relative to the folder), ``label`` and, if wanted, ``start`` and ``end``
            (seconds: a part of the recording) and ``split``: "examples" (or "train") sets a row apart for in-context
            examples. Without such rows examples are drawn from the rows that are asked. Or there are Raven's selection
            tables in it, of which every selection is a row. One such table in the folder may be named alone.
        name: The dataset's name.
        task: What is asked of it.
        label_column: The column that holds the label, instead of ``label``.
        channel: The channel that is heard, counted from 1; None for the mean of all.

    Raises:
        DatasetError: The metadata is missing, damaged or names a file that is not there, or two labels differ only in
            what scoring does not look at; the file, and where there is one the line, is named.
    """
    folder = path.parent if path.is_file() else path
    metadata = metadata_file(folder) if path == folder else None
    if metadata is not None:
        where, documents = metadata, read_rows(metadata, error=DatasetError)
    else:
        where, documents = path, annotated_stretches(path, folder, label_column=label_column, task=task)
        label_column = LABEL
    asked: list[DatasetRow] = []
    examples: list[DatasetRow] = []
    for split, row in _rows(folder, documents, task, label_column or LABEL):
        (examples if split in EXAMPLES else asked).append(row)
    rows = [*asked, *examples]
    recording, recordings = recordings_of(rows, channel)
    unique = unique_rows(asked, f"{where} (rows that are asked)")
    longer = sum(row.end is not None and row.end - row.start > CLIP_SECONDS for row in rows)
    note = f"{name}: {longer} of {len(rows)} parts of recordings are longer than 10 s; their first 10 s are heard"
    return Dataset(
        name=name,
        task=task,
        asked=unique,
        examples=tuple(examples) or unique,
        labels=len({row.label for row in unique}),
        seconds=CLIP_SECONDS,
        source=str(path),
        notes=(note,) if longer else (),
        recording=recording,
        recordings=recordings,
        channel=channel,
    )


def metadata_file(folder: Path) -> Path | None:
    """The file of ``METADATA`` that a folder has, if it has one.

    Raises:
        DatasetError: It has both.
    """
    there = [folder / file for file in METADATA if (folder / file).is_file()]
    if len(there) > 1:
        raise DatasetError(f"{folder}: has both metadata.csv and metadata.jsonl; keep one")
    return there[0] if there else None


def _rows(
    folder: Path, documents: Iterable[Document], task: Task, label_column: str
) -> Iterator[tuple[str, DatasetRow]]:
    """Every row, after its value of the column ``split``; texts as :func:`plain_text` makes them."""
    lines: dict[str, str] = {}  # id -> where its row begins
    labels: dict[str, str] = {}  # label as scoring compares it -> as it is written
    required = (FILE, label_column)
    for document in documents:
        values = {plain_text(column): plain_text(value) for column, value in document.data.items()}
        # 1. The columns are there, once, and hold texts.
        for column in required:
            if column not in values:
                raise document.problem((), f"no column '{column}'; it has {', '.join(map(str, values)) or 'none'}")
        if len(values) < len(document.data):
            raise document.problem((), "two columns differ only in white space")
        for column in values.keys() - _READ:
            meant = re.sub(r"\W*\(?(s|sec|seconds)\)?$", "", str(column).lower()).replace(" ", "_")
            if meant in _READ - values.keys():
                raise document.problem((), f"the column '{column}' is not read; write it '{meant}'")
        if type(values[label_column]) in (int, float):
            values[label_column] = json.dumps(values[label_column])
        for column in (*required, "split"):
            if values.get(column) is not None and not is_text(values[column]):
                raise document.problem((), f"'{column}' must be a text without a lone surrogate")
        split = values.get("split") or ""
        if split not in EXAMPLES + ASKED:
            raise document.problem((), f"split '{split}' is none of {', '.join(filter(None, ASKED + EXAMPLES))}")
        for column in required:
            if not values[column]:
                raise document.problem((), f"no {column}")
        # 2. The recording, or this part of it, is in the folder, and in one row.
        path = inside(folder, values[FILE], document)
        row_id = unicodedata.normalize("NFC", posixpath.normpath(path.relative_to(folder).as_posix()))
        start, end = (_seconds(document, values.get(column), column) for column in ("start", "end"))
        if end is not None and end <= (start or 0):
            raise document.problem((), f"ends at {end:g} s, which is not behind its start at {start or 0:g} s")
        if start is not None or end is not None:
            row_id += f":{_in_short(start or 0)}-{'' if end is None else _in_short(end)}"
        if row_id in lines:
            raise document.problem((), f"the id '{row_id}' stands in {lines[row_id]} too")
        lines[row_id] = document.line()
        # 3. No answer could be two labels at once.
        label_text = values[label_column]
        if task != "captioning":
            for label in sorted(label_set(label_text)) if task == "detection" else [label_text]:
                first = labels.setdefault(normalised(label), label)
                if first != label:
                    differ = "differ only in case, white space or punctuation; write one of them"
                    raise document.problem((), f"the labels {first!r} and {label!r} {differ}")
        yield split, DatasetRow(id=row_id, label=label_text, path=path, start=start or 0, end=end)


def _seconds(document: Document, value: Any, column: str) -> float | None:
    """A place in a recording; None where the row names none."""
    if value is None or value == "":
        return None
    if (seconds := parse_seconds(str(value))) is None:
        raise document.problem((), f"{column}: '{value}' is no time in seconds")
    return seconds


def _in_short(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def plain_text(value: Any) -> Any:
    """A text as it is compared: without white space around it and characters that have no width, composed (NFC)."""
    return unicodedata.normalize("NFC", _NO_WIDTH.sub("", value)).strip() if isinstance(value, str) else value


def inside(folder: Path, name: str, document: Document) -> Path:
    """The recording of a row, by its name as some system or other writes it."""
    if "\0" in name:
        raise document.problem((), f"'{name}' is outside the folder")
    names = [name, unicodedata.normalize("NFD", name)]
    names += [text.replace("\\", "/") for text in names]
    for path in dict.fromkeys(folder / text for text in names):
        if not path.resolve().is_relative_to(folder.resolve()):
            raise document.problem((), f"'{name}' is outside the folder")
        if path.is_file():
            return path
    raise document.problem((), f"the recording '{name}' does not exist")


def recordings_of(rows: Sequence[DatasetRow], channel: int | None) -> tuple[Recording, Recordings]:
    """What a dataset reads the recordings of rows in files with: ``recording`` and ``recordings`` of its attributes."""
    by_id = {row.id: row for row in rows if row.path is not None}
    return partial(_recording, by_id, channel), partial(_recordings, by_id, channel)


def _recording(rows: dict[str, DatasetRow], channel: int | None, row_id: str, note: Note) -> tuple[np.ndarray, int]:
    row = rows[row_id]
    assert row.path is not None
    start, seconds = _part(row)
    samples, rate = read_samples(row.path, start=start, seconds=seconds, channel=channel, note=note)
    return checked_samples(samples, str(row.path)), rate


def _recordings(
    rows: dict[str, DatasetRow], channel: int | None, row_ids: Sequence[str], note: Note
) -> Iterator[tuple[np.ndarray, int] | AudioError]:
    path = rows[row_ids[0]].path
    assert path is not None
    return read_parts(path, [_part(rows[row_id]) for row_id in row_ids], channel=channel, note=note)


def _part(row: DatasetRow) -> tuple[float, float]:
    """Start and length of what is heard of a row's recording, in seconds."""
    return row.start, CLIP_SECONDS if row.end is None else min(CLIP_SECONDS, row.end - row.start)

"""A folder of one's own recordings with metadata.csv or metadata.jsonl (the Hub's AudioFolder convention)."""

import json
import posixpath
import re
import unicodedata
from collections.abc import Iterator
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
from mergekit_bio.outside_data import Document, is_text, read_rows

METADATA = ("metadata.csv", "metadata.jsonl")
REQUIRED = ("file_name", "label")
#: Values of the column ``split``: rows of the first are examples only, rows of the second are asked only.
EXAMPLES, ASKED = ("examples", "train"), ("", "test")
#: Characters that nobody sees and copying brings along: joiners, marks of direction and of byte order.
_NO_WIDTH = re.compile("[\u200b-\u200f\u2060\ufeff]")


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
    for split, row in _rows(folder, metadata[0], task):
        (examples if split in EXAMPLES else asked).append(row)
    rows = [*asked, *examples]
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


def _rows(folder: Path, file: Path, task: Task) -> Iterator[tuple[str, DatasetRow]]:
    """Every row, after its value of the column ``split``; texts as :func:`_plain` makes them."""
    lines: dict[str, str] = {}  # id -> where its row begins
    labels: dict[str, str] = {}  # label as scoring compares it -> as it is written
    for document in read_rows(file, error=DatasetError):
        values = {_plain(column): _plain(value) for column, value in document.data.items()}
        # 1. The columns are there, once, and hold texts.
        for column in REQUIRED:
            if column not in values:
                raise document.problem((), f"no column '{column}'; it has {', '.join(map(str, values)) or 'none'}")
        if len(values) < len(document.data):
            raise document.problem((), "two columns differ only in white space")
        if type(values["label"]) in (int, float):
            values["label"] = json.dumps(values["label"])
        for column in (*REQUIRED, "split"):
            if values.get(column) is not None and not is_text(values[column]):
                raise document.problem((), f"'{column}' must be a text without a lone surrogate")
        split = values.get("split") or ""
        if split not in EXAMPLES + ASKED:
            raise document.problem((), f"split '{split}' is none of {', '.join(filter(None, ASKED + EXAMPLES))}")
        for column in REQUIRED:
            if not values[column]:
                raise document.problem((), f"no {column}")
        # 2. The recording is in the folder, and in one row.
        path = _inside(folder, values["file_name"], document)
        row_id = unicodedata.normalize("NFC", posixpath.normpath(path.relative_to(folder).as_posix()))
        if row_id in lines:
            raise document.problem((), f"the id '{row_id}' stands in {lines[row_id]} too")
        lines[row_id] = document.line()
        # 3. No answer could be two labels at once.
        if task != "captioning":
            for label in sorted(label_set(values["label"])) if task == "detection" else [values["label"]]:
                first = labels.setdefault(normalised(label), label)
                if first != label:
                    differ = "differ only in case, white space or punctuation; write one of them"
                    raise document.problem((), f"the labels {first!r} and {label!r} {differ}")
        yield split, DatasetRow(id=row_id, label=values["label"], path=path)


def _plain(value: Any) -> Any:
    """A text as it is compared: without white space around it and characters that have no width, composed (NFC)."""
    return unicodedata.normalize("NFC", _NO_WIDTH.sub("", value)).strip() if isinstance(value, str) else value


def _inside(folder: Path, name: str, document: Document) -> Path:
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


def _recording(paths: dict[str, Path], channel: int | None, row_id: str, note: Note) -> tuple[np.ndarray, int]:
    samples, rate = read_samples(paths[row_id], seconds=CLIP_SECONDS, channel=channel, note=note)
    return checked_samples(samples, str(paths[row_id])), rate

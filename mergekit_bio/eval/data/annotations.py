"""Annotated recordings: the stretches that Raven's selection tables name, with their labels."""

from collections.abc import Iterator
from pathlib import Path

from mergekit_bio.audio.finding import find_recordings
from mergekit_bio.audio.selections import RecordingFinder, Selection, is_raven_table, read_selections
from mergekit_bio.errors import AudioError, DatasetError
from mergekit_bio.eval.components import Task
from mergekit_bio.outside_data import Document, nearest


def annotated_stretches(path: Path, folder: Path, *, label_column: str | None, task: Task) -> Iterator[Document]:
    """The stretches that tables name, as rows of a ``metadata.csv``; one that several selections name is one row.

    Args:
        path: A table, or a folder with tables in and below it.
        folder: Holds the recordings; file names are relative to it.
        label_column: The tables' column that holds the label.
        task: In a detection a stretch has all labels that its selections give it; in others they must agree.

    Yields:
        ``file_name``, ``start``, ``end`` (seconds) and ``label``.

    Raises:
        DatasetError: There is no table, one is damaged or has no such column, a selection has no label, a recording
            is missing, or a stretch has several labels and may have one; the line is named.
    """
    tables = [path] if path.is_file() else sorted(file for file in path.rglob("*.txt") if is_raven_table(file))
    if not tables:
        raise DatasetError(
            f"{folder}: no metadata.csv or metadata.jsonl in it, with the columns file_name,label, and no selection "
            "table of Raven's"
        )
    try:
        finder = RecordingFinder(find_recordings([folder]).recordings)
    except AudioError as error:
        raise DatasetError(str(error)) from None
    labels: dict[tuple[Path, float, float], dict[str, Selection]] = {}
    for table in tables:
        for selection in read_selections(table, error=DatasetError):
            label = _label(selection, label_column)
            recording = finder.find(selection, table, error=DatasetError)
            if recording is None:
                raise DatasetError(f"{selection.where}: the recording '{selection.recording}' is not in {folder}")
            labels.setdefault((recording, selection.start, selection.end), {}).setdefault(label, selection)
    for (recording, start, end), given in labels.items():
        first, *others = given.values()
        if others and task != "detection":
            one, other, *_ = given
            raise DatasetError(
                f"{others[0].where}: '{other}' is about the same stretch as '{one}' ({first.where}); keep one of them, "
                "or take task: detection"
            )
        name = recording.relative_to(folder).as_posix()
        row = {"file_name": name, "start": start, "end": end, "label": ", ".join(given)}
        yield Document(first.where, row, DatasetError)


def _label(selection: Selection, column: str | None) -> str:
    columns = [name for name in selection.values if name]
    if column is None:
        raise DatasetError(f"{selection.where}: which column holds the label? Say label_column: {' or '.join(columns)}")
    if column not in columns:
        raise DatasetError(f"{selection.where}: no column '{column}'{nearest(column, columns)}")
    if not (label := selection.values[column]):
        raise DatasetError(f"{selection.where}: no {column}")
    return label

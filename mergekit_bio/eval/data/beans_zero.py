"""BEANS-Zero: the rows and recordings of one component, never the whole benchmark."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from mergekit_bio.audio.decoding import Note
from mergekit_bio.errors import DatasetError, MissingPackageError

try:
    import datasets
    import numpy as np
    import pyarrow
except ImportError:
    raise MissingPackageError("datasets", "eval", "reading BEANS-Zero") from None

from mergekit_bio.checkpoint.source import hub_errors
from mergekit_bio.eval.components import Component
from mergekit_bio.eval.data.dataset import (
    Dataset,
    DatasetRow,
    Download,
    RecordingError,
    checked_samples,
    unique_rows,
)
from mergekit_bio.eval.data.parquet_rows import (
    COMPONENT_COLUMN,
    RECORDING_COLUMNS,
    TEXT_COLUMNS,
    CachedRecordings,
    Place,
    RowGroup,
    component_rows,
    local_files,
    recording_row,
    recordings_of,
)
from mergekit_bio.outside_data import parse_json

#: Row id -> the row's ``RECORDING_COLUMNS``.
FindRow = Callable[[str], dict[str, Any]]


def open_component(component: Component, *, source: str, streaming: bool = False) -> Dataset:
    """Open a component.

    Of parquet files on the Hub the rows' texts are fetched; of the recordings only those row groups that hold rows
    which are heard, into the cache of the ``datasets`` library, from where they are read in any order.

    Args:
        component: What to open, and what it should hold.
        source: A hub id, a ``save_to_disk`` folder, or a parquet or arrow file or a folder of such files.
        streaming: Keep nothing in the cache: recordings are read as they are asked for, front to back. Arrow files are
            read in place either way.

    Raises:
        DatasetError: The data cannot be had, or is not of BEANS-Zero's schema.
    """
    cached: CachedRecordings | None = None
    with _one_line_errors(source):
        if local_files(source, "arrow"):
            table = _arrow_table(source, component.name)
            texts, find = list(table.select_columns([*TEXT_COLUMNS])), _in_any_order(table)
        else:
            rows = component_rows(source, component.name, keep=not streaming)
            texts = list(rows.texts)
            places = {values["id"]: place for values, place in zip(texts, rows.places, strict=True)}
            if streaming:
                find = _front_to_back(places)
            else:
                cached = CachedRecordings(source, component.name, places)
                find = cached.row
        asked = unique_rows([_row(values, source) for values in texts], f"{source}: component {component.name}")
    return Dataset(
        name=component.name,
        task=component.task,
        asked=asked,
        examples=asked,
        labels=None if component.labels is None else len(component.labels),
        seconds=component.duration,
        source=source,
        recording=partial(_recording, find, source),
        downloads=partial(_downloads, cached) if cached and not Path(source).exists() else None,
        notes=tuple(_differences(component, asked)),
    )


def _downloads(cached: CachedRecordings, ids: Sequence[str]) -> list[Download]:
    """A download for every row group that is not here yet."""
    return [Download(group.bytes, partial(_fetch, cached, group)) for group in cached.to_fetch(ids)]


def _fetch(cached: CachedRecordings, group: RowGroup) -> None:
    with _one_line_errors(cached.source):
        cached.fetch(group)


def _row(values: dict[str, Any], source: str) -> DatasetRow:
    for column in ("id", "output", "instruction"):
        if not isinstance(value := values[column], str):
            raise DatasetError(f"{source}: row {values['id']!r}: the column '{column}' holds {value!r}, not a text")
    return DatasetRow(id=values["id"], label=values["output"], instruction=values["instruction"])


def _differences(component: Component, rows: tuple[DatasetRow, ...]) -> Iterator[str]:
    """How the rows differ from what the component should hold."""
    if len(rows) != component.rows:
        yield (
            f"{component.name}: {len(rows)} clips, the benchmark has {component.rows}: figures cannot be compared"
            " with published ones"
        )
    if component.labels is not None:
        several = component.task == "detection"
        labels = {part for row in rows for part in (row.label.split(", ") if several else [row.label])}
        unknown = sorted(labels - set(component.labels))
        if unknown:
            yield f"{component.name}: {len(unknown)} label(s) the benchmark does not have: {', '.join(unknown[:3])}"


def _recording(find: FindRow, source: str, row_id: str, note: Note) -> tuple[np.ndarray, int]:
    """Samples, float64 [samples], and their rate in Hz, which the row's metadata states."""
    where = f"{source}: row '{row_id}'"
    with _one_line_errors(source):
        row = find(row_id)
    rate = parse_json(row["metadata"] or "{}", source=f"{where}: metadata", error=DatasetError).get("sample_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or rate <= 0:
        raise RecordingError(f"{where}: the metadata states no sample_rate")
    return checked_samples(row["audio"], where), int(rate)


def _in_any_order(table: Any) -> FindRow:
    """Rows of a memory-mapped table."""
    rows = table.with_format("numpy", columns=["audio"], output_all_columns=True)
    index = {row_id: number for number, row_id in enumerate(table["id"])}
    return lambda row_id: dict(rows[index[row_id]])


def _front_to_back(places: dict[str, Place]) -> FindRow:
    """Rows of a stream: it is read on until the row comes, once more from the beginning if that has gone by."""
    rows: Iterator[tuple[str, dict[str, Any]]] = iter(())

    def find(row_id: str) -> dict[str, Any]:
        nonlocal rows
        for again in (rows, _streamed(places)):
            rows = again
            for name, row in rows:
                if name == row_id:
                    return row
        raise KeyError(row_id)

    return find


def _streamed(places: dict[str, Place]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows with their ids, read row group by row group."""
    for group, of_group in groupby(places.items(), key=lambda item: item[1].group):
        ids = {place.row: row_id for row_id, place in of_group}
        for row_id, batch in zip(ids.values(), recordings_of(group, [*ids]), strict=True):
            yield row_id, recording_row(batch)


def _arrow_table(source: str, component: str) -> Any:
    """The rows of a component in arrow files as a ``datasets.Dataset``."""
    table = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in local_files(source, "arrow")])
    columns = sorted({COMPONENT_COLUMN, *TEXT_COLUMNS, *RECORDING_COLUMNS})
    if missing := set(columns) - set(table.column_names):
        raise DatasetError(f"{source}: no column '{min(missing)}'; BEANS-Zero has {', '.join(columns)}")
    names = table.data.column(COMPONENT_COLUMN).to_pylist()
    return table.select([index for index, name in enumerate(names) if name == component]).select_columns(columns)


@contextmanager
def _one_line_errors(source: str) -> Iterator[None]:
    """What ``datasets``, pyarrow and the Hub raise, as one line."""
    local = Path(source).exists()
    if local and not local_files(source, "parquet") and not local_files(source, "arrow"):
        raise DatasetError(f"{source}: no parquet or arrow file in it")
    try:
        with _quiet(bars=not local and sys.stderr.isatty()):
            yield
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, *hub_errors()) as error:
        first = str(error.__cause__ or error).split("\n")[0]
        if local:
            raise DatasetError(f"{source}: not BEANS-Zero's parquet or arrow data: {first}") from None
        raise DatasetError(
            f"{source}: cannot be fetched from the Hub ({first}); check the network and `hf auth login`, or give a"
            " local copy (--data FOLDER, or data: FOLDER in the recipe)"
        ) from None


@contextmanager
def _quiet(*, bars: bool) -> Iterator[None]:
    """The libraries' warnings and, unless ``bars``, their progress bars kept from the terminal."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("datasets", "huggingface_hub"))}
    shown = not datasets.are_progress_bars_disabled()
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    if not bars:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()

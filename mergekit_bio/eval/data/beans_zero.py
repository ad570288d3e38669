"""BEANS-Zero through the ``datasets`` library: one component at a time, never the whole benchmark."""

import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

from mergekit_bio.errors import DatasetError, MissingPackageError
from mergekit_bio.eval.components import Component
from mergekit_bio.eval.data.dataset import Dataset, DatasetRow, checked_samples, unique_rows
from mergekit_bio.outside_data import parse_json

try:
    import datasets
    import numpy as np
    import pyarrow
except ImportError:
    raise MissingPackageError("datasets", "eval", "reading BEANS-Zero") from None

CONFIGURATION, SPLIT = "BEANS-Zero", "test"
#: Everything about a row that is asked before its recording is.
TEXT_COLUMNS = ("id", "dataset_name", "instruction", "output")
AUDIO_COLUMNS = ("id", "dataset_name", "audio", "metadata")
#: Row id -> the row's ``AUDIO_COLUMNS``.
FindRow = Callable[[str], dict[str, Any]]


def open_component(component: Component, *, source: str, streaming: bool = False) -> Dataset:
    """Open a component.

    From the Hub only its row groups are fetched: without ``streaming`` into the ``datasets`` cache, from where
    recordings are read in any order; with it the texts only, and the recordings as they are asked for, front to back.

    Args:
        component: What to open, and what it should hold.
        source: A hub id, a ``save_to_disk`` folder, or a parquet or arrow file or a folder of such files.
        streaming: See above; folders of arrow files are read in place either way.

    Raises:
        DatasetError: The data cannot be had, or is not of BEANS-Zero's schema.
    """
    with _one_line_errors(source):
        if streaming and not _files(source, "arrow"):
            texts: Iterable[dict[str, Any]] = _streamed(source, component.name, TEXT_COLUMNS)
            find = _front_to_back(source, component.name)
        else:
            table = _table(source, component.name)
            texts = table.select_columns([*TEXT_COLUMNS])
            find = _in_any_order(table)
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
        notes=tuple(_differences(component, asked)),
    )


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


def _recording(find: FindRow, source: str, row_id: str) -> tuple[np.ndarray, int]:
    """Samples, float64 [samples], and their rate in Hz, which the row's metadata states."""
    where = f"{source}: row '{row_id}'"
    with _one_line_errors(source):
        row = find(row_id)
    rate = parse_json(row["metadata"] or "{}", source=f"{where}: metadata", error=DatasetError).get("sample_rate")
    if isinstance(rate, bool) or not isinstance(rate, int | float) or rate <= 0:
        raise DatasetError(f"{where}: the metadata states no sample_rate")
    return checked_samples(row["audio"], where), int(rate)


def _in_any_order(table: Any) -> FindRow:
    """Rows of a memory-mapped table."""
    rows = table.with_format("numpy", columns=["audio"], output_all_columns=True)
    index = {row_id: number for number, row_id in enumerate(table["id"])}
    return lambda row_id: dict(rows[index[row_id]])


def _front_to_back(source: str, component: str) -> FindRow:
    """Rows of a stream: it is read on until the row comes, once more from the beginning if that has gone by."""
    rows: Iterator[dict[str, Any]] = iter(())

    def find(row_id: str) -> dict[str, Any]:
        nonlocal rows
        for again in (rows, _streamed(source, component, AUDIO_COLUMNS)):
            rows = again
            for row in rows:
                if row["id"] == row_id:
                    return row
        raise DatasetError(f"{source}: the row '{row_id}' is gone")

    return find


def _streamed(source: str, component: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of a component from the Hub or from parquet files, read row group by row group."""
    files = _files(source, "parquet")
    where = {"path": "parquet", "data_files": files} if files else {"path": source, "name": CONFIGURATION}
    yield from datasets.load_dataset(
        **where,
        split="train" if files else SPLIT,
        streaming=True,
        filters=[("dataset_name", "==", component)],
        columns=list(columns),
    )


def _table(source: str, component: str) -> Any:
    """The rows of a component as a ``datasets.Dataset`` on this disk."""
    columns = tuple(sorted({*TEXT_COLUMNS, *AUDIO_COLUMNS}))
    if arrow := _files(source, "arrow"):
        table = datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in arrow])
        missing = set(columns) - set(table.column_names)
        if missing:
            raise DatasetError(f"{source}: no column '{min(missing)}'; BEANS-Zero has {', '.join(columns)}")
        kept = [index for index, name in enumerate(table.data.column("dataset_name").to_pylist()) if name == component]
        return table.select(kept).select_columns([*columns])
    # Cached under the function and its arguments: the second run reads nothing from the source.
    arguments = {"source": source, "component": component, "columns": columns}
    try:
        return datasets.Dataset.from_generator(_streamed, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, datasets.arrow_writer.SchemaInferenceError):
            raise DatasetError(f"{source}: component {component}: no clip in it") from None
        raise


def _files(source: str, suffix: str) -> list[str]:
    """The files of a kind that a local source has; none for a hub id."""
    path = Path(source)
    if path.is_dir():
        return sorted(map(str, path.rglob(f"*.{suffix}")))
    return [source] if path.is_file() and path.suffix == f".{suffix}" else []


@contextmanager
def _one_line_errors(source: str) -> Iterator[None]:
    """What ``datasets``, pyarrow and the Hub raise, as one line."""
    local = Path(source).exists()
    if local and not _files(source, "parquet") and not _files(source, "arrow"):
        raise DatasetError(f"{source}: no parquet or arrow file in it")
    try:
        with _quiet(bars=not local and sys.stderr.isatty()):
            yield
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, HfHubHTTPError, OSError) as error:
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

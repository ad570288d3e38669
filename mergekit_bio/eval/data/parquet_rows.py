"""Rows in parquet files, on this disk or on the Hub: where they lie, and their recordings kept in a cache.

A row group is the least that can be read of a parquet file's column. What is read of one here are whole column chunks,
whose sizes its file's footer states, so that what a recording costs is known before it is fetched.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from huggingface_hub import HfFileSystem

from mergekit_bio.errors import DatasetError

CONFIGURATION, SPLIT = "BEANS-Zero", "test"
COMPONENT_COLUMN = "dataset_name"
#: Everything about a row that is asked before its recording is.
TEXT_COLUMNS = ("id", "instruction", "output")
RECORDING_COLUMNS = ("audio", "metadata")

#: Files whose texts are read at the same time: each takes a few small requests.
FILES_AT_ONCE = 8
#: Rows that are decoded at a time: 10 s at 96 kHz are 4 MB each.
ROWS_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group of a file.

    Attributes:
        file: Its path, or its hf:// address with the commit.
        version: What tells a local file from a later one of its name; empty on the Hub.
        number: Which group of the file.
        bytes: What its recordings take in the file: all of the group's, whatever the component.
    """

    file: str
    version: str
    number: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row lies.

    Attributes:
        group: The row group.
        row: Its number in the group.
        rank: Its number among the component's rows of the group.
    """

    group: RowGroup
    row: int
    rank: int


@dataclass(frozen=True)
class ComponentRows:
    """The rows of a component, without their recordings.

    Attributes:
        texts: ``TEXT_COLUMNS`` of every row, in the files' order.
        places: Where they lie.
    """

    texts: Sequence[dict[str, Any]]
    places: Sequence[Place]


def local_files(source: str, suffix: str) -> list[str]:
    """The files of a kind that a local source has; none for a hub id."""
    path = Path(source)
    if path.is_dir():
        return sorted(map(str, path.rglob(f"*.{suffix}")))
    return [source] if path.is_file() and path.suffix == f".{suffix}" else []


def component_rows(source: str, component: str, *, keep: bool = True) -> ComponentRows:
    """Find the rows of a component.

    Of parquet files on the Hub the footers are read, and the text columns of those row groups which may hold the
    component, by the statistics in the footer. With ``keep`` that is kept in the cache: the second time nothing is
    asked of the Hub.

    Args:
        source: A hub id, a parquet file or a folder of such files.
        component: The value of the column ``dataset_name``.
        keep: Whether what the Hub says is kept.

    Raises:
        OSError: The files cannot be had.
        pyarrow.ArrowException: A file is damaged, or lacks a column.
    """
    local = local_files(source, "parquet")
    kept = None if local or not keep else cache_folder(source, component) / "rows.arrow"
    if kept is not None and kept.is_file():
        return _from_table(_read_arrow(kept).read_all())
    files = local or _files_on_the_hub(source)
    rows: list[tuple[dict[str, Any], Place]] = []
    pool = ThreadPoolExecutor(FILES_AT_ONCE)
    try:
        with datasets.utils.tqdm(total=len(files), desc=f"finding {component}", unit="file") as bar:
            for of_file in pool.map(partial(_rows_of_file, component=component), files):
                rows += of_file
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)  # an error or Ctrl-C waits for what is being read, not for all files
    found = ComponentRows([texts for texts, _ in rows], [place for _, place in rows])
    if kept is not None and rows:
        table = _to_table(found)
        _write_arrow(kept, table.schema, [table])
    return found


def recordings_of(group: RowGroup, rows: Sequence[int]) -> Iterator[pyarrow.RecordBatch]:
    """Read the recordings of a row group's rows: a batch of one row with ``RECORDING_COLUMNS`` for each.

    Args:
        group: The row group; its recordings are fetched whole.
        rows: Numbers of rows in it, ascending.
    """
    first, wanted = 0, list(rows)
    with _opened(group.file, group.version) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group.number], columns=[*RECORDING_COLUMNS]):
            while wanted and wanted[0] < first + len(batch):
                yield batch.slice(wanted.pop(0) - first, 1)
            first += len(batch)
            if not wanted:
                return  # the rest of the group need not be decoded


@dataclass(frozen=True)
class CachedRecordings:
    """Recordings of a component, fetched a row group at a time and kept on this disk.

    Attributes:
        source: As in :func:`component_rows`.
        component: As there.
        places: Row id -> where it lies, of all rows of the component.
    """

    source: str
    component: str
    places: dict[str, Place]

    def to_fetch(self, ids: Sequence[str]) -> list[RowGroup]:
        """The row groups that hold recordings of these rows and are not here yet, in the order of the rows."""
        groups = dict.fromkeys(self.places[row_id].group for row_id in ids)
        return [group for group in groups if not self._file(group).is_file()]

    def fetch(self, group: RowGroup) -> None:
        """Get the component's recordings of a row group, whole or not at all."""
        rows = [place.row for place in self.places.values() if place.group == group]
        batches = recordings_of(group, rows)
        first = next(batches)

        def all_batches() -> Iterator[pyarrow.RecordBatch]:
            yield first
            yield from batches

        _write_arrow(self._file(group), first.schema, all_batches())

    def row(self, row_id: str) -> dict[str, Any]:
        """``RECORDING_COLUMNS`` of a row, its row group fetched if it is not here; ``audio`` as an array."""
        place = self.places[row_id]
        file = self._file(place.group)
        if not file.is_file():
            self.fetch(place.group)
        return recording_row(_read_arrow(file).get_batch(place.rank))

    def _file(self, group: RowGroup) -> Path:
        name = hashlib.sha256(f"{group.file} {group.version} {group.number}".encode()).hexdigest()[:32]
        return cache_folder(self.source, self.component) / f"{name}.arrow"


def recording_row(batch: pyarrow.RecordBatch) -> dict[str, Any]:
    """The one row of a batch; ``audio`` as a numpy array, or None."""
    audio, metadata = (batch.column(name)[0] for name in RECORDING_COLUMNS)
    return {
        "audio": audio.values.to_numpy(zero_copy_only=False).copy() if audio.is_valid else None,
        "metadata": metadata.as_py(),
    }


def cache_folder(source: str, component: str) -> Path:
    """Where a component of a source is kept, in the cache of the ``datasets`` library (HF_DATASETS_CACHE)."""
    name = source.replace("/", "--") if not Path(source).exists() else hashlib.sha256(source.encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "mergekit-bio" / name / component


def _files_on_the_hub(source: str) -> list[str]:
    """Their hf:// addresses, which hold the commit, in the order that the data set's card gives them."""
    builder = datasets.load_dataset_builder(source, CONFIGURATION)
    files = (builder.config.data_files or {}).get(SPLIT, [])
    if not files or not all(file.endswith(".parquet") for file in files):
        raise DatasetError(f"{source}: no parquet files for the split {SPLIT} of {CONFIGURATION}")
    return list(files)


def _version(file: str) -> str:
    """What tells a local file from a later one of its name."""
    if file.startswith("hf://"):
        return ""
    status = Path(file).stat()
    return f"{status.st_size} {status.st_mtime_ns}"


@contextmanager
def _opened(file: str, version: str) -> Iterator[Any]:
    """A parquet file for reading. On the Hub every read is one request for exactly what is read."""
    with _stream(file) as stream:
        yield pyarrow.parquet.ParquetFile(stream, metadata=_footer(file, version))


@lru_cache(maxsize=1024)
def _footer(file: str, version: str) -> Any:
    with _stream(file) as stream:
        return pyarrow.parquet.read_metadata(stream)


def _stream(file: str) -> Any:
    if not file.startswith("hf://"):
        return Path(file).open("rb")
    return HfFileSystem(endpoint=datasets.config.HF_ENDPOINT).open(file, cache_type="none")


def _rows_of_file(file: str, *, component: str) -> list[tuple[dict[str, Any], Place]]:
    """The component's rows in a file."""
    rows = []
    version = _version(file)
    with _opened(file, version) as parquet:
        missing = {COMPONENT_COLUMN, *TEXT_COLUMNS, *RECORDING_COLUMNS} - set(parquet.schema_arrow.names)
        if missing:
            raise pyarrow.ArrowInvalid(f"{file}: no column '{min(missing)}'")
        for number in range(parquet.num_row_groups):
            if not _may_hold(parquet.metadata.row_group(number), component):
                continue
            # 1. Which rows of the group are the component's: it may have none in spite of the statistics.
            names = parquet.read_row_group(number, columns=[COMPONENT_COLUMN]).column(0)
            inside = pyarrow.compute.indices_nonzero(pyarrow.compute.equal(names, component)).to_pylist()
            if not inside:
                continue
            # 2. Their texts, and what their recordings will cost.
            texts = parquet.read_row_group(number, columns=[*TEXT_COLUMNS]).take(inside).to_pylist()
            group = RowGroup(file, version, number, _recording_bytes(parquet.metadata.row_group(number)))
            places = [Place(group, row, rank) for rank, row in enumerate(inside)]
            rows += list(zip(texts, places, strict=True))
    return rows


def _chunks(group: Any) -> Iterator[Any]:
    """The column chunks of a row group's metadata."""
    return (group.column(number) for number in range(group.num_columns))


def _may_hold(group: Any, component: str) -> bool:
    """Whether the statistics of a row group leave room for a component."""
    for chunk in _chunks(group):
        if chunk.path_in_schema == COMPONENT_COLUMN and chunk.statistics is not None and chunk.statistics.has_min_max:
            return bool(chunk.statistics.min <= component <= chunk.statistics.max)
    return True


def _recording_bytes(group: Any) -> int:
    """What is read of a row group for its recordings."""
    return sum(
        chunk.total_compressed_size
        for chunk in _chunks(group)
        if chunk.path_in_schema.split(".")[0] in RECORDING_COLUMNS
    )


def _to_table(rows: ComponentRows) -> pyarrow.Table:
    """Texts and places as columns."""
    return pyarrow.Table.from_pylist(
        [
            texts | asdict(place.group) | {"row": place.row, "rank": place.rank}
            for texts, place in zip(rows.texts, rows.places, strict=True)
        ]
    )


def _from_table(table: pyarrow.Table) -> ComponentRows:
    values = table.to_pylist()
    groups = {
        key: RowGroup(**{name: row[name] for name in ("file", "version", "number", "bytes")})
        for row in values
        for key in [(row["file"], row["number"])]
    }
    return ComponentRows(
        [{name: row[name] for name in TEXT_COLUMNS} for row in values],
        [Place(groups[row["file"], row["number"]], row["row"], row["rank"]) for row in values],
    )


def _read_arrow(file: Path) -> Any:
    return pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))


def _write_arrow(file: Path, schema: pyarrow.Schema, batches: Any) -> None:
    """Write an Arrow file that appears whole or not at all; of several processes that write it one wins."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(suffix=".part", dir=file.parent)
    os.close(handle)
    try:
        with pyarrow.ipc.new_file(unfinished, schema) as writer:
            for batch in batches:
                writer.write(batch)
        Path(unfinished).chmod(0o644)
        Path(unfinished).replace(file)
    finally:
        Path(unfinished).unlink(missing_ok=True)

"""Parquet, which is written when all answers are there."""

from collections.abc import Sequence
from pathlib import Path

from mergekit_bio.errors import MissingPackageError
from mergekit_bio.listen.journal import HeardRecording, Journal, Row
from mergekit_bio.listen.publishing import whole_file
from mergekit_bio.listen.tables.interface import About, in_batches


class ParquetTable:
    """One file, with a row an answer."""

    def __init__(self, out: Path, about: About) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise MissingPackageError("pyarrow", "eval", "a .parquet file") from error
        self._out, self._about = out, about
        types = {str: pyarrow.string(), float: pyarrow.float64()}
        self._schema = pyarrow.schema([(name, types[kind]) for name, kind in about.columns.items()])

    def begin(self, journal: Journal) -> None:
        """A Parquet file cannot grow: until all of it is there, the journal holds the answers."""

    def add(self, journal: Journal, rows: Sequence[Row], ended: Sequence[HeardRecording]) -> None:
        """A Parquet file cannot grow."""

    def finish(self, journal: Journal) -> None:
        """See :class:`mergekit_bio.listen.tables.interface.Table`."""
        import pyarrow
        import pyarrow.parquet

        with whole_file(self._out) as partial, pyarrow.parquet.ParquetWriter(partial, self._schema) as file:
            for rows in in_batches(journal.rows()):
                cells = [self._about.cells(row) for row in rows]
                file.write_table(pyarrow.Table.from_pylist(cells, self._schema))

"""Formats with a line an answer, which grow as answers come: CSV, JSON lines, plain text."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from mergekit_bio.listen.journal import HeardRecording, Journal, Row
from mergekit_bio.listen.publishing import problems_with, whole_file
from mergekit_bio.listen.tables.interface import About, as_text, in_batches, one_line


class LineTable:
    """A file with a line an answer, and perhaps a header."""

    def __init__(self, out: Path, about: About) -> None:
        self.out, self.about = out, about

    def header(self) -> str:
        """What stands above all lines."""
        return ""

    def lines(self, rows: Iterable[Row]) -> str:
        """The lines of some rows."""
        raise NotImplementedError

    def begin(self, journal: Journal) -> None:
        """See :class:`mergekit_bio.listen.tables.interface.Table`."""
        self.finish(journal)

    def add(self, journal: Journal, rows: Sequence[Row], ended: Sequence[HeardRecording]) -> None:
        """See :class:`mergekit_bio.listen.tables.interface.Table`."""
        with problems_with(self.out), self.out.open("ab") as file:
            file.write(self.lines(rows).encode("utf-8", "backslashreplace"))

    def finish(self, journal: Journal) -> None:
        """See :class:`mergekit_bio.listen.tables.interface.Table`."""
        with whole_file(self.out) as partial, partial.open("wb") as file:
            file.write(self.header().encode())
            for rows in in_batches(journal.rows()):
                file.write(self.lines(rows).encode("utf-8", "backslashreplace"))


class CsvTable(LineTable):
    """Comma-separated values with a header (RFC 4180, lines that end as Unix ends them)."""

    def header(self) -> str:
        return self._csv([list(self.about.columns)])

    def lines(self, rows: Iterable[Row]) -> str:
        return self._csv([list(self.about.cells(row).values()) for row in rows])

    @staticmethod
    def _csv(rows: Sequence[Sequence[object]]) -> str:
        # What stands in a line's end is put into quotation marks: of both characters, though lines end with the second.
        end, lines = "\r\n", []
        for row in rows:
            csv.writer(text := io.StringIO(), lineterminator=end).writerow(row)
            lines.append(text.getvalue().removesuffix(end) + "\n")
        return "".join(lines)


class JsonLinesTable(LineTable):
    """An object a line; null where there is no value."""

    def lines(self, rows: Iterable[Row]) -> str:
        return "".join(json.dumps(self.about.cells(row), ensure_ascii=False) + "\n" for row in rows)


class TextTable(LineTable):
    """What the shell shows."""

    def lines(self, rows: Iterable[Row]) -> str:
        return "".join(f"{shown(row)}\n" for row in rows)


def shown(row: Row) -> str:
    """``"wren.wav [0.0-10.0 s]  Wren"``."""
    probability = "" if row.probability is None else f"  ({row.probability:.2f})"
    return f"{as_text(row.recording)} [{row.start:.1f}-{row.end:.1f} s]  {one_line(row.answer)}{probability}"

"""Tables that name stretches of recordings: Raven's selection tables, Audacity's label tracks, and CSV.

- Raven: columns separated by tabs, ``Selection``, ``Begin Time (s)``, ``End Time (s)`` and others. A selection stands
  in a row for every view it was drawn in. In a table about several files the times are those of all files one after the
  other, and ``File Offset (s)`` is the start within its own.
- Audacity: ``start<TAB>end<TAB>label`` without a header; a line that begins with a backslash holds the frequencies of
  the one before (https://manual.audacityteam.org/man/importing_and_exporting_labels.html).
- CSV, or JSON lines: columns ``file`` (or ``file_name``, ``recording``), ``start`` and ``end``, in seconds. Raven's and
  BirdNET's columns do too, as a spreadsheet saves them.
"""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PureWindowsPath

from mergekit_bio.errors import MergekitBioError
from mergekit_bio.outside_data import Document, read_rows, read_text

#: What the columns of a table may be called, in lower case: also Raven's, BirdNET's (``filepath`` in its output for R)
#: and Kaleidoscope's (``in file``).
_FILE = ("file", "file_name", "filename", "filepath", "path", "recording", "begin path", "begin file", "in file")
_START = ("start", "start (s)", "begin time (s)")
_END = ("end", "end (s)", "end time (s)")
#: Bytes within which recordings of one name and size differ that are not copies.
_BEGINNING = 1 << 20


@dataclass(frozen=True)
class Selection:
    """A stretch of a recording.

    Attributes:
        start: Where it begins in its recording, in seconds.
        end: Where it ends.
        where: Its place in the table, for messages: ``"birds.txt:12"``.
        recording: The recording's path or name as the table writes it; None where it writes none.
        values: The row's columns.
    """

    start: float
    end: float
    where: str
    recording: str | None = None
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.end - self.start


def read_selections(file: Path, *, error: type[MergekitBioError]) -> list[Selection]:
    """Read a table, in the order of its rows; which of the formats it has, its content says.

    Raises:
        error: It is none of these tables, or a row has no times; the line is named.
    """
    rows = _rows_of_columns
    if file.suffix != ".jsonl":
        first, *_ = read_text(file, error=error).partition("\n")
        header = [column.strip().lower() for column in first.split("\t")]
        if "begin time (s)" in header:
            rows = _rows_of_raven
        elif len(header) > 1 and _number(header[0]) and _number(header[1]):
            rows = _rows_of_audacity
    return list(_selections(rows(file, error), error))


def parse_seconds(text: str) -> float | None:
    """A place in a recording, in seconds; None where the text is none. Some locales write a comma."""
    try:
        seconds = float(text.replace(",", "."))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def is_raven_table(file: Path) -> bool:
    """Whether a file begins as Raven's selection tables do, in any encoding in which tables are read."""
    try:
        with file.open("rb") as content:
            first = content.readline(1 << 16)
    except OSError:
        return False
    named = ("Begin Time (s)".encode(encoding) for encoding in ("utf-8", "utf-16-le", "utf-16-be"))
    return b"\t" in first and any(name in first for name in named)


#: A row's place in its table, and its values by column.
_Rows = Iterator[tuple[str, dict[str, str]]]


def _rows_of_raven(file: Path, error: type[MergekitBioError]) -> _Rows:
    # Raven puts nothing in quotation marks: one that stands in a field is a part of it.
    lines = read_text(file, error=error).split("\n")
    columns = [column.strip() for column in lines[0].split("\t")]
    if repeated := next((column for column in columns if column and columns.count(column) > 1), None):
        raise error(f"{file}:1: the column '{repeated}' stands twice")
    for number, line in enumerate(lines[1:], start=2):
        if line.strip():
            fields = [value.strip() for value in line.split("\t")]
            values = dict(zip(columns, fields + [""] * (len(columns) - len(fields)), strict=False))
            yield f"{file}:{number}", values


def _rows_of_audacity(file: Path, error: type[MergekitBioError]) -> _Rows:
    for number, line in enumerate(read_text(file, error=error).split("\n"), start=1):
        if line.strip() and not line.startswith("\\"):
            start, end, *label = line.split("\t")
            yield f"{file}:{number}", {"start": start, "end": end, "label": "\t".join(label).strip()}


def _rows_of_columns(file: Path, error: type[MergekitBioError]) -> _Rows:
    for row in read_rows(file, error=error):
        values = {str(column).strip(): _text(value) for column, value in row.data.items()}
        _need_columns(row, {column.lower(): value for column, value in values.items()})
        yield row.line(), values


def _selections(rows: _Rows, error: type[MergekitBioError]) -> Iterator[Selection]:
    known: set[tuple[str, str, float, float]] = set()
    for where, values in rows:
        by_name = {column.lower(): value for column, value in values.items()}
        start, end = _time(by_name, _START, where, error), _time(by_name, _END, where, error)
        if by_name.get("file offset (s)"):
            seconds, start = end - start, _time(by_name, ("file offset (s)",), where, error)
            end = round(start + seconds, 6)  # microseconds, so that 0.1 + 0.2 is 0.3
        recording = next((by_name[column] for column in _FILE if by_name.get(column)), None)
        if end < start:
            raise error(f"{where}: ends at {end:g} s, before its start at {start:g} s")
        # Raven writes a selection once for each view.
        place = (by_name.get("selection") or where, recording or "", start, end)
        if place not in known:
            known.add(place)
            yield Selection(start, end, where, recording, values)


def _need_columns(row: Document, by_name: Mapping[str, str]) -> None:
    for columns in (_START, _END):
        if not any(column in by_name for column in columns):
            found = ", ".join(by_name) or "none"
            raise row.problem(
                (),
                f"no column '{columns[0]}'; a table of windows is Raven's, Audacity's, or has the columns "
                f"file,start,end; this one has {found[:200]}",
            )


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()


def _number(text: str) -> bool:
    return re.fullmatch(r"-?\d+(?:[.,]\d*)?", text.strip()) is not None


def _time(values: Mapping[str, str], columns: Sequence[str], where: str, error: type[MergekitBioError]) -> float:
    column = next((column for column in columns if column in values), columns[0])
    text = values.get(column, "")
    if (seconds := parse_seconds(text)) is None:
        raise error(f"{where}: {column}: '{text}' is no time in seconds")
    return seconds


class RecordingFinder:
    """Finds the recordings that tables name, among those that there are.

    Tables travel: a path in them may be another machine's, with its own slashes. So a recording is found by its name,
    and where several have it, by the folders above it that agree. A path that leads to a file names it, or a copy.

    Args:
        recordings: Those that there are.

    Attributes:
        by_name: What was found by its name alone, though the table names a folder, as the table writes it.
    """

    def __init__(self, recordings: Iterable[Path]) -> None:
        self._recordings = list(dict.fromkeys(recordings))
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for recording in self._recordings:
            self._by_name[_normal(recording.name)].append(recording)
        self.by_name: dict[str, Path] = {}

    def find(self, selection: Selection, table: Path, *, error: type[MergekitBioError]) -> Path | None:
        """The recording of a selection; None where it is not among them.

        Args:
            selection: A row of the table.
            table: Where a selection names no recording, the only one there is, or the one after which the table is
                called: ``wren.Table.1.selections.txt`` is about ``wren.wav``.
            error: What to raise.

        Raises:
            error: It could be several, or the table does not tell.
        """
        if selection.recording is None:
            return self._of_table(selection, table, error)
        parts = [_normal(part) for part in PureWindowsPath(selection.recording).parts]
        candidates = self._by_name.get(parts[-1], []) if parts else []
        if not candidates:
            return None
        if len(parts) > 1 and is_there(there := table.parent / selection.recording):
            return next((path for path in candidates if _is_copy(path, there)), None)
        best = _nearest(candidates, parts)
        if len(best) > 1:
            raise error(f"{selection.where}: '{selection.recording}' could be {best[0]} or {best[1]}; name it further")
        if len(parts) > 1 and _normal(best[0].absolute().parent.name) != parts[-2]:
            self.by_name[selection.recording] = best[0]
        return best[0]

    def _of_table(self, selection: Selection, table: Path, error: type[MergekitBioError]) -> Path:
        if len(self._recordings) == 1:
            return self._recordings[0]
        name = _normal(table.name)
        named = [path for path in self._recordings if name.startswith(_normal(path.stem) + ".")]
        longest = max((len(path.stem) for path in named), default=0)
        best = _nearest([path for path in named if len(path.stem) == longest], table.absolute().parts[:-1], above=1)
        if len(best) != 1:
            raise error(
                f"{selection.where}: names no recording, and of the {len(self._recordings)} recordings "
                f"{'several have' if best else 'none has'} the table's name; give the one that it is about"
            )
        return best[0]


def is_there(path: Path) -> bool:
    """Whether a path that a table names leads to a file; a text may be too long to be one."""
    try:
        return path.is_file()
    except OSError:
        return False


@lru_cache(maxsize=4096)  # a table has many rows about a recording
def _is_copy(one: Path, other: Path) -> bool:
    """Whether two files are the same, or of one size and begin alike."""
    try:
        if one.samefile(other):
            return True
        if one.stat().st_size != other.stat().st_size:
            return False
        with one.open("rb") as first, other.open("rb") as second:
            return first.read(_BEGINNING) == second.read(_BEGINNING)
    except OSError:
        return False


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _nearest(paths: Sequence[Path], parts: Sequence[str], *, above: int = 0) -> list[Path]:
    """Those of some paths whose ends, ``above`` parts above their names, agree with most of ``parts``."""
    ends = [[_normal(part) for part in path.absolute().parts[: -above or None]] for path in paths]
    agreeing = [_agreeing([_normal(part) for part in parts], end) for end in ends]
    return [path for path, count in zip(paths, agreeing, strict=True) if count == max(agreeing)]


def _agreeing(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts of two paths agree, from their ends."""
    count = 0
    for left, right in zip(reversed(one), reversed(other), strict=False):
        if left != right:
            break
        count += 1
    return count

"""Tables that name stretches of recordings: Raven's selection tables, Audacity's label tracks, and CSV.

- Raven: columns separated by tabs, ``Selection``, ``Begin Time (s)``, ``End Time (s)`` and others. A selection stands
  in a row for every view it was drawn in. In a table about several files the times are those of all files one after the
  other, and ``File Offset (s)`` is the start within its own.
- Audacity: ``start<TAB>end<TAB>label`` without a header; a line that begins with a backslash holds the frequencies of
  the one before (https://manual.audacityteam.org/man/importing_and_exporting_labels.html).
- CSV, or JSON lines: columns ``file`` (or ``file_name``, ``recording``), ``start`` and ``end``, in seconds.
"""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from mergekit_bio.errors import MergekitBioError
from mergekit_bio.outside_data import Document, read_rows, read_text

#: What the columns of a CSV table may be called, in lower case; the second and third are also BirdNET's.
_FILE = ("file", "file_name", "recording", "begin path", "begin file")
_START = ("start", "start (s)", "begin time (s)")
_END = ("end", "end (s)", "end time (s)")


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
    if file.suffix == ".jsonl":
        return list(_of_columns(file, error))
    first, *_ = read_text(file, error=error).partition("\n")
    header = [column.strip().lower() for column in first.split("\t")]
    if "begin time (s)" in header:
        return list(_of_raven(file, error))
    if len(header) > 1 and _number(header[0]) and _number(header[1]):
        return list(_of_audacity(file, error))
    return list(_of_columns(file, error))


def parse_seconds(text: str) -> float | None:
    """A place in a recording, in seconds; None where the text is none. Some locales write a comma."""
    try:
        seconds = float(text.replace(",", "."))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def is_raven_table(file: Path) -> bool:
    """Whether a file begins as Raven's selection tables do."""
    try:
        with file.open("rb") as content:
            first = content.readline(1 << 16)
    except OSError:
        return False
    return b"\t" in first and b"Begin Time (s)" in first


def _of_raven(file: Path, error: type[MergekitBioError]) -> Iterator[Selection]:
    # Raven puts nothing in quotation marks: one that stands in a field is a part of it.
    lines = read_text(file, error=error).split("\n")
    columns = [column.strip() for column in lines[0].split("\t")]
    if repeated := next((column for column in columns if column and columns.count(column) > 1), None):
        raise error(f"{file}:1: the column '{repeated}' stands twice")
    known: set[tuple[str, str, float, float]] = set()
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        fields = [value.strip() for value in line.split("\t")]
        values = dict(zip(columns, fields + [""] * (len(columns) - len(fields)), strict=False))
        by_name = {column.lower(): value for column, value in values.items()}
        where = f"{file}:{number}"
        begin = _time(by_name, ("begin time (s)",), where, error)
        seconds = _time(by_name, _END, where, error) - begin
        start = _time(by_name, ("file offset (s)",), where, error) if by_name.get("file offset (s)") else begin
        recording = by_name.get("begin path") or by_name.get("begin file") or None
        selection = by_name.get("selection", "") or where
        place = (selection, recording or "", start, seconds)
        if place not in known:
            known.add(place)
            # Microseconds, so that 0.1 + 0.2 is 0.3.
            yield _checked(Selection(start, round(start + seconds, 6), where, recording, values), error)


def _of_audacity(file: Path, error: type[MergekitBioError]) -> Iterator[Selection]:
    for number, line in enumerate(read_text(file, error=error).split("\n"), start=1):
        if not line.strip() or line.startswith("\\"):
            continue
        start, end, *label = line.split("\t")
        values = {"start": start, "end": end, "label": "\t".join(label).strip()}
        where = f"{file}:{number}"
        times = _time(values, ("start",), where, error), _time(values, ("end",), where, error)
        yield _checked(Selection(*times, where, None, values), error)


def _of_columns(file: Path, error: type[MergekitBioError]) -> Iterator[Selection]:
    for row in read_rows(file, error=error):
        values = {str(column).strip(): _text(value) for column, value in row.data.items()}
        by_name = {column.lower(): value for column, value in values.items()}
        _need_columns(row, by_name)
        recording = next((by_name[column] for column in _FILE if by_name.get(column)), None)
        start, end = (_time(by_name, columns, row.line(), error) for columns in (_START, _END))
        yield _checked(Selection(start, end, row.line(), recording, values), error)


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


def _checked(selection: Selection, error: type[MergekitBioError]) -> Selection:
    if selection.end < selection.start:
        raise error(f"{selection.where}: ends at {selection.end:g} s, before its start at {selection.start:g} s")
    return selection


class RecordingFinder:
    """Finds the recordings that tables name, among those that there are.

    Tables travel: a path in them may be another machine's, with its own slashes. So a recording is found by its name,
    and where several have it, by the folders above it that agree.

    Args:
        recordings: Those that there are.
    """

    def __init__(self, recordings: Iterable[Path]) -> None:
        self._recordings = list(dict.fromkeys(recordings))
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for recording in self._recordings:
            self._by_name[_normal(recording.name)].append(recording)

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
        if len(candidates) < 2:
            return candidates[0] if candidates else None
        agreeing = [_agreeing(parts, [_normal(part) for part in path.absolute().parts]) for path in candidates]
        best = [path for path, count in zip(candidates, agreeing, strict=True) if count == max(agreeing)]
        if len(best) > 1:
            raise error(f"{selection.where}: '{selection.recording}' could be {best[0]} or {best[1]}; name it further")
        return best[0]

    def _of_table(self, selection: Selection, table: Path, error: type[MergekitBioError]) -> Path:
        if len(self._recordings) == 1:
            return self._recordings[0]
        name = _normal(table.name)
        named = [path for path in self._recordings if name.startswith(_normal(path.stem) + ".")]
        longest = max((len(path.stem) for path in named), default=0)
        best = [path for path in named if len(path.stem) == longest]
        if len(best) != 1:
            raise error(
                f"{selection.where}: names no recording, and of the {len(self._recordings)} recordings "
                f"{'several have' if best else 'none has'} the table's name; give the one that it is about"
            )
        return best[0]


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _agreeing(one: Sequence[str], other: Sequence[str]) -> int:
    """How many parts of two paths agree, from their ends."""
    count = 0
    for left, right in zip(reversed(one), reversed(other), strict=False):
        if left != right:
            break
        count += 1
    return count

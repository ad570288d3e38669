"""Raven's selection tables: one a recording in a folder, or one file for all recordings, opened one after the other."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mergekit_bio.audio.config import SAMPLING_RATE
from mergekit_bio.listen.journal import HeardRecording, Journal, Row
from mergekit_bio.listen.publishing import whole_file
from mergekit_bio.listen.reading import place_of
from mergekit_bio.listen.tables.interface import About, as_text, one_line
from mergekit_bio.listen.tables.per_recording import FilePerRecording

#: The highest frequency that the model hears.
_HEARD_HZ = SAMPLING_RATE // 2
_COLUMNS = (
    "Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)", "Begin Path",
    "Begin File", "File Offset (s)", "Answer",
)  # fmt: skip


def _header(about: About) -> str:
    return "\t".join([*_COLUMNS, *["Probability"] * about.choices]) + "\n"


def _lines(about: About, recording: HeardRecording, rows: Iterable[Row], *, first: int, begins: float) -> Iterator[str]:
    """A selection a window: all frequencies that the model hears of it.

    Args:
        about: The table.
        recording: Whose windows they are.
        rows: The windows.
        first: The number of the first selection.
        begins: Where the recording begins among those opened together, in seconds.
    """
    rate = recording.sampling_rate
    highest = min(_HEARD_HZ, rate / 2) if rate else _HEARD_HZ
    path = place_of(recording.path)
    channel = str(about.channel or 1)
    for number, row in enumerate(rows, start=first):
        cells = [
            str(number), "Spectrogram 1", channel, f"{begins + row.start:.6f}", f"{begins + row.end:.6f}", "0.0",
            f"{highest:.1f}", _cell(str(path)), _cell(path.name), f"{row.start:.6f}",
            one_line(row.answer),
        ]  # fmt: skip
        if about.choices:
            cells.append("" if row.probability is None else f"{row.probability:.4f}")
        yield "\t".join(cells) + "\n"


def _cell(path: str) -> str:
    """A path with its blanks, but without what ends a cell or a line."""
    return re.sub("[\t\r\n]", " ", as_text(path))


class RavenTables(FilePerRecording):
    """A selection table a recording."""

    suffix = ".selections.txt"

    def text(self, recording: HeardRecording, rows: Iterable[Row]) -> str:
        return _header(self.about) + "".join(_lines(self.about, recording, rows, first=1, begins=0.0))


class RavenTable:
    """One selection table for all recordings.

    Raven opens them as one sound, in the order in which they were asked about, those without answers too: begin and end
    count from the beginning of the first one, the file offset from that of the recording itself.
    """

    def __init__(self, out: Path, about: About) -> None:
        self._out, self._about = out, about

    def begin(self, journal: Journal) -> None:
        """Where a recording begins is known when those before it have been heard: the table is written at the end."""

    def add(self, journal: Journal, rows: Sequence[Row], ended: Sequence[HeardRecording]) -> None:
        """It is written at the end."""

    def finish(self, journal: Journal) -> None:
        """See :class:`mergekit_bio.listen.tables.interface.Table`."""
        first, begins = 1, 0.0
        with whole_file(self._out) as partial, partial.open("wb") as file:
            file.write(_header(self._about).encode())
            for recording in journal.recordings():
                for line in _lines(self._about, recording, journal.rows(recording), first=first, begins=begins):
                    file.write(line.encode())
                    first += 1
                begins += recording.seconds or 0.0

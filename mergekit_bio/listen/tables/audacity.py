"""Audacity's label tracks: a file a recording, for File > Import > Labels."""

from collections.abc import Iterable

from mergekit_bio.listen.journal import HeardRecording, Row
from mergekit_bio.listen.tables.interface import one_line
from mergekit_bio.listen.tables.per_recording import FilePerRecording


class AudacityTable(FilePerRecording):
    """Start and end in seconds and the answer, tabs between (Audacity's manual, "Importing and Exporting Labels")."""

    suffix = ".labels.txt"

    def text(self, recording: HeardRecording, rows: Iterable[Row]) -> str:
        return "".join(f"{row.start:.6f}\t{row.end:.6f}\t{one_line(row.answer)}\n" for row in rows)

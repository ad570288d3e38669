"""Formats with a file a recording, in a folder that mirrors those of the recordings."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from mergekit_bio.listen.journal import HeardRecording, Journal, Row
from mergekit_bio.listen.publishing import problems_with, whole_file
from mergekit_bio.listen.tables.interface import About


class FilePerRecording:
    """A file appears when its recording has been heard."""

    #: What follows the recording's name.
    suffix = ".txt"

    def __init__(self, out: Path, about: About) -> None:
        self.out, self.about = out, about

    def text(self, recording: HeardRecording, rows: Iterable[Row]) -> str:
        """The content of a recording's file."""
        raise NotImplementedError

    def begin(self, journal: Journal) -> None:
        """See :class:`mergekit_bio.listen.tables.interface.Table`."""
        with problems_with(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            for recording in journal.unanswered():  # what stands there is of what they were, or of another question
                self._file(recording).unlink(missing_ok=True)

    def add(self, journal: Journal, rows: Sequence[Row], ended: Sequence[HeardRecording]) -> None:
        """See :class:`mergekit_bio.listen.tables.interface.Table`."""
        for recording in ended:
            self._write(journal, recording)

    def finish(self, journal: Journal) -> None:
        """See :class:`mergekit_bio.listen.tables.interface.Table`."""
        for recording in journal.recordings():
            self._write(journal, recording)

    def _file(self, recording: HeardRecording) -> Path:
        return self.out / (name_within(recording.path, self.about.root) + self.suffix)

    def _write(self, journal: Journal, recording: HeardRecording) -> None:
        if recording.windows == 0:
            return
        file = self._file(recording)
        with problems_with(file):
            file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as partial:
            partial.write_bytes(self.text(recording, journal.rows(recording)).encode("utf-8", "backslashreplace"))


def name_within(path: str, root: Path) -> str:
    """The part of a recording's path below ``root``; all of it where it is elsewhere."""
    inside = os.path.relpath(path, root)
    return str(Path(path).absolute()).lstrip(os.sep) if inside.startswith(os.pardir) else inside

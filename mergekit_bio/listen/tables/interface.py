"""What every format of answers provides."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from mergekit_bio.audio.recording_time import RecordingTime, recording_time
from mergekit_bio.listen.journal import HeardRecording, Journal, Row


@dataclass(frozen=True, kw_only=True)
class About:
    """What a table knows of all its answers.

    Attributes:
        root: The folder that the recordings are in.
        model: Who answers, as the user named it.
        alpha: Its merge strength; None where it is not one number.
        prompt: The question.
        channel: The channel that is heard, from 1; None for the mean of all.
        choices: Whether answers are choices, with probabilities.
    """

    root: Path
    model: str
    alpha: float | None
    prompt: str
    channel: int | None = None
    choices: bool = False

    @property
    def columns(self) -> dict[str, type]:
        """The columns of a flat table and the types of their values."""
        choice = {"probability": float, "second": str, "second_probability": float, "third": str}
        return {
            "recording": str,
            "start": float,
            "end": float,
            "time": str,
            "answer": str,
            **(choice | {"third_probability": float} if self.choices else {}),
            "model": str,
            "alpha": float,
            "prompt": str,
        }

    def cells(self, row: Row) -> dict[str, Any]:
        """A row's values by column; None where there is none."""
        (second, second_probability), (third, third_probability) = (*row.others[:2], (None, None), (None, None))[:2]
        values = {
            "recording": as_text(row.recording),
            "start": row.start,
            "end": row.end,
            "time": time_of(row),
            "answer": row.answer,
            "probability": row.probability,
            "second": second,
            "second_probability": second_probability,
            "third": third,
            "third_probability": third_probability,
            "model": self.model,
            "alpha": self.alpha,
            "prompt": self.prompt,
        }
        return {column: values[column] for column in self.columns}


class Table(Protocol):
    """A format, with its place on the disk. A file that is there is replaced.

    A format is a module with such a class, and a line in :data:`mergekit_bio.listen.tables.choice.FORMATS`.
    """

    def __init__(self, out: Path, about: About) -> None: ...

    def begin(self, journal: Journal) -> None:
        """Have what is answered already in the table."""

    def add(self, journal: Journal, rows: Sequence[Row], ended: Sequence[HeardRecording]) -> None:
        """Add answers as they come, as far as the format can grow; ``ended`` are recordings without open windows."""

    def finish(self, journal: Journal) -> None:
        """Write the whole table, in order."""


def time_of(row: Row) -> str | None:
    """When a window began, as ISO 8601 has it; None where its recording does not tell."""
    began = _recording_time(row.recording)
    return began.at(row.start) if began else None


@lru_cache(maxsize=256)  # rows come recording by recording
def _recording_time(recording: str) -> RecordingTime | None:
    return recording_time(Path(recording))


def as_text(path: str) -> str:
    """A path whose bytes need not be text, escaped where they are not."""
    return path.encode("utf-8", "backslashreplace").decode()


def one_line(answer: str) -> str:
    """An answer without line breaks and tabs."""
    return " ".join(answer.split())


def in_batches(rows: Iterator[Row], size: int = 10_000) -> Iterator[list[Row]]:
    """Rows, so many at a time."""
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch

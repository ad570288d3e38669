"""Recordings in stretches: cut for workers, read ahead by each of them, and handed out until all are heard."""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from mergekit_bio.engine.pool import DEATHS_OF_A_JOB, Workers, hand_out
from mergekit_bio.listen.reading import Ended, OpenRecording, Window, WindowReader

#: What comes out for a window: an answer, or vectors.
Outcome = TypeVar("Outcome")

#: Stretches for each of several workers, so that all of them are done at about the same time.
_STRETCHES_EACH = 8
#: Recordings of a stretch, at most.
_MOST_RECORDINGS = 256


@dataclass(frozen=True)
class Stretch:
    """Recordings that one worker goes through: plain data, for whichever is free.

    Attributes:
        number: Of the stretch; what is left of it keeps the number.
        recordings: In order.
    """

    number: int
    recordings: tuple[OpenRecording, ...]

    def __str__(self) -> str:
        first, last = self.recordings[0].path, self.recordings[-1].path
        return first if first == last else f"{first} to {last}"

    def after(self, heard: Sequence[Window | Ended]) -> "Stretch | None":
        """What is left once these, the first of it, are done."""
        rest = list(self.recordings[sum(isinstance(item, Ended) for item in heard) :])
        if rest and isinstance(heard[-1], Window):
            rest[0] = replace(rest[0], first=heard[-1].number + 1)
        return replace(self, recordings=tuple(rest)) if rest else None


@dataclass(frozen=True)
class Heard(Generic[Outcome]):
    """What a worker gives back of a stretch.

    Attributes:
        windows: What came out for its next windows, in order.
        ended: Recordings that were heard to their end, or to where they break.
        rest: What is left of the stretch.
        seconds: What it took once the model was there.
        notes: What a user should know.
    """

    windows: tuple[Outcome, ...]
    ended: tuple[Ended, ...]
    rest: Stretch | None
    seconds: float
    notes: tuple[str, ...] = ()


def stretches(recordings: Sequence[OpenRecording], *, workers: int) -> list[Stretch]:
    """Cut what is open into stretches, in order; for several workers into some of about equal size for each."""
    whole = sum(recording.size for recording in recordings)
    full = whole / (workers * _STRETCHES_EACH) if workers > 1 else whole
    parts: list[list[OpenRecording]] = []
    size = 0
    for recording in recordings:
        if not parts or size >= full or len(parts[-1]) == _MOST_RECORDINGS:
            parts.append([])
            size = 0
        parts[-1].append(recording)
        size += recording.size
    return [Stretch(number, tuple(part)) for number, part in enumerate(parts)]


class StretchReader:
    """Reads a worker's stretches: on from where the last one was left, and the next one ahead.

    Args:
        begin: Begins to read a stretch.
    """

    def __init__(self, begin: Callable[[Stretch], WindowReader]) -> None:
        self._begin = begin
        self._reading: tuple[Stretch | None, WindowReader] | None = None
        self._next: tuple[Stretch, WindowReader] | None = None

    def at(self, stretch: Stretch) -> WindowReader:
        """The reader whose next windows are the stretch's first ones.

        It stands there already if the stretch is what was left of the last one, or was read ahead.
        """
        while self._reading is None or self._reading[0] != stretch:
            if self._reading is not None:
                self._reading[1].close()
            self._reading, self._next = self._next or (stretch, self._begin(stretch)), None
        return self._reading[1]

    def read_ahead(self, following: Stretch | None) -> None:
        """Begin with what will probably come next, once all of this stretch is decoded."""
        if self._reading and self._reading[1].read_all and following is not None and self._next is None:
            self._next = following, self._begin(following)

    def left_after(self, heard: Sequence[Window | Ended]) -> Stretch | None:
        """What is left of the stretch once these, the first of it, are done; of one that is read to its end, none."""
        assert self._reading is not None
        stretch, reader = self._reading
        rest = stretch.after(heard) if stretch and heard else None
        self._reading = rest, reader
        return rest

    def close(self) -> None:
        """Read no further."""
        for read in (self._reading, self._next):
            if read is not None:
                read[1].close()


def hear_all(
    workers: Workers[Stretch, Heard[Outcome]], still_open: Sequence[OpenRecording], *, note: Callable[[str], None]
) -> Iterator[Heard[Outcome]]:
    """Have workers hear all that is open; what they give back, as it comes.

    A recording that workers die of is found, and fails: it has ended then, with nothing of it left.

    Raises:
        MergekitBioError: A worker raised it, or workers die whatever they are given.
    """
    suspected = yield from _hear(workers, stretches(still_open, workers=workers.count), note)
    # Each alone: of a stretch that workers died of, one recording will be the reason.
    recordings = [recording for stretch in suspected for recording in stretch.recordings]
    alone = [Stretch(number, (recording,)) for number, recording in enumerate(recordings)]
    for stretch in (yield from _hear(workers, alone, note)):
        (recording,) = stretch.recordings
        error = f"{recording.path}: {DEATHS_OF_A_JOB} workers died when they heard it"
        yield Heard((), (Ended(recording.path, 0.0, None, error, passing=True, deadly=True),), None, 0.0)


def _hear(
    workers: Workers[Stretch, Heard[Outcome]], parts: Sequence[Stretch], note: Callable[[str], None]
) -> Generator[Heard[Outcome], None, list[Stretch]]:
    """Have stretches heard; those that workers died of are returned."""
    given_up = []
    for stretch, heard in hand_out(
        workers,
        parts,
        group=lambda stretch: stretch.number,
        started=lambda stretch: None,
        note=note,
        rest=lambda heard: heard.rest,
    ):
        if heard is None:
            given_up.append(stretch)
        else:
            yield heard
    return given_up

"""How far an archive is, and who is told."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from mergekit_bio.errors import AudioError
from mergekit_bio.listen.reading import Ended, OpenRecording

#: So many recordings in a row that cannot be read end it.
_MOST_UNREADABLE = 10


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far it is.

    Attributes:
        recordings: Of them ``done`` have been heard, now or before.
        failed: How many of these are no use, or not to their end.
        windows: How many windows this start has done.
        rate: Windows a second, since the engine was up; None before the first.
        seconds_left: By the bytes of what is left; None before the first recording has been heard.
        workers: How many work.
    """

    recordings: int
    done: int
    failed: int
    windows: int
    rate: float | None
    seconds_left: float | None
    workers: int = 1


class Listener(Protocol):
    """Is told how it goes."""

    def note(self, text: str) -> None:
        """Something that a user should know."""

    def failed(self, recording: Ended) -> None:
        """A recording is no use, or not to its end."""

    def standing(self, standing: Standing) -> None:
        """Called after every batch."""


class RecordingCounter:
    """Counts what is done and tells the listener, of recordings that have ended too.

    Args:
        recordings: How many there are in all.
        still_open: Those that are to be heard.
        failed: How many of the others are no use.
        listener: Who is told.
        workers: Says how many work.
    """

    def __init__(
        self,
        recordings: int,
        still_open: Sequence[OpenRecording],
        *,
        failed: int,
        listener: Listener,
        workers: Callable[[], int],
    ) -> None:
        self._recordings, self._done, self._failed = recordings, recordings - len(still_open), failed
        self._sizes = {recording.path: recording.size for recording in still_open}
        self._bytes_left, self._bytes_done = sum(self._sizes.values()), 0
        self._listener, self._workers = listener, workers
        self._windows, self._since = 0, 0.0
        self._unreadable = 0

    def add(self, windows: int, ended: Sequence[Ended], *, seconds: float) -> None:
        """Count a batch, for which the engine took so long once it was up, and say what is to be known of recordings.

        Raises:
            AudioError: One recording after the other cannot be read: the disk will have gone.
        """
        now = time.perf_counter()
        self._since = self._since or now - seconds
        self._windows += windows
        for recording in ended:
            for text in recording.notes:
                self._listener.note(f"note: {text}")
            if recording.error is not None:
                self._listener.failed(recording)
            self._unreadable = self._unreadable + 1 if recording.passing else 0
            self._done += 1
            self._failed += recording.error is not None
            size = self._sizes.pop(recording.recording, 0)
            self._bytes_done += size
            self._bytes_left -= size
        took = max(now - self._since, 1e-9)
        self._listener.standing(
            Standing(
                recordings=self._recordings,
                done=self._done,
                failed=self._failed,
                windows=self._windows,
                rate=self._windows / took if self._windows else None,
                seconds_left=took / self._bytes_done * self._bytes_left if self._bytes_done else None,
                workers=self._workers(),
            )
        )
        if self._unreadable >= _MOST_UNREADABLE:
            raise AudioError(
                f"{self._unreadable} recordings in a row could not be read, the last: {ended[-1].error}; is the disk "
                "there? Run the command again to go on"
            )

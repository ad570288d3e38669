"""Recordings read ahead on threads: their windows in order, decoded while a model is busy with those before."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Condition, Thread
from typing import Protocol

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.decoding import Note, stated_length
from mergekit_bio.audio.recording import BehindTheEnd, read_clips, read_windows
from mergekit_bio.audio.waveform import MIN_RATE
from mergekit_bio.errors import AudioError
from mergekit_bio.listen.selected import Span

#: Recordings that are decoded at the same time.
_THREADS = min(4, os.cpu_count() or 1)
#: Windows of each of them that wait: 1.3 MB of samples each.
_DECODED = 8
#: Windows that are prepared together, such as by an audio tower.
_TOGETHER = 16
#: Seconds after which a thread that waits looks whether it is still needed.
_PATIENCE = 0.1
#: In the stamp of a file that may not be read.
_UNREADABLE = " unreadable"


@dataclass(frozen=True)
class OpenRecording:
    """A recording with windows that are still to be heard.

    Attributes:
        path: Its file.
        first: The number of the first of them, from 0.
        size: Of the file, in bytes.
        windows: Start and end of each window, in seconds; None for windows of one length over the whole recording.
    """

    path: str
    first: int = 0
    size: int = 0
    windows: tuple[Span, ...] | None = None


@dataclass(frozen=True)
class Window:
    """One window of a recording, the ``number``-th from 0; whether it is too quiet to be asked about."""

    recording: str
    number: int
    clip: Clip
    quiet: bool = False


@dataclass(frozen=True)
class Ended:
    """A recording that has been read, to its end or to where it breaks.

    Attributes:
        recording: Its file.
        seconds: How long it is, as far as it was heard.
        sampling_rate: Its own, in Hz; None where it is no use.
        error: Why it is no use, or not from some second on.
        notes: What a user should know of it.
        passing: Whether the error need not be the recording's own, such as that of a disk that has gone: it is tried
            again the next time, from where it breaks.
        deadly: Whether workers died of it.
    """

    recording: str
    seconds: float
    sampling_rate: int | None
    error: str | None = None
    notes: tuple[str, ...] = ()
    passing: bool = False
    deadly: bool = False


def place_of(path: str | Path) -> Path:
    """The absolute path of a recording, however its user names it; links are kept."""
    return Path(os.path.normpath(Path(path).absolute()))


def each_once(paths: Sequence[Path]) -> list[Path]:
    """Recordings without those that are named a second time."""
    places: dict[Path, Path] = {}
    for path in paths:
        places.setdefault(place_of(path), path)
    return list(places.values())


def stamp_of(path: str | Path) -> tuple[str, int]:
    """What changes with a file's content, or with the permission to read it; and its size in bytes."""
    try:
        stat = Path(path).stat()
        readable = os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)
    except OSError:  # gone since it was found: whoever opens it says so
        return "gone", 0
    return f"{stat.st_size} {stat.st_mtime_ns}{'' if readable else _UNREADABLE}", stat.st_size


def content_of(stamp: str) -> str:
    """What of a stamp changes with a file's content."""
    return stamp.replace(_UNREADABLE, "")


class Cuts(Protocol):
    """A recording's windows in order, as :class:`mergekit_bio.audio.recording.Windows` gives them."""

    @property
    def sampling_rate(self) -> int:
        """The recording's, in Hz; 0 before the first window, and where nobody can tell."""

    @property
    def seconds(self) -> float:
        """How long the recording is, as far as it was heard."""

    @property
    def whole(self) -> float:
        """Seconds of a window that no end and no break has cut; 0 where each has its own length."""

    def __iter__(self) -> Iterator[Clip]: ...

    def close(self) -> None:
        """Close the file, where not all windows are wanted."""


#: Cuts a recording into its windows, and tells the user what is odd about it.
Cut = Callable[[OpenRecording, Note], Cuts]


def windows_of(*, window: float, hop: float, channel: int | None) -> Cut:
    """What cuts recordings into windows of so many seconds, or into those that are named."""

    def cut(recording: OpenRecording, note: Note) -> Cuts:
        if recording.windows is not None:
            return _NamedWindows(recording.path, recording.windows, channel, note)
        return read_windows(recording.path, window=window, hop=hop, channel=channel, note=note)

    return cut


class _NamedWindows:
    """The windows of a recording that tables name. It is not heard to its end: how long it is, its header says.

    A break cuts none of them: what lies before it is not given. The recording's end does, and those of which less than
    half a second is there are left out with a note.
    """

    whole = 0.0

    def __init__(self, path: str, windows: Sequence[Span], channel: int | None, note: Note) -> None:
        self._windows, self._note = windows, note
        self._clips = read_clips(path, [(start, end - start) for start, end in windows], channel=channel, note=note)
        self.sampling_rate, self.seconds = stated_length(Path(path))

    def __iter__(self) -> Iterator[Clip]:
        given = 0
        try:
            for clip, (_, end) in zip(self._clips, self._windows, strict=False):
                if abs(clip.end - end) < 1 / MIN_RATE:  # as it was named, and not as the next sample is
                    clip.end = end
                self.seconds = max(self.seconds, clip.end)
                yield clip
                given += 1
        except AudioError as error:
            if not isinstance(error.__cause__, BehindTheEnd):
                raise
            # Those that begin later are behind the end too.
            others = len(self._windows) - given - 1
            start, end = self._windows[-1]
            more = f", and so are {others} more, to that of {start:g} to {end:g} s" if others else ""
            self._note(f"{error}: left out{more}")

    def close(self) -> None:
        """Close the file."""
        self._clips.close()


class WindowReader:
    """Reads recordings one after the other, ahead of whoever takes their windows.

    Args:
        recordings: In order.
        cut: Makes windows of a recording.
        prepare: Is given windows, a few at a time and in order, before they can be taken; it may return others.
        ahead: Windows that wait to be taken, at most.
        is_quiet: Which windows nobody is asked about.
    """

    def __init__(
        self,
        recordings: Sequence[OpenRecording],
        cut: Cut,
        *,
        prepare: Callable[[list[Window]], list[Window]],
        ahead: int,
        is_quiet: Callable[[Clip], bool] = lambda clip: False,
    ) -> None:
        self._cut, self._prepare, self._ahead = cut, prepare, ahead
        self._is_quiet = is_quiet
        self._ready: deque[Window | Ended] = deque()
        self._windows = 0
        self._changed = Condition()
        self._stopped = self.read_all = False
        self._failure: BaseException | None = None
        self._reading = Thread(target=self._read, args=(list(recordings),), name="window reader")
        self._reading.start()

    def take(self, count: int) -> list[Window | Ended]:
        """The next ``count`` windows, with the recordings that end among them; fewer where all are read, or more are
        asked for than wait.

        Raises:
            MergekitBioError: Reading is impossible, such as without a package.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._windows >= min(count, self._ahead) or self.read_all)
            taken: list[Window | Ended] = []
            while self._ready and (count > 0 or isinstance(self._ready[0], Ended)):
                item = self._ready.popleft()
                if isinstance(item, Window):
                    self._windows -= 1
                    count -= 1
                taken.append(item)
            self._changed.notify_all()
            if self._failure is not None and not taken:
                raise self._failure
            return taken

    def close(self) -> None:
        """Read no further."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._reading.join()

    def _read(self, recordings: list[OpenRecording]) -> None:
        try:
            with ThreadPoolExecutor(_THREADS) as threads:
                try:
                    self._collect(self._begun(recordings, threads))
                finally:
                    self._stopped = True
                    threads.shutdown(wait=False, cancel_futures=True)
        except BaseException as failure:
            self._failure = failure
        finally:
            with self._changed:
                self.read_all = True
                self._changed.notify_all()

    def _begun(
        self, recordings: Sequence[OpenRecording], threads: ThreadPoolExecutor
    ) -> "Iterator[Queue[Window | Ended | BaseException]]":
        """What each recording is decoded into, in order; a few of them are begun ahead."""
        begun: deque[Queue[Window | Ended | BaseException]] = deque()
        for recording in recordings:
            begun.append(Queue(_DECODED))
            threads.submit(self._decode, recording, begun[-1])
            if len(begun) > _THREADS:
                yield begun.popleft()
        yield from begun

    def _collect(self, buffers: "Iterable[Queue[Window | Ended | BaseException]]") -> None:
        """Hand on, in order, what the threads decode."""
        waiting: list[Window | Ended] = []
        for buffer in buffers:
            while not self._stopped:
                try:
                    item = buffer.get(timeout=_PATIENCE)
                except Empty:
                    continue
                if isinstance(item, BaseException):
                    self._hand_on(waiting)
                    raise item
                waiting.append(item)
                if sum(isinstance(one, Window) for one in waiting) >= _TOGETHER:
                    self._hand_on(waiting)
                    waiting = []
                if isinstance(item, Ended):
                    break
        self._hand_on(waiting)

    def _hand_on(self, items: "list[Window | Ended]") -> None:
        if self._stopped or not items:
            return
        prepared = iter(self._prepare([item for item in items if isinstance(item, Window)]))
        items = [next(prepared) if isinstance(item, Window) else item for item in items]
        with self._changed:
            self._changed.wait_for(lambda: self._windows < self._ahead or self._stopped)
            self._ready += items
            self._windows += sum(isinstance(item, Window) for item in items)
            self._changed.notify_all()

    def _decode(self, recording: OpenRecording, buffer: "Queue[Window | Ended | BaseException]") -> None:
        try:
            self._put(self._windows_into(recording, buffer), buffer)
        except BaseException as failure:
            self._put(failure, buffer)

    def _windows_into(self, recording: OpenRecording, buffer: "Queue[Window | Ended | BaseException]") -> Ended:
        notes: list[str] = []
        windows, error, passing = self._cut(recording, notes.append), None, False
        held: Window | None = None
        try:
            for number, clip in enumerate(windows):
                if self._stopped:
                    break
                if held is not None:
                    self._put(held, buffer)
                    held = None
                if number >= recording.first:
                    held = Window(recording.path, number, clip, self._is_quiet(clip))
        except AudioError as failure:
            error = str(failure)
            passing = _passes(failure, recording.path)
            # The next time the window that the break has cut is whole.
            if passing and held is not None and held.clip.end - held.clip.start < windows.whole - 1e-6:
                held = None
        finally:
            windows.close()
        if held is not None:
            self._put(held, buffer)
        return Ended(recording.path, windows.seconds, windows.sampling_rate or None, error, tuple(notes), passing)

    def _put(self, item: Window | Ended | BaseException, buffer: "Queue[Window | Ended | BaseException]") -> None:
        while not self._stopped:
            with suppress(Full):
                buffer.put(item, timeout=_PATIENCE)
                return


def _passes(error: AudioError, path: str) -> bool:
    """Whether an error is a disk's or a network's, and not the recording's own.

    A permission that is lacking is: it may stay away, and once it is given, the recording's stamp is another.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    if isinstance(cause, PermissionError):
        return False
    return cause is not None or not os.access(path, os.F_OK)

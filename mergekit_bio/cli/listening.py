"""How ``ask`` and ``embed`` tell of their progress, and of recordings that are no use."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bio.cli.console import Output, progress_bars

if TYPE_CHECKING:
    from rich.progress import Progress

    from mergekit_bio.listen.journal import HeardRecording
    from mergekit_bio.listen.progress import Standing
    from mergekit_bio.listen.reading import Ended

#: Seconds between two lines of progress where there is no terminal.
_LINE_EVERY = 60.0
#: Columns of the bar: it shares 80 with the counts.
_BAR = 12


class ListenOutput(Output):
    """An output that is a ``Listener`` too: a bar over the recordings, or a line now and then.

    Args:
        as_json: See :class:`mergekit_bio.cli.console.Output`.
        quiet: See there.
        several: Whether there are several recordings, of which each that fails is named.
        bar: Whether progress is shown; answers that are printed as they come show it themselves.
    """

    def __init__(self, *, as_json: bool, quiet: bool, several: bool, bar: bool = True) -> None:
        super().__init__(as_json=as_json, quiet=quiet)
        self._several, self._bar = several, bar and not quiet
        self._bars: Progress | None = None
        self._spoken = time.monotonic()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Take the bar away at the end, whichever way it ends."""
        try:
            yield
        finally:
            if self._bars is not None:
                self._bars.stop()

    def failed(self, recording: "Ended") -> None:
        """Name a recording that is no use, or not to its end."""
        if self._several:
            upto = f"heard up to {recording.seconds:.1f} s" if recording.seconds else "skipped"
            self.warn(f"{upto}: {recording.error}")

    def standing(self, standing: "Standing") -> None:
        """Draw the bar, or print a line where there is no terminal."""
        if not self._bar:
            return
        if sys.stderr.isatty():
            self._draw(standing)
        elif time.monotonic() - self._spoken >= _LINE_EVERY:
            self._spoken = time.monotonic()
            workers = f" by {standing.workers} workers" if standing.workers > 1 else ""
            self.note(f"{standing.done} of {standing.recordings} recordings{workers}; {_pace(standing)}")

    def _draw(self, standing: "Standing") -> None:
        if self._bars is None:
            from rich.progress import MofNCompleteColumn, TextColumn

            self._bars = progress_bars(MofNCompleteColumn(), TextColumn("{task.fields[pace]}"), bar_width=_BAR)
            self._bars.add_task("listening", pace="")
        (bar,) = self._bars.task_ids
        self._bars.update(bar, total=standing.recordings, completed=standing.done, pace=_pace(standing))
        self._bars.start()  # once there is something to show; later it does nothing


def _pace(standing: "Standing") -> str:
    """``"21.3 windows/s, 0:12:05 left, 2 failed"``, as far as it is known."""
    parts = []
    if standing.rate is not None:
        fast = standing.rate >= 1
        parts.append(f"{standing.rate:.1f} windows/s" if fast else f"{60 * standing.rate:.1f} windows/min")
    if standing.seconds_left is not None:
        left = round(standing.seconds_left)
        parts.append(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
    if standing.failed:
        parts.append(f"{standing.failed} failed")
    return ", ".join(parts)


def tell_failed(recordings: Sequence[Path], failed: "Sequence[HeardRecording]", output: Output) -> None:
    """Count the recordings that failed; where all have, that is an error.

    Raises:
        AudioError: Every recording has failed.
    """
    from mergekit_bio.errors import AudioError

    several = len(recordings) > 1
    if failed and several:
        output.note(f"{len(failed)} of {len(recordings)} recordings could not be used")
    if len(failed) == len(recordings):
        none = f"none of the {len(recordings)} recordings could be used; the first: "
        raise AudioError(f"{none if several else ''}{failed[0].error}")


def hear_each(recordings: Sequence[Path], hear: Callable[[Path], object], output: Output) -> list[dict[str, str]]:
    """Call ``hear`` with every recording.

    Returns:
        Those that could not be used, at all or to their end: ``recording`` and ``error`` of each.
    """
    from mergekit_bio.errors import AudioError

    failed: list[dict[str, str]] = []
    several = len(recordings) > 1
    with output.progress("listening", total=len(recordings)) as advance:
        for recording in recordings:
            try:
                hear(recording)
            except AudioError as error:
                failed.append({"recording": str(recording), "error": str(error)})
                if several:
                    output.note(f"skipped: {error}")
            advance(1)
    if failed and several:
        output.note(f"{len(failed)} of {len(recordings)} recordings could not be used")
    return failed


def check_any_used(recordings: Sequence[Path], failed: Sequence[Mapping[str, str]]) -> None:
    """Raise AudioError where every recording has failed."""
    from mergekit_bio.errors import AudioError

    if len(failed) == len(recordings):
        several = f"none of the {len(recordings)} recordings could be used; the first: "
        raise AudioError(f"{several if len(recordings) > 1 else ''}{failed[0]['error']}")

"""How ``ask`` and ``embed`` tell of their progress, and of recordings that are no use."""

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_bio.cli.console import LINE_EVERY, Output, human_rate, progress_bars, time_left

ChannelOption = Annotated[
    str,
    typer.Option(
        metavar="mean|N", help="The mean of all channels, or the number of one, from 1 as in Raven and Audacity."
    ),
]
DeviceOption = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:N; cuda:N is one GPU, and so for one process.")
]

if TYPE_CHECKING:
    from rich.progress import Progress

    from mergekit_bio.listen.progress import Standing
    from mergekit_bio.listen.reading import Ended

#: Columns of the bar: it shares 80 with the counts.
_BAR = 12


class ListenOutput(Output):
    """An output that is a ``Listener`` too: a bar over the recordings, or a line now and then.

    Args:
        as_json: See :class:`mergekit_bio.cli.console.Output`.
        quiet: See there.
    """

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        super().__init__(as_json=as_json, quiet=quiet)
        self._several = self._bar = False
        self._bars: Progress | None = None
        self._spoken = time.monotonic()

    @contextmanager
    def shown(self, *, several: bool, bar: bool = True) -> Iterator[None]:
        """Show progress, and take the bar away at the end, whichever way it ends.

        Args:
            several: Whether there are several recordings: then each that fails is named.
            bar: Whether progress is shown; answers that are printed as they come show it themselves.
        """
        self._several, self._bar = several, bar and not self.quiet
        try:
            yield
        finally:
            if self._bars is not None:
                self._bars.stop()

    def tell(self, sentence: str) -> None:
        """A note about a recording."""
        self.note(f"note: {sentence}")

    def failed(self, recording: "Ended") -> None:
        """Name a recording that is no use, or not to its end; one alone that is no use is the command's error."""
        from mergekit_bio.audio.waveform import MIN_SECONDS

        if recording.seconds >= MIN_SECONDS:
            self.warn(f"heard up to {recording.seconds:.1f} s: {recording.error}")
        elif self._several:
            self.warn(f"skipped: {recording.error}")

    def standing(self, standing: "Standing") -> None:
        """Draw the bar, or print a line where there is no terminal."""
        if not self._bar:
            return
        if sys.stderr.isatty():
            self._draw(standing)
        elif time.monotonic() - self._spoken >= LINE_EVERY:
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
        parts.append(human_rate(standing.rate, "windows"))
    if standing.seconds_left is not None:
        parts.append(time_left(standing.seconds_left))
    if standing.failed:
        parts.append(f"{standing.failed} failed")
    return ", ".join(parts)


def tell_failed(recordings: int, failed: Mapping[str, str], broken: Mapping[str, str], output: Output) -> None:
    """Count the recordings that failed and those that broke midway, each with its error.

    Raises:
        AudioError: Every recording has failed.
    """
    from mergekit_bio.errors import AudioError

    several = recordings > 1
    if failed and several:
        output.note(f"{len(failed)} of {recordings} recordings could not be used")
    if broken and several:
        output.note(f"{len(broken)} of {recordings} recordings break midway, and were heard up to there")
    if failed and len(failed) == recordings:
        none = f"none of the {recordings} recordings could be used; the first: "
        raise AudioError(f"{none if several else ''}{next(iter(failed.values()))}")

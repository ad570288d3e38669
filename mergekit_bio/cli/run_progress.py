"""How an evaluation run tells of its progress: two bars on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from mergekit_bio.cli.console import Output

if TYPE_CHECKING:
    from rich.progress import Progress

    from mergekit_bio.eval.run.progress import Standing

#: Seconds between two lines of progress where there is no terminal.
LINE_EVERY = 60.0


class RunListener:
    """A :class:`mergekit_bio.eval.run.progress.ProgressListener` that draws: a bar for the cell and one for the run."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._bars: Progress | None = None
        self._tasks: tuple[Any, Any] | None = None
        self._cell, self._spoken = 0, 0.0

    def note(self, text: str) -> None:
        """Print it."""
        self._output.note(text)

    def progress(self, description: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Open a bar."""
        return self._output.progress(description, total, unit)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Take the bars away at the end, whichever way it ends."""
        try:
            yield
        finally:
            if self._bars is not None:
                self._bars.stop()

    def standing(self, standing: "Standing") -> None:
        """Draw both bars, or print a line where there is no terminal."""
        if self._output.quiet:
            return
        cell = f"[{standing.number}/{standing.cells}] {standing.cell}"
        if sys.stderr.isatty():
            self._draw(cell, standing)
            return
        now = time.monotonic()
        if standing.number != self._cell or standing.done == standing.rows or now - self._spoken >= LINE_EVERY:
            self._cell, self._spoken = standing.number, now
            left = f"; {pace(standing.rate, standing.run_seconds_left)} for the run" if standing.rate else ""
            self._output.note(
                f"{cell}: {standing.done} of {standing.rows}; run {standing.run_done} of {standing.run_rows}{left}"
            )

    def _draw(self, cell: str, standing: "Standing") -> None:
        if self._bars is None or self._tasks is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bars = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[pace]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bars.start()
            self._tasks = (self._bars.add_task("", pace=""), self._bars.add_task("run", pace=""))
        self._bars.update(
            self._tasks[0],
            description=cell,
            total=standing.rows,
            completed=standing.done,
            pace=pace(standing.rate, standing.cell_seconds_left),
        )
        self._bars.update(
            self._tasks[1],
            total=standing.run_rows,
            completed=standing.run_done,
            pace=pace(standing.rate, standing.run_seconds_left),
        )


def pace(rate: float | None, seconds_left: float | None) -> str:
    """``"3.2/s, 0:12:05 left"``; nothing before the first answer."""
    if rate is None or seconds_left is None:
        return ""
    whole = round(seconds_left)
    speed = f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min"
    return f"{speed}, {whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} left"

"""How an evaluation run tells of its progress: two bars on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mergekit_bio.cli.console import LINE_EVERY, Output, human_rate, progress_bars, time_left

if TYPE_CHECKING:
    from rich.progress import Progress

    from mergekit_bio.eval.run.progress import Standing


class RunOutput(Output):
    """An output that is a run's ``ProgressListener`` too, with a bar for the cell and one for the run."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        super().__init__(as_json=as_json, quiet=quiet)
        self._bars: Progress | None = None
        self._begun: set[int] = set()
        self._spoken = 0.0

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
        if self.quiet:
            return
        cell = f"[{standing.number}/{standing.cells}] {standing.cell}"
        if sys.stderr.isatty():
            self._draw(cell, standing)
            return
        now = time.monotonic()
        begins, ends = standing.number not in self._begun, standing.done == standing.rows
        if begins or ends or now - self._spoken >= LINE_EVERY:
            self._begun.add(standing.number)
            self._spoken = now
            left = f"; {pace(standing.rate, standing.run_seconds_left)} for the run" if standing.rate else ""
            run = f"{_run(standing)} {standing.run_done} of {standing.run_rows}"
            self.note(f"{cell}: {standing.done} of {standing.rows}; {run}{left}")

    def _draw(self, cell: str, standing: "Standing") -> None:
        if self._bars is None:
            from rich.progress import MofNCompleteColumn, TextColumn

            self._bars = progress_bars(MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
            for _ in range(2):
                self._bars.add_task("", pace="")
        cell_bar, run_bar = self._bars.task_ids
        speed = pace(standing.rate, standing.cell_seconds_left) if standing.workers == 1 else ""
        self._bars.update(cell_bar, description=cell, total=standing.rows, completed=standing.done, pace=speed)
        speed = pace(standing.rate, standing.run_seconds_left)
        self._bars.update(
            run_bar,
            description=_run(standing),
            total=standing.run_rows,
            completed=standing.run_done,
            pace=speed,
        )
        self._bars.start()  # once there is something to show; later it does nothing


def _run(standing: "Standing") -> str:
    """``"run"``, or ``"run, 4 workers"``."""
    return "run" if standing.workers == 1 else f"run, {standing.workers} workers"


def pace(rate: float | None, seconds_left: float | None) -> str:
    """``"3.2/s, 0:12:05 left"``; nothing before the first answer."""
    if rate is None or seconds_left is None:
        return ""
    return f"{human_rate(rate)}, {time_left(seconds_left)}"

"""How far a run is, and who is told."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.run.asking import Batch
from mergekit_bio.eval.run.plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a run is.

    Attributes:
        cell: What is being asked.
        number: Which of ``cells`` it is, from 1.
        done: Answers of the cell, of ``rows``.
        run_done: Answers of the run, of ``run_rows``.
        rate: Answers a second since the first engine was up, changes of checkpoint included; None before the first.
        workers: How many engines work.
    """

    cell: str
    number: int
    cells: int
    done: int
    rows: int
    run_done: int
    run_rows: int
    rate: float | None
    workers: int = 1

    @property
    def cell_seconds_left(self) -> float | None:
        """At this rate."""
        return (self.rows - self.done) / self.rate if self.rate else None

    @property
    def run_seconds_left(self) -> float | None:
        """At this rate."""
        return (self.run_rows - self.run_done) / self.rate if self.rate else None


class ProgressListener(Protocol):
    """Is told how a run goes."""

    def note(self, text: str) -> None:
        """Something that a user should know."""

    def warn(self, text: str) -> None:
        """Something that a user must know, who wants to hear of nothing else too."""

    def progress(self, description: str, total: int, unit: str) -> AbstractContextManager[Any]:
        """Open a bar for something that takes time; the value is called with each step's size."""

    def standing(self, standing: Standing) -> None:
        """Called when a cell begins and after every batch of answers."""


class SilentListener:
    """A ProgressListener that tells nobody."""

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        self.note(text)

    def progress(self, description: str, total: int, unit: str) -> AbstractContextManager[Any]:
        return nullcontext(lambda step: None)

    def standing(self, standing: Standing) -> None: ...


class AnswerCounter:
    """Counts a run's answers and tells the listener where it stands.

    Args:
        plan: The run.
        batches: What is to be asked.
        listener: Who is told.
        skipped: Predictions file -> questions that are neither answered nor asked.
        workers: Says how many work.
    """

    def __init__(
        self,
        plan: RunPlan,
        batches: Sequence[Batch],
        listener: ProgressListener,
        *,
        skipped: Mapping[str, int],
        workers: Callable[[], int],
    ) -> None:
        self._plan, self._listener, self._workers = plan, listener, workers
        self._done = {cell.file: (cell.rows or 0) - skipped.get(cell.file, 0) for cell in plan.cells}
        for batch in batches:
            self._done[batch.cell] -= len(batch.places)
        self._run_done = sum(self._done.values())
        self._numbers = {cell.file: number for number, cell in enumerate(plan.cells, start=1)}
        self._begun: set[str] = set()
        self._new_answers, self._engine_up_since = 0, 0.0

    def begin(self, cell: Cell) -> None:
        """Tell of a cell whose first batch is being asked."""
        if cell.file not in self._begun:
            self._begun.add(cell.file)
            self._tell(cell)

    def answered(self, cell: Cell, count: int, *, seconds: float) -> None:
        """Tell of answers that have come, and how long the engine took for them once it was up."""
        self._engine_up_since = self._engine_up_since or time.perf_counter() - seconds
        self._new_answers += count
        self._run_done += count
        self._done[cell.file] += count
        self._tell(cell)

    def _tell(self, cell: Cell) -> None:
        seconds = time.perf_counter() - self._engine_up_since
        self._listener.standing(
            Standing(
                cell=f"{cell.checkpoint}, {cell.dataset}, query {cell.query}",
                number=self._numbers[cell.file],
                cells=len(self._plan.cells),
                done=self._done[cell.file],
                rows=cell.rows or 0,
                run_done=self._run_done,
                run_rows=self._plan.rows,
                rate=self._new_answers / seconds if self._new_answers else None,
                workers=self._workers(),
            )
        )

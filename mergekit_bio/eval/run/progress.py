"""How far a run is, and who is told."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.run.plan import RunPlan


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a run is.

    Attributes:
        cell: What is being asked.
        number: Which of ``cells`` it is, from 1.
        done: Answers of the cell, of ``rows``.
        run_done: Answers of the run, of ``run_rows``.
        rate: Answers a second since the engine was up, changes of checkpoint included; None before the first.
    """

    cell: str
    number: int
    cells: int
    done: int
    rows: int
    run_done: int
    run_rows: int
    rate: float | None

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

    def progress(self, description: str, total: int, unit: str) -> AbstractContextManager[Any]:
        """Open a bar for something that takes time; the value is called with each step's size."""

    def standing(self, standing: Standing) -> None:
        """Called when a cell begins and after every batch of answers."""


class SilentListener:
    """A ProgressListener that tells nobody."""

    def note(self, text: str) -> None: ...

    def progress(self, description: str, total: int, unit: str) -> AbstractContextManager[Any]:
        return nullcontext(lambda step: None)

    def standing(self, standing: Standing) -> None: ...


class AnswerCounter:
    """Counts a run's answers and tells the listener where it stands.

    Args:
        plan: The run.
        listener: Who is told.
    """

    def __init__(self, plan: RunPlan, listener: ProgressListener) -> None:
        self._plan, self._listener = plan, listener
        self._run_done = sum(plan.answered(cell) for cell in plan.cells)
        self._numbers = {cell.file: number for number, cell in enumerate(plan.cells, start=1)}
        self._new_answers, self._engine_up_since = 0, 0.0

    def engine_is_up(self) -> None:
        """The rate counts from the first such moment on."""
        self._engine_up_since = self._engine_up_since or time.perf_counter()

    def tell(self, cell: Cell, done: int, new: int = 0) -> None:
        """Tell that a cell has ``done`` answers, ``new`` ones among them."""
        self._new_answers += new
        self._run_done += new
        seconds = time.perf_counter() - self._engine_up_since
        self._listener.standing(
            Standing(
                cell=f"{cell.checkpoint}, {cell.dataset}, query {cell.query}",
                number=self._numbers[cell.file],
                cells=len(self._plan.cells),
                done=done,
                rows=cell.rows or 0,
                run_done=self._run_done,
                run_rows=self._plan.rows,
                rate=self._new_answers / seconds if self._new_answers else None,
            )
        )

"""The report as data: scored cells in sweeps, compared with the best of the sweep and its JSON form."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from mergekit_bio.eval.records.cells import Cell
from mergekit_bio.eval.scoring.matching import SCORERS
from mergekit_bio.eval.scoring.score import Score, score
from mergekit_bio.eval.scoring.statistics import (
    LEVEL,
    RESAMPLES,
    bootstrap,
    holm,
    mcnemar_exact,
    paired_bootstrap,
    plateau,
)

#: What every table and figure calls a figure; no average goes unnamed.
TITLES = {
    "accuracy": "Accuracy",
    "f1_weighted": "F1 weighted",
    "f1_macro": "F1 macro",
    "f1_macro_true": "F1 macro (labels only)",
    "precision_weighted": "Precision weighted",
    "recall_weighted": "Recall weighted",
    "precision_macro": "Precision macro",
    "recall_macro": "Recall macro",
    "top1": "Top-1 (beans-zero)",
    "out_of_set": "Out of set",
    "in_set_wrong": "In set, wrong",
    "out_of_set_matched": "Out of set (matched)",
    "in_set_wrong_matched": "In set, wrong (matched)",
    "map": "mAP",
    "cider": "CIDEr",
    "spice": "SPICE",
    "spider": "SPIDEr",
}
#: The figures that a task is judged by, the first one first.
MAIN_FIGURES = {
    "classification": ("accuracy", "f1_weighted", "f1_macro"),
    "detection": ("f1_macro", "map"),
    "captioning": ("cider", "spice", "spider"),
}


@dataclass(frozen=True, kw_only=True)
class Against:
    """One cell of a sweep against the best one.

    Attributes:
        checkpoint: The cell's.
        alpha: Its merge strength, if it has one.
        difference: Its figure minus the best one's, with the 95% interval of the paired bootstrap.
        p: Two-sided.
        p_adjusted: Holm-adjusted for the number of cells compared.
    """

    checkpoint: str
    alpha: float | None
    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A sweep against its best cell, paired clip by clip.

    Attributes:
        figure: What is compared.
        test: "McNemar exact" or "paired bootstrap".
        clips: The number of clips that all cells of the sweep have.
        best: The checkpoint with the highest figure (the first such).
        against: The other cells.
        plateau: The first and last alpha of the stretch around the best that cannot be told from it; None where the
            cells are not told apart by alpha.
    """

    figure: str
    test: str
    clips: int
    best: str
    against: tuple[Against, ...]
    plateau: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All cells of a run that were asked the same query about the same dataset."""

    scores: tuple[Score, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def cell(self) -> Cell:
        """The first cell: what it says about the query holds for all."""
        return self.scores[0].cell

    @property
    def title(self) -> str:
        """Run, dataset where it is not the run's name, query, and what is asked for where it is not the label."""
        cell = self.cell
        parts = [cell.run] + ([] if cell.dataset == cell.run else [cell.dataset]) + [f"query {cell.query}"]
        return ", ".join(parts + ([] if cell.target == "label" else [f"{cell.target} name"]))

    @property
    def by_alpha(self) -> bool:
        """Whether every cell has an alpha of its own: then it is a curve."""
        return _distinct_alphas(self.scores)

    @property
    def main_figures(self) -> list[str]:
        """The figures of ``MAIN_FIGURES`` that could be computed."""
        return [name for name in MAIN_FIGURES[self.cell.task] if name in self.scores[0].figures]

    def comparison(self, figure: str) -> Comparison | None:
        """The comparison of a figure; None where the sweep has one cell."""
        return next((item for item in self.comparisons if item.figure == figure), None)

    def best(self, figure: str) -> Score:
        """The cell with the highest figure (the first such)."""
        return max(self.scores, key=lambda item: item.figures[figure])

    def improvement(self, figure: str) -> tuple[Score, Score, float] | None:
        """The best cell, the one at alpha 1.0 and the relative gain between them; None where there is none to state."""
        best = self.best(figure)
        full = next((item for item in self.scores if item.cell.alpha == 1.0), None)
        if not self.by_alpha or full is None or full is best or not full.figures[figure]:
            return None
        return best, full, best.figures[figure] / full.figures[figure] - 1


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that tables, figures and the page are drawn from."""

    sweeps: tuple[Sweep, ...]

    @property
    def scorers(self) -> list[str]:
        """The scorers used; more than one only where runs ask for different ones."""
        return list(dict.fromkeys(item.scorer for sweep in self.sweeps for item in sweep.scores))

    @property
    def notes(self) -> list[str]:
        """What a reader must be told, each once."""
        return list(dict.fromkeys(note for sweep in self.sweeps for item in sweep.scores for note in item.notes))


def build_report(
    cells: Sequence[Cell], *, scorer: str | None = None, seed: int = 0, progress: Callable[[int], None] = lambda _: None
) -> Report:
    """Score and compare.

    Args:
        cells: In the order of ``read_runs``.
        scorer: For all cells; None takes what each run asks for ("paper" for the published layout).
        seed: Of the bootstrap.
        progress: Called with 1 after each cell.
    """
    sweeps = []
    for _, members in groupby(cells, key=lambda cell: (cell.run, cell.dataset, cell.query)):
        scores = []
        for cell in members:
            scores.append(score(cell, scorer=scorer or cell.scorer or "paper", seed=seed))
            progress(1)
        sweeps.append(Sweep(scores=tuple(scores), comparisons=tuple(_compare(scores, seed))))
    return Report(sweeps=tuple(sweeps))


def _compare(scores: Sequence[Score], seed: int) -> Iterator[Comparison]:
    """Every main figure, over the clips that all cells have."""
    if len(scores) < 2:
        return
    shared = set.intersection(*(set(item.ids) for item in scores))
    if not shared:
        return
    rows = [[index for index, key in enumerate(item.ids) if key in shared] for item in scores]
    parts = [item.indicators[kept] for item, kept in zip(scores, rows, strict=True)]
    samples = [item.samples for item in scores]
    if any(len(item.ids) > len(shared) for item in scores):
        samples = [
            bootstrap(indicators=part, statistic=item.statistic, seed=seed)
            for item, part in zip(scores, parts, strict=True)
        ]
    values = [item.statistic(part.sum(axis=0).A) for item, part in zip(scores, parts, strict=True)]
    alphas = [item.cell.alpha or 0.0 for item in scores]
    for figure in MAIN_FIGURES[scores[0].cell.task]:
        if figure not in samples[0]:
            continue
        points = [float(value[figure][0]) for value in values]
        best = max(range(len(points)), key=points.__getitem__)
        others = [index for index in range(len(points)) if index != best]
        paired = {index: paired_bootstrap(samples[best][figure], samples[index][figure]) for index in others}
        p_values = {index: paired[index][2] for index in others}
        if figure == "accuracy":
            right = [[item.correct[index] for index in kept] for item, kept in zip(scores, rows, strict=True)]
            p_values = {index: _mcnemar(right[best], right[index]) for index in others}
        adjusted = dict(zip(others, holm([p_values[index] for index in others]), strict=True))
        first, last = plateau(points, [adjusted.get(index, 1.0) for index in range(len(points))])
        yield Comparison(
            figure=figure,
            test="McNemar exact" if figure == "accuracy" else "paired bootstrap",
            clips=len(shared),
            best=scores[best].cell.checkpoint,
            against=tuple(
                Against(
                    checkpoint=scores[index].cell.checkpoint,
                    alpha=scores[index].cell.alpha,
                    difference=points[index] - points[best],
                    low=paired[index][0],
                    high=paired[index][1],
                    p=p_values[index],
                    p_adjusted=adjusted[index],
                )
                for index in others
            ),
            plateau=(alphas[first], alphas[last]) if _distinct_alphas(scores) else None,
        )


def _distinct_alphas(scores: Sequence[Score]) -> bool:
    alphas = {item.cell.alpha for item in scores}
    return len(alphas) == len(scores) and None not in alphas


def _mcnemar(best: Sequence[bool], other: Sequence[bool]) -> float:
    pairs = list(zip(best, other, strict=True))
    return mcnemar_exact(only_first=pairs.count((True, False)), only_second=pairs.count((False, True)))


def to_document(report: Report) -> dict[str, Any]:
    """The report as JSON-serialisable values."""
    return {
        "scorers": {name: SCORERS[name] for name in report.scorers},
        "intervals": f"{LEVEL:.0%} percentile bootstrap over clips, {RESAMPLES} resamples",
        "comparisons": "against the best, paired by clip; p-values Holm-adjusted",
        "notes": report.notes,
        "sweeps": [_sweep_document(sweep) for sweep in report.sweeps],
    }


def _sweep_document(sweep: Sweep) -> dict[str, Any]:
    cell, first = sweep.cell, sweep.scores[0]
    gains = {name: gain for name in sweep.main_figures if (gain := sweep.improvement(name))}
    return {
        "run": cell.run,
        "dataset": cell.dataset,
        "task": cell.task,
        "query": cell.query,
        "query_text": cell.query_text,
        "target": cell.target,
        "scorer": first.scorer,
        "clips": len(first.ids),
        "labels": len(set(first.targets)) if cell.task == "classification" else None,
        "baselines": first.baselines,
        "cells": [
            {
                "checkpoint": item.cell.checkpoint,
                "alpha": item.cell.alpha,
                "clips": len(item.ids),
                "figures": item.figures,
                "intervals": item.intervals,
                "matching": item.matching,
            }
            for item in sweep.scores
        ],
        "comparisons": [asdict(comparison) for comparison in sweep.comparisons],
        "best_over_full_strength": {
            name: {"best_alpha": best.cell.alpha, "best": best.figures[name], "full": full.figures[name], "gain": gain}
            for name, (best, full, gain) in gains.items()
        },
    }

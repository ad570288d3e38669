"""The cells of a sweep against its best one, over the clips that all of them have."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_bio.eval.scoring.score import Score
from mergekit_bio.eval.scoring.statistics import (
    PValue,
    bootstrap,
    holm_adjusted,
    mcnemar_exact,
    paired_randomisation,
    percentile_interval,
    plateau,
)

#: The metrics that a task is judged by, the first one first.
MAIN_METRICS = {
    "classification": ("accuracy", "f1_weighted", "f1_macro"),
    "detection": ("f1_macro", "map"),
    "captioning": ("cider", "spice", "spider"),
    "instructions": ("strict", "loose"),
}


@dataclass(frozen=True, kw_only=True)
class Against:
    """One cell of a sweep against the best one.

    Attributes:
        difference: Its metric minus the best one's, with the 95% interval of the paired bootstrap.
        p: Two-sided, that the two answer equally well.
        p_adjusted: Holm-adjusted for the number of cells compared.
        p_at_most: Whether ``p_adjusted`` may be smaller: it stands at the floor of the swaps that were drawn.
    """

    checkpoint: str
    alpha: float | None
    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float
    p_at_most: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A sweep against its best cell, paired clip by clip.

    Attributes:
        test: "McNemar exact" or "paired randomisation".
        clips: The number of clips that all cells of the sweep have.
        best: The checkpoint with the highest metric (the first such).
        best_interval: The 95% bootstrap interval of its metric.
        values: Checkpoint -> its metric over these clips, for all cells.
        against: The other cells.
        plateau: The first and last alpha of the stretch around the best that cannot be told from it; None where the
            cells are not told apart by alpha, or there is no best, as all are 0.
    """

    metric: str
    test: str
    clips: int
    best: str
    best_interval: tuple[float, float]
    values: dict[str, float]
    against: tuple[Against, ...]
    plateau: tuple[float, float] | None

    def of(self, checkpoint: str) -> Against | None:
        """A cell against the best; None for the best itself."""
        return next((row for row in self.against if row.checkpoint == checkpoint), None)


def clips_of(item: Score) -> frozenset[tuple[str, str]]:
    """The clips of a cell, by id and right answer: labels may have been corrected between two cells."""
    return frozenset(zip(item.ids, item.targets, strict=True))


def shared_clips(scores: Sequence[Score]) -> frozenset[str]:
    """The ids of the clips that all cells have, with the same right answer."""
    return frozenset(key for key, _ in frozenset.intersection(*map(clips_of, scores)))


def distinct_alphas(scores: Sequence[Score]) -> bool:
    """Whether every cell has an alpha of its own."""
    alphas = {item.cell.alpha for item in scores}
    return len(alphas) == len(scores) and None not in alphas


def compare(scores: Sequence[Score], seed: int) -> Iterator[Comparison]:
    """Every main metric of a sweep's cells, in the order of alpha, over the clips that all of them have.

    Nothing where there is no such clip, or one cell.
    """
    # 1. Pairing needs the same clips in the same order.
    shared, kept_rows, indicators = aligned(scores)
    if len(scores) < 2 or not shared:
        return
    statistic = scores[0].statistic

    # 2. Each cell's metrics and resamples over these clips. Where no cell has more clips, those of its score serve.
    #    One seed draws the same clips in every cell.
    if all(len(item.ids) == len(shared) for item in scores):
        samples = [item.samples for item in scores]
        metrics = [item.metrics for item in scores]
    else:
        samples = [bootstrap(indicators=part, statistic=statistic, seed=seed) for part in indicators]
        sums = [statistic(part.sum(axis=0).A) for part in indicators]
        metrics = [{name: float(value[0]) for name, value in values.items()} for values in sums]

    alphas = [item.cell.alpha or 0.0 for item in scores]
    tests: dict[tuple[int, int], dict[str, PValue]] = {}
    for metric in MAIN_METRICS[scores[0].cell.task]:
        if metric not in samples[0]:
            continue
        # 3. The best cell (the first of equals), and every other against it.
        values = [of_cell[metric] for of_cell in metrics]
        best = max(range(len(values)), key=values.__getitem__)
        others = [index for index in range(len(values)) if index != best]
        intervals = [percentile_interval(samples[index][metric] - samples[best][metric]) for index in others]

        # 4. Accuracy counts clips that are right or wrong: what swapping them gives is known without drawing.
        if metric == "accuracy":
            right = [[item.correct[row] for row in rows] for item, rows in zip(scores, kept_rows, strict=True)]
            p_values = [PValue(_mcnemar(right[best], right[index])) for index in others]
        else:
            for pair in ((best, index) for index in others):
                if pair not in tests:  # one test gives the p-values of all metrics
                    tests[pair] = paired_randomisation(indicators[pair[0]], indicators[pair[1]], statistic, seed=seed)
            p_values = [tests[best, index][metric] for index in others]

        # 5. So many tests at once find a difference by chance: the p-values are adjusted for their number. What they
        #    do not tell from the best, without a gap, is the plateau.
        adjusted = holm_adjusted(p_values)
        values_of_p = [p.value for p in adjusted]
        first, last = plateau(values, [*values_of_p[:best], 1.0, *values_of_p[best:]])
        yield Comparison(
            metric=metric,
            test="McNemar exact" if metric == "accuracy" else "paired randomisation",
            clips=len(shared),
            best=scores[best].cell.checkpoint,
            best_interval=percentile_interval(samples[best][metric]),
            values={item.cell.checkpoint: value for item, value in zip(scores, values, strict=True)},
            against=tuple(
                Against(
                    checkpoint=scores[index].cell.checkpoint,
                    alpha=scores[index].cell.alpha,
                    difference=values[index] - values[best],
                    low=low,
                    high=high,
                    p=p.value,
                    p_adjusted=p_adjusted.value,
                    p_at_most=p_adjusted.at_most,
                )
                for index, (low, high), p, p_adjusted in zip(others, intervals, p_values, adjusted, strict=True)
            ),
            plateau=(alphas[first], alphas[last]) if distinct_alphas(scores) and any(values) else None,
        )


def aligned(scores: Sequence[Score]) -> tuple[frozenset[str], list[list[int]], list[Any]]:
    """The clips that all cells have: their ids, and for each cell the rows and the indicators of them, in one order."""
    shared = shared_clips(scores)
    # The rows of every cell are ordered by id already.
    rows = [[row for row, clip_id in enumerate(item.ids) if clip_id in shared] for item in scores]
    return shared, rows, [item.indicators[kept] for item, kept in zip(scores, rows, strict=True)]


def _mcnemar(best: Sequence[bool], other: Sequence[bool]) -> float:
    pairs = list(zip(best, other, strict=True))
    return mcnemar_exact(only_first=pairs.count((True, False)), only_second=pairs.count((False, True)))

"""What a chosen alpha is worth on clips that it was not chosen on.

The best of eleven alphas is partly the luckiest: its metric over the clips that it was chosen on is too high. Here
alpha is chosen on one part of the clips and scored on the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.report.comparison import MAIN_METRICS, Comparison, aligned, distinct_alphas
from mergekit_bio.eval.scoring.score import Score
from mergekit_bio.eval.scoring.statistics import Statistic, percentile_interval

#: Splits into halves, and resamples of the clips that are split for the interval.
SPLITS = 500
#: What ``AlphaChoice.chosen_on`` says where alpha was chosen on the halves.
HALVES = "halves"


@dataclass(frozen=True, kw_only=True)
class AlphaChoice:
    """One metric of a sweep, with alpha chosen on other clips than it is scored on.

    Attributes:
        chosen_on: ``HALVES``, or what the sweep is called that alpha was chosen on.
        value: The metric of chosen alphas on clips that they were not chosen on, and its 95% interval from ``low`` to
            ``high``.
        optimistic: The best alpha's metric over the clips that it was chosen on, and its interval.
        gain: ``value`` minus the metric of alpha 1.0 on the same clips, and its interval; None without alpha 1.0.
        alphas: How often each alpha was chosen, as a share.
    """

    metric: str
    chosen_on: str
    value: float
    low: float
    high: float
    optimistic: float
    optimistic_low: float
    optimistic_high: float
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    alphas: Mapping[float, float]


def choose_on_halves(
    scores: Sequence[Score], comparisons: Sequence[Comparison], *, seed: int, splits: int = SPLITS
) -> Iterator[AlphaChoice]:
    """Answer each half of a sweep's clips with the alpha that is best on the other half, over many seeded splits.

    Every split gives the metric over all clips, none of them answered by an alpha that was chosen on it; the value is
    the mean. For the interval the clips are resampled before they are split, a clip that was drawn twice into one half.

    Nothing where the cells are not told apart by alpha, or have less than two clips in common.
    """
    if not comparisons or not distinct_alphas(scores) or comparisons[0].clips < 2:
        return
    # 1. The halves of every split, first of the clips as they are, then of clips drawn with replacement.
    _, _, indicators = aligned(scores)
    clips = indicators[0].shape[0]
    generator = np.random.default_rng(seed)
    halves = (generator.random((splits, clips)).argsort(axis=1) < clips // 2).astype(np.float64)
    drawn = generator.multinomial(clips, np.full(clips, 1 / clips), size=splits).astype(np.float64)
    # Of few clips a half may get none, and then there is nothing to choose on.
    drawn[(drawn * halves).sum(axis=1) % clips == 0] = 1.0
    statistic, names = scores[0].statistic, [comparison.metric for comparison in comparisons]
    whole = _Crossed(indicators, statistic, names, first=halves, second=1 - halves)
    resampled = _Crossed(indicators, statistic, names, first=drawn * halves, second=drawn * (1 - halves))

    # 2. What they come to.
    alphas = [float(item.cell.alpha or 0.0) for item in scores]
    full = alphas.index(1.0) if 1.0 in alphas else None
    for comparison in comparisons:
        name = comparison.metric
        low, high = percentile_interval(resampled.values[name])
        gain, gain_low, gain_high = None, None, None
        if full is not None:
            gain = float((whole.values[name] - whole.of_cell[full][name]).mean())
            gain_low, gain_high = percentile_interval(resampled.values[name] - resampled.of_cell[full][name])
        shares = np.bincount(whole.best[name], minlength=len(alphas)) / whole.best[name].size
        yield AlphaChoice(
            metric=name,
            chosen_on=HALVES,
            value=float(whole.values[name].mean()),
            low=low,
            high=high,
            optimistic=comparison.values[comparison.best],
            optimistic_low=comparison.best_interval[0],
            optimistic_high=comparison.best_interval[1],
            gain=gain,
            gain_low=gain_low,
            gain_high=gain_high,
            alphas={alpha: float(share) for alpha, share in zip(alphas, shares, strict=True) if share},
        )


class _Crossed:
    """Each half of every split answered by the best cell of the other half.

    Args:
        indicators: Of each cell, scipy CSR float64 [clips, columns].
        statistic: From sums of them to metrics.
        names: The metrics that decide which cell is best.
        first: How often each clip is in the first half, float64 [splits, clips]; ``second`` in the second.

    Attributes:
        values: Metric -> its values over both halves, float64 [splits].
        best: Metric -> the cells that are best on the first halves, then those on the second ones, int [2 * splits].
        of_cell: For each cell metric -> its values over both halves without any choice, float64 [splits].
    """

    def __init__(
        self, indicators: Sequence[Any], statistic: Statistic, names: Sequence[str], *, first: Any, second: Any
    ) -> None:
        # [cells, splits, columns]
        of_first, of_second = (np.stack([half @ cell for cell in indicators]) for half in (first, second))
        on_first, on_second = ([statistic(sums) for sums in half] for half in (of_first, of_second))
        self.of_cell = [statistic(sums) for sums in of_first + of_second]
        self.values: dict[str, np.ndarray] = {}
        self.best: dict[str, np.ndarray] = {}
        rows = np.arange(len(first))
        for name in names:
            # The first of equals, as everywhere.
            best = [np.argmax([cell[name] for cell in half], axis=0) for half in (on_first, on_second)]
            crossed = of_second[best[0], rows] + of_first[best[1], rows]
            self.values[name] = statistic(crossed)[name]
            self.best[name] = np.concatenate(best)


def choose_on_another(
    scores: Sequence[Score],
    comparisons: Sequence[Comparison],
    *,
    other: Sequence[Score],
    of_other: Sequence[Comparison],
    title: str,
) -> Iterator[AlphaChoice]:
    """Score the alpha that is the best of another sweep, called ``title``.

    Nothing where the two have no metric in common, or the alpha chosen there was not asked here.
    """
    if not (distinct_alphas(scores) and distinct_alphas(other)):
        return
    chosen = {item.metric: _alpha(other, item.best) for item in of_other}
    by_alpha = {item.cell.alpha: item for item in scores}
    for comparison in comparisons:
        item = by_alpha.get(chosen.get(comparison.metric))
        if item is None or item.cell.alpha is None:
            continue
        low, high = item.intervals[comparison.metric]
        gain, gain_low, gain_high = _gain(item, by_alpha.get(1.0), comparison.metric)
        yield AlphaChoice(
            metric=comparison.metric,
            chosen_on=title,
            value=item.metrics[comparison.metric],
            low=low,
            high=high,
            optimistic=comparison.values[comparison.best],
            optimistic_low=comparison.best_interval[0],
            optimistic_high=comparison.best_interval[1],
            gain=gain,
            gain_low=gain_low,
            gain_high=gain_high,
            alphas={item.cell.alpha: 1.0},
        )


def _alpha(scores: Sequence[Score], checkpoint: str) -> float | None:
    return next(item.cell.alpha for item in scores if item.cell.checkpoint == checkpoint)


def _gain(item: Score, full: Score | None, metric: str) -> tuple[float | None, float | None, float | None]:
    """A cell's metric minus that at alpha 1, paired by clip, with its interval; nothing where they have other clips."""
    if full is None or item.ids != full.ids or item.targets != full.targets:
        return None, None, None
    low, high = percentile_interval(item.samples[metric] - full.samples[metric])
    return item.metrics[metric] - full.metrics[metric], low, high


def matching_cell(candidates: Sequence[Cell], cell: Cell) -> int | None:
    """Which of the candidates, the first cells of sweeps, is of the sweep whose best alpha this cell's should take.

    The same question and target if it is there, else the same target, else whatever has the same metrics.
    """
    alike = [index for index, other in enumerate(candidates) if MAIN_METRICS[other.task] == MAIN_METRICS[cell.task]]
    same_target = [index for index in alike if candidates[index].target == cell.target]
    same_question = [index for index in same_target if candidates[index].query == cell.query]
    return next(iter([*same_question, *same_target, *alike]), None)

"""The cells of a sweep against its best one, over the clips that all of them have."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mergekit_bio.eval.scoring.score import Score
from mergekit_bio.eval.scoring.statistics import bootstrap, holm, mcnemar_exact, paired_bootstrap, plateau

#: The metrics that a task is judged by, the first one first.
MAIN_METRICS = {
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
        difference: Its metric minus the best one's, with the 95% interval of the paired bootstrap.
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
        metric: What is compared.
        test: "McNemar exact" or "paired bootstrap".
        clips: The number of clips that all cells of the sweep have.
        best: The checkpoint with the highest metric (the first such).
        values: Checkpoint -> its metric over these clips, for all cells.
        against: The other cells.
        plateau: The first and last alpha of the stretch around the best that cannot be told from it; None where the
            cells are not told apart by alpha.
    """

    metric: str
    test: str
    clips: int
    best: str
    values: dict[str, float]
    against: tuple[Against, ...]
    plateau: tuple[float, float] | None


def clips_of(item: Score) -> frozenset[tuple[str, str]]:
    """The clips of a cell: their ids and right answers, as the labels of a dataset may have been mended in between."""
    return frozenset(zip(item.ids, item.targets, strict=True))


def shared_clips(scores: Sequence[Score]) -> frozenset[str]:
    """The ids of the clips that all cells have, with the same right answer."""
    return frozenset(key for key, _ in frozenset.intersection(*map(clips_of, scores)))


def distinct_alphas(scores: Sequence[Score]) -> bool:
    """Whether every cell has an alpha of its own."""
    alphas = {item.cell.alpha for item in scores}
    return len(alphas) == len(scores) and None not in alphas


def compare(scores: Sequence[Score], seed: int) -> Iterator[Comparison]:
    """Every main metric, over the clips that all cells have; nothing where there is no such clip, or one cell.

    Args:
        scores: The cells of a sweep, in the order of alpha.
        seed: Of the bootstrap.
    """
    shared = shared_clips(scores)
    if len(scores) < 2 or not shared:
        return
    rows = [[index for index, key in enumerate(item.ids) if key in shared] for item in scores]
    parts = [item.indicators[kept] for item, kept in zip(scores, rows, strict=True)]
    samples = [item.samples for item in scores]
    values = [item.metrics for item in scores]
    if any(len(item.ids) > len(shared) for item in scores):
        samples = [
            bootstrap(indicators=part, statistic=item.statistic, seed=seed)
            for item, part in zip(scores, parts, strict=True)
        ]
        sums = [item.statistic(part.sum(axis=0).A) for item, part in zip(scores, parts, strict=True)]
        values = [{name: float(value[0]) for name, value in one.items()} for one in sums]
    alphas = [item.cell.alpha or 0.0 for item in scores]
    for metric in MAIN_METRICS[scores[0].cell.task]:
        if metric not in samples[0]:
            continue
        points = [value[metric] for value in values]
        best = max(range(len(points)), key=points.__getitem__)
        others = [index for index in range(len(points)) if index != best]
        paired = {index: paired_bootstrap(samples[best][metric], samples[index][metric]) for index in others}
        p_values = {index: paired[index][2] for index in others}
        if metric == "accuracy":
            right = [[item.correct[index] for index in kept] for item, kept in zip(scores, rows, strict=True)]
            p_values = {index: _mcnemar(right[best], right[index]) for index in others}
        adjusted = dict(zip(others, holm([p_values[index] for index in others]), strict=True))
        first, last = plateau(points, [adjusted.get(index, 1.0) for index in range(len(points))])
        yield Comparison(
            metric=metric,
            test="McNemar exact" if metric == "accuracy" else "paired bootstrap",
            clips=len(shared),
            best=scores[best].cell.checkpoint,
            values={item.cell.checkpoint: point for item, point in zip(scores, points, strict=True)},
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
            plateau=(alphas[first], alphas[last]) if distinct_alphas(scores) else None,
        )


def _mcnemar(best: Sequence[bool], other: Sequence[bool]) -> float:
    pairs = list(zip(best, other, strict=True))
    return mcnemar_exact(only_first=pairs.count((True, False)), only_second=pairs.count((False, True)))

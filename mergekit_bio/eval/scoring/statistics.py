"""How sure a metric is: bootstrap over clips, exact McNemar, the paired bootstrap, and what a plateau is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 2000
LEVEL = 0.95

#: From sums over clips, [..., columns], to named metrics, [...] each.
Statistic = Callable[[np.ndarray], Mapping[str, np.ndarray]]


def bootstrap(
    *, indicators: Any, statistic: Statistic, seed: int = 0, resamples: int = RESAMPLES
) -> dict[str, np.ndarray]:
    """Resample the clips with replacement and compute the metrics of every resample (Efron 1979).

    Every metric of ours depends on the clips through sums of per-clip indicators only (hits, true and predicted
    counts of a class), so a resample is one row of weights times the indicator matrix. Two cells with the same
    clips in the same order and the same seed are resampled alike, which is what makes their comparison paired.

    Args:
        indicators: scipy sparse matrix, float64 [clips, columns].
        statistic: Maps sums [resamples, columns] to metrics [resamples].

    Returns:
        For each metric its values, float64 [resamples].
    """
    # float64 sums of whole numbers are exact, whatever the order.
    sums = np.concatenate([weights @ indicators for weights in _weights(indicators.shape[0], seed, resamples)])
    return {name: np.asarray(values, dtype=np.float64) for name, values in statistic(sums).items()}


def _weights(clips: int, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """How often each clip is drawn: float64 [up to a few hundred resamples, clips], about 16 MB at a time."""
    generator = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // clips)
    for start in range(0, resamples, chunk):
        size = min(chunk, resamples - start)
        drawn = generator.integers(0, clips, size=(size, clips)) + np.arange(size)[:, None] * clips
        yield np.bincount(drawn.ravel(), minlength=size * clips).reshape(size, clips).astype(np.float64)


def percentile_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The central interval that holds ``level`` of the resampled values (the percentile method)."""
    return float(np.quantile(values, (1 - level) / 2)), float(np.quantile(values, (1 + level) / 2))


def mcnemar_exact(*, only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two answers to the same clips are right equally often (McNemar 1947).

    It goes by the numbers of clips that only the first has right, and only the second.
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def paired_bootstrap(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Compare a metric of two cells, float64 [resamples] each, that were resampled alike.

    Returns:
        The 95% interval of ``second - first`` and the two-sided p-value that it is 0: twice the smaller share of
        resamples on one side of 0, at least 2 / (resamples + 1).
    """
    difference = second - first
    low, high = percentile_interval(difference)
    smaller = min(int((difference <= 0).sum()), int((difference >= 0).sum()))
    return low, high, min(1.0, 2 * (smaller + 1) / (len(difference) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the given order."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(np.arange(len(order), 0, -1) * np.asarray(p_values)[order]).clip(max=1)
    return list(map(float, adjusted))


def plateau(values: Sequence[float], adjusted_p: Sequence[float], level: float = LEVEL) -> tuple[int, int]:
    """The unbroken stretch around the best cell that cannot be told from it.

    Args:
        values: The metric of each cell, in the order of alpha.
        adjusted_p: For each cell the adjusted p-value against the best (anything for the best itself).

    Returns:
        Index of the first and the last cell of the stretch.
    """
    best = max(range(len(values)), key=values.__getitem__)
    tied = [index == best or p >= 1 - level for index, p in enumerate(adjusted_p)]
    first = last = best
    while first > 0 and tied[first - 1]:
        first -= 1
    while last + 1 < len(tied) and tied[last + 1]:
        last += 1
    return first, last

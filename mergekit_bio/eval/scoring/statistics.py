"""How sure a metric is: bootstrap over clips, exact McNemar, the paired randomisation test, and what a plateau is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

RESAMPLES = 2000
LEVEL = 0.95
#: Ways to swap that are drawn where there are too many to go through, and the most clips of which all are gone through.
SWAPS = 9999
MOST_CLIPS_EXACT = 14
#: Two differences this close are one that was summed in another order.
_ROUNDING = 1e-12

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
    """The central interval that holds ``level`` of the resampled values (the percentile method).

    Resamples without a clip that the metric is about have none (NaN), and are left out.
    """
    return float(np.nanquantile(values, (1 - level) / 2)), float(np.nanquantile(values, (1 + level) / 2))


def mcnemar_exact(*, only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two answers to the same clips are right equally often (McNemar 1947).

    It goes by the numbers of clips that only the first has right, and only the second.
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


@dataclass(frozen=True)
class PValue:
    """Of a test.

    Attributes:
        value: Two-sided.
        at_most: Whether it may be smaller: of the swaps that were drawn, none differed as much.
    """

    value: float
    at_most: bool = False


def paired_randomisation(first: Any, second: Any, statistic: Statistic, *, seed: int = 0) -> dict[str, PValue]:
    """p-values that two cells answer the same clips equally well (Fisher 1935; for F1 Yeh 2000).

    If they do, swapping the two answers to a clip changes nothing but chance. The p-value is the share of all ways to
    swap, clip by clip, with a difference at least as large as the one that was seen. Swapping everything reverses the
    difference, so that with n clips no p-value is below 2 / 2**n. Clips with the same answer in both cells cancel out.

    Args:
        first: Indicators of one cell, scipy sparse matrix, float64 [clips, columns].
        second: Those of the other, with the same clips and columns in the same order.
        statistic: Maps sums [swaps, columns] to metrics [swaps].
        seed: Of the swaps, where they are too many to go through.

    Returns:
        For each metric its p-value.
    """
    # 1. What swapping one clip moves from the first cell's sums to the second's, where it moves anything.
    moved = second - first
    moved = moved[np.diff(moved.indptr).nonzero()[0]] if moved.nnz else moved[:0]
    clips = moved.shape[0]
    of_first, of_second = (np.asarray(cell.sum(axis=0), dtype=np.float64).reshape(1, -1) for cell in (first, second))
    seen = _differences(of_first, of_second, statistic)

    # 2. Every way to swap, or as many as are drawn. Half of all ways are enough: the other half are the same, reversed.
    exact = clips <= MOST_CLIPS_EXACT
    beyond: dict[str, int] = dict.fromkeys(seen, 0)
    ways = 0
    for swapped in _all_swaps(clips) if exact else _drawn_swaps(clips, seed):
        change = np.asarray(swapped @ moved)
        differences = _differences(of_first + change, of_second - change, statistic)
        ways += len(swapped)
        for name, values in differences.items():
            beyond[name] += int((np.abs(values) >= abs(seen[name][0]) - _ROUNDING).sum())

    # 3. The ways that were drawn are counted with the one that was seen, or p would be 0 where none comes near
    #    (Phipson and Smyth 2010).
    if exact:
        return {name: PValue(count / ways) for name, count in beyond.items()}
    return {name: PValue((count + 1) / (ways + 1), at_most=not count) for name, count in beyond.items()}


def _differences(first: np.ndarray, second: np.ndarray, statistic: Statistic) -> dict[str, np.ndarray]:
    values = statistic(first)
    return {name: other - values[name] for name, other in statistic(second).items()}


def _all_swaps(clips: int) -> Iterator[np.ndarray]:
    """Whether each clip is swapped, float64 [ways, clips], in every way in which the first clip is not."""
    numbers = np.arange(2 ** max(clips - 1, 0))[:, None]
    yield ((numbers >> np.arange(clips)[::-1]) & 1).astype(np.float64)


def _drawn_swaps(clips: int, seed: int) -> Iterator[np.ndarray]:
    """``SWAPS`` ways at random, float64 [up to 1000 ways, clips], a few MB at a time."""
    generator = np.random.default_rng(seed)
    chunk = max(1, min(1000, 1_000_000 // clips))
    for start in range(0, SWAPS, chunk):
        yield generator.integers(0, 2, size=(min(chunk, SWAPS - start), clips)).astype(np.float64)


def holm_adjusted(p_values: Sequence[PValue]) -> list[PValue]:
    """p-values adjusted for their number; one that an upper bound raised is an upper bound too."""
    adjusted = holm([p.value for p in p_values])
    bound = max((value for value, p in zip(adjusted, p_values, strict=True) if p.at_most), default=0.0)
    return [PValue(value, at_most=value <= bound < 1) for value in adjusted]


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

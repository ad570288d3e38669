"""How well a cell does label by label: precision, recall and F1 of each, with the interval of F1."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergekit_bio.eval.scoring import classification
from mergekit_bio.eval.scoring.score import Score
from mergekit_bio.eval.scoring.statistics import bootstrap, percentile_interval


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelScore:
    """One label of a cell; 0 / 0 is 0, as everywhere.

    Attributes:
        clips: How many have the label; ``answered``: how many were answered with it; ``right``: how many both.
        low: The 95% interval of ``f1`` goes from here to ``high``. A resample without the label, in clips or answers,
            has F1 0.
    """

    label: str
    clips: int
    answered: int
    right: int
    precision: float
    recall: float
    f1: float
    low: float
    high: float


def label_scores(item: Score, labels: Sequence[str], *, seed: int = 0) -> list[LabelScore]:
    """Score labels of a classification or a detection, over the resamples of the cell's own metrics."""
    if item.cell.task == "detection":
        classes = [*item.labels]
    else:
        classes = classification.classes_of(item.targets, item.answers, item.labels)
    column = {label: index for index, label in enumerate(classes)}
    count = len(classes)

    def f1_of(sums: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for label in labels:
            if label in column:
                clips, answered, right = (sums[:, part * count + column[label]] for part in range(3))
                whole = clips + answered
                found[label] = np.divide(2 * right, whole, out=np.zeros_like(right), where=whole > 0)
        return found

    sums = np.asarray(item.indicators.sum(axis=0), dtype=np.float64).reshape(1, -1)
    f1, samples = f1_of(sums), bootstrap(indicators=item.indicators, statistic=f1_of, seed=seed)
    scores = []
    for label in labels:
        place = column.get(label)
        counts = (0, 0, 0) if place is None else (int(sums[0, part * count + place]) for part in range(3))
        clips, answered, right = counts
        low, high = percentile_interval(samples[label]) if label in samples else (0.0, 0.0)
        scores.append(
            LabelScore(
                label=label,
                clips=clips,
                answered=answered,
                right=right,
                precision=right / answered if answered else 0.0,
                recall=right / clips if clips else 0.0,
                f1=float(f1[label][0]) if label in f1 else 0.0,
                low=low,
                high=high,
            )
        )
    return scores

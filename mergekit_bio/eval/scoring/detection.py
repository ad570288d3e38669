"""The metrics of a detection cell: several labels a clip, or none."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix


def indicators(*, targets: Sequence[frozenset[str]], answers: Sequence[frozenset[str]]) -> Any:
    """Per-clip indicators: label k of the targets is there, is answered, both; and a column of ones.

    They are a scipy CSR matrix float64 [clips, 3 * classes + 1].
    """
    labels = sorted(frozenset().union(*targets))
    true, answered = (
        np.array([[label in row for label in labels] for row in rows], dtype=np.float64).reshape(len(rows), len(labels))
        for rows in (targets, answers)
    )
    return csr_matrix(np.hstack([true, answered, true * answered, np.ones((len(true), 1))]))


def resampled_metrics(sums: np.ndarray) -> Mapping[str, np.ndarray]:
    """Metrics from sums of ``indicators``; all averages are macro over the classes that occur in the targets.

    ``map`` is scikit-learn's average precision with the yes or no answers as scores: at the one threshold precision
    and recall are those of the answers, at none they are the class's frequency and 1. beans-zero ranks tied scores
    by the order of the rows, so that its mAP changes when the file is shuffled. Sums are float64 [resamples,
    3 * classes + 1], metrics float64 [resamples] each.
    """
    classes = (sums.shape[1] - 1) // 3
    true, answered, hit = (sums[:, part * classes : (part + 1) * classes] for part in range(3))
    clips = sums[:, -1:]

    def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)

    precision, recall = ratio(hit, answered), ratio(hit, true)
    average_precision = recall * precision + (1 - recall) * true / clips
    occurring = true > 0
    number = np.maximum(occurring.sum(axis=1), 1)
    return {
        name: (values * occurring).sum(axis=1) / number
        for name, values in {
            "map": average_precision,
            "f1_macro": ratio(2 * hit, true + answered),
            "precision_macro": precision,
            "recall_macro": recall,
        }.items()
    }


def metrics(*, targets: Sequence[frozenset[str]], answers: Sequence[frozenset[str]]) -> dict[str, float]:
    """mAP, and F1, precision and recall averaged over the labels."""
    sums = indicators(targets=targets, answers=answers).sum(axis=0)
    return {name: float(values[0]) for name, values in resampled_metrics(sums.reshape(1, -1).A).items()}

"""The metrics of a detection cell: several labels a clip, or none."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

#: The kinds of wrong answers, each a share of the clips.
ERRORS = ("missed", "added", "missed_and_added")


def indicators(
    *, targets: Sequence[frozenset[str]], answers: Sequence[frozenset[str]], labels: Sequence[str] = ()
) -> Any:
    """Per-clip indicators: label k is there, is answered, both; each kind of wrong answer; and a column of ones.

    They are a scipy CSR matrix float64 [clips, 3 * classes + 4]. The classes are the ``labels``, by default those that
    occur in the targets.
    """
    labels = labels or sorted(frozenset().union(*targets))
    true, answered = (
        np.array([[label in row for label in labels] for row in rows], dtype=np.float64).reshape(len(rows), len(labels))
        for rows in (targets, answers)
    )
    missed, added = (
        np.array([bool(whole - part) for whole, part in zip(wholes, parts, strict=True)])[:, None]
        for wholes, parts in ((targets, answers), (answers, targets))
    )
    errors = [missed & ~added, added & ~missed, missed & added]
    return csr_matrix(np.hstack([true, answered, true * answered, *errors, np.ones((len(true), 1))]))


def resampled_metrics(sums: np.ndarray) -> Mapping[str, np.ndarray]:
    """Metrics from sums of ``indicators``; all averages are macro over the classes that occur in the targets.

    ``map`` is scikit-learn's average precision with the yes or no answers as scores: at the one threshold precision
    and recall are those of the answers, at none they are the class's frequency and 1. beans-zero ranks tied scores
    by the order of the rows, so that its mAP changes when the file is shuffled (``map_by_rows``). ``missed``, ``added``
    and ``missed_and_added`` are shares of the clips: labels that are there are not answered, or others are, or both.
    Sums are float64 [resamples, 3 * classes + 4], metrics float64 [resamples] each.
    """
    classes = (sums.shape[1] - 4) // 3
    true, answered, hit = (sums[:, part * classes : (part + 1) * classes] for part in range(3))
    clips = sums[:, -1:]

    def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        return np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0)

    precision, recall = ratio(hit, answered), ratio(hit, true)
    average_precision = recall * precision + (1 - recall) * true / clips
    occurring = true > 0
    number = np.maximum(occurring.sum(axis=1), 1)
    averages = {
        "map": average_precision,
        "f1_macro": ratio(2 * hit, true + answered),
        "precision_macro": precision,
        "recall_macro": recall,
    }
    errors = sums[:, -4:-1] / clips
    return {name: (values * occurring).sum(axis=1) / number for name, values in averages.items()} | {
        name: errors[:, index] for index, name in enumerate(ERRORS)
    }


def metrics(*, targets: Sequence[frozenset[str]], answers: Sequence[frozenset[str]]) -> dict[str, float]:
    """mAP, F1, precision and recall averaged over the labels, kinds of errors; in the order of the file, both mAPs."""
    sums = indicators(targets=targets, answers=answers).sum(axis=0)
    of_sums = {name: float(values[0]) for name, values in resampled_metrics(sums.reshape(1, -1).A).items()}
    return of_sums | {"map_beans_zero": map_by_rows(targets=targets, answers=answers)}


def map_by_rows(*, targets: Sequence[frozenset[str]], answers: Sequence[frozenset[str]]) -> float:
    """The mAP that the beans-zero library prints for a file with these rows, in this order.

    For each label it ranks the clips answered with it first, then the others, both in the order of the rows, and
    averages the precision at each clip that has the label: rows in another order have another mAP.
    """
    found = []
    for label in sorted(frozenset().union(*targets)):
        there, answered = (np.array([label in row for row in rows]) for rows in (targets, answers))
        ranked = there[np.argsort(~answered, kind="stable")]
        precision = ranked.cumsum() / np.arange(1, len(ranked) + 1)
        found.append(precision[ranked].mean())
    return float(np.mean(found))

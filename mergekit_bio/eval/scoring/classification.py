"""The metrics of a classification cell: accuracy, both F1 averages, error breakdowns, baselines, confusion."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, precision_recall_fscore_support

from mergekit_bio.eval.label_map import NO_TARGET
from mergekit_bio.eval.scoring.matching import MAX_EDITS, NO_LABEL, NO_MATCH, Match


def metrics(*, targets: Sequence[str], answers: Sequence[str], asked: Sequence[str] = ()) -> dict[str, float]:
    """Accuracy and averages over the classes, by scikit-learn with ``zero_division=0``.

    ``*_weighted`` weighs the classes by their frequency (what the paper and beans-zero print as "F1 Score").
    ``f1_macro`` averages over every class that occurs as a target or an answer, so that no label, once answered, is a
    class with F1 0, and over the closed list that was ``asked``, where there is one. ``f1_macro_true`` averages over
    the targets' classes only. ``top1`` is beans-zero's "Top-1 Accuracy": a target with commas counts as the list of its
    parts. An answer is a label, ``NO_LABEL`` or ``NO_MATCH``.
    """
    precision, recall, f1, _ = precision_recall_fscore_support(targets, answers, average="weighted", zero_division=0)
    macro = partial(f1_score, targets, answers, average="macro", zero_division=0)
    right = sum(
        answer != NO_MATCH and answer in [part.strip() for part in target.split(",")]
        for target, answer in zip(targets, answers, strict=True)
    )
    return {
        "accuracy": float(accuracy_score(targets, answers)),
        "f1_weighted": float(f1),
        "f1_macro": float(macro(labels=sorted({*targets, *answers, *asked}))),
        "f1_macro_true": float(macro(labels=sorted(set(targets)))),
        "precision_weighted": float(precision),
        "recall_weighted": float(recall),
        "top1": right / len(targets),
    }


def error_rates(*, targets: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> tuple[float, float]:
    """The share of answers that are none of the labels, and of those that are one but the wrong one."""
    known = set(labels)
    out_of_set = sum(answer not in known for answer in answers)
    wrong = sum(answer in known and answer != target for target, answer in zip(targets, answers, strict=True))
    return out_of_set / len(targets), wrong / len(targets)


def baselines(targets: Sequence[str], asked: Sequence[str] = ()) -> dict[str, float]:
    """What always answering the most frequent label gives, and the expectation of a uniform guess.

    A guess is among the labels of the closed list that was ``asked``, else among those that the clips have.

    The F1 of a guess is taken from its expected counts, as in the paper's scripts. Every metric is given in the
    average of the curve it is drawn under. Nobody can answer ``NO_TARGET``: as a class it has F1 0.
    """
    counts = [count for target, count in sorted(Counter(targets).items()) if target != NO_TARGET]
    total, classes, classes_of_f1 = len(targets), len(set(asked)) or max(len(counts), 1), len({*targets, *asked})
    largest = max(counts, default=0)
    # The most frequent label answered everywhere: precision largest / total, recall 1; every other class has F1 0.
    majority_f1 = 2 * largest / (total + largest)
    # A guess gets count / classes right of the total / classes times that it names a class.
    guess_f1 = [2 * (count / classes) / (total / classes + count) for count in counts]
    return {
        "accuracy_majority": largest / total,
        "accuracy_random": sum(counts) / total / classes,
        "f1_weighted_majority": majority_f1 * largest / total,
        "f1_weighted_random": sum(f1 * count for f1, count in zip(guess_f1, counts, strict=True)) / total,
        "f1_macro_majority": majority_f1 / classes_of_f1,
        "f1_macro_random": sum(guess_f1) / classes_of_f1,
    }


def match_counts(*, matches: Sequence[Match], targets: Sequence[str]) -> dict[str, float | None]:
    """How the texts met the labels: exactly, within the limit, beyond it; and how often the nearest was a tie."""
    inexact = [match for match in matches if match.edits]
    tied = [pair for pair in zip(matches, targets, strict=True) if pair[0].edits and len(pair[0].nearest) > 1]
    return {
        "exact": len(matches) - len(inexact),
        "near": sum(match.edits <= MAX_EDITS for match in inexact),
        "far": sum(match.edits > MAX_EDITS for match in inexact),
        "ties": len(tied),
        "ties_with_target": sum(target in match.nearest for match, target in tied),
        "ties_near": sum(match.edits <= MAX_EDITS for match, _ in tied),
        "ties_near_with_target": sum(match.edits <= MAX_EDITS and target in match.nearest for match, target in tied),
        "mean_edits_inexact": sum(match.edits for match in inexact) / len(inexact) if inexact else None,
    }


def confusion(*, targets: Sequence[str], answers: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Rows and columns, and counts, int64 [labels, labels].

    The targets come first, sorted, then what else was answered: labels of clips that are not here, no label last.
    """
    labels = sorted(set(targets))
    labels += sorted(set(answers) - set(labels), key=lambda label: (label in (NO_LABEL, NO_MATCH), label))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found")  # and a matrix of one row is what is wanted
        return labels, confusion_matrix(targets, answers, labels=labels)


def indicators(*, targets: Sequence[str], answers: Sequence[str], listed: Sequence[str], labels: Sequence[str]) -> Any:
    """Per-clip indicators from whose sums ``resampled_metrics`` computes.

    Args:
        targets: The n true labels, and ``answers`` the n matched ones.
        listed: The n answers matched as lists, for the error breakdown of the paper.
        labels: What an answer may be. The same labels give the same columns, whatever was answered.

    Returns:
        scipy CSR matrix float64 [n, 3 * classes + 2]: is target k, answers k, both; out of set; in set but wrong. The
        classes are those of ``classes_of``.
    """
    column = {label: index for index, label in enumerate(classes_of(targets, answers, labels))}
    rows, known = np.arange(len(targets)), set(labels)

    def one_hot(values: Sequence[str], weights: np.ndarray) -> Any:
        columns = [column[value] for value in values]
        return csr_matrix((weights, (rows, columns)), shape=(len(rows), len(column)))

    everywhere = np.ones(len(rows))
    right = np.array([target == answer for target, answer in zip(targets, answers, strict=True)], dtype=np.float64)
    errors = [
        (text not in known, text in known and text != target) for target, text in zip(targets, listed, strict=True)
    ]
    parts = [one_hot(targets, everywhere), one_hot(answers, everywhere), one_hot(targets, right)]
    return hstack([*parts, csr_matrix(np.array(errors, dtype=np.float64))], format="csr")


def classes_of(targets: Sequence[str], answers: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The classes of ``indicators``: whatever can be a target or an answer."""
    return sorted({*labels, NO_LABEL, NO_MATCH, NO_TARGET, *targets, *answers})


def resampled_metrics(sums: np.ndarray, *, asked: np.ndarray | None = None) -> Mapping[str, np.ndarray]:
    """The metrics that get an interval, from sums of ``indicators``, float64 [resamples, 3 * classes + 2].

    They are float64 [resamples] each, equal to ``metrics`` of the resample. ``asked``, bool [classes], says which of
    the classes are on the closed list that was asked, if there is one.
    """
    classes = (sums.shape[1] - 2) // 3
    true, answered, hit = (sums[:, part * classes : (part + 1) * classes] for part in range(3))
    clips = true.sum(axis=1)
    occurs = true + answered
    f1 = np.divide(2 * hit, occurs, out=np.zeros_like(hit), where=occurs > 0)
    averaged = occurs > 0 if asked is None else (occurs > 0) | asked
    return {
        "accuracy": hit.sum(axis=1) / clips,
        "f1_weighted": (f1 * true).sum(axis=1) / clips,
        "f1_macro": f1.sum(axis=1) / averaged.sum(axis=1),
        "f1_macro_true": (f1 * (true > 0)).sum(axis=1) / (true > 0).sum(axis=1),
        "out_of_set": sums[:, -2] / clips,
        "in_set_wrong": sums[:, -1] / clips,
    }

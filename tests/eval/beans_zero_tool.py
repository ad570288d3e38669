"""What the beans-zero library's own command makes of a predictions file, in our words.

``beans-evaluate FILE.jsonl METRICS.json`` (earthspecies/beans-zero on GitHub) lets pandas read the lines, needs the
columns prediction, label and dataset_name, looks at one component of the benchmark after the other, refuses what is no
text, matches answers with the labels that occur, and prints weighted averages (detection: macro, and a mAP that ranks
clips answered alike by their order in the file).
"""

import math
from pathlib import Path

import numpy as np
import pandas
from sklearn.metrics import accuracy_score, precision_recall_fscore_support

from mergekit_bio.eval.components import components

Pairs = list[tuple[str, str]]


def edits(first: str, second: str) -> int:
    """Levenshtein's recurrence, written out."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        previous, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def read(path: Path) -> dict[str, Pairs]:
    """Component -> (prediction, label) of its rows, as the command reads them."""
    table = pandas.read_json(path, orient="records", lines=True)
    assert {"prediction", "label", "dataset_name"} <= set(table.columns)
    rows = {}
    for name in components():
        part = table[table["dataset_name"] == name]
        if not part.empty:
            rows[name] = list(zip(part["prediction"].to_list(), part["label"].to_list(), strict=True))
            assert all(isinstance(text, str) for pair in rows[name] for text in pair)
    assert sum(map(len, rows.values())) == len(table), "rows of no component are left out"
    return rows


def figures(path: Path) -> dict[str, dict[str, float]]:
    """Component -> what the command prints for it; nothing for captions."""
    scored = {"classification": _classification, "detection": _detection}
    tasks = {name: component.task for name, component in components().items()}
    return {name: scored[tasks[name]](pairs) for name, pairs in read(path).items() if tasks[name] in scored}


def _nearest(text: str, labels: set[str], limit: float = math.inf) -> str:
    text = text.split("<|end_of_text|>")[0]
    distances = {label: edits(text, label) for label in labels}
    smallest = min(distances.values())
    if smallest > limit:
        return "None"
    (label,) = (label for label, distance in distances.items() if distance == smallest)  # the test has no ties
    return label


def _classification(pairs: Pairs) -> dict[str, float]:
    labels = [label for _, label in pairs]
    answers = [_nearest(text, set(labels)) for text, _ in pairs]
    precision, recall, f1, _ = precision_recall_fscore_support(labels, answers, average="weighted", zero_division=0)
    top = np.mean([answer in map(str.strip, label.split(",")) for answer, label in zip(answers, labels, strict=True)])
    return {
        "Accuracy": accuracy_score(labels, answers),
        "Precision": precision,
        "Recall": recall,
        "F1 Score": f1,
        "Top-1 Accuracy": top,
    }


def _detection(pairs: Pairs) -> dict[str, float]:
    texts = {label for _, label in pairs} | {"None"}
    answers = [[_nearest(part.strip(), texts, limit=5) for part in text.split(",")] for text, _ in pairs]
    found = [", ".join(parts).split(", ") for parts in answers]
    there = [label.split(", ") for _, label in pairs]
    rows, average_precisions = [], []
    for label in {part for parts in there for part in parts} - {"None"}:
        truth, said = ([label in parts for parts in clips] for clips in (there, found))
        rows.append(precision_recall_fscore_support(truth, said, average="binary", zero_division=0)[:3])
        # Ranked by what was said, clips that are alike in the order of the file.
        ranked = [there_is for _, there_is in sorted(zip(said, truth, strict=True), key=lambda pair: not pair[0])]
        average_precisions.append(np.mean([sum(ranked[: n + 1]) / (n + 1) for n in range(len(ranked)) if ranked[n]]))
    precision, recall, f1 = np.mean(rows, axis=0)
    return {"F1": f1, "Precision": precision, "Recall": recall, "mAP": np.mean(average_precisions)}

"""F1 label by label, against scikit-learn and a bootstrap of its own."""

import csv

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support
from sklearn.preprocessing import MultiLabelBinarizer

from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.eval.report.build import build_report
from mergekit_bio.eval.report.files import _TABLES, _write_csv


def scored(pairs: list[tuple[str, str]], task: str) -> list:
    """The scores of the labels of a cell with these (label, answer)."""
    rows = tuple(
        Prediction(prediction=answer, label=label, id=f"{number:03}", dataset_name="night")
        for number, (label, answer) in enumerate(pairs)
    )
    cell = Cell(
        file="a.jsonl", dataset="night", task=task, query=0, checkpoint="a", rows=len(rows), alpha=0.5, run="night",
        predictions=rows, scorer="exact",
    )  # fmt: skip
    ((_, scores),) = build_report([cell]).sweeps[0].label_scores
    return scores


def classified(clips: int) -> list[tuple[str, str]]:
    generator = np.random.default_rng(3)
    labels = generator.choice(["Auk", "Bittern", "Crake", "Dunlin"], size=clips, p=[0.5, 0.3, 0.15, 0.05])
    wrong = generator.choice(["Auk", "Bittern", "Crake", "no idea"], size=clips)
    return [
        (str(label), str(label if right else other))
        for label, other, right in zip(labels, wrong, generator.random(clips) < 0.6, strict=True)
    ]


def test_precision_recall_and_f1_of_every_label_are_scikit_learns():
    pairs = classified(80)
    scores = scored(pairs, "classification")
    labels = [score.label for score in scores]
    assert labels == ["Auk", "Bittern", "Crake", "Dunlin"]
    precision, recall, f1, support = precision_recall_fscore_support(
        *zip(*pairs, strict=True), labels=labels, zero_division=0
    )
    assert [score.precision for score in scores] == pytest.approx(list(precision))
    assert [score.recall for score in scores] == pytest.approx(list(recall))
    assert [score.f1 for score in scores] == pytest.approx(list(f1))
    assert [score.clips for score in scores] == list(support)


def test_of_a_detection_too():
    several = ["Auk", "Auk, Crake", "Crake", "None", "Auk, Bittern, Crake", "None"] * 4
    answers = ["Auk", "Auk", "Crake, Auk", "Auk", "Bittern, Crake", "None"] * 4
    scores = scored(list(zip(several, answers, strict=True)), "detection")
    sets = [[[part for part in text.split(", ") if part != "None"] for text in texts] for texts in (several, answers)]
    encoder = MultiLabelBinarizer(classes=["Auk", "Bittern", "Crake"])
    expected = precision_recall_fscore_support(*map(encoder.fit_transform, sets), zero_division=0)
    ours = [[getattr(score, name) for score in scores] for name in ("precision", "recall", "f1", "clips")]
    assert np.array(ours) == pytest.approx(np.array(expected))


def test_the_interval_of_f1_is_that_of_a_bootstrap_over_clips_with_scikit_learn():
    pairs = np.array(classified(300))
    scores = scored([(str(label), str(answer)) for label, answer in pairs], "classification")
    generator = np.random.default_rng(11)
    resamples = np.array(
        [
            precision_recall_fscore_support(
                *pairs[generator.integers(0, len(pairs), len(pairs))].T,
                labels=[score.label for score in scores],
                zero_division=0,
            )[2]
            for _ in range(1000)
        ]
    )
    low, high = np.quantile(resamples, [0.025, 0.975], axis=0)
    assert [score.low for score in scores] == pytest.approx(list(low), abs=0.05)
    assert [score.high for score in scores] == pytest.approx(list(high), abs=0.05)


def test_a_label_with_one_clip_tells_nothing_however_it_was_answered():
    pairs = [("Auk", "Auk")] * 30 + [("Bittern", "Bittern")]
    auk, bittern = scored(pairs, "classification")
    assert (auk.low, auk.high) == (1.0, 1.0)
    # Every third resample has no clip of it.
    assert bittern.f1 == 1.0 and (bittern.low, bittern.high) == (0.0, 1.0)


def test_the_file_has_every_label_of_every_cell(make_run, tmp_path):
    report = build_report(read_runs([make_run()]))
    header, rows = _TABLES["labels.csv"]
    with _write_csv(tmp_path / "labels.csv", header, rows(report)).open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["alpha"], row["label"]) for row in found] == [
        (alpha, label)
        for alpha in ("0.0", "0.5", "1.0")
        for label in ("Coruro", "Great <b>Grig</b>", "Wild Boar & Sons")
    ]
    for item in report.scores:
        mine = [row for row in found if row["alpha"] == str(item.cell.alpha)]
        expected = precision_recall_fscore_support(
            item.targets, item.answers, labels=[row["label"] for row in mine], zero_division=0
        )
        assert [float(row["f1"]) for row in mine] == pytest.approx(list(expected[2]))
        assert sum(int(row["right"]) for row in mine) == sum(item.correct)

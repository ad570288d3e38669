"""An alpha that is chosen on some clips and scored on others."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from scipy.sparse import csr_matrix
from sklearn.metrics import accuracy_score, f1_score
from typer.testing import CliRunner

from mergekit_bio.cli.app import app
from mergekit_bio.errors import RunError
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.report.build import build_report, to_document
from mergekit_bio.eval.report.choosing import HALVES, SPLITS, choose_on_halves
from mergekit_bio.eval.report.comparison import Comparison
from mergekit_bio.eval.report.tables import sentences
from mergekit_bio.eval.scoring.score import Score

LABELS = np.array(["a", "b", "c"])
SKLEARN = {
    "accuracy": accuracy_score,
    "f1_weighted": lambda true, said: f1_score(true, said, average="weighted", zero_division=0),
    "f1_macro": lambda true, said: f1_score(true, said, average="macro", zero_division=0),
}


def sweep_cells(targets, answers: dict[float, object], dataset: str = "frogs") -> list[Cell]:
    """A sweep of cells: the answers at each alpha."""
    return [
        Cell(
            file=f"{alpha}.jsonl",
            dataset=dataset,
            task="classification",
            query=0,
            checkpoint=f"alpha {alpha}",
            rows=None,
            alpha=alpha,
            run=dataset,
            predictions=tuple(
                Prediction(prediction=str(text), label=str(label), id=f"{number:03d}", dataset_name=dataset)
                for number, (text, label) in enumerate(zip(said, targets, strict=True))
            ),
        )
        for alpha, said in answers.items()
    ]


def some_answers(generator, targets, right: dict[float, float]) -> dict[float, np.ndarray]:
    """Answers of which at each alpha about such a share is right."""
    return {
        alpha: np.where(generator.random(len(targets)) < share, targets, generator.choice(LABELS, len(targets)))
        for alpha, share in right.items()
    }


def test_each_half_is_answered_by_the_alpha_that_is_best_on_the_other():
    """sklearn over every way to split eight clips."""
    generator = np.random.default_rng(4)
    targets = generator.choice(LABELS, 8)
    answers = some_answers(generator, targets, {0.0: 0.2, 0.5: 0.5, 1.0: 0.4})
    (sweep,) = build_report(sweep_cells(targets, answers), scorer="exact").sweeps
    choices = {choice.metric: choice for choice in sweep.choices}
    for name, metric in SKLEARN.items():
        values, taken = [], []
        for half in itertools.combinations(range(8), 4):
            said = np.empty_like(targets)
            for on in (np.isin(np.arange(8), half), ~np.isin(np.arange(8), half)):
                best = max(answers, key=lambda alpha: metric(targets[on], answers[alpha][on]))
                said[~on] = answers[best][~on]
                taken.append(best)
            values.append(metric(targets, said))
        ours = choices[name]
        # Four standard errors of a mean over the splits that were drawn.
        assert ours.value == pytest.approx(np.mean(values), abs=4 * np.std(values) / math.sqrt(SPLITS))
        assert ours.gain == pytest.approx(ours.value - metric(targets, answers[1.0]))
        for alpha in answers:
            assert ours.alphas.get(alpha, 0.0) == pytest.approx(taken.count(alpha) / len(taken), abs=0.09)
        assert ours.optimistic == pytest.approx(max(metric(targets, said) for said in answers.values()))
        assert ours.low <= ours.value <= ours.high and ours.chosen_on == HALVES


def accuracy_of(sums):
    return {"accuracy": sums[:, 0] / sums[:, 1]}


def coin_score(alpha: float, right: np.ndarray) -> Score:
    """A cell that is right about some clips."""
    clips = len(right)
    return Score(
        cell=sweep_cells([], {alpha: []})[0], scorer="exact", ids=tuple(map(str, range(clips))), targets=("a",) * clips,
        answers=("",) * clips, correct=tuple(right), metrics={"accuracy": right.mean()},
        indicators=csr_matrix(np.c_[right, np.ones(clips)]), statistic=accuracy_of,
    )  # fmt: skip


def test_eleven_equal_alphas_look_better_than_they_are_and_the_chosen_one_does_not():
    """Every alpha is right half of the time: the best of them is as much above it as scipy's largest of eleven is."""
    generator = np.random.default_rng(1)
    clips, cells, sweeps = 40, 11, 150
    best, honest, covered = [], [], 0
    for _ in range(sweeps):
        right = generator.random((cells, clips)) < 0.5
        scores = [coin_score(number / 10, row) for number, row in enumerate(right)]
        values = {item.cell.checkpoint: item.metrics["accuracy"] for item in scores}
        comparison = Comparison(
            metric="accuracy", test="", clips=clips, best=max(values, key=values.__getitem__), best_interval=(0, 1),
            values=values, against=(), plateau=None,
        )  # fmt: skip
        (choice,) = choose_on_halves(scores, [comparison], seed=0, splits=100)
        best.append(choice.optimistic)
        honest.append(choice.value)
        covered += choice.low <= 0.5 <= choice.high
    right = np.arange(clips + 1)
    largest = np.diff(stats.binom.cdf(right, clips, 0.5) ** cells, prepend=0)
    expected = float((right * largest).sum() / clips)
    assert expected > 0.62
    assert np.mean(best) == pytest.approx(expected, abs=4 * np.std(best) / math.sqrt(sweeps))
    assert np.mean(honest) == pytest.approx(0.5, abs=4 * np.std(honest) / math.sqrt(sweeps))
    assert covered >= stats.binom.ppf(0.001, sweeps, 0.95)


def test_alpha_can_be_chosen_on_another_dataset():
    generator = np.random.default_rng(7)
    ours, theirs = generator.choice(LABELS, 60), generator.choice(LABELS, 50)
    here = some_answers(generator, ours, {0.0: 0.1, 0.5: 0.5, 1.0: 0.7})
    there = some_answers(generator, theirs, {0.0: 0.1, 0.5: 0.9, 1.0: 0.2})
    cells = sweep_cells(ours, here, "frogs") + sweep_cells(theirs, there, "birds")
    frogs, birds = build_report(cells, scorer="exact", choose_on="birds").sweeps
    for choice in frogs.choices:
        metric = SKLEARN[choice.metric]
        assert choice.chosen_on == "birds, query 0" and choice.alphas == {0.5: 1.0}
        assert choice.value == pytest.approx(metric(ours, here[0.5]))
        assert choice.optimistic == pytest.approx(metric(ours, here[1.0]))
        assert choice.gain == pytest.approx(metric(ours, here[0.5]) - metric(ours, here[1.0])) and choice.gain < 0
        assert choice.gain_low < choice.gain < choice.gain_high
    assert {choice.chosen_on for choice in birds.choices} == {HALVES}
    assert "Accuracy with alpha 0.5, chosen on birds, query 0: " in " ".join(sentences(frogs))


def test_an_alpha_that_was_not_asked_here_is_said_and_halves_choose():
    targets = np.array(["a", "b", "c"] * 4)
    wrong = np.roll(targets, 1)
    here = sweep_cells(targets, {0.0: wrong, 1.0: targets}, "frogs")
    there = sweep_cells(targets, {0.0: wrong, 0.5: targets}, "birds")
    report = build_report(here + there, scorer="exact", choose_on="birds")
    assert {choice.chosen_on for sweep in report.sweeps for choice in sweep.choices} == {HALVES}
    (note,) = report.notes
    assert note == (
        "frogs, query 0: no alpha that is best on birds, query 0 was asked here for Accuracy, F1 weighted, F1 macro; "
        "--choose-on birds does not count there, and each half of the clips chooses for the other"
    )


def test_what_is_a_dataset_and_a_run_is_taken_for_the_dataset():
    generator = np.random.default_rng(3)
    targets = generator.choice(LABELS, 30)
    answers = some_answers(generator, targets, {0.0: 0.2, 1.0: 0.8})
    in_run = [replace(cell, run="birds") for cell in sweep_cells(targets, answers, "frogs")]
    about = [replace(cell, run="mine") for cell in sweep_cells(targets, answers, "birds")]
    frogs, birds = build_report(in_run + about, scorer="exact", choose_on="birds").sweeps
    assert {choice.chosen_on for choice in frogs.choices} == {"mine, birds, query 0"}
    assert {choice.chosen_on for choice in birds.choices} == {HALVES}


def test_a_dataset_that_is_not_in_the_report_is_named_with_those_that_are():
    with pytest.raises(RunError, match=r"--choose-on owls: no such dataset or run in the report; there is frogs$"):
        build_report(sweep_cells(["a"], {0.0: ["a"]}), choose_on="owls")


def test_the_report_gives_both_figures(make_run):
    done = CliRunner().invoke(app, ["report", str(make_run()), "--json", "--tables-only"])
    (sweep,) = json.loads(done.stdout)["sweeps"]
    assert [choice["figure"] for choice in sweep["alpha_choices"]] == ["accuracy", "f1_weighted", "f1_macro"]
    for choice in sweep["alpha_choices"]:
        assert choice["optimistic"] == sweep["cells"][1]["figures"][choice["figure"]]
        assert choice["low"] < choice["value"] <= choice["optimistic"] + 1e-9
        assert choice["alphas"]["0.5"] > 0.9
    printed = " ".join(CliRunner().invoke(app, ["report", str(make_run()), "--tables-only"]).stdout.split())
    assert printed.count("with alpha chosen on the other half of the clips: ") == printed.count(" (0.5 in ") == 3


def test_checkpoints_without_alphas_and_single_cells_have_nothing_to_choose():
    (one,) = build_report(sweep_cells(["a", "b"], {0.5: ["a", "b"]}), scorer="exact").sweeps
    assert one.choices == () and to_document(build_report(sweep_cells(["a"], {0.5: ["a"]})))["sweeps"]

"""What a task's score costs in instructions kept, alpha by alpha."""

import csv
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
from matplotlib.collections import LineCollection, PathCollection
from rich.console import Console

from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.records.read import _with_distinct_names
from mergekit_bio.eval.report.build import build_report, to_document
from mergekit_bio.eval.report.files import write_report
from mergekit_bio.eval.report.tables import constraint_table, print_report
from mergekit_bio.eval.report.trade_off_figure import trade_off_figures

#: Alpha -> of 20 clips, how many are answered rightly, and with another name of the list; the others leave the list.
CLOSED = {0.0: (4, 16), 0.5: (12, 6), 1.0: (2, 2)}
#: Alpha -> of 20 prompts, how many are kept.
KEPT = {0.0: 18, 0.5: 15, 1.0: 5}
MERGED_FROM_A = {"checkpoint": {"merged_from": "a"}}


def no_bar(description: str, total: int):
    return nullcontext(lambda step: None)


def cells(run: str, task: str, answers: dict[float, list[tuple[str, str]]], **changes) -> list[Cell]:
    return [
        Cell(
            file=f"{run}{alpha}.jsonl", run=run, dataset=run, task=task, query=0, rows=None, alpha=alpha,
            checkpoint=f"alpha {alpha:.2f}",
            predictions=tuple(
                Prediction(prediction=text, label=label, id=f"{number:02d}", dataset_name=run)
                for number, (text, label) in enumerate(pairs)
            ),
            **changes,
        )
        for alpha, pairs in answers.items()
    ]  # fmt: skip


def closed(counts=CLOSED, **changes) -> list[Cell]:
    answers = {
        alpha: [("Owl", "Owl")] * right + [("Wren", "Owl")] * wrong + [("Mouse", "Owl")] * (20 - right - wrong)
        for alpha, (right, wrong) in counts.items()
    }
    return cells("closed", "classification", answers, **({"labels": ("Owl", "Wren"), "scorer": "exact"} | changes))


def instructions(**changes) -> list[Cell]:
    answers = {alpha: [("OWL", "upper_case")] * n + [("owl", "upper_case")] * (20 - n) for alpha, n in KEPT.items()}
    return cells("instructions", "instructions", answers, **changes)


def points(report) -> dict[float, tuple[float, float]]:
    (trade_off,) = report.trade_offs
    return {point.alpha: (point.score, point.kept) for point in trade_off.points}


def test_a_task_is_set_against_the_instructions_kept_at_the_same_alphas():
    assert points(build_report(closed() + instructions())) == {0.0: (0.2, 0.9), 0.5: (0.6, 0.75), 1.0: (0.1, 0.25)}
    assert points(build_report(closed() + instructions()[::2])) == {0.0: (0.2, 0.9), 1.0: (0.1, 0.25)}


def test_without_instructions_what_is_kept_is_the_closed_list():
    assert points(build_report(closed())) == {
        0.0: (0.2, pytest.approx(1.0)), 0.5: (0.6, pytest.approx(0.9)), 1.0: (0.1, pytest.approx(0.2)),
    }  # fmt: skip


def test_both_shares_come_with_the_bootstraps_interval():
    """Resampling n independent verdicts is drawing from a binomial."""
    for cells_, kept in ((closed() + instructions(), 15), (closed(), 18)):
        middle = build_report(cells_).trade_offs[0].points[1]
        for low, high, share in ((middle.low, middle.high, 12 / 20), (middle.kept_low, middle.kept_high, kept / 20)):
            drawn = scipy.stats.binom(20, share)
            assert (low, high) == pytest.approx((drawn.ppf(0.025) / 20, drawn.ppf(0.975) / 20), abs=0.051)


@pytest.mark.parametrize(
    "cells_",
    [
        closed(labels=()),  # an open question without instructions
        closed(identity={"decoding": "choice"}),  # the list cannot be left
        closed()[:1],
        closed()[:2] + instructions()[2:],
        instructions(),
        closed(identity=MERGED_FROM_A) + instructions(identity={"checkpoint": {"merged_from": "b"}}),
    ],
    ids=["open", "choice", "one alpha", "other alphas", "no task", "another model"],
)  # fmt: skip
def test_where_there_is_nothing_to_trade_there_is_no_trade_off(cells_):
    assert build_report(cells_).trade_offs == []


@pytest.mark.parametrize("task", ["detection", "captioning"])
def test_a_closed_list_is_kept_or_left_in_classification_only(task):
    answers = {alpha: [("Owl", "Owl"), ("Wren", "Owl, Wren"), ("None", "Owl")] for alpha in (0.0, 1.0)}
    listed = cells("listed", task, answers, labels=("Owl", "Wren"), scorer="exact")
    assert build_report(listed).trade_offs == []
    assert len(build_report(listed + instructions()).trade_offs) == 1


def test_points_are_over_the_clips_and_prompts_that_all_alphas_have():
    """The first three clips are right at every alpha but the last, the first three prompts are kept at every alpha."""
    few = closed()
    few[0] = replace(few[0], predictions=few[0].predictions[:3])
    assert points(build_report(few + instructions())) == {0.0: (1.0, 0.9), 0.5: (1.0, 0.75), 1.0: (2 / 3, 0.25)}
    few = instructions()
    few[2] = replace(few[2], predictions=few[2].predictions[:3])
    assert points(build_report(closed() + few)) == {0.0: (0.2, 1.0), 0.5: (0.6, 1.0), 1.0: (0.1, 1.0)}
    (_, sweep) = build_report(closed() + few).sweeps
    header, (*_, row) = constraint_table(sweep, "strict")
    assert header == ["constraint", "n", "0", "0.5", "1"] and row == ["upper_case", "3", "1.00", "1.00", "1.00"]


@pytest.mark.parametrize("scorer", ["paper", "beans-zero", "exact"])
def test_the_list_is_the_one_that_was_asked_whatever_the_scorer_goes_by(scorer):
    """No clip is of an ibis, which is on the list; a wrens is near a wren, and is not."""
    answers = {alpha: [("Owl", "Owl"), (text, "Wren")] for alpha, text in ((0.0, "Ibis"), (1.0, "Wrens"))}
    asked = cells("asked", "classification", answers, labels=("Owl", "Wren", "Ibis"))
    (trade_off,) = build_report(asked, scorer=scorer).trade_offs
    assert [point.kept for point in trade_off.points] == [1.0, 0.5]


def test_another_model_beside_a_sweep_changes_nothing_of_it():
    answers = {alpha: [("Wrens", "Wren"), ("Owl", "Owl")] * 5 for alpha in (0.0, 1.0)}
    ours = cells("p", "classification", answers, scorer="paper")
    more = tuple(replace(row, id=f"z{row.id}", label="Wrens") for row in ours[0].predictions[:2])
    other = replace(
        ours[0], checkpoint="other", alpha=None, identity={"baseline": True}, file="o.jsonl",
        predictions=ours[0].predictions + more,
    )  # fmt: skip
    (alone,), (beside,) = build_report(ours).sweeps, build_report([*ours, other]).sweeps
    assert [item.metrics for item in beside.scores] == [item.metrics for item in alone.scores]
    assert [item.cell.checkpoint for item in beside.other_models] == ["other"]


def test_another_model_makes_no_one_run_of_two():
    """Two searched with two beams, one greedily; the other model was asked the same."""
    asked = {"data": "d", "query": "q"}
    beams, greedy = ({**asked, "engine": "vllm", "generate": {"num_beams": number}} for number in (2, 1))
    ours = [replace(cell, folder=Path("a" if cell.alpha < 1 else "b"), identity=beams) for cell in closed()]
    other = replace(
        ours[0], checkpoint="other", alpha=None, folder=Path("c"), file="o.jsonl",
        identity={**asked, "engine": "openai", "generate": {"num_beams": 1}, "baseline": True},
    )  # fmt: skip
    assert {cell.run for cell in _with_distinct_names([*ours, other])} == {"closed"}
    two = [*ours[:2], replace(ours[2], identity=greedy)]
    assert {cell.run for cell in _with_distinct_names([*two, other])} == {"a", "b", "c"}


def test_tables_files_and_json_have_it(tmp_path):
    report = build_report(closed() + instructions())
    console = Console(record=True, width=80, file=(tmp_path / "shown").open("w"))
    print_report(report, console)
    shown = " ".join(console.export_text().split())
    assert (
        "closed, query 0, and instructions, query 0: accuracy and instructions kept, strict: alpha 0: 0.200, 0.900; "
        "alpha 0.5: 0.600, 0.750; alpha 1: 0.100, 0.250"
    ) in shown
    files = write_report(report, tmp_path, progress=no_bar)
    assert tmp_path / "figures/trade_off_closed_query_0_and_instructions_query_0.png" in files
    page = files[0].read_text()
    assert "Accuracy against instructions kept, strict" in page and "Kept, strict, by constraint" in page
    assert ",strict:upper_case,0.75," in (tmp_path / "scores.csv").read_text()
    with (tmp_path / "trade_offs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["alpha"], row["score"], row["kept"]) for row in rows] == [
        ("0.0", "0.2", "0.9"), ("0.5", "0.6", "0.75"), ("1.0", "0.1", "0.25"),
    ]  # fmt: skip
    assert (rows[0]["run"], rows[0]["kept_run"], rows[0]["figure"], rows[0]["kept_figure"]) == (
        "closed", "instructions", "accuracy", "strict",
    )  # fmt: skip
    (document,) = json.loads(json.dumps(to_document(report)))["trade_offs"]
    assert document["points"][1]["kept"] == 0.75 and document["task"]["run"] == "closed"


def test_the_figure_has_a_point_an_alpha_with_intervals_both_ways(tmp_path):
    for made in (closed() + instructions(), closed()):
        report = build_report(made)
        (trade_off,) = report.trade_offs
        (figure,) = trade_off_figures(report)
        axes, _ = figure.draw().axes  # and a bar of colours
        (dots,) = [drawn for drawn in axes.collections if isinstance(drawn, PathCollection)]
        assert [tuple(place) for place in dots.get_offsets()] == [(p.kept, p.score) for p in trade_off.points]
        assert {text.get_text() for text in axes.texts} == {"0", "0.5", "1"}
        bars = [drawn.get_segments() for drawn in axes.collections if isinstance(drawn, LineCollection)]
        across, up = [[tuple(map(tuple, segment)) for segment in segments] for segments in bars]
        for point, horizontal, vertical in zip(trade_off.points, across, up, strict=True):
            assert [x for x, _ in horizontal] == pytest.approx([point.kept_low, point.kept_high])
            assert [y for _, y in vertical] == pytest.approx([point.low, point.high])


def test_checkpoints_without_an_alpha_have_none():
    named = [replace(cell, alpha=None) for cell in closed()]
    assert build_report(named + instructions()).trade_offs == []

"""What a task's score costs in instructions kept, alpha by alpha."""

import csv
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import scipy.stats
from matplotlib.collections import LineCollection, PathCollection
from rich.console import Console

from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.report.build import build_report, to_document
from mergekit_bio.eval.report.files import write_report
from mergekit_bio.eval.report.tables import print_report
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
    assert "Accuracy against instructions kept, strict" in files[0].read_text()
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
        (axes,) = figure.draw().axes
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

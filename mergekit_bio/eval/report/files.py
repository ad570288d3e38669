"""The files of a report: the page, figures, CSV and JSON, in one folder that can be made again at any time."""

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mergekit_bio.errors import OutputError
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.run_directory import RECORD_NAME
from mergekit_bio.eval.report.build import Report, to_document
from mergekit_bio.eval.report.choosing import AlphaChoice
from mergekit_bio.eval.report.figures import ProgressBar, draw_figures
from mergekit_bio.eval.report.page import render_page
from mergekit_bio.eval.report.trade_off import Point, trade_off_document


def default_folder(runs: list[Path]) -> Path:
    """Where the report of these runs goes: into the run, if it is one of ours, else ``./report``."""
    return runs[0] / "report" if len(runs) == 1 and (runs[0] / RECORD_NAME).is_file() else Path("report")


def write_report(report: Report, folder: Path, *, progress: ProgressBar) -> list[Path]:
    """Write report.html, scores.json, six CSV files and figures/ (PNG and PDF); what is there is replaced.

    Returns:
        The files, the page first.

    Raises:
        OutputError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures = draw_figures(report, folder / "figures", progress=progress)
        document = folder / "scores.json"
        document.write_text(json.dumps(to_document(report), indent=1, ensure_ascii=False), encoding="utf-8")
        tables = [_write_csv(folder / name, header, rows(report)) for name, (header, rows) in _TABLES.items()]
        page = folder / "report.html"
        # The large ones are made again of what the page holds anyway.
        texts = {table.name: None if table.name in _LARGE else _text(table) for table in tables}
        page.write_text(render_page(report, figures, folder=folder, tables=texts, progress=progress), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {error.filename or folder}: {error.strerror}") from None
    return [page, document, *tables, *(file for figure in figures for file in figure.files)]


def _write_csv(path: Path, header: str, rows: Iterator[list[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(), *rows])
    return path


def _text(path: Path) -> str:
    with path.open(newline="", encoding="utf-8") as file:
        return file.read()


def _score_rows(report: Report) -> Iterator[list[Any]]:
    for item in report.scores:
        for name, value in item.metrics.items():
            baselines = [item.baselines.get(f"{name}_{kind}") for kind in ("majority", "random")]
            interval = item.intervals.get(name, (None, None))
            yield [*_of_cell(item.cell), item.scorer, len(item.ids), name, value, *interval, *baselines]


def _comparison_rows(report: Report) -> Iterator[list[Any]]:
    for sweep in report.sweeps:
        for item in sweep.comparisons:
            for row in item.against:
                yield [*_key(sweep.cell), item.metric, item.test, item.clips, item.best, *asdict(row).values()]


_CHOICE_COLUMNS = tuple(column.name for column in fields(AlphaChoice))


def _choice_rows(report: Report) -> Iterator[list[Any]]:
    for sweep in report.sweeps:
        for choice in sweep.choices:
            values = asdict(choice)
            values["alphas"] = " ".join(f"{alpha:g}:{share:g}" for alpha, share in choice.alphas.items())
            yield [*_key(sweep.cell), *values.values()]


_POINT_COLUMNS = tuple(column.name for column in fields(Point))


def _trade_off_rows(report: Report) -> Iterator[list[Any]]:
    for item in report.trade_offs:
        document = trade_off_document(item)
        for point in document["points"]:
            kept = [*document["kept"].values(), document["kept_figure"]]
            yield [*document["task"].values(), document["figure"], *kept, *point.values()]


def _label_rows(report: Report) -> Iterator[list[Any]]:
    for sweep in report.sweeps:
        for item, labels in sweep.label_scores:
            yield from ([*_of_cell(item.cell), *asdict(label).values()] for label in labels)


def _prediction_rows(report: Report) -> Iterator[list[Any]]:
    for item in report.scores:
        rows = zip(item.cell.predictions, item.answers, item.targets, item.correct, strict=True)
        for row, answer, target, correct in rows:
            yield [*_of_cell(item.cell), row.id, row.prediction, answer, target, int(correct)]


def _key(cell: Cell) -> list[Any]:
    return [cell.run, cell.dataset, cell.query]


def _of_cell(cell: Cell) -> list[Any]:
    return [*_key(cell), cell.checkpoint, cell.alpha]


_TABLES = {
    "scores.csv": (
        "run dataset query checkpoint alpha scorer clips figure value low high majority random", _score_rows
    ),
    "comparisons.csv": (
        "run dataset query figure test clips best checkpoint alpha difference low high p p_adjusted p_at_most",
        _comparison_rows,
    ),
    "choices.csv": (f"run dataset query figure {' '.join(_CHOICE_COLUMNS[1:])}", _choice_rows),
    "trade_offs.csv": (
        f"run dataset query figure kept_run kept_dataset kept_query kept_figure {' '.join(_POINT_COLUMNS)}",
        _trade_off_rows,
    ),
    "labels.csv": (
        "run dataset query checkpoint alpha label clips answered right precision recall f1 low high", _label_rows
    ),
    "predictions.csv": ("run dataset query checkpoint alpha id prediction answer target correct", _prediction_rows),
}  # fmt: skip
_LARGE = ("labels.csv", "predictions.csv")

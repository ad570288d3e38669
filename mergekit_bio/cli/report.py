"""``mergekit-bio report``: score finished runs, without a model."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergekit_bio.cli.console import JsonOption, Output, QuietOption

if TYPE_CHECKING:
    from mergekit_bio.eval.records.cell import Cell
    from mergekit_bio.eval.report.build import Report


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories, or folders of published beans_zero_eval_*.jsonl[.gz]."),
    ],
    scorer: Annotated[
        str | None,
        typer.Option(help="How answers become labels: paper, exact, ... [default: what the run asks for, else paper]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for CSV, JSON, figures and report.html. [default: RUN/report of one run, ./report]"),
    ] = None,
    label_map: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="CSV file (label,scientific) instead of the run's, for the datasets whose labels it has; at hand: "
            "watkins_corrected.csv, cbi_corrected.csv. Repeatable.",
        ),
    ] = None,
    choose_on: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A dataset or a run of the report: the others are scored with the alpha that is the best of it. "
            "[default: alpha is chosen on one half of the clips and scored on the other, many times]",
        ),
    ] = None,
    tables_only: Annotated[bool, typer.Option("--tables-only", help="Print, and write no file.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score runs again, compare every alpha with the best, and draw tables, figures and a page.

    \b
    Examples:
      mergekit-bio report runs/closed_set
      mergekit-bio report published/watkins --scorer exact --tables-only
      mergekit-bio report runs/validation runs/test --choose-on validation
    """
    from mergekit_bio.eval.recipe.shipped import find_label_map
    from mergekit_bio.eval.records.read import read_runs
    from mergekit_bio.eval.report.build import to_document
    from mergekit_bio.eval.report.files import default_folder
    from mergekit_bio.eval.report.tables import print_report

    output = Output(as_json=as_json, quiet=quiet)
    cells = read_runs(runs, [find_label_map(path) for path in label_map or []])
    folder = None if tables_only else out or default_folder(runs)
    scored, files = score_and_write(cells, output, scorer=scorer, choose_on=choose_on, folder=folder)
    output.result({**to_document(scored), "files": files}, lambda console: print_report(scored, console), files)
    if files:
        output.note(f"the page: {files[0]}")


def score_and_write(
    cells: "Sequence[Cell]",
    output: Output,
    *,
    scorer: str | None = None,
    choose_on: str | None = None,
    folder: Path | None,
) -> "tuple[Report, list[str]]":
    """Score cells, with what each run asks for by default, and write the report's files unless ``folder`` is None.

    The report comes with the names of its files, the page first.
    """
    from mergekit_bio.eval.report.build import build_report
    from mergekit_bio.eval.report.files import write_report

    with output.progress("scoring", len(cells), "cells") as advance:
        scored = build_report(cells, scorer=scorer, choose_on=choose_on, progress=advance)
    for note in scored.notes:
        output.note(f"note: {note}")
    files = [] if folder is None else write_report(scored, folder, progress=output.progress)
    return scored, [str(file) for file in files]

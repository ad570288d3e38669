"""``mergekit-bio report``: score finished runs, without a model."""

from pathlib import Path
from typing import Annotated

import typer

from mergekit_bio.cli.console import Output
from mergekit_bio.cli.options import JsonOption, QuietOption


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories, or folders of published beans_zero_eval_*.jsonl[.gz]."),
    ],
    scorer: Annotated[
        str | None,
        typer.Option(help="paper, beans-zero, exact or choice; the default is what the run asks for, else paper."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for CSV, JSON, figures and report.html. [default: RUN/report of one run, ./report]"),
    ] = None,
    label_map: Annotated[
        Path | None,
        typer.Option(help="CSV file (label,scientific) instead of the run's own; watkins_corrected.csv is at hand."),
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
    """
    from mergekit_bio.eval.cells import read_runs
    from mergekit_bio.eval.report import build_report, to_document
    from mergekit_bio.eval.report_files import default_folder, write_report
    from mergekit_bio.eval.report_tables import print_report
    from mergekit_bio.eval.shipped import find_label_map

    output = Output(as_json=as_json, quiet=quiet)
    cells = read_runs(runs, label_map and find_label_map(label_map))
    with output.progress("scoring", len(cells), "cells") as advance:
        scored = build_report(cells, scorer=scorer, progress=advance)
    for note in scored.notes:
        output.note(f"note: {note}")
    files: list[Path] = []
    if not tables_only:
        files = write_report(scored, out or default_folder(runs), progress=output.progress)
    output.result(
        {**to_document(scored), "files": [str(file) for file in files]},
        lambda console: print_report(scored, console),
        [str(file) for file in files],
    )
    if files:
        output.note(f"the page: {files[0]}")

"""The figures of a report, drawn into files."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from mergekit_bio.errors import MissingPackageError
from mergekit_bio.eval.report.build import Report
from mergekit_bio.eval.report.drawing import STYLE, Figure, font_families, save
from mergekit_bio.eval.report.side_by_side_figures import side_by_side_figures
from mergekit_bio.eval.report.sweep_figures import sweep_figures
from mergekit_bio.eval.report.trade_off_figure import trade_off_figures

#: What gives the figures that a report has the cells for, in the order of the page. Another kind is a function here.
FIGURES: tuple[Callable[[Report], Iterator[Figure]], ...] = (sweep_figures, trade_off_figures, side_by_side_figures)
#: Bytes of a file's name without its suffix; file systems take 255 at most, some of them 143.
LONGEST_NAME = 120
#: Opens a progress bar, given a description and a total.
ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def draw_figures(report: Report, folder: Path, *, progress: ProgressBar) -> list[Figure]:
    """Draw everything that the report has the cells for, into a folder that is made when missing.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise MissingPackageError("matplotlib", "eval", "drawing figures") from None
    folder.mkdir(parents=True, exist_ok=True)
    planned, drawn = figures_of(report), []
    with matplotlib.rc_context(STYLE | {"font.family": font_families()}), progress("drawing", len(planned)) as advance:
        for name, figure in zip(file_names(planned), planned, strict=True):
            files, svg = save(figure.draw(), folder / name)
            drawn.append(replace(figure, files=files, svg=svg))
            advance(1)
    return drawn


def figures_of(report: Report) -> list[Figure]:
    """The figures that the report has the cells for, not drawn yet."""
    return [figure for kind in FIGURES for figure in kind(report)]


def file_names(figures: Sequence[Figure]) -> list[str]:
    """For each figure a name without suffix that any file system takes and no other figure has."""
    names: dict[str, str] = {}  # as file systems compare them, some of which ignore case
    for figure in figures:
        title = "".join(c if c.isalnum() or c in "-." else "_" for c in figure.title).replace("__", "_")
        stem = f"{figure.kind}_{title}".encode()
        if len(stem) > LONGEST_NAME:
            stem = stem[: LONGEST_NAME - 9] + b"-" + hashlib.sha256(stem).hexdigest()[:8].encode()
        name = first = stem.decode(errors="ignore")
        number = 1
        while name.casefold() in names:
            number += 1
            name = f"{first}-{number}"
        names[name.casefold()] = name
    return [*names.values()]

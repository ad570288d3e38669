"""The figures of a report: PNG and PDF, one style, colours that colour-blind readers can tell apart."""

import hashlib
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_bio.errors import MissingPackageError
from mergekit_bio.eval.label_map import Target
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.report.build import TITLES, Report, Sweep, counted
from mergekit_bio.eval.report.tables import model
from mergekit_bio.eval.scoring.classification import confusion
from mergekit_bio.eval.scoring.score import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

# Okabe and Ito, "Color Universal Design" (2008).
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
MARKERS = "osD^vP"
ALPHA_AXIS: dict[str, Any] = {"xlabel": "merge strength alpha", "ylim": (0, None)}
GREY = "#6e6e6e"

STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "text.parse_math": False,  # a label may hold a dollar
    "pdf.fonttype": 42,  # text stays text: journals ask for it
    "savefig.bbox": "tight",
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
}
#: Drawn with where they are installed, the first that has the letter, for what DejaVu Sans has none of.
FALLBACK_FONTS = (
    "Noto Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans CJK KR", "Noto Sans JP", "Noto Sans SC",
    "Noto Sans KR", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai",
    "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Ethiopic", "Noto Sans Symbols2", "Source Han Sans",
    "IPAexGothic", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei", "Droid Sans Fallback", "Hiragino Sans", "PingFang SC",
    "Apple SD Gothic Neo", "Yu Gothic", "Microsoft YaHei", "Malgun Gothic", "Nirmala UI", "Leelawadee UI",
    "Arial Unicode MS", "Unifont",
)  # fmt: skip
#: Bytes of a file's name without its suffix; file systems take 255 at most, some of them 143.
LONGEST_NAME = 120
#: Opens a progress bar, given a description and a total.
ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
#: Labels of a confusion matrix are written out up to this many, its counts up to a third of that.
MOST_LABELS = 60


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure; ``kind`` and ``title`` make its file name.

    Attributes:
        kind: A key of ``_KINDS``.
        sweep: The sweep that it is about; None where it compares several.
        files: The PNG and the PDF, once it is drawn.
    """

    kind: str
    title: str
    draw: "Callable[[], Canvas]"
    sweep: Sweep | None = None
    files: tuple[Path, ...] = ()

    @property
    def caption(self) -> str:
        """What it shows; what a figure of one sweep shares with the others of that sweep is not repeated."""
        rest = self.title.removeprefix(self.sweep.title).removeprefix(", ") if self.sweep else self.title
        several = self.sweep and self.kind in ("sweep", "errors") and not self.sweep.same_clips
        return _KINDS[self.kind] + (f": {rest}" if rest else "") + (" (each over its own clips)" if several else "")


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
    planned, drawn = list(_figures(report)), []
    with matplotlib.rc_context(STYLE | {"font.family": _fonts()}), progress("drawing", len(planned)) as advance:
        for name, figure in zip(_file_names(planned), planned, strict=True):
            drawn.append(replace(figure, files=_save(figure.draw(), folder / name)))
            advance(1)
    return drawn


def _fonts() -> list[str]:
    """The style's font and those of ``FALLBACK_FONTS`` that are here; matplotlib goes on about others."""
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    return [*STYLE["font.sans-serif"], *(name for name in FALLBACK_FONTS if name in installed)]


def _file_names(figures: Sequence[Figure]) -> list[str]:
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


def _save(canvas: "Canvas", stem: Path) -> tuple[Path, Path]:
    files = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.pdf")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a box stands there; the page has the letter
        for file in files:
            # Without a date the same report gives the same bytes.
            canvas.savefig(file, metadata={"CreationDate": None} if file.suffix == ".pdf" else None)
    return files


#: The targets, as readers of figures call them.
NAMES: dict[Target, str] = {"label": "common", "scientific": "scientific", "combined": "combined"}
_KINDS = {
    "sweep": "Against alpha",
    "errors": "Error breakdown",
    "names": "Common, scientific and combined names",
    "runs": "Runs over the same clips",
    "wordings": "Wordings of one question",
    "confusion": "Confusion",
}


def _figures(report: Report) -> Iterator[Figure]:
    """Every figure there is something for."""
    for sweep in report.sweeps:
        if sweep.by_alpha and len(sweep.scores) > 1:
            yield Figure(kind="sweep", title=sweep.title, draw=partial(_draw_sweep, sweep), sweep=sweep)
        if sweep.cell.task in _ERRORS and len(sweep.scores) > 1:
            yield Figure(kind="errors", title=sweep.title, draw=partial(_draw_errors, sweep), sweep=sweep)
        if sweep.cell.task == "classification":
            best = sweep.best(sweep.main_metrics[0])
            if best is not None:
                title = f"{sweep.title}, {best.cell.checkpoint}"
                yield Figure(kind="confusion", title=title, draw=partial(_draw_confusion, best), sweep=sweep)
    for (run, dataset), members in groupby(report.sweeps, key=lambda sweep: (sweep.cell.run, sweep.cell.dataset)):
        title = run if run == dataset else f"{run}, {dataset}"
        asked = [sweep for sweep in members if sweep.cell.task == "classification"]
        by_target = {target: [sweep for sweep in asked if sweep.cell.target == target] for target in NAMES}
        yield from _names_figures(title, by_target)
        for target, wordings in by_target.items():
            if len(wordings) > 1 and all(len(sweep.scores) == 1 for sweep in wordings) and _same_clips(wordings):
                yield Figure(kind="wordings", title=_of_target(title, target), draw=partial(_draw_wordings, wordings))
    yield from _run_figures(report)


def _names_figures(title: str, by_target: Mapping[Target, Sequence[Sweep]]) -> Iterator[Figure]:
    """The three targets of one question; of several wordings the first of each, the second of each, and so on."""
    curves = ([sweep for sweep in sweeps if sweep.by_alpha and len(sweep.scores) > 1] for sweeps in by_target.values())
    together = [sweeps for sweeps in zip(*curves, strict=False) if _same_clips(sweeps)]
    for sweeps in together:
        queries = ", queries " + ", ".join(str(sweep.cell.query) for sweep in sweeps) if len(together) > 1 else ""
        named = dict(zip(by_target, sweeps, strict=True))
        yield Figure(kind="names", title=title + queries, draw=partial(_draw_names, named))


def _of_target(title: str, target: Target) -> str:
    """The title of a figure about one target where another may be about the next."""
    return title if target == "label" else f"{title}, {target} name"


def _same_clips(sweeps: Sequence[Sweep]) -> bool:
    """Whether the cells may be drawn side by side, though what they are asked about the clips may differ."""
    return len({item.ids for sweep in sweeps for item in sweep.scores}) == 1


def _run_figures(report: Report) -> Iterator[Figure]:
    """Runs that asked about the same clips, laid over one another (in-context examples or none, for one)."""
    alike: dict[Any, list[Sweep]] = {}
    for sweep in report.sweeps:
        if sweep.by_alpha and sweep.comparisons and sweep.same_clips and sweep.cell.task == "classification":
            key = (sweep.cell.dataset, sweep.cell.target, sweep.clips)
            alike.setdefault(key, []).append(sweep)
    together = {key: sweeps for key, sweeps in alike.items() if len({sweep.cell.run for sweep in sweeps}) > 1}
    titles = Counter((dataset, target) for dataset, target, _ in together)
    for (dataset, target, clips), sweeps in together.items():
        number = f", {counted(len(clips), 'clip')}" if titles[dataset, target] > 1 else ""
        yield Figure(kind="runs", title=_of_target(dataset, target) + number, draw=partial(_draw_runs, sweeps))


def _subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], squeeze: bool = True) -> Any:
    """A figure and its axes, without pyplot: no window system, nothing to close."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=figsize)
    return canvas, canvas.subplots(rows, columns, squeeze=squeeze)


def _curve(axes: "Axes", scores: Sequence[Score], metric: str, label: str, order: int = 0) -> None:
    colour = COLOURS[order % len(COLOURS)]
    alphas = [item.cell.alpha or 0.0 for item in scores]
    low, high = zip(*(item.intervals[metric] for item in scores), strict=True)
    axes.fill_between(alphas, low, high, color=colour, alpha=0.16, linewidth=0)
    values, marker = [item.metrics[metric] for item in scores], MARKERS[order % len(MARKERS)]
    axes.plot(alphas, values, color=colour, marker=marker, markerfacecolor="white", markeredgewidth=1.3, label=label)


def _baselines(axes: "Axes", sweep: Sweep, metric: str) -> None:
    baselines = sweep.baselines
    for kind, dashes in (("majority", (5, 2)), ("random", (1, 1.5))):
        if f"{metric}_{kind}" in baselines:
            axes.axhline(baselines[f"{metric}_{kind}"], color=GREY, linewidth=1.1, dashes=dashes, label=kind)


def draw_against_alpha(axes: "Axes", sweep: Sweep, metric: str) -> None:
    """A metric against alpha: its curve and intervals, the plateau around the best, the baselines."""
    comparison = sweep.comparison(metric)
    if comparison and comparison.plateau and comparison.plateau[0] < comparison.plateau[1]:
        axes.axvspan(*comparison.plateau, color=ORANGE, alpha=0.18, linewidth=0, label="plateau")
    _curve(axes, sweep.scores, metric, "value, 95% interval")
    _baselines(axes, sweep, metric)
    axes.set(title=TITLES[metric], **ALPHA_AXIS)


def _draw_sweep(sweep: Sweep) -> "Canvas":
    names = sweep.main_metrics
    canvas, grid = _subplots(1, len(names), figsize=(2.5 * len(names), 2.3), squeeze=False)
    for axes, name in zip(grid[0], names, strict=True):
        draw_against_alpha(axes, sweep, name)
    handles: dict[str, Any] = {}
    for axes in grid[0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    canvas.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return canvas


#: Task -> the metrics that are shares of wrong answers, from the bottom up, and what the legend calls them.
_ERRORS = {
    "classification": {"out_of_set": "out of set", "in_set_wrong": "in set, but wrong"},
    "detection": {"missed": "labels missed", "added": "labels added", "missed_and_added": "both"},
}


def _draw_errors(sweep: Sweep) -> "Canvas":
    canvas, axes = _subplots(figsize=(4.2, 2.4))
    places = range(len(sweep.scores))
    bottom = np.zeros(len(sweep.scores))
    looks = zip(_ERRORS[sweep.cell.task].items(), (ORANGE, BLUE, SKY), ("", "///", "..."), strict=False)
    for (metric, label), colour, hatch in looks:
        shares = [item.metrics[metric] for item in sweep.scores]
        axes.bar(
            places, shares, bottom=bottom, color=colour, label=label, width=0.75, hatch=hatch, edgecolor="white",
            linewidth=0,
        )  # fmt: skip
        bottom += shares
    axes.set_xticks(places, [model(sweep, item) for item in sweep.scores])
    if not sweep.by_alpha:
        axes.tick_params(axis="x", rotation=30)
    axes.set(xlabel=ALPHA_AXIS["xlabel"] if sweep.by_alpha else "", ylabel="share of the clips", ylim=(0, 1))
    axes.grid(axis="x", visible=False)
    canvas.legend(loc="outside upper center", ncols=3)
    return canvas


def _draw_names(named: Mapping[Target, Sweep]) -> "Canvas":
    """Left: accuracy against alpha for the three targets. Right: combined against the mean of the other two."""
    canvas, (left, right) = _subplots(1, 2, figsize=(6.6, 2.7))
    for order, (target, word) in enumerate(NAMES.items()):
        _curve(left, named[target].scores, "accuracy", word, order)
    left.set(title="Accuracy", **ALPHA_AXIS)
    left.legend(loc="upper left")
    values = [
        {item.cell.alpha: item.metrics["accuracy"] for item in named[target].scores if item.cell.alpha is not None}
        for target in NAMES
    ]
    alphas = sorted(set.intersection(*map(set, values)))
    trained = [(values[0][alpha] + values[1][alpha]) / 2 for alpha in alphas]
    combined = [values[2][alpha] for alpha in alphas]
    right.plot(trained, combined, color=GREY, linewidth=1)
    points = right.scatter(
        trained, combined, c=alphas, cmap="cividis", vmin=0, vmax=1, zorder=3, edgecolor="black", s=26
    )
    canvas.colorbar(points, ax=right, label="alpha")
    limit = max(trained + combined) * 1.05 or 1
    right.plot([0, limit], [0, limit], color=GREY, linewidth=0.8, dashes=(1, 1.5))
    right.set(xlabel="accuracy on the training tasks (mean)", ylabel="accuracy on combined names")
    right.set(title="Combined against trained")
    return canvas


def _draw_wordings(sweeps: Sequence[Sweep]) -> "Canvas":
    scores = [sweep.scores[0] for sweep in sweeps]
    canvas, axes = _subplots(figsize=(1.2 + 1.3 * len(scores), 2.6))
    values = np.array([item.metrics["accuracy"] for item in scores])
    low, high = np.array([item.intervals["accuracy"] for item in scores]).T
    errors = np.clip([values - low, high - values], 0, None)
    names = [_wording(item.cell) for item in scores]
    axes.bar(names, values, yerr=errors, width=0.6, color=SKY, edgecolor="black", linewidth=0.6, capsize=3)
    _baselines(axes, sweeps[0], "accuracy")
    axes.set(ylabel="Accuracy", ylim=(0, 1))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right")
    return canvas


def _wording(cell: Cell) -> str:
    """A query's first line where the run knows it, short enough to stand under a bar; else its number."""
    if not cell.query_text:
        return f"query {cell.query}"
    return textwrap.fill(textwrap.shorten(cell.query_text.splitlines()[0], 60, placeholder=" …"), 20)


def _draw_runs(sweeps: Sequence[Sweep]) -> "Canvas":
    names = sweeps[0].main_metrics[:2]
    canvas, grid = _subplots(1, len(names), figsize=(3.2 * len(names), 2.4), squeeze=False)
    for axes, name in zip(grid[0], names, strict=True):
        for order, sweep in enumerate(sweeps):
            _curve(axes, sweep.scores, name, textwrap.fill(sweep.title, 48), order)
        axes.set(title=TITLES[name], **ALPHA_AXIS)
    canvas.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return canvas


def _draw_confusion(item: Score) -> "Canvas":
    """Counts as shares of their row: how the clips of each label were answered; right answers are framed."""
    from matplotlib.patches import Rectangle

    labels, counts = confusion(targets=item.targets, answers=item.answers)
    answers, labels = labels, sorted(set(item.targets))
    counts = counts[: len(labels)]  # what else was answered is the label of no clip here
    side = min(7.0, max(2.6, 0.17 * len(labels) + 1.4))
    canvas, axes = _subplots(figsize=(side + 0.8, side))
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / totals.clip(min=1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.grid(visible=False)
    axes.set(xlabel="answer", ylabel="label (clips)")
    for place in range(len(labels)):
        axes.add_patch(Rectangle((place - 0.5, place - 0.5), 1, 1, fill=False, edgecolor=GREY, linewidth=0.6))
    if len(labels) <= MOST_LABELS:
        columns, rows = (
            [text or "no label" if len(text) <= 34 else text[:32] + "…" for text in part] for part in (answers, labels)
        )
        rows = [f"{text} ({total})" for text, total in zip(rows, totals[:, 0], strict=True)]
        size = 8 if len(labels) < 12 else 5.5
        widest = max(map(len, columns))
        axes.set_xticks(range(len(columns)), columns, rotation=90 if widest * len(columns) > 24 else 0, fontsize=size)
        axes.set_yticks(range(len(rows)), rows, fontsize=size)
    else:
        axes.set(xticks=[], yticks=[])
    if len(labels) <= MOST_LABELS // 3:
        for row, column in zip(*counts.nonzero(), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=7)
    canvas.colorbar(picture, ax=axes, label="share of the label's clips", shrink=0.7)
    return canvas

"""The figures that compare sweeps: datasets, the names that were asked for, wordings, runs over the same clips."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_bio.eval.label_map import Target
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.report.build import TITLES, Report, Sweep, counted
from mergekit_bio.eval.report.drawing import (
    ALPHA_AXIS,
    COLOURS,
    GREY,
    INK,
    MARKERS,
    PAPER,
    SKY,
    Figure,
    baselines,
    curve,
    head,
    legend_below,
    share_limit,
    subplots,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

#: The targets, as readers of figures call them.
NAMES: dict[Target, str] = {"label": "common", "scientific": "scientific", "combined": "combined"}
#: More curves in one panel cannot be told apart.
MOST_CURVES = len(COLOURS)


def side_by_side_figures(report: Report) -> Iterator[Figure]:
    """Every figure about several sweeps."""
    limit = share_limit(report.sweeps)
    asked = [sweep for sweep in report.sweeps if sweep.cell.task == "classification"]
    yield from _dataset_figures([sweep for sweep in asked if sweep.by_alpha and len(sweep.scores) > 1], limit)
    trios: dict[str, dict[Target, Sweep]] = {}
    for (run, dataset), members in groupby(asked, key=lambda sweep: (sweep.cell.run, sweep.cell.dataset)):
        title, here = run if run == dataset else f"{run}, {dataset}", list(members)
        by_target = {target: [sweep for sweep in here if sweep.cell.target == target] for target in NAMES}
        of_names = dict(_trios(title, by_target))
        trios |= of_names
        for name, trio in of_names.items():
            caption = "Common, scientific and combined names"
            yield Figure(kind="names", caption=f"{caption}: {name}", title=name, draw=partial(_draw_names, trio, limit))
        for target, wordings in by_target.items():
            if len(wordings) > 1 and all(len(sweep.scores) == 1 for sweep in wordings) and _same_clips(wordings):
                of_target, draw = _of_target(title, target), partial(_draw_wordings, wordings)
                yield Figure(
                    kind="wordings", caption=f"Wordings of one question: {of_target}", title=of_target, draw=draw
                )
    yield from _trio_figures(trios, limit)
    yield from _run_figures(report, limit)


def _of_target(title: str, target: Target) -> str:
    """The title of a figure about one target where another may be about the next."""
    return title if target == "label" else f"{title}, {target} name"


def _same_clips(sweeps: Sequence[Sweep]) -> bool:
    """Whether the cells may be drawn side by side, though what they are asked about the clips may differ."""
    return len({item.ids for sweep in sweeps for item in sweep.scores}) == 1


def _dataset_figures(curves: Sequence[Sweep], limit: float) -> Iterator[Figure]:
    """All sweeps in one figure, a panel a dataset."""
    panels: dict[str, list[Sweep]] = {}
    for sweep in curves:
        panels.setdefault(sweep.cell.dataset, []).append(sweep)
    if len(panels) > 1 and max(map(len, panels.values())) <= MOST_CURVES:
        title = ", ".join(panels)
        draw = partial(_draw_datasets, panels, limit)
        yield Figure(kind="datasets", caption=f"Datasets against alpha: {title}", title=title, draw=draw)


def _draw_datasets(panels: Mapping[str, Sequence[Sweep]], limit: float) -> "Canvas":
    canvas, grid = subplots(1, len(panels), figsize=(3.3 * len(panels), 3.6), squeeze=False, sharey=True)
    for axes, (dataset, sweeps) in zip(grid[0], panels.items(), strict=True):
        for order, sweep in enumerate(sweeps):
            curve(axes, sweep.scores, "accuracy", textwrap.fill(_told_apart(sweep, sweeps), 34), order)
        axes.set(title=textwrap.fill(f"{dataset}, {counted(len(sweeps[0].clips), 'clip')}", 44), **ALPHA_AXIS)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=1 + (len(sweeps) > 3))
    grid[0][0].set(ylim=(0, limit), ylabel="Accuracy")
    return canvas


def _told_apart(sweep: Sweep, sweeps: Sequence[Sweep]) -> str:
    """What a sweep is called among others of its dataset: its run, and the names or the query."""
    cell = sweep.cell
    parts = [] if cell.run == cell.dataset else [cell.run]
    of_run = [other for other in sweeps if other.cell.run == cell.run]
    if len({other.cell.target for other in of_run}) > 1:
        parts.append(f"{NAMES[cell.target]} name{'s' * (cell.target == 'combined')}")
    if len({other.cell.target for other in of_run}) < len(of_run) or not parts:
        parts.append(f"query {cell.query}")
    return ", ".join(parts)


def _trios(title: str, by_target: Mapping[Target, Sequence[Sweep]]) -> Iterator[tuple[str, dict[Target, Sweep]]]:
    """The three targets of one question; of several wordings the first of each, the second of each, and so on."""
    curves = ([sweep for sweep in sweeps if sweep.by_alpha and len(sweep.scores) > 1] for sweeps in by_target.values())
    together = [sweeps for sweeps in zip(*curves, strict=False) if _same_clips(sweeps)]
    for sweeps in together:
        queries = ", queries " + ", ".join(str(sweep.cell.query) for sweep in sweeps) if len(together) > 1 else ""
        yield title + queries, dict(zip(by_target, sweeps, strict=True))


def _draw_names(trio: Mapping[Target, Sweep], limit: float) -> "Canvas":
    """Left: accuracy against alpha for the three targets. Right: combined against the mean of the other two."""
    canvas, (left, right) = subplots(1, 2, figsize=(6.6, 2.7))
    for order, (target, word) in enumerate(NAMES.items()):
        curve(left, trio[target].scores, "accuracy", word, order)
    left.set(title="Accuracy", ylim=(0, limit), **ALPHA_AXIS)
    left.legend(loc="upper left")
    alphas, trained, combined = _trained_and_combined(trio)
    right.plot(trained, combined, color=GREY, linewidth=1)
    points = right.scatter(trained, combined, c=alphas, cmap="cividis", vmin=0, vmax=1, zorder=3, edgecolor=INK, s=26)
    canvas.colorbar(points, ax=right, label="alpha")
    _diagonal(right, max(trained + combined))
    cell, queries = trio["label"].cell, ", ".join(str(sweep.cell.query) for sweep in trio.values())
    head(canvas, [*trio.values()], f"{', '.join(dict.fromkeys((cell.run, cell.dataset)))}, queries {queries}")
    return canvas


def _trained_and_combined(trio: Mapping[Target, Sweep]) -> tuple[list[float], list[float], list[float]]:
    """The alphas that all three have; the mean accuracy of common and scientific names there, and that of both."""
    values = [
        {item.cell.alpha: item.metrics["accuracy"] for item in trio[target].scores if item.cell.alpha is not None}
        for target in NAMES
    ]
    alphas = sorted(set.intersection(*map(set, values)))
    common, scientific, combined = ([of_target[alpha] for alpha in alphas] for of_target in values)
    return alphas, [(first + second) / 2 for first, second in zip(common, scientific, strict=True)], combined


def _diagonal(axes: "Axes", largest: float) -> None:
    limit = largest * 1.05 or 1
    axes.plot([0, limit], [0, limit], color=GREY, linewidth=0.8, dashes=(1, 1.5))
    axes.set(xlabel="accuracy on the training tasks (mean)", ylabel="accuracy on combined names")
    axes.set(title="Combined against trained")


def _trio_figures(trios: Mapping[str, Mapping[Target, Sweep]], limit: float) -> Iterator[Figure]:
    """The three targets of several datasets in one: at alpha 1, and combined against trained."""
    if not 1 < len(trios) <= MOST_CURVES:
        return
    title = ", ".join(trios)
    draw = partial(_draw_trained, trios)
    yield Figure(kind="trained", caption=f"Combined against trained names: {title}", title=title, draw=draw)
    if all(sweep.scores[-1].cell.alpha == 1.0 for trio in trios.values() for sweep in trio.values()):
        caption = f"Names at alpha 1: {title}"
        yield Figure(kind="fine_tune", caption=caption, title=title, draw=partial(_draw_fine_tune, trios, limit))


def _draw_trained(trios: Mapping[str, Mapping[Target, Sweep]]) -> "Canvas":
    canvas, axes = subplots(figsize=(4.2, 3.9))
    largest = 0.0
    for order, (title, trio) in enumerate(trios.items()):
        alphas, trained, combined = _trained_and_combined(trio)
        colour, marker = COLOURS[order], MARKERS[order]
        axes.plot(
            trained, combined, color=colour, marker=marker, markerfacecolor=PAPER, markeredgewidth=1.3, label=title
        )
        for alpha, x, y in zip(alphas, trained, combined, strict=True):
            axes.annotate(
                f"{alpha:g}", (x, y), (0, 4), textcoords="offset points", ha="center", color=colour, fontsize=6.5
            )
        largest = max(largest, *trained, *combined)
    _diagonal(axes, largest)
    axes.legend(loc="upper left")
    head(canvas, [trio["combined"] for trio in trios.values()], f"{', '.join(trios)}: the numbers are alphas")
    return canvas


def _draw_fine_tune(trios: Mapping[str, Mapping[Target, Sweep]], limit: float) -> "Canvas":
    canvas, axes = subplots(figsize=(4.2, 2.7))
    width = 0.8 / len(trios)
    for order, (title, trio) in enumerate(trios.items()):
        scores = [trio[target].scores[-1] for target in NAMES]
        places = np.arange(len(NAMES)) + width * (order - (len(trios) - 1) / 2)
        values = np.array([item.metrics["accuracy"] for item in scores])
        low, high = np.array([item.intervals["accuracy"] for item in scores]).T
        hatch = ("", "///", "...", "xx", "\\\\", "++")[order]
        axes.bar(
            places,
            values,
            width=0.92 * width,
            color=COLOURS[order],
            hatch=hatch,
            edgecolor=PAPER,
            linewidth=0,
            label=title,
        )
        axes.errorbar(
            places, values, [values - low, high - values], color=INK, linewidth=0.8, capsize=2, linestyle="none"
        )
        for x, value, top in zip(places, values, high, strict=True):
            axes.annotate(f"{value:.2f}", (x, top), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    axes.set_xticks(range(len(NAMES)), [f"{word} names" for word in NAMES.values()])
    axes.set(ylabel="Accuracy", ylim=(0, limit * 1.08))
    axes.grid(axis="x", visible=False)
    axes.legend(loc="upper right")
    head(canvas, [trio["label"] for trio in trios.values()], f"{', '.join(trios)}: the fine-tune, alpha 1")
    return canvas


def _draw_wordings(sweeps: Sequence[Sweep]) -> "Canvas":
    scores = [sweep.scores[0] for sweep in sweeps]
    canvas, axes = subplots(figsize=(1.2 + 1.3 * len(scores), 2.6))
    values = np.array([item.metrics["accuracy"] for item in scores])
    low, high = np.array([item.intervals["accuracy"] for item in scores]).T
    errors = np.clip([values - low, high - values], 0, None)
    names = [_wording(item.cell) for item in scores]
    axes.bar(names, values, yerr=errors, width=0.6, color=SKY, edgecolor=INK, ecolor=INK, linewidth=0.6, capsize=3)
    baselines(axes, sweeps[0], "accuracy")
    axes.set(ylabel="Accuracy", ylim=(0, 1.03))
    axes.grid(axis="x", visible=False)
    legend_below(canvas, [axes])
    head(canvas, sweeps, f"{sweeps[0].cell.run}, {scores[0].cell.checkpoint}")
    return canvas


def _wording(cell: Cell) -> str:
    """A query's first line where the run knows it, short enough to stand under a bar; else its number."""
    if not cell.query_text:
        return f"query {cell.query}"
    return textwrap.fill(textwrap.shorten(cell.query_text.splitlines()[0], 60, placeholder=" …"), 20)


def _run_figures(report: Report, limit: float) -> Iterator[Figure]:
    """Runs that asked about the same clips, laid over one another (in-context examples or none, for one)."""
    alike: dict[Any, list[Sweep]] = {}
    for sweep in report.sweeps:
        if sweep.by_alpha and sweep.comparisons and sweep.same_clips and sweep.cell.task == "classification":
            key = (sweep.cell.dataset, sweep.cell.target, sweep.clips)
            alike.setdefault(key, []).append(sweep)
    together = {key: sweeps for key, sweeps in alike.items() if len({sweep.cell.run for sweep in sweeps}) > 1}
    titles = Counter((dataset, target) for dataset, target, _ in together)
    for (dataset, target, clips), sweeps in together.items():
        title = _of_target(dataset, target) + (
            f", {counted(len(clips), 'clip')}" if titles[dataset, target] > 1 else ""
        )
        draw = partial(_draw_runs, sweeps, limit)
        yield Figure(kind="runs", caption=f"Runs over the same clips: {title}", title=title, draw=draw)


def _draw_runs(sweeps: Sequence[Sweep], limit: float) -> "Canvas":
    names = sweeps[0].main_metrics[:2]
    canvas, grid = subplots(1, len(names), figsize=(3.2 * len(names), 2.4), squeeze=False, sharey=True)
    for axes, name in zip(grid[0], names, strict=True):
        for order, sweep in enumerate(sweeps):
            curve(axes, sweep.scores, name, textwrap.fill(sweep.title, 48), order)
        axes.set(title=TITLES[name], ylim=(0, limit), **ALPHA_AXIS)
    legend_below(canvas, grid[0], columns=2)
    head(canvas, sweeps, sweeps[0].cell.dataset)
    return canvas

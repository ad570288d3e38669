"""The figures about one sweep: its metrics against alpha, its ends and its best, its errors, its confusions."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mergekit_bio.eval.report.build import TITLES, Report, Sweep
from mergekit_bio.eval.report.choosing import HALVES
from mergekit_bio.eval.report.drawing import (
    ALPHA_AXIS,
    BLUE,
    GREY,
    INK,
    ORANGE,
    PAPER,
    SKY,
    Figure,
    baselines,
    curve,
    head,
    legend_below,
    line,
    share_limit,
    subplots,
)
from mergekit_bio.eval.report.other_models import draw_other_models
from mergekit_bio.eval.report.tables import model
from mergekit_bio.eval.scoring.classification import confusion
from mergekit_bio.eval.scoring.score import Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

#: Labels of a confusion matrix are written out up to this many, its counts up to a third of that.
MOST_LABELS = 60
#: Task -> the metrics that are shares of wrong answers, from the bottom up, and what the legend calls them.
_ERRORS = {
    "classification": {"out_of_set": "out of set", "in_set_wrong": "in set, but wrong"},
    "detection": {"missed": "labels missed", "added": "labels added", "missed_and_added": "both"},
}


def sweep_figures(report: Report) -> Iterator[Figure]:
    """Every figure about one sweep."""
    limit = share_limit(report.sweeps)
    for sweep in report.sweeps:
        task, clips = sweep.cell.task, "" if sweep.same_clips else " (each over its own clips)"
        of_sweep = partial(Figure, sweep=sweep, title=sweep.title)
        if sweep.by_alpha and len(sweep.scores) > 1:
            yield of_sweep(kind="sweep", caption=f"Against alpha{clips}", draw=partial(_draw_sweep, sweep, limit))
            if len(_ends(sweep, sweep.main_metrics[0])) > 1:
                caption = f"Base, best merge and fine-tune{clips}"
                yield of_sweep(kind="ends", caption=caption, draw=partial(_draw_ends, sweep, limit))
        if task in _ERRORS and len(sweep.scores) > 1:
            yield of_sweep(kind="errors", caption=f"Error breakdown{clips}", draw=partial(_draw_errors, sweep))
        if task == "classification":
            if sweep.by_alpha and len(sweep.scores) > 1:
                caption = f"Answers {_in_the_set(sweep)}{clips}"
                yield of_sweep(kind="in_set", caption=caption, draw=partial(_draw_in_set, sweep))
            best = sweep.best(sweep.main_metrics[0])
            if best is not None:
                where = best.cell.checkpoint
                yield Figure(
                    kind="confusion",
                    caption=f"Confusion: {where}",
                    title=f"{sweep.title}, {where}",
                    draw=partial(_draw_confusion, sweep, best),
                    sweep=sweep,
                )


def draw_against_alpha(axes: "Axes", sweep: Sweep, metric: str) -> None:
    """A metric against alpha: its curve and intervals, the plateau around the best, the baselines, other models."""
    comparison = sweep.comparison(metric)
    if comparison and comparison.plateau and comparison.plateau[0] < comparison.plateau[1]:
        axes.axvspan(*comparison.plateau, color=ORANGE, alpha=0.18, linewidth=0, label="plateau")
    curve(axes, sweep.scores, metric, "value, 95% interval")
    baselines(axes, sweep, metric)
    draw_other_models(axes, sweep, metric)
    if not any(item.metrics[metric] for item in sweep.scores):
        axes.text(0.5, 0.5, "0 at every alpha", transform=axes.transAxes, ha="center", color=GREY)
    axes.set(title=TITLES[metric], **ALPHA_AXIS)


def _draw_sweep(sweep: Sweep, limit: float) -> "Canvas":
    names, shares = sweep.main_metrics, sweep.cell.task != "captioning"
    canvas, grid = subplots(1, len(names), figsize=(2.5 * len(names), 2.3), squeeze=False, sharey=shares)
    for axes, name in zip(grid[0], names, strict=True):
        draw_against_alpha(axes, sweep, name)
        axes.set_ylim(0, limit if shares else None)
    legend_below(canvas, grid[0])
    head(canvas, [sweep])
    return canvas


def _ends(sweep: Sweep, metric: str) -> dict[str, Score]:
    """What the bars of a metric are called, and the cells that they show; the best may be one of the ends."""
    ends = {"alpha 0": 0.0, "alpha 1": 1.0}
    found = {name: item for name, alpha in ends.items() for item in sweep.scores if item.cell.alpha == alpha}
    best = sweep.best(metric)
    if best is not None and best not in found.values():
        found["the best between"] = best
    return {name: found[name] for name in ("alpha 0", "the best between", "alpha 1") if name in found}


def _draw_ends(sweep: Sweep, limit: float) -> "Canvas":
    """Bars for base, best merge and fine-tune, metric by metric; beside them what a choice on other clips gives."""
    names, shares = sweep.main_metrics, sweep.cell.task != "captioning"
    canvas, axes = subplots(figsize=(1.4 + 1.5 * len(names), 2.5))
    looks = {"alpha 0": (SKY, ""), "the best between": (BLUE, ""), "alpha 1": (ORANGE, "///")}
    known = sweep.baselines
    for place, name in enumerate(names):
        bars = _ends(sweep, name)
        for number, (label, item) in enumerate(bars.items()):
            x = place + 0.27 * (number - (len(bars) - 1) / 2)
            value, (low, high) = item.metrics[name], item.intervals[name]
            colour, hatch = looks[label]
            axes.bar(x, value, width=0.25, color=colour, hatch=hatch, edgecolor=PAPER, linewidth=0, label=label)
            axes.errorbar(
                x, value, [[max(0, value - low)], [max(0, high - value)]], color=INK, capsize=2, linewidth=0.8
            )
            text = f"{value:.2f}" + (f"\nat {item.cell.alpha:g}" if label == "the best between" else "")
            axes.annotate(text, (x, high), (0, 3), textcoords="offset points", ha="center", fontsize=7)
        for kind, dashes in (("majority", (5, 2)), ("random", (1, 1.5))):
            if f"{name}_{kind}" in known:
                level = [known[f"{name}_{kind}"]] * 2
                axes.plot([place - 0.45, place + 0.45], level, color=GREY, linewidth=1.1, dashes=dashes, label=kind)
        for choice in sweep.choices:
            if choice.metric == name:
                chosen = "other half" if choice.chosen_on == HALVES else choice.chosen_on
                axes.errorbar(
                    place + 0.47, choice.value, [[choice.value - choice.low], [choice.high - choice.value]], color=GREY,
                    marker="D", markerfacecolor=PAPER, capsize=2, linewidth=0.8, label=f"chosen on {chosen}",
                )  # fmt: skip
    axes.set_xticks(range(len(names)), [TITLES[name] for name in names])
    axes.set_ylim(0, limit * 1.1 if shares else None)
    axes.grid(axis="x", visible=False)
    legend_below(canvas, [axes], columns=3)
    head(canvas, [sweep])
    return canvas


def _draw_errors(sweep: Sweep) -> "Canvas":
    canvas, axes = subplots(figsize=(4.2, 2.4))
    places = range(len(sweep.scores))
    bottom = np.zeros(len(sweep.scores))
    looks = zip(_ERRORS[sweep.cell.task].items(), (ORANGE, BLUE, SKY), ("", "///", "..."), strict=False)
    for (metric, label), colour, hatch in looks:
        shares = [item.metrics[metric] for item in sweep.scores]
        axes.bar(
            places, shares, bottom=bottom, color=colour, label=label, width=0.75, hatch=hatch, edgecolor=PAPER,
            linewidth=0,
        )  # fmt: skip
        bottom += shares
    axes.set_xticks(places, [model(sweep, item) for item in sweep.scores])
    if not sweep.by_alpha:
        axes.tick_params(axis="x", rotation=30)
    axes.set(xlabel=ALPHA_AXIS["xlabel"] if sweep.by_alpha else "", ylabel="share of the clips", ylim=(0, 1.03))
    axes.grid(axis="x", visible=False)
    legend_below(canvas, [axes])
    head(canvas, [sweep])
    return canvas


def _in_the_set(sweep: Sweep) -> str:
    return "on the list" if sweep.asked else "that are a label"


def _draw_in_set(sweep: Sweep) -> "Canvas":
    """How far the answers keep to the labels, whether they are right or not."""
    canvas, axes = subplots(figsize=(4.2, 2.4))
    alphas = [item.cell.alpha or 0.0 for item in sweep.scores]
    kept = [1 - item.metrics["out_of_set"] for item in sweep.scores]
    intervals = [(1 - high, 1 - low) for low, high in (item.intervals["out_of_set"] for item in sweep.scores)]
    line(axes, alphas, kept, intervals, f"answers {_in_the_set(sweep)}, 95% interval")
    curve(axes, sweep.scores, "accuracy", "right answers, 95% interval", order=1)
    axes.set(ylabel="share of the clips", ylim=(0, 1.03), **ALPHA_AXIS)
    legend_below(canvas, [axes])
    head(canvas, [sweep])
    return canvas


def _draw_confusion(sweep: Sweep, item: Score) -> "Canvas":
    """Counts as shares of their row: how the clips of each label were answered; right answers are framed."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    labels, counts = confusion(targets=item.targets, answers=item.answers)
    answers, labels = labels, sorted(set(item.targets))
    counts = counts[: len(labels)]  # what else was answered is the label of no clip here
    side = min(7.0, max(2.6, 0.17 * len(labels) + 1.4))
    canvas, axes = subplots(figsize=(side + 0.8, side))
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / totals.clip(min=1)
    # From nothing to blue: what is behind the figure may be dark.
    colours = LinearSegmentedColormap.from_list("shares", [f"{BLUE}00", BLUE])
    picture = axes.imshow(shares, cmap=colours, vmin=0, vmax=1, interpolation="none")
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
            colour = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, counts[row, column], ha="center", va="center", color=colour, fontsize=7)
    canvas.colorbar(picture, ax=axes, label="share of the label's clips", shrink=0.7)
    head(canvas, [sweep], f"{sweep.title}, {item.cell.checkpoint}")
    return canvas

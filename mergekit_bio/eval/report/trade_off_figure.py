"""The figure of a trade-off: a task's score against the instructions kept, one point an alpha."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from mergekit_bio.eval.report.build import TITLES, Report
from mergekit_bio.eval.report.drawing import GREY, INK, Figure, head, subplots
from mergekit_bio.eval.report.trade_off import TradeOff

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


def trade_off_figures(report: Report) -> Iterator[Figure]:
    """One for each task and what was kept beside it."""
    for trade_off in report.trade_offs:
        yield Figure(
            kind="trade_off",
            caption=f"{TITLES[trade_off.metric]} against {trade_off.kept_title}",
            title=trade_off.title,
            draw=partial(_draw, trade_off),
            sweep=trade_off.task if trade_off.kept is trade_off.task else None,
        )


def draw_trade_off(axes: "Axes", trade_off: TradeOff) -> None:
    """The points in the order of alpha, joined, each with its alpha and its intervals both ways."""
    points = trade_off.points
    kept, scores = [point.kept for point in points], [point.score for point in points]
    axes.errorbar(
        kept,
        scores,
        # Of a share that no resample changes, the interval may lie a rounding error beside it.
        xerr=[
            [max(0.0, point.kept - point.kept_low) for point in points],
            [max(0.0, point.kept_high - point.kept) for point in points],
        ],
        yerr=[
            [max(0.0, point.score - point.low) for point in points],
            [max(0.0, point.high - point.score) for point in points],
        ],
        fmt="-",
        color=GREY,
        linewidth=0.9,
        elinewidth=0.7,
        zorder=2,
    )
    alphas = [point.alpha for point in points]
    axes.scatter(kept, scores, c=alphas, cmap="cividis", vmin=0, vmax=max(1.0, *alphas), edgecolor=INK, s=30, zorder=3)
    for point in points:
        place = (point.kept, point.score)
        axes.annotate(f"{point.alpha:g}", place, xytext=(5, 4), textcoords="offset points", fontsize=7, zorder=4)
    axes.set(xlabel=f"{trade_off.kept_title}, share", ylabel=TITLES[trade_off.metric], xlim=(0, 1.06), ylim=(0, None))


def _draw(trade_off: TradeOff) -> "Canvas":
    canvas, axes = subplots(figsize=(4.4, 3.2))
    draw_trade_off(axes, trade_off)
    axes.set_title("one point an alpha, 95% intervals", fontsize=8, color=GREY)
    same = trade_off.kept is trade_off.task
    head(canvas, [trade_off.task] if same else [trade_off.task, trade_off.kept], "" if same else trade_off.title)
    return canvas

"""Other people's models beside a sweep: a horizontal line each, since they have no alpha."""

from typing import TYPE_CHECKING

from mergekit_bio.eval.report.build import Sweep
from mergekit_bio.eval.report.drawing import GREEN, PURPLE, SKY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours and dashes of the models' lines, in turn; 12 models are told apart.
_COLOURS = (PURPLE, GREEN, SKY)
_DASHES = ("-.", (0, (3, 1, 1, 1, 1, 1)), (0, (6, 2)), (0, (8, 2, 1, 2)))


def draw_other_models(axes: "Axes", sweep: Sweep, metric: str) -> None:
    """A line at each model's metric, across all alphas, with its 95% interval."""
    for order, item in enumerate(sweep.other_models):
        colour, dashes = _COLOURS[order % len(_COLOURS)], _DASHES[order % len(_DASHES)]
        axes.axhspan(*item.intervals[metric], color=colour, alpha=0.12, linewidth=0)
        axes.axhline(item.metrics[metric], color=colour, linewidth=1.3, linestyle=dashes, label=item.cell.checkpoint)

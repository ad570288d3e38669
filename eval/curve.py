"""The README's picture: the paper's trade-off against alpha, scored and drawn anew from its published predictions.

    python eval/curve.py published/

"Model Merging Improves Zero-Shot Generalization in Bioacoustic Foundation Models", arXiv 2511.05171: 451 recordings of
40 species from families that fine-tuning never heard, and a list of the 40 names to choose from.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from mergekit_bio.errors import MergekitBioError
from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.eval.report.build import Sweep, build_report
from mergekit_bio.eval.report.drawing import STYLE
from mergekit_bio.eval.report.sweep_figures import draw_against_alpha

RUN = "closed_set_classification_all"
FIGURE = "f1_weighted"
PICTURE = Path(__file__).with_name("results") / "closed_set.png"


#: In the legend, for readers who have not read what the report calls them.
WORDS = {
    "value, 95% interval": "weighted F1, 95% interval",
    "plateau": "not told from the best",
    "majority": "always the most frequent name",
    "random": "names at random",
}


def draw(sweep: Sweep, file: Path) -> None:
    """F1 against alpha; the ends of the axis are the base and its fine-tune."""
    best, full, _ = sweep.improvement(FIGURE)
    base = sweep.scores[0]
    times = best.metrics[FIGURE] / full.metrics[FIGURE]
    notes = ((base, ""), (best, f": {times:.1f} times the fine-tune's"), (full, ""))
    ends = {0.0: "Llama-3.1-8B-Instruct", 1.0: "NatureLM-audio"}
    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(7.0, 2.9))
        axes = canvas.subplots()
        draw_against_alpha(axes, sweep, FIGURE)
        for item, text in notes:
            value, high = item.metrics[FIGURE], item.intervals[FIGURE][1]
            axes.annotate(
                f"{value:.2f}{text}", (item.cell.alpha, high), (0, 4), textcoords="offset points", ha="center"
            )
        alphas = [item.cell.alpha for item in sweep.scores]
        axes.set_xticks(alphas, [f"{alpha:g}\n{ends.get(alpha, '')}" for alpha in alphas])
        axes.set(xlim=(-0.05, 1.05), ylim=(0, 0.38), ylabel="weighted F1")
        axes.xaxis.labelpad = -8.5  # on one line with the ends
        axes.grid(axis="x", visible=False)
        labels = len(set(base.targets))
        axes.set_title(
            f"Naming {labels} species of unseen families, given their names ({len(base.ids)} recordings)", loc="left"
        )
        handles, names = axes.get_legend_handles_labels()
        canvas.legend(handles, [WORDS[name] for name in names], loc="outside lower center", ncols=4)
        canvas.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("published", type=Path, help=f"holds {RUN}/")
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    try:
        (sweep,) = build_report(read_runs([arguments.published / RUN]), scorer="paper").sweeps
    except MergekitBioError as error:
        sys.exit(f"error: {error}")
    draw(sweep, arguments.out)


if __name__ == "__main__":
    main()

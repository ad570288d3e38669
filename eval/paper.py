"""The paper's experiments: our scores beside the published ones.

    python eval/paper.py runs/closed_set runs/watkins      runs of ours: how close do they come?
    python eval/paper.py --exact published/                the published predictions: are they scored as published?

"Model Merging Improves Zero-Shot Generalization in Bioacoustic Foundation Models", arXiv 2511.05171.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from mergekit_bio.errors import MergekitBioError
from mergekit_bio.eval.cells import read_runs
from mergekit_bio.eval.report import TITLES, Sweep, build_report

FIGURES = ("accuracy", "f1_weighted", "f1_macro")
#: Folders of published predictions that are not called as our recipes.
RECIPES = {
    "closed_set_classification_2": "closed_set_2",
    "closed_set_classification_all": "closed_set",
    "zf-indiv": "zf_indiv",
}
#: Summation orders differ.
TOLERANCE = 1e-9

Published = dict[tuple[str, int, float | None], dict[str, float]]


def published_scores() -> Published:
    """(recipe, query, alpha) -> figure -> value."""
    cells = json.loads(Path(__file__).with_name("paper_scores.json").read_text())["cells"]
    return {(cell["recipe"], cell["query"], cell["alpha"]): cell for cell in cells}


def print_sweep(sweep: Sweep, published: Published) -> float:
    """Print a table; the value is the largest difference, infinite where nothing was published."""
    recipe = RECIPES.get(sweep.cell.run, sweep.cell.run)
    print(f"\n{sweep.title} ({len(sweep.scores[0].ids)} clips)")
    print("       " + "".join(f"{TITLES[name]:<18}" for name in FIGURES))
    print("alpha  " + "paper   ours      " * len(FIGURES))
    largest = 0.0
    for item in sweep.scores:
        theirs = published.get((recipe, sweep.cell.query, item.cell.alpha))
        line = f"{item.cell.checkpoint if item.cell.alpha is None else item.cell.alpha:<7}"
        for name in FIGURES:
            ours, (low, high) = item.figures[name], item.intervals[name]
            value = theirs[name] if theirs else math.nan
            largest = max(largest, abs(ours - value) if theirs else math.inf)
            line += f"{value:<8.4f}{ours:.4f}{'!' if value < low or value > high else ' '}   "
        print(line.rstrip())
    gain = sweep.improvement("f1_weighted")
    if gain:
        best, full, relative = gain
        ours = {name: f"{best.figures[name]:.3f} / {full.figures[name]:.3f}" for name in ("f1_weighted", "f1_macro")}
        print(
            f"best alpha {best.cell.alpha:g} over alpha 1: F1 weighted {ours['f1_weighted']} ({relative:+.1%}),"
            f" F1 macro {ours['f1_macro']} ({best.figures['f1_macro'] / full.figures['f1_macro'] - 1:+.1%})"
        )
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories or folders of published predictions")
    parser.add_argument("--scorer", default="paper", help="default: paper, as the published figures")
    parser.add_argument("--exact", action="store_true", help=f"exit with 1 unless every figure agrees to {TOLERANCE}")
    arguments = parser.parse_args()
    try:
        report = build_report(read_runs(arguments.runs), scorer=arguments.scorer)
    except MergekitBioError as error:
        sys.exit(f"error: {error}")
    published = published_scores()
    differences = [print_sweep(sweep, published) for sweep in report.sweeps]
    print("\n!: the published value is outside our 95% interval; nan: not published with predictions")
    print(f"largest difference: {max(differences):.2g}")
    if arguments.exact and max(differences) > TOLERANCE:
        sys.exit("not as published")


if __name__ == "__main__":
    main()

"""The paper's experiments: our scores beside the published ones.

    python eval/paper.py --run paper/                      merge, ask all of it (a GPU wanted), and compare
    python eval/paper.py runs/closed_set runs/watkins      runs of ours: how close do they come?
    python eval/paper.py --exact published/                the published predictions: are they scored as published?

"Model Merging Improves Zero-Shot Generalization in Bioacoustic Foundation Models", arXiv 2511.05171.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from mergekit_bio import merge
from mergekit_bio.errors import MergekitBioError
from mergekit_bio.eval.recipe.schema import load_recipe
from mergekit_bio.eval.recipe.shipped import find_recipe
from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.eval.report.build import TITLES, Sweep, build_report, counted
from mergekit_bio.eval.report.tables import gain_text
from mergekit_bio.eval.run.evaluate import evaluate
from mergekit_bio.eval.run.progress import SilentListener, Standing

#: The recipes of the experiments, and the strengths that they ask between them.
EXPERIMENTS = (
    "closed_set", "closed_set_2", "in_context_1", "in_context_5", "textual_in_context", "watkins", "cbi", "zf_indiv",
)  # fmt: skip
SWEEP = "0:1:0.1"
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


class Notes(SilentListener):
    """Tells what a user should know, and when a cell begins."""

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def standing(self, standing: Standing) -> None:
        if not standing.done:
            print(f"[{standing.number}/{standing.cells}] {standing.cell}", file=sys.stderr)


def run_experiments(folder: Path, arguments: argparse.Namespace) -> list[Path]:
    """Run every experiment in the folder, on one sweep of checkpoints; go on where an earlier start stopped."""
    sweep = arguments.model or folder / "checkpoints"
    if not sweep.is_dir():
        merge(alphas=[SWEEP], out=sweep)
    runs = []
    for name in arguments.only or EXPERIMENTS:
        asked = load_recipe(find_recipe(name)).recipe.merge
        done = evaluate(
            recipe=name,
            out=folder / name,
            models=[sweep / f"alpha-{alpha.label}" for alpha in asked.strengths],
            data=arguments.data,
            engine=arguments.engine,
            limit=arguments.limit,
            listener=Notes(),
        )
        runs.append(done.path)
    return runs


def print_sweep(sweep: Sweep, published: Published) -> float:
    """Print a table; the value is the largest difference, infinite where nothing was published."""
    recipe = RECIPES.get(sweep.cell.run, sweep.cell.run)
    print(f"\n{sweep.title} ({counted(len(sweep.clips), 'clip')})")
    print(("       " + "".join(f"{TITLES[name]:<18}" for name in FIGURES)).rstrip())
    print(("alpha  " + "paper   ours      " * len(FIGURES)).rstrip())
    largest = 0.0
    for item in sweep.scores:
        theirs = published.get((recipe, sweep.cell.query, item.cell.alpha))
        line = f"{item.cell.checkpoint if item.cell.alpha is None else item.cell.alpha:<7}"
        for name in FIGURES:
            ours, (low, high) = item.metrics[name], item.intervals[name]
            value = theirs[name] if theirs else math.nan
            largest = max(largest, abs(ours - value) if theirs else math.inf)
            line += f"{value:<8.4f}{ours:.4f}{'!' if value < low or value > high else ' '}   "
        print(line.rstrip())
    gain = sweep.improvement("f1_weighted")
    if gain:
        best, full, _ = gain
        weighted, macro = (
            [sweep.compared(name, item) for item in (best, full)] for name in ("f1_weighted", "f1_macro")
        )
        print(
            f"best alpha {best.cell.alpha:g} over alpha 1: F1 weighted {weighted[0]:.3f} / {weighted[1]:.3f}"
            f" ({gain_text(*weighted)}), F1 macro {macro[0]:.3f} / {macro[1]:.3f} ({gain_text(*macro)})"
        )
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories or folders of published predictions")
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="run the experiments there first")
    parser.add_argument("--only", action="append", choices=EXPERIMENTS, help="with --run: this one; repeatable")
    parser.add_argument("--model", type=Path, help="with --run: a sweep merged before; default: FOLDER/checkpoints")
    parser.add_argument("--data", help="with --run: where BEANS-Zero is; default: on the Hub")
    parser.add_argument("--engine", help="with --run: vllm or transformers")
    parser.add_argument("--limit", type=int, help="with --run: so many clips of each experiment")
    parser.add_argument("--scorer", default="paper", help="default: paper, as the published figures")
    parser.add_argument("--exact", action="store_true", help=f"exit with 1 unless every figure agrees to {TOLERANCE}")
    arguments = parser.parse_args()
    if not (arguments.runs or arguments.run):
        parser.error("name runs, or --run FOLDER")
    try:
        runs = arguments.runs + (run_experiments(arguments.run, arguments) if arguments.run else [])
        report = build_report(read_runs(runs), scorer=arguments.scorer)
    except MergekitBioError as error:
        sys.exit(f"error: {error}")
    published = published_scores()
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    differences = [print_sweep(sweep, published) for sweep in report.sweeps]
    print("\n!: the published value is outside our 95% interval; nan: not published with predictions")
    print(f"largest difference: {max(differences):.2g}")
    if arguments.exact and max(differences) > TOLERANCE:
        sys.exit("not as published")


if __name__ == "__main__":
    main()

"""The report on a terminal: a sweep over alpha fits 80 columns, names of checkpoints take what they need."""

from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mergekit_bio.eval.report.build import TITLES, Report, Sweep, counted
from mergekit_bio.eval.report.choosing import HALVES, AlphaChoice
from mergekit_bio.eval.report.comparison import shared_clips
from mergekit_bio.eval.report.trade_off import TradeOff
from mergekit_bio.eval.scoring.following import RULES, groups_of, groups_with
from mergekit_bio.eval.scoring.score import Score
from mergekit_bio.eval.scoring.scorers import SCORERS

SIGNIFICANCE = 0.05
#: What stands beside the main metrics, over three lines at most: the kinds of error, and for detection another mAP.
RATES = {
    "out_of_set": "Out\nof\nset",
    "in_set_wrong": "In\nset,\nwrong",
    "map_beans_zero": "mAP\n(beans-\nzero)",
    "missed": "Labels\nmissed",
    "added": "Labels\nadded",
    "missed_and_added": "Missed\nand\nadded",
}
#: Below this share at alpha 1 a gain is no ratio worth stating, and above so many times that share neither.
SMALLEST_BASE, LARGEST_GAIN = 0.01, 10


def print_report(report: Report, console: Console) -> None:
    """Print one table a sweep, and under it what it says in words."""
    for sweep in report.sweeps:
        console.print(_table(sweep))
        for rule in RULES if sweep.cell.task == "instructions" else ():
            for table in _by_constraint(sweep, rule):
                console.print(table)
        for sentence in sentences(sweep):
            console.print(Padding(Text(sentence), (0, 0, 0, 2), expand=False))
        console.print()
    for trade_off in report.trade_offs:
        console.print(Text(trade_off_sentence(trade_off)))
    console.print("[95% interval]: bootstrap over clips; *: best; =: not told from it (Holm, 5%)")
    for name in report.scorers:
        console.print(f"scorer {name}: {SCORERS[name].description}")


def _table(sweep: Sweep) -> Table:
    first = sweep.scores[0]
    table = Table(
        title=Text(f"{sweep.title} · {size(sweep)} · scorer {first.scorer}"),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )
    table.add_column(
        model_header(sweep) + ("" if sweep.same_clips else "\n(clips)"),
        overflow="fold",
        vertical="bottom",
        min_width=len("majority"),
    )
    metrics = sweep.main_metrics
    for name in metrics:
        table.add_column(TITLES[name], no_wrap=True, vertical="bottom", min_width=len("0.000 [.000, .000]="))
    rates = [name for name in RATES if name in first.metrics]
    for name in rates:
        table.add_column(RATES[name], justify="right", no_wrap=True)
    for item in (*sweep.scores, *sweep.other_models):
        values = [_with_interval(sweep, item, name) for name in metrics]
        clips = "" if sweep.same_clips else f" ({len(item.ids)})"
        table.add_row(Text(model(sweep, item) + clips), *values, *(f"{item.metrics[name]:.3f}" for name in rates))
    baselines = sweep.baselines
    for kind in ("majority", "random") if baselines else ():
        table.add_row(kind, *(f"{baselines[f'{name}_{kind}']:.3f}" for name in metrics), style="dim")
    return table


def _by_constraint(sweep: Sweep, rule: str) -> Iterator[Table]:
    """The shares of every group of prompts, a column a cell: eleven alphas fit 80 columns, other models stand below."""
    header, rows = constraint_table(sweep, rule)
    first_other = 2 + len(sweep.scores)
    for columns in (range(2, first_other), range(first_other, len(header))):
        if not columns:
            continue
        table = Table(
            title=TITLES[rule], title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
            padding=(0, 1, 0, 0),
        )  # fmt: skip
        for index in (0, 1, *columns):
            # An alpha's column is as wide as its shares; a model's name is broken.
            width = 0 if index in (1, *range(2, first_other)) else 10
            table.add_column(
                Text(header[index]), justify="right" if index else "left", vertical="bottom", min_width=width,
                overflow="fold",
            )  # fmt: skip
        for row in rows:
            texts = (row[index] for index in (0, 1, *columns))
            table.add_row(*(text.removeprefix("0") if "." in text else text for text in texts))
        yield table


def constraint_table(sweep: Sweep, rule: str) -> tuple[list[str], list[list[str]]]:
    """What share of the prompts kept their constraint, strictly or loosely: text-only, with audio, of each kind.

    Returns:
        The header, and for each group of prompts its name, how many all cells have, and each cell's share of those.
    """
    scores = (*sweep.scores, *sweep.other_models)
    shared = shared_clips(scores)
    header = ["constraint", "n", *(model(sweep, item) for item in scores)]
    # What each prompt's groups are, and which prompts each cell has kept.
    groups = {
        row.id: groups_with(row.label, row.audio is not None) for row in scores[0].cell.predictions if row.id in shared
    }
    verdicts = {"strict": ("kept",), "loose": ("kept", "kept loosely")}[rule]
    kept = [{key for key, answer in zip(item.ids, item.answers, strict=True) if answer in verdicts} for item in scores]
    rows = []
    for group in groups_of([row.label for row in scores[0].cell.predictions if row.id in shared])[1:]:
        members = [key for key, names in groups.items() if group in names]
        shares = [f"{sum(key in of_cell for key in members) / len(members):.2f}" for of_cell in kept if members]
        rows += [[group, str(len(members)), *shares]] if members else []
    return header, rows


def size(sweep: Sweep) -> str:
    """The clips or prompts that any cell has, and the labels that a classification chooses among."""
    labels = f", {counted(len(sweep.labels), 'label')}" if sweep.cell.task == "classification" else ""
    return f"{counted(len(sweep.clips), 'prompt' if sweep.cell.task == 'instructions' else 'clip')}{labels}"


def model_header(sweep: Sweep) -> str:
    """What ``model`` gives for the cells of a sweep."""
    return "alpha" if sweep.by_alpha else "model"


def model(sweep: Sweep, item: Score) -> str:
    """What the rows of tables call a cell: its alpha where that tells them apart, else its checkpoint."""
    return f"{item.cell.alpha:g}" if sweep.by_alpha and item.cell.alpha is not None else item.cell.checkpoint


def _with_interval(sweep: Sweep, item: Score, metric: str) -> str:
    # As narrow as its column: .824, and 1 rather than 1.000.
    low, high = (f"{bound:.3f}".removeprefix("0").replace("1.000", "1") for bound in item.intervals[metric])
    return f"{item.metrics[metric]:.3f} [{low}, {high}]{mark(sweep, item, metric)}"


def mark(sweep: Sweep, item: Score, metric: str) -> str:
    """``*`` for the best cell, ``=`` for one that cannot be told from it, a space otherwise and where all are 0."""
    comparison = sweep.comparison(metric)
    if comparison is None or item.cell.checkpoint not in comparison.values or not any(comparison.values.values()):
        return " "
    row = comparison.of(item.cell.checkpoint)
    return "*" if row is None else "=" if row.p_adjusted >= SIGNIFICANCE else " "


def p_text(p: float, *, at_most: bool) -> str:
    """A p-value as it is printed; ``at_most`` says that it is a bound."""
    return "<0.001" if p < 0.001 else f"{'at most ' if at_most else ''}{p:.3f}"


def sentences(sweep: Sweep) -> list[str]:
    """What the comparisons of a sweep come to, metric by metric."""
    found = []
    for name in sweep.main_metrics:
        comparison = sweep.comparison(name)
        best = sweep.best(name)
        if comparison is None or best is None:
            continue
        if not sweep.compared(name, best):
            found.append(f"{TITLES[name]}: 0 everywhere")
            continue
        test = comparison.test
        if not sweep.same_clips:
            test += f", {counted(comparison.clips, 'shared clip')}"
        where = f"alone at the top ({test})"
        if comparison.plateau and comparison.plateau[0] < comparison.plateau[1]:
            first, last = comparison.plateau
            where = f"on a plateau from {first:g} to {last:g} ({test})"
        elif any(row.p_adjusted >= SIGNIFICANCE for row in comparison.against):
            where = f"not told from every other ({test})"
        sentence = f"{TITLES[name]}: best at {'alpha ' if sweep.by_alpha else ''}{model(sweep, best)}, {where}"
        gain = sweep.improvement(name)
        if gain:
            top, full, _ = gain
            values = sweep.compared(name, top), sweep.compared(name, full)
            sentence += f"; {values[0]:.3f} against {values[1]:.3f} at alpha 1: {gain_text(*values)}"
            macro = [sweep.compared("f1_macro", item) for item in (top, full) if name == "f1_weighted"]
            if macro and macro[1]:
                sentence += f" (F1 macro there: {macro[0]:.3f} against {macro[1]:.3f}, {gain_text(*macro)})"
        found.append(sentence)
    return found + [_choice_sentence(choice) for choice in sweep.choices if choice.optimistic]


def trade_off_sentence(trade_off: TradeOff) -> str:
    """What a task's score costs in instructions kept: at both ends, and at the best alpha."""
    points = trade_off.points
    shown = dict.fromkeys((points[0], max(points, key=lambda point: point.score), points[-1]))
    said = "; ".join(f"alpha {point.alpha:g}: {point.score:.3f}, {point.kept:.3f}" for point in shown)
    return f"{trade_off.title}: {TITLES[trade_off.metric].lower()} and {trade_off.kept_title}: {said}"


def _choice_sentence(choice: AlphaChoice) -> str:
    """What the chosen alpha is worth on clips that it was not chosen on, beside the best of all on its own clips."""

    def text(value: float, low: float | None, high: float | None, sign: str = "") -> str:
        return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    often = sorted(choice.alphas.items(), key=lambda pair: -pair[1])
    value = f"{text(choice.value, choice.low, choice.high)} instead of {choice.optimistic:.3f}"
    gain = ""
    if choice.gain is not None:
        gain = f"; {text(choice.gain, choice.gain_low, choice.gain_high, '+')} over alpha 1"
    if choice.chosen_on == HALVES:
        shown = ", ".join(f"{alpha:g} in {share:.0%}" for alpha, share in often[:3] if share >= 0.01)
        return f"{TITLES[choice.metric]} with alpha chosen on the other half of the clips: {value}{gain} ({shown})"
    return f"{TITLES[choice.metric]} with alpha {often[0][0]:g}, chosen on {choice.chosen_on}: {value}{gain}"


def gain_text(value: float, base: float) -> str:
    """By how much a metric is above another: in per cent, or as a difference where the other is next to nothing."""
    if base < SMALLEST_BASE or value > LARGEST_GAIN * base:
        return f"{value - base:+.3f}"
    return f"{value / base - 1:+.1%}"

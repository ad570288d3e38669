"""The report as one HTML page that needs nothing beside it: tables, figures, every prediction, prompts, recordings."""

import base64
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_bio.errors import MissingPackageError
from mergekit_bio.eval.components import Task
from mergekit_bio.eval.report.build import TITLES, Report, Sweep, counted
from mergekit_bio.eval.report.figures import Figure, ProgressBar
from mergekit_bio.eval.report.recordings import Part, page_sources
from mergekit_bio.eval.report.tables import RATES, constraint_table, mark, model, model_header, p_text, sentences, size
from mergekit_bio.eval.scoring.following import RULES
from mergekit_bio.eval.scoring.score import KEPT, Score
from mergekit_bio.eval.scoring.scorers import SCORERS


def render_page(
    report: Report, figures: Sequence[Figure], *, folder: Path, tables: Mapping[str, str | None], progress: ProgressBar
) -> str:
    """The page's HTML, figures in it; recordings too many to be embedded are linked from ``folder``, where it stands.

    Args:
        report: What it shows.
        figures: Drawn.
        folder: Where the page stands.
        tables: The CSV files that it offers, by name: their text, or None where the page makes it of what it holds.
        progress: Opens a progress bar.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingPackageError("jinja2", "eval", "the HTML page") from None
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(_asset("page.html.j2"))
    rows = [row for item in report.scores for row in item.cell.predictions]
    heard = len({part for part in map(Part.of, rows) if part})
    with progress("recordings", heard) as advance:
        sources = page_sources(rows, folder, progress=advance)
    data = {
        **_predictions(report, sources),
        "labels": [_labels(sweep, first) for sweep, first in _first_cells(report)],
        "tables": {name: text for name, text in tables.items() if text is not None},
    }
    return template.render(
        title=", ".join(dict.fromkeys(sweep.cell.run for sweep in report.sweeps)),
        about=_about(report),
        scorers={name: SCORERS[name].description for name in report.scorers},
        notes=report.notes,
        overview=_overview(report),
        sweeps=[
            _sweep(sweep, [_figure(figure) for figure in figures if figure.sweep is sweep]) for sweep in report.sweeps
        ],
        figures=[_figure(figure) for figure in figures if figure.sweep is None],
        heard=bool(sources),
        outcomes=_outcomes({sweep.cell.task for sweep in report.sweeps}),
        tables=list(tables),
        style=_asset("page.css"),
        scripts=[_asset("spectrogram.js"), _asset("page.js")],
        data=_script(data),
    )


def _outcomes(tasks: Collection[Task]) -> list[str]:
    """What the page calls the outcomes of ``_outcome`` that can be filtered for."""
    of_labels, of_instructions = ("right", "in set, wrong", "out of set"), ("kept", "kept loosely", "not kept")
    if "instructions" not in tasks:
        return list(of_labels)
    if len(tasks) == 1:
        return list(of_instructions)
    return [f"{first}; {second}" for first, second in zip(of_labels, of_instructions, strict=True)]


def _asset(name: str) -> str:
    return Path(__file__).with_name("assets").joinpath(name).read_text(encoding="utf-8")


def _about(report: Report) -> str:
    answers = sum(len(item.ids) for item in report.scores)
    parts = counted(len(report.sweeps), "sweep"), counted(len(report.scores), "cell"), counted(answers, "answer")
    return f"{', '.join(parts)}; scored by mergekit-bio"


def _figure(figure: Figure) -> dict[str, str]:
    pdf = next(file for file in figure.files if file.suffix == ".pdf")
    return {
        "caption": figure.caption,
        "title": figure.title,
        "name": pdf.stem,
        "svg": figure.svg,
        "pdf": base64.b64encode(pdf.read_bytes()).decode(),
    }


def _overview(report: Report) -> dict[str, Any]:
    """A line a sweep: its first metric at both ends, at its best, and what the choice of alpha is worth."""
    rows = []
    for sweep in report.sweeps:
        metric = sweep.main_metrics[0]
        by_alpha = {item.cell.alpha: item for item in sweep.scores} if sweep.by_alpha else {}
        best, full = sweep.best(metric), by_alpha.get(1.0)
        values = [item.metrics[metric] for item in sweep.scores]
        height = 24 / max(1.0, *values)
        points = [(alpha, value) for alpha, value in zip(by_alpha, values, strict=False) if alpha is not None]
        choice = next((choice for choice in sweep.choices if choice.metric == metric and choice.optimistic), None)
        named = best is not None and any(values)
        rows.append(
            {
                "title": sweep.title,
                "metric": TITLES[metric],
                "spark": " ".join(f"{100 * alpha:.1f},{24 - height * value:.1f}" for alpha, value in points),
                "first": f"{values[0]:.3f}",
                "last": f"{values[-1]:.3f}",
                "cells": [
                    _with_interval(by_alpha[0.0], metric) if 0.0 in by_alpha else "",
                    f"{_with_interval(best, metric)} at {model(sweep, best)}" if best and named else "",
                    _with_interval(full, metric) if full else "",
                    f"{choice.value:.3f} [{choice.low:.3f}, {choice.high:.3f}]" if choice else "",
                ],
            }
        )
    return {"header": ["", "Over alpha", "Alpha 0", "Best", "Alpha 1", "Chosen on other clips"], "rows": rows}


def _with_interval(item: Score, metric: str) -> str:
    low, high = item.intervals[metric]
    return f"{item.metrics[metric]:.3f} [{low:.3f}, {high:.3f}]"


def _sweep(sweep: Sweep, figures: Sequence[dict[str, str]]) -> dict[str, Any]:
    """What the page shows about a sweep, as texts, and its figures."""
    metrics = sweep.main_metrics
    rates = [name for name in RATES if name in sweep.scores[0].metrics]
    first = sweep.scores[0]
    clips = [] if sweep.same_clips else ["Clips"]
    baselines = sweep.baselines
    compared = {name: comparison for name in metrics if (comparison := sweep.comparison(name))}

    def cells(item: Any) -> list[str]:
        texts = []
        for name in metrics:
            texts.append(f"{_with_interval(item, name)} {mark(sweep, item, name)}".strip())
            if name in compared:
                row = compared[name].of(item.cell.checkpoint)
                texts.append("" if row is None else p_text(row.p_adjusted, at_most=row.p_at_most))
        return texts + [f"{item.metrics[name]:.3f}" for name in rates] + [str(len(item.ids)) for _ in clips]

    header = [text for name in metrics for text in (TITLES[name], *(["p"] if name in compared else []))]
    blank = [""] * (len(rates) + len(clips))
    return {
        "title": sweep.title,
        "about": f"{size(sweep)}, scorer {first.scorer}",
        "query": sweep.cell.query_text,
        "prompt": first.cell.predictions[0].prompt,
        "header": [model_header(sweep), *header, *(TITLES[name] for name in rates), *clips],
        "rows": [(model(sweep, item), cells(item)) for item in (*sweep.scores, *sweep.other_models)],
        "baselines": [
            (
                kind,
                [t for n in metrics for t in (f"{baselines[f'{n}_{kind}']:.3f}", *[""] * (n in compared))] + blank,
            )
            for kind in ("majority", "random")
            if baselines
        ],
        "constraints": [(TITLES[rule], *constraint_table(sweep, rule)) for rule in RULES]
        if sweep.cell.task == "instructions"
        else [],
        "sentences": sentences(sweep),
        "figures": figures,
        "labels": len(sweep.label_scores[0][1]) if sweep.label_scores else 0,
    }


def _predictions(report: Report, sources: Mapping[Part, str]) -> dict[str, Any]:
    """Every answer, in columns: what stands in many rows is a number there, and stands once beside them."""
    texts, clips, prompts = _Numbers(), _Numbers(), _Numbers()
    audio = {part: number for number, part in enumerate(sources)}
    columns: dict[str, list[int]] = {name: [] for name in ("cell", "clip", "prediction", "answer", "outcome", "prompt")}
    cells = []
    for number, sweep in enumerate(report.sweeps):
        labels, task = sweep.labels, sweep.cell.task
        for item in (*sweep.scores, *sweep.other_models):
            cells.append([number, model(sweep, item), item.cell.checkpoint, item.cell.alpha])
            for row, answer, target, correct in zip(
                item.cell.predictions, item.answers, item.targets, item.correct, strict=True
            ):
                outcome = _outcome(task, answer, correct=correct, labels=labels)
                heard = Part.of(row)
                clip = (row.id, texts[target], -1 if heard is None else audio.get(heard, -1))
                values = (len(cells) - 1, clips[clip], texts[row.prediction], texts[answer], outcome)
                for column, value in zip(columns.values(), values, strict=False):
                    column.append(value)
                columns["prompt"].append(-1 if row.prompt is None else prompts[row.prompt])
    return {
        "sweeps": [[sweep.title, sweep.cell.run, sweep.cell.dataset, sweep.cell.query] for sweep in report.sweeps],
        "cells": cells,
        "texts": [*texts],
        "clips": [*clips],
        "prompts": [*prompts],
        "audio": [*sources.values()],
        "rows": columns,
    }


def _first_cells(report: Report) -> Iterator[tuple[Sweep, int]]:
    """Each sweep with the number of its first cell."""
    first = 0
    for sweep in report.sweeps:
        yield sweep, first
        first += len(sweep.scores) + len(sweep.other_models)


def _labels(sweep: Sweep, first_cell: int) -> dict[str, Any] | None:
    """The scores of every label, a column a number; None for a task without labels."""
    if not sweep.label_scores:
        return None
    best = sweep.best(sweep.main_metrics[0])
    cells = [
        [
            first_cell + number,
            *([getattr(score, name) for score in scores] for name in ("clips", "answered", "right")),
            *([round(getattr(score, name), 6) for score in scores] for name in ("f1", "low", "high")),
        ]
        for number, (_, scores) in enumerate(sweep.label_scores)
    ]
    return {
        "labels": [score.label for score in sweep.label_scores[0][1]],
        "by_alpha": sweep.by_alpha,
        "best": 0 if best is None else sweep.scores.index(best),
        "cells": cells,
    }


def _outcome(task: Task, answer: str, *, correct: bool, labels: Collection[str]) -> int:
    """0 right or kept, 1 a wrong label or kept loosely, 2 no label or not kept, 3 a caption."""
    if task == "captioning":
        return 3
    if correct:
        return 0
    if task == "instructions":
        return 1 if answer == KEPT[False, True] else 2
    return 1 if (answer if task == "detection" else answer in labels) else 2


class _Numbers(dict[Any, int]):
    """Numbers what it is asked for, from 0, in the order of first mention."""

    def __missing__(self, key: Any) -> int:
        self[key] = number = len(self)
        return number


def _script(data: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")

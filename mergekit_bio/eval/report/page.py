"""The report as one HTML page that needs nothing beside it: tables, figures, every prediction, prompts, recordings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_bio.errors import MissingPackageError
from mergekit_bio.eval.report.build import TITLES, Report, Sweep
from mergekit_bio.eval.report.figures import Figure, ProgressBar
from mergekit_bio.eval.report.recordings import Part, page_sources
from mergekit_bio.eval.report.tables import RATES, constraint_table, mark, model, model_header, p_text, sentences, size
from mergekit_bio.eval.scoring.following import RULES
from mergekit_bio.eval.scoring.scorers import SCORERS


def render_page(report: Report, figures: Sequence[Figure], *, folder: Path, progress: ProgressBar) -> str:
    """The page's HTML, figures in it; recordings too many to be embedded are linked from ``folder``, where it stands.

    Raises:
        MissingPackageError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError:
        raise MissingPackageError("jinja2", "eval", "the HTML page") from None
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    )
    runs = list(dict.fromkeys(sweep.cell.run for sweep in report.sweeps))
    pictures = [(figure.sweep, figure.caption, figure.svg) for figure in figures]
    rows = [row for item in report.scores for row in item.cell.predictions]
    heard = len({part for part in map(Part.of, rows) if part})
    with progress("recordings", heard) as advance:
        sources = page_sources(rows, folder, progress=advance)
    return template.render(
        title=", ".join(runs),
        scorers={name: SCORERS[name].description for name in report.scorers},
        notes=report.notes,
        sweeps=[_sweep(sweep, [rest for owner, *rest in pictures if owner is sweep]) for sweep in report.sweeps],
        figures=[rest for owner, *rest in pictures if owner is None],
        data=_script(_predictions(report, sources)),
    )


def _sweep(sweep: Sweep, pictures: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What the page shows about a sweep, as texts; ``pictures`` are its captions and SVGs."""
    metrics = sweep.main_metrics
    rates = [name for name in RATES if name in sweep.scores[0].metrics]
    first = sweep.scores[0]
    clips = [] if sweep.same_clips else ["Clips"]
    baselines = sweep.baselines
    compared = {name: comparison for name in metrics if (comparison := sweep.comparison(name))}

    def cells(item: Any) -> list[str]:
        texts = []
        for name in metrics:
            low, high = item.intervals[name]
            texts.append(f"{item.metrics[name]:.3f} [{low:.3f}, {high:.3f}] {mark(sweep, item, name)}".strip())
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
        "pictures": pictures,
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
            cells.append([number, model(sweep, item)])
            for row, answer, target, correct in zip(
                item.cell.predictions, item.answers, item.targets, item.correct, strict=True
            ):
                # 0 right, 1 a wrong label, 2 no label, 3 a caption
                is_label = bool(answer) if task == "detection" else answer in labels
                outcome = 3 if task == "captioning" else 0 if correct else 1 if is_label else 2
                heard = Part.of(row)
                clip = (row.id, texts[target], -1 if heard is None else audio.get(heard, -1))
                values = (len(cells) - 1, clips[clip], texts[row.prediction], texts[answer], outcome)
                for column, value in zip(columns.values(), values, strict=False):
                    column.append(value)
                columns["prompt"].append(-1 if row.prompt is None else prompts[row.prompt])
    return {
        "sweeps": [sweep.title for sweep in report.sweeps],
        "cells": cells,
        "texts": [*texts],
        "clips": [*clips],
        "prompts": [*prompts],
        "audio": [*sources.values()],
        "rows": columns,
    }


class _Numbers(dict[Any, int]):
    """Numbers what it is asked for, from 0, in the order of first mention."""

    def __missing__(self, key: Any) -> int:
        self[key] = number = len(self)
        return number


def _script(data: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")

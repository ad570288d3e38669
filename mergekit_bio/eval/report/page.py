"""The report as one HTML page that needs nothing beside it: tables, figures, every prediction, prompts, recordings."""

import base64
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from mergekit_bio.errors import MissingPackageError
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.report.build import TITLES, Report, Sweep
from mergekit_bio.eval.report.figures import Figure
from mergekit_bio.eval.report.tables import RATES, constraint_table, mark, model, model_header, p_text, sentences, size
from mergekit_bio.eval.scoring.following import RULES
from mergekit_bio.eval.scoring.scorers import SCORERS

#: Recordings go into the page until they fill this many bytes, which can still be mailed; the rest is linked.
AUDIO_BUDGET = 16_000_000
#: Seconds of a recording that go into the page.
AUDIO_SECONDS = 30


def render_page(report: Report, figures: Sequence[Figure], *, folder: Path) -> str:
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
    pictures = [
        (figure.sweep, figure.caption, base64.b64encode(figure.files[0].read_bytes()).decode()) for figure in figures
    ]
    return template.render(
        title=", ".join(runs),
        scorers={name: SCORERS[name].description for name in report.scorers},
        notes=report.notes,
        sweeps=[_sweep(sweep, [rest for owner, *rest in pictures if owner is sweep]) for sweep in report.sweeps],
        figures=[rest for owner, *rest in pictures if owner is None],
        data=_predictions(report, folder),
    )


def _sweep(sweep: Sweep, pictures: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What the page shows about a sweep, as texts; ``pictures`` are its captions and PNGs in base64."""
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
        "rows": [(model(sweep, item), cells(item)) for item in sweep.scores],
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


def _predictions(report: Report, folder: Path) -> str:
    """The predictions table as JSON that may stand inside a script element."""
    prompts: dict[str | None, int] = {None: -1}
    recordings = _Recordings(folder)
    rows = []
    for number, sweep in enumerate(report.sweeps):
        labels, caption, several = sweep.labels, sweep.cell.task == "captioning", sweep.cell.task == "detection"
        for item in sweep.scores:
            for row, answer, target, correct in zip(
                item.cell.predictions, item.answers, item.targets, item.correct, strict=True
            ):
                # 0 right, 1 a wrong label, 2 no label, 3 a caption
                is_label = bool(answer) if several else answer in labels
                outcome = 3 if caption else 0 if correct else 1 if is_label else 2
                prompt = prompts.setdefault(row.prompt, len(prompts) - 1)
                shown = (row.id, row.prediction, answer, target)
                rows.append([number, model(sweep, item), *shown, outcome, prompt, recordings.add(row)])
    data = {
        "sweeps": [sweep.title for sweep in report.sweeps],
        "prompts": [prompt for prompt in prompts if prompt is not None],
        "audio": recordings.sources,
        "rows": rows,
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


class _Recordings:
    """The recordings of the page, each once: inside it as FLAC, or linked once the page is full."""

    def __init__(self, folder: Path) -> None:
        self.sources: list[str] = []
        self._folder = folder
        self._known: dict[str, int] = {}
        self._bytes = 0

    def add(self, row: Prediction) -> int:
        """The index of the row's recording in ``sources``; -1 where it has none that is still there."""
        if row.audio is None:
            return -1
        if row.audio not in self._known:
            source = self._source(Path(row.audio))
            self._known[row.audio] = -1 if source is None else len(self.sources)
            self.sources += [] if source is None else [source]
        return self._known[row.audio]

    def _source(self, path: Path) -> str | None:
        if not path.is_file():
            return None
        if self._bytes < AUDIO_BUDGET:
            flac = _flac(path)
            if flac is not None:
                self._bytes += len(flac)
                return "data:audio/flac;base64," + base64.b64encode(flac).decode()
        return quote(os.path.relpath(path.resolve(), self._folder.resolve()))


def _flac(path: Path) -> bytes | None:
    """The beginning of a recording as mono 16-bit FLAC; None where libsndfile cannot read or write it."""
    import soundfile

    try:
        # By descriptor, so that libsndfile goes by what is in the file and not by its name.
        with path.open("rb") as raw, soundfile.SoundFile(raw.fileno(), closefd=False) as file:
            rate = file.samplerate
            samples = file.read(AUDIO_SECONDS * rate, dtype="float32", always_2d=True).mean(axis=1)
        buffer = io.BytesIO()
        # After the seconds that a model hears anything may stand, and FLAC has no NaN.
        samples = np.nan_to_num(samples, posinf=0.0, neginf=0.0)
        soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    except (OSError, soundfile.LibsndfileError):
        return None
    return buffer.getvalue()

"""A look at the recordings before anything is merged or loaded: which of them can be heard at all."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from mergekit_bio.audio.recording import read_samples
from mergekit_bio.errors import AudioError, DatasetError
from mergekit_bio.eval.run.plan import RunPlan
from mergekit_bio.eval.run.progress import ProgressListener
from mergekit_bio.eval.run.questions import clips_heard

#: So much of a recording is decoded: what is no recording shows at once, and the rest is heard when it is asked about.
_SECONDS = 0.1
_THREADS = 8

#: Dataset and clip id -> why the clip cannot be heard.
Unheard = dict[tuple[str, str], str]


def check_headers(plan: RunPlan, listener: ProgressListener) -> Unheard:
    """The recordings in files that the open questions of a run hear, and that cannot be decoded.

    Raises:
        DatasetError: None of a dataset's can be.
    """
    unheard: Unheard = {}
    for dataset in plan.datasets:
        cells = [cell for cell in plan.cells if cell.dataset == dataset.name]
        paths = {row.id: row.path for row in (*dataset.asked, *dataset.examples) if row.path is not None}
        if not paths or all(plan.answered(cell) == cell.rows for cell in cells):
            continue
        ids = clips_heard(plan.recipe, dataset, plan.limit)
        files = list(dict.fromkeys(paths[clip_id] for clip_id in ids))  # many clips may be parts of one
        problems: dict[Path, str] = {}
        with (
            listener.progress(f"checking {dataset.name}", len(files), "recordings") as advance,
            ThreadPoolExecutor(_THREADS) as threads,
        ):
            for file, why in zip(files, threads.map(partial(_problem, channel=dataset.channel), files), strict=True):
                advance(1)
                if why:
                    problems[file] = why
        of_dataset = {(dataset.name, clip): problems[path] for clip in ids if (path := paths[clip]) in problems}
        if ids and len(of_dataset) == len(ids):
            raise DatasetError(f"{dataset.name}: no recording of it can be heard: {next(iter(of_dataset.values()))}")
        unheard |= of_dataset
    for why in dict.fromkeys(unheard.values()):
        listener.warn(f"note: left out: {why}")
    return unheard


def _problem(path: Path, *, channel: int | None) -> str | None:
    try:
        read_samples(path, seconds=_SECONDS, channel=channel)
    except AudioError as error:
        return str(error)
    return None

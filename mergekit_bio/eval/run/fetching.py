"""What a run needs that is not on this machine: its size, before it is fetched, and the fetching."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_bio.checkpoint.source import MissingFiles, is_hub_id, missing_files, resolve
from mergekit_bio.engine.choice import engine_class
from mergekit_bio.errors import RecipeError
from mergekit_bio.eval.data.dataset import Download
from mergekit_bio.eval.run.plan import RunPlan
from mergekit_bio.eval.run.progress import ProgressListener
from mergekit_bio.eval.run.questions import clips_heard


@dataclass(frozen=True, kw_only=True)
class MissingRecordings:
    """What is missing of one dataset.

    Attributes:
        dataset: Its name.
        source: Where it comes from.
        clips: How many recordings the run hears, those that are here too.
        downloads: What they lie in, in the order in which it is fetched.
    """

    dataset: str
    source: str
    clips: int
    downloads: tuple[Download, ...]

    @property
    def bytes(self) -> int:
        """What all downloads take."""
        return sum(download.bytes for download in self.downloads)


@dataclass(frozen=True, kw_only=True)
class FetchPlan:
    """Everything that a run fetches before it can be asked offline.

    Attributes:
        models: For every hub id that it reads what is missing, nothing included.
        recordings: For every dataset that comes from the hub what is missing, nothing included.
    """

    models: tuple[MissingFiles, ...]
    recordings: tuple[MissingRecordings, ...]

    @property
    def bytes(self) -> int:
        """How much is fetched."""
        return sum(model.bytes for model in self.models) + sum(missing.bytes for missing in self.recordings)


def plan_fetch(plan: RunPlan) -> FetchPlan:
    """Ask the Hub for the sizes of what is missing; nothing is downloaded.

    Args:
        plan: Of a run, whose checkpoints need not be here.

    Raises:
        SourceError: A model cannot be had.
        RecipeError: The recipe streams from the hub, so that what is fetched would not be kept.
    """
    sources = [dataset.source for dataset in plan.datasets]
    if plan.recipe.streaming and any(is_hub_id(source) and not Path(source).exists() for source in sources):
        raise RecipeError(
            f"{plan.recipe.name}: streaming keeps no recording on this machine, so that none can be fetched for later; "
            "set streaming: false, or give a local copy (--data FOLDER)"
        )
    models = [missing_files(source) for source in _models(plan)]
    return FetchPlan(
        models=tuple(model for model in models if not Path(model.source).exists()), recordings=missing_recordings(plan)
    )


def missing_recordings(plan: RunPlan) -> tuple[MissingRecordings, ...]:
    """The recordings that the open cells of a run hear and that are not on this machine yet."""
    missing = []
    for dataset in plan.datasets:
        cells = [cell for cell in plan.cells if cell.dataset == dataset.name]
        if dataset.downloads is None or all(plan.answered(cell) == cell.rows for cell in cells):
            continue
        ids = clips_heard(plan.recipe, dataset, plan.limit)
        downloads = tuple(dataset.downloads(ids))
        missing.append(
            MissingRecordings(dataset=dataset.name, source=dataset.source, clips=len(ids), downloads=downloads)
        )
    return tuple(missing)


def fetch_models(models: Sequence[MissingFiles]) -> None:
    """Download models into the Hugging Face cache. What is whole stays when this is interrupted.

    Raises:
        SourceError: One cannot be had.
    """
    for model in models:
        if model.files:
            resolve(model.source)


def fetch_recordings(recordings: Sequence[MissingRecordings], listener: ProgressListener) -> None:
    """Download recordings, row group by row group. What is whole stays when this is interrupted.

    Raises:
        DatasetError: They cannot be had.
    """
    for missing in recordings:
        if missing.downloads:
            with listener.progress(f"fetching {missing.dataset}", missing.bytes, "bytes") as advance:
                for download in missing.downloads:
                    download.fetch()
                    advance(download.bytes)


def to_document(fetch: FetchPlan) -> dict[str, Any]:
    """The plan as JSON-serialisable values."""
    return {
        "bytes": fetch.bytes,
        "models": [{"source": model.source, "files": model.files, "bytes": model.bytes} for model in fetch.models],
        "recordings": [
            {
                "dataset": missing.dataset,
                "source": missing.source,
                "clips": missing.clips,
                "row_groups": len(missing.downloads),
                "bytes": missing.bytes,
            }
            for missing in fetch.recordings
        ],
    }


def _models(plan: RunPlan) -> list[str]:
    """The sources that the run reads: what is merged first, and checkpoints."""
    if engine_class(plan.engine).remote:
        return []
    if plan.recipe.merge is None:
        return [checkpoint.source for checkpoint in plan.checkpoints]
    if not any(checkpoint.missing for checkpoint in plan.checkpoints):
        return []
    return [str(plan.recipe.merge.base), *(str(entry.source) for entry in plan.recipe.merge.adapters)]

"""How long a run will take on this machine: real questions to its engine, for some seconds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mergekit_bio.engine.choice import engine_class
from mergekit_bio.engine.interface import EngineSettings, Prompt
from mergekit_bio.engine.slot import EngineSlot
from mergekit_bio.errors import AudioError, RunError
from mergekit_bio.eval.data.dataset import Dataset, RecordingError
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.run.asking import answers_to
from mergekit_bio.eval.run.audio_reader import decoded_clip
from mergekit_bio.eval.run.batches import AUDIOS_AT_ONCE
from mergekit_bio.eval.run.checkpoints import FOLDER, RunCheckpoint, merge_missing
from mergekit_bio.eval.run.fetching import plan_fetch
from mergekit_bio.eval.run.plan import RunPlan
from mergekit_bio.eval.run.progress import ProgressListener
from mergekit_bio.eval.run.questions import Question, clips_heard, options, questions


@dataclass(frozen=True, kw_only=True)
class ProbedQuery:
    """What one query about one dataset costs.

    Attributes:
        dataset: Its name.
        query: Its number.
        open: Questions of all checkpoints that have no answer yet.
        asked: How many were asked together when the time was taken.
        seconds: For one question, of those.
    """

    dataset: str
    query: int
    open: int
    asked: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured with one engine on one checkpoint.

    Attributes:
        checkpoint: Its name.
        start_seconds: Until the engine was up.
        clips: Different clips that the open questions hear; each is encoded once.
        clip_seconds: To encode one; 0 where servers do it while they answer.
        queries: What the questions cost.
    """

    checkpoint: str
    start_seconds: float
    clips: int
    clip_seconds: float
    queries: tuple[ProbedQuery, ...]

    @property
    def answering_seconds(self) -> float:
        """For all open questions."""
        return sum(query.open * query.seconds for query in self.queries)

    @property
    def hours(self) -> float:
        """For the whole run with one engine: starting it, encoding every clip, answering; not merging."""
        return (self.start_seconds + self.clips * self.clip_seconds + self.answering_seconds) / 3600


def probe_document(probe: Probe) -> dict[str, Any]:
    """A probe as JSON-serialisable values."""
    return {**asdict(probe), "hours": probe.hours}


def probe(plan: RunPlan, settings: EngineSettings, *, seconds: float, listener: ProgressListener) -> Probe:
    """Ask the engine some of a run's questions. Nothing is written to the run's directory.

    How fast a checkpoint answers does not depend on its alpha, so that one is enough: the first of the run that there
    is. Where none is merged yet, one is, into a folder beside the run's directory that is removed at the end: the run
    will need that space anyway.

    Args:
        plan: The run.
        settings: What the engine is started with.
        seconds: For how long to ask, about; the start of the engine comes on top.
        listener: Hears of the merge.

    Raises:
        RunError: Everything is answered, or something is missing on this machine that ``--fetch-only`` would fetch.
        MergekitBioError: The merge cannot be made, or the engine cannot run it.
    """
    open_cells = [cell for cell in plan.cells if plan.answered(cell) < (cell.rows or 0)]
    if not open_cells:
        raise RunError("--probe: the run is complete, there is nothing left to ask")
    if (missing := plan_fetch(plan)).bytes:
        raise RunError(
            f"--probe: {missing.bytes / 1e6:,.0f} MB that the run reads are not on this machine; fetch them first with "
            "--fetch-only"
        )
    engine = engine_class(plan.engine)
    settings = replace(settings, max_audios=plan.max_audios, prefixes=None)
    with _checkpoint(plan, listener) as checkpoint, EngineSlot(engine, settings) as slot:
        listener.note(f"probe: {checkpoint.name}, about {seconds:g} s once the engine is up")
        since = time.perf_counter()
        slot.at(checkpoint.source)
        start_seconds = time.perf_counter() - since
        cells = {(cell.dataset, cell.query): cell for cell in open_cells}
        asker = _Asker(plan, slot, checkpoint)
        queries = tuple(
            asker.probed(
                cell,
                seconds=seconds / len(cells),
                left=sum((of.rows or 0) - plan.answered(of) for of in open_cells if (of.dataset, of.query) == key),
            )
            for key, cell in cells.items()
        )
        datasets = {cell.dataset: plan.dataset(cell) for cell in open_cells}
        return Probe(
            checkpoint=checkpoint.name,
            start_seconds=start_seconds,
            clips=sum(len(clips_heard(plan.recipe, dataset, plan.limit)) for dataset in datasets.values()),
            clip_seconds=asker.clip_seconds,
            queries=queries,
        )


@contextmanager
def _checkpoint(plan: RunPlan, listener: ProgressListener) -> Iterator[RunCheckpoint]:
    """One of the run's checkpoints: the first that there is, or one that is merged for the time being."""
    for checkpoint in plan.checkpoints:
        if not checkpoint.missing:
            yield checkpoint
            return
    assert plan.recipe.merge is not None
    parent = next(folder for folder in plan.out.absolute().parents if folder.is_dir())
    with TemporaryDirectory(prefix=".probe-", dir=parent) as folder:
        first = plan.checkpoints[0]
        merged = replace(first, source=str(Path(folder) / FOLDER / Path(first.source).name))
        merge_missing([merged], merge=plan.recipe.merge, out=Path(folder), progress=listener.progress)
        yield merged


class _Asker:
    """Asks questions in growing batches, and takes the time."""

    def __init__(self, plan: RunPlan, slot: EngineSlot, checkpoint: RunCheckpoint) -> None:
        self._plan, self._slot = plan, slot
        self._engine = slot.at(checkpoint.source)
        self._encoded: list[tuple[int, float]] = []

    @property
    def clip_seconds(self) -> float:
        """To encode one clip; 0 where none was encoded here. The first batch only counts where there is no other."""
        measured = self._encoded[1:] or self._encoded
        clips = sum(count for count, _ in measured)
        return sum(seconds for _, seconds in measured) / clips if clips else 0.0

    def probed(self, cell: Cell, *, seconds: float, left: int) -> ProbedQuery:
        """Ask a cell's questions for some seconds.

        Batches double until they are as large as the run's own, because an engine is fast when it is full; the time of
        the largest ones counts. The first question alone warms the engine up.
        """
        recipe, dataset = self._plan.recipe, self._plan.dataset(cell)
        asked = list(questions(recipe, dataset, cell.query, self._plan.limit))
        labels = [] if recipe.decoding == "generate" else options(recipe, dataset, cell.query)
        audios = len(asked[0].instruction.clips)
        most = max(1, min(self._engine.prompts_at_once(self._slot.settings), AUDIOS_AT_ONCE // audios))
        began = time.perf_counter()
        place, size = 0, 1
        taken: dict[int, list[float]] = {}
        while place < len(asked):
            batch = asked[place : place + size]
            since = time.perf_counter()
            prompts = self._prompts(dataset, batch)
            answering = time.perf_counter()
            now = answering
            if prompts:
                answers_to(self._engine, recipe, prompts, labels, seed=recipe.seed + place)
                now = time.perf_counter()
                taken.setdefault(len(prompts), []).append(now - answering)
            place, size = place + len(batch), min(2 * size, most)
            # A larger batch takes longer, at most as much longer as it is larger.
            if now + (now - since) * size / len(batch) > began + seconds:
                break
        if not taken:
            raise RunError(f"--probe: {dataset.name}: no recording that was tried can be heard")
        largest = max(taken)
        each = sum(taken[largest]) / len(taken[largest]) / largest
        return ProbedQuery(dataset=cell.dataset, query=cell.query, open=left, asked=largest, seconds=each)

    def _prompts(self, dataset: Dataset, batch: list[Question]) -> list[Prompt]:
        """Decode and encode what the questions hear; the time of encoding is kept apart.

        A question whose recordings are no use is left out, as in the run.
        """
        clips = {}
        for clip_id in dict.fromkeys(clip_id for question in batch for clip_id in question.instruction.clips):
            with suppress(RecordingError, AudioError):
                clips[clip_id] = decoded_clip(dataset, clip_id, dataset.audio(clip_id))
        since, before = time.perf_counter(), self._slot.encoded
        self._slot.encode(list(clips.values()))
        if count := self._slot.encoded - before:
            self._encoded.append((count, time.perf_counter() - since))
        return [
            Prompt(question.instruction.text, tuple(clips[clip_id] for clip_id in question.instruction.clips))
            for question in batch
            if clips.keys() >= {*question.instruction.clips}
        ]

"""The loop of a run: its open questions in batches, handed to workers; what comes back is written, here alone."""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from mergekit_bio.engine.pool import Workers, hand_out
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.kept_answers import AskedNow
from mergekit_bio.eval.records.predictions import PredictionWriter, read_predictions
from mergekit_bio.eval.records.run_directory import RunDirectory
from mergekit_bio.eval.run.asking import Answered, Batch
from mergekit_bio.eval.run.headers import Unheard
from mergekit_bio.eval.run.plan import RunPlan
from mergekit_bio.eval.run.progress import AnswerCounter, ProgressListener
from mergekit_bio.eval.run.questions import questions

#: Audios handed to an engine at once: 1.3 MB of samples each.
AUDIOS_AT_ONCE = 512
#: Batches for each of several workers, at least, so that all of them are done at about the same time.
BATCHES_EACH = 4
#: Seconds between two updates of the cells' time in run.json.
SAVE_TIME_EVERY = 30.0


@dataclass
class Unanswered:
    """What a start of a run leaves open.

    Attributes:
        given_up: Batches that workers died of.
        questions: How many questions were not asked, because a recording cannot be heard.
        unheard: Dataset and clip id -> why it cannot be heard.
    """

    given_up: list[Batch] = field(default_factory=list)
    questions: int = 0
    unheard: Unheard = field(default_factory=dict)


def ask_all(
    plan: RunPlan,
    run: RunDirectory,
    workers: Workers[Batch, Answered],
    listener: ProgressListener,
    *,
    at_once: int,
    asked: Mapping[str, AskedNow],
    unheard: Mapping[tuple[str, str], str],
) -> Unanswered:
    """Ask whatever is not answered yet, ``at_once`` questions a batch; a checkpoint without such is not loaded.

    Args:
        plan: The run.
        run: Its directory.
        workers: Who answers.
        listener: Is told how it goes.
        at_once: Questions of a batch at most.
        asked: Predictions file -> what its cell asks: every answer is written with what tells its question from others.
        unheard: The recordings that are known to be no use, and of which the listener has been told.

    Raises:
        MergekitBioError: The run cannot go on. Answers so far are kept.
    """
    # 1. What earlier starts have not answered, but for what is known to be no use.
    batches = open_batches(plan, at_once=at_once, workers=workers.count, unheard=unheard)
    skipped = _skipped(plan, batches) if unheard else Counter()
    cells = {cell.file: cell for cell in plan.cells}
    left = Counter(batch.cell for batch in batches)
    counter = AnswerCounter(plan, batches, listener, skipped=skipped, workers=lambda: workers.up)
    writers: dict[str, PredictionWriter] = {}
    unsaved: defaultdict[str, float] = defaultdict(float)
    left_open = Unanswered(questions=skipped.total(), unheard={**unheard})
    saved = time.perf_counter()
    counts: Counter[str] = Counter()
    try:
        # 2. Have it answered. Batches of one checkpoint are a group: to change it, an engine has to load weights.
        for batch, answered in hand_out(
            workers,
            batches,
            group=lambda batch: batch.checkpoint,
            started=lambda batch: counter.begin(cells[batch.cell]),
            note=listener.note,
        ):
            cell = cells[batch.cell]
            if answered is None:
                left_open.given_up.append(batch)
            else:
                # 3. Write a batch when all of it is back: whatever happens to a worker loses and doubles nothing.
                writer = writers.get(batch.cell) or writers.setdefault(batch.cell, run.writer(cell))
                for prediction in answered.predictions:
                    # Of a recording that could be read only now nobody knows what it was: another start asks again.
                    known = asked[batch.cell].questions[prediction.id] or "unknown"
                    writer.append(replace(prediction, question=known))
                # A recording that cannot be heard leaves its questions open, for a start after it was mended.
                left_open.questions += len(batch.places) - len(answered.predictions)
                for clip_id, why in answered.unheard.items():
                    if (cell.dataset, clip_id) not in left_open.unheard:
                        listener.warn(f"note: left out: {why}")
                        left_open.unheard[cell.dataset, clip_id] = why
                counter.answered(cell, len(answered.predictions), seconds=answered.seconds)
                unsaved[batch.cell] += answered.seconds
                counts.update(answered.counts)
                for text in answered.notes:
                    listener.note(f"note: {text}")
            left[batch.cell] -= 1
            if not left[batch.cell] and batch.cell in writers:
                writers.pop(batch.cell).close()
            # 4. Keep the time that was spent, now and then for a run that will be killed.
            if time.perf_counter() - saved > SAVE_TIME_EVERY:
                _save_time(run, cells, unsaved)
                saved = time.perf_counter()
    finally:
        for writer in writers.values():
            writer.close()
        _save_time(run, cells, unsaved)
    run.note({name: run.record.environment.get(name, 0) + count for name, count in counts.items()})
    return left_open


def _save_time(run: RunDirectory, cells: Mapping[str, Cell], unsaved: dict[str, float]) -> None:
    for file, seconds in unsaved.items():
        run.add_seconds(cells[file], seconds)
    unsaved.clear()


def _skipped(plan: RunPlan, batches: Sequence[Batch]) -> Counter[str]:
    """Predictions file -> how many of its open questions are in no batch."""
    left = Counter({cell.file: (cell.rows or 0) - plan.answered(cell) for cell in plan.cells})
    for batch in batches:
        left[batch.cell] -= len(batch.places)
    return left


def open_batches(
    plan: RunPlan, *, at_once: int, workers: int = 1, unheard: Collection[tuple[str, str]] = ()
) -> list[Batch]:
    """All questions of a run that have no answer yet.

    Which questions stand together changes with the number of workers and with what is answered; what is drawn for a
    question does not, because its seed goes by its place in the cell.

    Args:
        plan: The run.
        at_once: Questions of a batch at most; see :meth:`mergekit_bio.engine.interface.Engine.prompts_at_once`.
        workers: How many will share the batches.
        unheard: Dataset and id of clips that cannot be heard: nothing is asked for their sake alone.

    Returns:
        Checkpoint by checkpoint. Of several workers, each of which begins with a checkpoint of its own, no two begin
        with the same clips: what one has heard, the others find in the prefix cache.
    """
    # 1. The questions are the same for all checkpoints: each one's clip, and how many audios it has.
    clips: dict[tuple[str, int], list[tuple[str, int]]] = {}
    silent: dict[tuple[str, int], set[str]] = {}
    open_places: dict[str, list[int]] = {}
    for cell in plan.cells:
        if (cell.dataset, cell.query) not in clips:
            asked = list(questions(plan.recipe, plan.dataset(cell), cell.query, plan.limit))
            clips[cell.dataset, cell.query] = [(question.row.id, len(question.instruction.clips)) for question in asked]
            silent[cell.dataset, cell.query] = {
                question.row.id
                for question in asked
                if any((cell.dataset, clip) in unheard for clip in question.instruction.clips)
            }
        file = plan.out / cell.file
        done = {row.id for row in read_predictions(file)} if file.exists() else set()
        places = enumerate(clips[cell.dataset, cell.query])
        open_places[cell.file] = [place for place, (clip, _) in places if clip not in done]
    # 2. As many at once as the engine takes, or fewer where there would be too few batches for all workers.
    size = at_once
    if workers > 1:
        size = min(size, max(1, math.ceil(sum(map(len, open_places.values())) / (workers * BATCHES_EACH))))
    # 3. Cut.
    batches: list[Batch] = []
    for number, (checkpoint, cells) in enumerate(groupby(plan.cells, key=lambda cell: cell.checkpoint)):
        of_checkpoint = [
            Batch(cell.file, checkpoint, places, asked[places[0]][0], asked[places[-1]][0])
            for cell in cells
            for asked in [clips[cell.dataset, cell.query]]
            for places in _cut(open_places[cell.file], [audios for _, audios in asked], size)
            # What cannot be heard leaves no gap in a batch, but is no reason for one.
            if any(asked[place][0] not in silent[cell.dataset, cell.query] for place in places)
        ]
        first = number % workers * len(of_checkpoint) // workers
        batches += of_checkpoint[first:] + of_checkpoint[:first]
    return batches


def _cut(places: Sequence[int], audios: Sequence[int], size: int) -> Iterator[range]:
    """Consecutive places, so that the n-th question of a batch draws with the seed of its place in the cell."""
    start, stop, heard = 0, 0, 0
    for place in places:
        full = stop - start == size or heard + audios[place] > AUDIOS_AT_ONCE
        if stop > start and (full or place != stop):
            yield range(start, stop)
            start, stop, heard = place, place, 0
        if stop == start:  # the first of a batch
            start = place
        stop, heard = place + 1, heard + audios[place]
    if stop > start:
        yield range(start, stop)

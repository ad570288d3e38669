"""The loop of a run: every cell's open questions, batch by batch, to one engine."""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol

from mergekit_bio.errors import AudioError, DatasetError
from mergekit_bio.eval.recipe.schema import Recipe
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.records.run_directory import RunDirectory
from mergekit_bio.eval.run.engine_slot import PROMPTS_AT_ONCE, EngineSlot
from mergekit_bio.eval.run.plan import RunPlan
from mergekit_bio.eval.run.questions import Question, options, questions
from mergekit_bio.model.layout import LLAMA3_TEMPLATE

if TYPE_CHECKING:
    from mergekit_bio.engine.interface import Clip, Engine, Generation, Prompt

#: Audios handed to an engine at once: 1.3 MB of samples each.
AUDIOS_AT_ONCE = 512
#: Prepared clips that are kept for the next query or as examples.
CLIPS_KEPT = 400
#: Seconds between two updates of a cell's time in run.json.
SAVE_TIME_EVERY = 30.0


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a run is.

    Attributes:
        cell: What is being asked.
        number: Which of ``cells`` it is, from 1.
        done: Answers of the cell, of ``rows``.
        run_done: Answers of the run, of ``run_rows``.
        rate: Answers a second since the engine was up, changes of checkpoint included; None before the first.
    """

    cell: str
    number: int
    cells: int
    done: int
    rows: int
    run_done: int
    run_rows: int
    rate: float | None

    @property
    def cell_seconds_left(self) -> float | None:
        """At this rate."""
        return (self.rows - self.done) / self.rate if self.rate else None

    @property
    def run_seconds_left(self) -> float | None:
        """At this rate."""
        return (self.run_rows - self.run_done) / self.rate if self.rate else None


class Listener(Protocol):
    """Hears how a run goes."""

    def note(self, text: str) -> None:
        """Something that a user should know."""

    def progress(self, description: str, total: int, unit: str) -> AbstractContextManager[Any]:
        """Open a bar for something that takes time; the value is called with each step's size."""

    def standing(self, standing: Standing) -> None:
        """Called when a cell begins and after every batch of answers."""


class Silence:
    """Listens to nothing."""

    def note(self, text: str) -> None: ...

    def progress(self, description: str, total: int, unit: str) -> AbstractContextManager[Any]:
        return nullcontext(lambda step: None)

    def standing(self, standing: Standing) -> None: ...


class _Clock:
    """Counts answers and tells the listener."""

    def __init__(self, plan: RunPlan, listener: Listener, run_done: int) -> None:
        self._plan, self._listener, self._run_done = plan, listener, run_done
        self._answers, self._start = 0, 0.0

    def begin(self) -> None:
        """The engine is up: time counts from the first such moment on."""
        self._start = self._start or time.perf_counter()

    def tell(self, cell: Cell, number: int, done: int, new: int = 0) -> None:
        self._answers += new
        self._run_done += new
        rate = self._answers / (time.perf_counter() - self._start) if self._answers else None
        self._listener.standing(
            Standing(
                cell=f"{cell.checkpoint}, {cell.dataset}, query {cell.query}",
                number=number,
                cells=len(self._plan.cells),
                done=done,
                rows=cell.rows or 0,
                run_done=self._run_done,
                run_rows=self._plan.rows,
                rate=rate,
            )
        )


def ask_all(plan: RunPlan, run: RunDirectory, slot: EngineSlot, listener: Listener) -> None:
    """Every cell, checkpoint by checkpoint; a checkpoint that has answered everything is not loaded."""
    clock = _Clock(plan, listener, sum(plan.answered(cell) for cell in plan.cells))
    ears = _Ears(plan)
    numbers = {cell.file: number for number, cell in enumerate(plan.cells, start=1)}
    for _, cells in groupby(plan.cells, key=lambda cell: cell.checkpoint):
        engine: Engine | None = None
        for cell in cells:
            dataset = plan.dataset(cell)
            with run.writer(cell) as writer:
                todo = [
                    (index, question)
                    for index, question in enumerate(questions(plan.recipe, dataset, cell.query, plan.limit))
                    if question.clip.id not in writer.done
                ]
                done = (cell.rows or 0) - len(todo)
                if not todo:
                    continue
                clock.tell(cell, numbers[cell.file], done)
                engine = engine or slot.at(plan.checkpoint(cell))
                clock.begin()
                labels = [] if plan.recipe.decoding == "generate" else options(plan.recipe, dataset, cell.query)
                started = time.perf_counter()
                try:
                    for batch, prompts in ears.heard(cell, _batches(todo, PROMPTS_AT_ONCE[plan.engine])):
                        slot.encode([clip for prompt in prompts for clip in prompt.audios])
                        answers = _answers(engine, plan.recipe, prompts, labels, seed=plan.recipe.seed + batch[0][0])
                        for (_, question), answer in zip(batch, answers, strict=True):
                            writer.append(_prediction(cell, question, answer))
                        done += len(batch)
                        clock.tell(cell, numbers[cell.file], done, new=len(batch))
                        if (now := time.perf_counter()) - started > SAVE_TIME_EVERY:
                            run.add_seconds(cell, now - started)
                            started = now
                finally:
                    run.add_seconds(cell, time.perf_counter() - started)


def _batches(todo: Sequence[tuple[int, Question]], size: int) -> Iterator[list[tuple[int, Question]]]:
    """Consecutive questions, so that the n-th of a batch draws with the seed of its place in the cell."""
    batch: list[tuple[int, Question]] = []
    audios = 0
    for index, question in todo:
        count = len(question.prompt.clips)
        if batch and (len(batch) == size or audios + count > AUDIOS_AT_ONCE or index != batch[-1][0] + 1):
            yield batch
            batch, audios = [], 0
        batch.append((index, question))
        audios += count
    if batch:
        yield batch


class _Ears:
    """Decodes recordings, one batch ahead of the engine."""

    def __init__(self, plan: RunPlan) -> None:
        datasets = {dataset.name: dataset for dataset in plan.datasets}

        @lru_cache(CLIPS_KEPT)
        def clip(name: str, clip_id: str) -> "Clip":
            import numpy as np

            from mergekit_bio.audio.waveform import MIN_SECONDS
            from mergekit_bio.engine.interface import Clip

            samples, rate = datasets[name].audio(clip_id)
            # The model hears a short clip with silence after it; only prepare() refuses what is below half a second.
            lacking = math.ceil(MIN_SECONDS * rate) - len(samples)
            if lacking > 0:
                samples = np.pad(samples, [(0, lacking)] + [(0, 0)] * (samples.ndim - 1))
            try:
                return Clip.from_samples(samples, sampling_rate=rate)
            except AudioError as error:
                raise DatasetError(f"{name}: clip {clip_id}: {error}") from None

        self._clip = clip

    def heard(
        self, cell: Cell, batches: Iterator[list[tuple[int, Question]]]
    ) -> "Iterator[tuple[list[tuple[int, Question]], list[Prompt]]]":
        """The batches, and their prompts with audio."""

        def hear(batch: list[tuple[int, Question]]) -> "list[Prompt]":
            from mergekit_bio.engine.interface import Prompt

            head, tail = LLAMA3_TEMPLATE.split("{}")
            wanted = dict.fromkeys(clip for _, question in batch for clip in question.prompt.clips)
            clips = {clip: self._clip(cell.dataset, clip) for clip in wanted}
            return [
                Prompt.from_text(
                    question.prompt.text.removeprefix(head).removesuffix(tail),
                    [clips[clip] for clip in question.prompt.clips],
                )
                for _, question in batch
            ]

        with ThreadPoolExecutor(1) as pool:
            following = [(batch, pool.submit(hear, batch)) for batch in _first(batches)]
            while following:
                batch, prompts = following.pop()
                ready = prompts.result()
                following = [(after, pool.submit(hear, after)) for after in _first(batches)]
                yield batch, ready


def _first(batches: Iterator[list[tuple[int, Question]]]) -> list[list[tuple[int, Question]]]:
    batch = next(batches, None)
    return [] if batch is None else [batch]


@dataclass(frozen=True)
class _Answer:
    text: str
    generation: "Generation | None" = None
    label_logprobs: dict[str, float] | None = None


def _answers(
    engine: "Engine", recipe: Recipe, prompts: "Sequence[Prompt]", labels: Sequence[str], *, seed: int
) -> list[_Answer]:
    """Ask in the way that the recipe says."""
    from mergekit_bio.engine.interface import Decoding

    if recipe.decoding == "loglikelihood":
        answers = []
        for scores in engine.loglikelihood(prompts, labels):
            best = max(scores, key=lambda score: score.logprob)
            answers.append(_Answer(best.label, label_logprobs={score.label: score.logprob for score in scores}))
        return answers
    if recipe.decoding == "choice":
        return [_Answer(generation.text, generation) for generation in engine.choose(prompts, labels)]
    settings = recipe.generate
    decoding = Decoding(
        max_new_tokens=settings.max_new_tokens,
        num_beams=settings.num_beams,
        length_penalty=settings.length_penalty,
        temperature=settings.temperature,
        seed=seed,
    )
    return [_Answer(generation.text, generation) for generation in engine.generate(prompts, decoding)]


def _prediction(cell: Cell, question: Question, answer: _Answer) -> Prediction:
    clip, generation = question.clip, answer.generation
    logprob = sum(generation.logprobs) if generation else math.nan
    return Prediction(
        prediction=answer.text,
        label=clip.label,
        id=clip.id,
        dataset_name=cell.dataset,
        prompt=question.prompt.text,
        lora_scale=cell.alpha,
        prompt_tokens=generation.prompt_tokens if generation else None,
        generated_ids=generation.token_ids if generation else None,
        logprob=logprob if math.isfinite(logprob) else None,
        example_ids=question.prompt.examples or None,
        choice_logprobs=answer.label_logprobs,
        audio=None if clip.path is None else str(clip.path),
    )

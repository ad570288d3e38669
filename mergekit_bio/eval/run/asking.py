"""A worker of a run: hears and asks a batch of questions, and makes predictions of the answers."""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

from mergekit_bio.engine.choice import engine_class
from mergekit_bio.engine.interface import Decoding, Engine, EngineSettings, Generation, Prompt
from mergekit_bio.engine.slot import EngineSlot
from mergekit_bio.eval.recipe.schema import Recipe
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.run.audio_reader import AudioReader
from mergekit_bio.eval.run.plan import RunPlan
from mergekit_bio.eval.run.questions import Question, options, questions


@dataclass(frozen=True)
class Batch:
    """Questions of one cell that are asked together: plain data, for whichever worker is free.

    Attributes:
        cell: The name of its predictions file.
        checkpoint: The name of what answers it.
        places: Of the questions in the cell, one after the other: the seed of a question follows from its place.
        first: The id of the first question's clip.
        last: And of the last one's.
    """

    cell: str
    checkpoint: str
    places: range
    first: str
    last: str

    def __str__(self) -> str:
        clips = f"clip {self.first}" if len(self.places) == 1 else f"clips {self.first} to {self.last}"
        return f"{self.cell}, {clips}"


@dataclass(frozen=True)
class Answered:
    """What a worker gives back for a batch.

    Attributes:
        predictions: One for each of its questions whose recordings can be heard.
        seconds: From the moment the engine was on the checkpoint.
        counts: What the worker has done since its last batch, for the run's record, such as ``clips_encoded``: clips
            that went through the tower.
        unheard: Clip id -> why it cannot be heard, of those that the batch's questions are about.
        notes: What a user should know.
    """

    predictions: tuple[Prediction, ...]
    seconds: float
    counts: Mapping[str, int]
    unheard: Mapping[str, str]
    notes: tuple[str, ...] = ()


class RunWorker:
    """Answers batches of a run with one engine, on whichever checkpoint they belong to.

    Args:
        plan: The run.
        slot: Holds the engine; whoever made it closes it.
    """

    def __init__(self, plan: RunPlan, slot: EngineSlot) -> None:
        self._plan, self._slot = plan, slot
        self._cells = {cell.file: cell for cell in plan.cells}
        self._reader = AudioReader(plan.datasets, slot)
        self._channels = {dataset.name: dataset.channel for dataset in plan.datasets}
        self._questions = lru_cache(4)(self._questions_of)
        self._labels = lru_cache(4)(self._labels_of)
        self._ahead = ThreadPoolExecutor(1)
        self._reading: tuple[Batch, Future[list[Prompt | None]]] | None = None
        self._sending = ThreadPoolExecutor(2)
        self._sent: dict[Batch, Future[tuple[Prediction, ...]]] = {}
        self._counted, self._told = self._counts(), len(slot.notes)

    def answer(self, batch: Batch, following: Batch | None) -> Answered:
        """Ask one batch.

        Args:
            batch: Which questions.
            following: What will probably be asked next: its clips are heard while the engine answers.

        Raises:
            MergekitBioError: The engine cannot run the checkpoint, or the data cannot be had.
        """
        # 1. The engine on the checkpoint. It is not changed while it hears what comes next.
        if self._reading is not None:
            wait([self._reading[1]])
        engine = self._slot.at(self._plan.checkpoint(self._cells[batch.cell]).source)
        since = time.perf_counter()
        # 2. Ask. While the engine answers, the next batch's clips are heard.
        if not self._slot.remote:
            prompts = self._read(batch)
            if following is not None:
                self._read(following)
            predictions = self._predict(engine, batch, prompts)
        # Servers get the next batch too, to have something to do while the last answers of this one are awaited.
        else:
            sent = self._sent.pop(batch, None) or self._send(engine, batch)
            if following is not None and following.checkpoint == batch.checkpoint:
                self._sent[following] = self._send(engine, following)
            predictions = sent.result()
        before, self._counted = self._counted, self._counts()
        counts = {name: count - before[name] for name, count in self._counted.items()}
        of, known = self._cells[batch.cell].dataset, self._reader.unheard
        heard = {clip for question in self._asked(batch) for clip in question.instruction.clips} if known else set()
        unheard = {clip: known[of, clip] for clip in heard if (of, clip) in known}
        return Answered(predictions, time.perf_counter() - since, counts, unheard, self.notes())

    def _send(self, engine: Engine, batch: Batch) -> "Future[tuple[Prediction, ...]]":
        return self._sending.submit(self._predict, engine, batch, self._read(batch))

    def _predict(self, engine: Engine, batch: Batch, prompts: "Future[list[Prompt | None]]") -> tuple[Prediction, ...]:
        cell, recipe = self._cells[batch.cell], self._plan.recipe
        labels = [] if recipe.decoding == "generate" else self._labels(cell.dataset, cell.query)
        predictions: list[Prediction] = []
        heard = zip(batch.places, self._asked(batch), prompts.result(), strict=True)
        for places, asked, spoken in _unbroken(heard, sampled=recipe.generate.temperature > 0):
            answers = answers_to(engine, recipe, spoken, labels, seed=recipe.seed + places[0])
            predictions += (
                _prediction(cell, question, answer, asked=engine.render(prompt), channel=self._channels[cell.dataset])
                for question, prompt, answer in zip(asked, spoken, answers, strict=True)
            )
        return tuple(predictions)

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the recordings and prefixes, and has not been told."""
        self._slot.note_problem()
        of_prefixes = self._slot.notes[self._told :]
        self._told += len(of_prefixes)
        return (*self._reader.new_notes(), *of_prefixes)

    def close(self) -> None:
        """Read no further ahead, and have the prefixes on disk."""
        self._ahead.shutdown(cancel_futures=True)
        self._sending.shutdown(wait=False, cancel_futures=True)
        self._slot.flush()

    def _read(self, batch: Batch) -> "Future[list[Prompt | None]]":
        """Begin to read a batch, if that is not under way."""
        if self._reading is None or self._reading[0] != batch:
            instructions = [question.instruction for question in self._asked(batch)]
            self._reading = batch, self._ahead.submit(self._reader.read, self._cells[batch.cell].dataset, instructions)
        return self._reading[1]

    def _counts(self) -> dict[str, int]:
        """What a run counts, as :class:`Answered` says."""
        return {"clips_decoded": self._reader.decoded, "clips_encoded": self._slot.encoded}

    def _asked(self, batch: Batch) -> list[Question]:
        cell = self._cells[batch.cell]
        return self._questions(cell.dataset, cell.query)[batch.places.start : batch.places.stop]

    def _questions_of(self, dataset: str, query: int) -> list[Question]:
        return list(questions(self._plan.recipe, self._plan.dataset_named(dataset), query, self._plan.limit))

    def _labels_of(self, dataset: str, query: int) -> list[str]:
        return options(self._plan.recipe, self._plan.dataset_named(dataset), query)


def _unbroken(
    heard: Iterable[tuple[int, Question, Prompt | None]], *, sampled: bool
) -> Iterator[tuple[list[int], list[Question], list[Prompt]]]:
    """The questions that can be asked, with their places, in parts.

    Where answers are sampled a part has consecutive places, because its n-th prompt draws with the first seed + n.
    """
    together = [(place, question, prompt) for place, question, prompt in heard if prompt is not None]
    parts = groupby(enumerate(together), key=lambda item: item[1][0] - item[0] if sampled else 0)
    for _, part in parts:
        places, asked, spoken = zip(*(item for _, item in part), strict=True)
        yield list(places), list(asked), list(spoken)


class OwnEngine(RunWorker):
    """A worker with an engine of its own.

    Args:
        plan: The run.
        settings: What the engine is started with.
    """

    def __init__(self, plan: RunPlan, settings: EngineSettings) -> None:
        super().__init__(plan, EngineSlot(engine_class(plan.engine), settings))

    def close(self) -> None:
        """Close the engine too."""
        super().close()
        self._slot.close()


#: An answer's text, with its generation or the log-probability of every label, whichever the recipe's decoding gives.
Answer = tuple[str, Generation | None, dict[str, float] | None]


def answers_to(
    engine: Engine, recipe: Recipe, prompts: Sequence[Prompt], labels: Sequence[str], *, seed: int
) -> list[Answer]:
    """Ask in the way that the recipe says."""
    if recipe.decoding == "loglikelihood":
        scored = engine.loglikelihood(prompts, labels)
        return [(max(logprobs, key=logprobs.__getitem__), None, logprobs) for logprobs in scored]
    if recipe.decoding == "choice":
        generations = engine.choose(prompts, labels)
    else:
        settings = recipe.generate
        decoding = Decoding(
            max_new_tokens=settings.max_new_tokens,
            num_beams=settings.num_beams,
            length_penalty=settings.length_penalty,
            temperature=settings.temperature,
            seed=seed,
        )
        generations = engine.generate(prompts, decoding)
    return [(generation.text, generation, None) for generation in generations]


def _prediction(cell: Cell, question: Question, answer: Answer, *, asked: str, channel: int | None) -> Prediction:
    row = question.row
    text, generation, label_logprobs = answer
    logprob = sum(generation.logprobs) if generation else math.nan
    return Prediction(
        prediction=text,
        label=row.label,
        id=row.id,
        dataset_name=cell.dataset,
        prompt=asked,
        lora_scale=cell.alpha,
        prompt_tokens=generation.prompt_tokens if generation else None,
        generated_ids=generation.token_ids if generation else None,
        logprob=logprob if math.isfinite(logprob) else None,
        example_ids=question.instruction.examples or None,
        choice_logprobs=label_logprobs,
        audio=None if row.path is None else str(row.path),
        start=row.start or None,
        end=row.end,
        channel=None if row.path is None else channel,
    )

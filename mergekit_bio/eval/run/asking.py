"""The loop of a run: every cell's open questions, batch by batch, to one engine."""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from mergekit_bio.engine.interface import Decoding, Engine, Generation, Prompt
from mergekit_bio.engine.slot import EngineSlot
from mergekit_bio.eval.recipe.schema import Recipe
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.records.run_directory import RunDirectory
from mergekit_bio.eval.run.audio_reader import AudioReader
from mergekit_bio.eval.run.plan import RunPlan
from mergekit_bio.eval.run.progress import AnswerCounter, ProgressListener
from mergekit_bio.eval.run.questions import Question, options, questions

#: Audios handed to an engine at once: 1.3 MB of samples each.
AUDIOS_AT_ONCE = 512
#: Seconds between two updates of a cell's time in run.json.
SAVE_TIME_EVERY = 30.0

#: A question with its place in the cell, from which its seed follows.
Placed = tuple[int, Question]


def ask_all(plan: RunPlan, run: RunDirectory, slot: EngineSlot, listener: ProgressListener) -> int:
    """Ask every cell, checkpoint by checkpoint; a checkpoint that has answered everything is not loaded.

    Returns:
        How many clips were decoded.
    """
    counter = AnswerCounter(plan, listener)
    reader, told = AudioReader(plan.datasets, slot), len(slot.notes)
    for _, cells in groupby(plan.cells, key=lambda cell: cell.checkpoint):
        engine: Engine | None = None
        for cell in cells:
            dataset = plan.dataset(cell)
            with run.writer(cell) as writer:
                # 1. What an earlier start has not answered.
                todo = [
                    (place, question)
                    for place, question in enumerate(questions(plan.recipe, dataset, cell.query, plan.limit))
                    if question.row.id not in writer.done
                ]
                done = (cell.rows or 0) - len(todo)
                if not todo:
                    continue
                counter.tell(cell, done)
                # 2. The engine, moved to the checkpoint for its first open cell.
                engine = engine or slot.at(plan.checkpoint(cell).source)
                counter.engine_is_up()
                labels = [] if plan.recipe.decoding == "generate" else options(plan.recipe, dataset, cell.query)
                since = time.perf_counter()
                try:
                    # 3. Ask batch by batch. While the engine answers one, the clips of the next are heard.
                    for batch, prompts in _read_ahead(reader, cell, _batches(todo, engine.prompts_at_once)):
                        seed = plan.recipe.seed + batch[0][0]
                        answers = _answers(engine, plan.recipe, prompts, labels, seed=seed)
                        for (_, question), prompt, answer in zip(batch, prompts, answers, strict=True):
                            writer.append(_prediction(cell, question, answer, asked=engine.render(prompt)))
                        done += len(batch)
                        counter.tell(cell, done, new=len(batch))
                        # 4. Keep the time that was spent, now and then for a run that will be killed.
                        if (now := time.perf_counter()) - since > SAVE_TIME_EVERY:
                            run.add_seconds(cell, now - since)
                            since = now
                finally:
                    run.add_seconds(cell, time.perf_counter() - since)
    slot.flush()
    for text in slot.notes[told:]:
        listener.note(f"note: {text}")
    return reader.decoded


def _batches(todo: Sequence[Placed], size: int) -> Iterator[list[Placed]]:
    """Consecutive questions, so that the n-th of a batch draws with the seed of its place in the cell."""
    batch: list[Placed] = []
    audios = 0
    for place, question in todo:
        count = len(question.instruction.clips)
        if batch and (len(batch) == size or audios + count > AUDIOS_AT_ONCE or place != batch[-1][0] + 1):
            yield batch
            batch, audios = [], 0
        batch.append((place, question))
        audios += count
    if batch:
        yield batch


def _read_ahead(
    reader: AudioReader, cell: Cell, batches: Iterator[list[Placed]]
) -> Iterator[tuple[list[Placed], list[Prompt]]]:
    """The batches, each with its prompts; one is read while the one before is asked."""

    def read(batch: list[Placed]) -> list[Prompt]:
        return reader.read(cell.dataset, [question.instruction for _, question in batch])

    with ThreadPoolExecutor(1) as ahead:
        batch = next(batches, None)
        pending = ahead.submit(read, batch or [])
        while batch is not None:
            prompts = pending.result()
            following = next(batches, None)
            pending = ahead.submit(read, following or [])
            yield batch, prompts
            batch = following


#: An answer's text, with its generation or the log-probability of every label, whichever the recipe's decoding gives.
Answer = tuple[str, Generation | None, dict[str, float] | None]


def _answers(
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


def _prediction(cell: Cell, question: Question, answer: Answer, *, asked: str) -> Prediction:
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
    )

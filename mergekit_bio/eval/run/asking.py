"""The loop of a run: every cell's open questions, batch by batch, to one engine."""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import groupby

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.waveform import pad_to_minimum
from mergekit_bio.engine.interface import Decoding, Engine, Generation, Prompt
from mergekit_bio.engine.slot import EngineSlot
from mergekit_bio.errors import AudioError, DatasetError
from mergekit_bio.eval.data.dataset import Dataset
from mergekit_bio.eval.recipe.schema import Recipe
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.records.run_directory import RunDirectory
from mergekit_bio.eval.run.plan import RunPlan
from mergekit_bio.eval.run.progress import AnswerCounter, ProgressListener
from mergekit_bio.eval.run.questions import Question, options, questions

#: Audios handed to an engine at once: 1.3 MB of samples each.
AUDIOS_AT_ONCE = 512
#: Prepared clips that are kept for the next query or as examples.
CLIPS_KEPT = 400
#: Seconds between two updates of a cell's time in run.json.
SAVE_TIME_EVERY = 30.0

#: A question with its place in the cell, from which its seed follows.
Placed = tuple[int, Question]


def ask_all(plan: RunPlan, run: RunDirectory, slot: EngineSlot, listener: ProgressListener) -> None:
    """Ask every cell, checkpoint by checkpoint; a checkpoint that has answered everything is not loaded."""
    counter = AnswerCounter(plan, listener)
    reader = AudioReader(plan.datasets)
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
                    # 3. Ask batch by batch. While the engine answers one, the recordings of the next are decoded.
                    for batch, prompts in reader.prompts(cell, _batches(todo, engine.prompts_at_once)):
                        slot.encode([clip for prompt in prompts for clip in prompt.audios])
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


class AudioReader:
    """Makes prompts of questions: decodes their recordings, one batch ahead of the engine.

    Args:
        datasets: Where the recordings are.
    """

    def __init__(self, datasets: Sequence[Dataset]) -> None:
        self._datasets = {dataset.name: dataset for dataset in datasets}
        self._clip = lru_cache(CLIPS_KEPT)(self._decode)

    def prompts(self, cell: Cell, batches: Iterator[list[Placed]]) -> Iterator[tuple[list[Placed], list[Prompt]]]:
        """The batches, each with its prompts.

        Raises:
            DatasetError: A recording is no use.
        """
        with ThreadPoolExecutor(1) as pool:
            batch = next(batches, None)
            pending = pool.submit(self._read, cell, batch or [])
            while batch is not None:
                prompts = pending.result()
                following = next(batches, None)
                pending = pool.submit(self._read, cell, following or [])
                yield batch, prompts
                batch = following

    def _read(self, cell: Cell, batch: list[Placed]) -> list[Prompt]:
        instructions = [question.instruction for _, question in batch]
        # In the order of their places, which is how they lie in the data; each once, though the cache may be small.
        ids = dict.fromkeys(clip_id for instruction in instructions for clip_id in instruction.clips)
        clips = {clip_id: self._clip(cell.dataset, clip_id) for clip_id in ids}
        return [
            Prompt(instruction.text, tuple(clips[clip_id] for clip_id in instruction.clips))
            for instruction in instructions
        ]

    def _decode(self, dataset_name: str, clip_id: str) -> Clip:
        dataset = self._datasets[dataset_name]
        samples, rate = dataset.audio(clip_id)
        try:
            # A benchmark may hold clips of less than half a second: the model hears them with silence at the end.
            return Clip.from_samples(pad_to_minimum(samples, rate), sampling_rate=rate, seconds=dataset.seconds)
        except AudioError as error:
            raise DatasetError(f"{dataset_name}: clip {clip_id}: {error}") from None


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

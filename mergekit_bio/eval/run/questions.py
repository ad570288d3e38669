"""From a recipe and a dataset to the questions of a cell: one instruction for every clip."""

from collections.abc import Iterator
from dataclasses import dataclass

from mergekit_bio.errors import DatasetError
from mergekit_bio.eval.data.dataset import Dataset, DatasetRow, open_dataset, species_asked
from mergekit_bio.eval.label_map import candidates
from mergekit_bio.eval.prompt import Instruction, flags, instruction_prompt, query_prompt, text_prompt
from mergekit_bio.eval.recipe.schema import Recipe


@dataclass(frozen=True)
class Question:
    """A row of a dataset and what is asked about it."""

    row: DatasetRow
    instruction: Instruction


def query_numbers(recipe: Recipe) -> range:
    """The numbers of a recipe's queries; 0 alone stands for the dataset's own instruction."""
    return range(len(recipe.queries) or 1)


def questions(
    recipe: Recipe, dataset: Dataset, query: int, limit: int | None = None, *, certain: int | None = None
) -> Iterator[Question]:
    """The questions of a query, in the dataset's order.

    What is asked about a clip depends on the recipe's seed, the dataset, the query and the clip alone, so that a run
    with a limit asks what the whole run asks, and every checkpoint is asked the same.

    Args:
        recipe: As loaded.
        dataset: Opened for the recipe.
        query: One of ``query_numbers``.
        limit: The first so many clips only.
        certain: Of the clips beyond so many those that have too few examples are left out; by default none is.

    Raises:
        DatasetError: A species has too few clips for the examples.
        PromptError: A label brings an audio slot of its own.
    """
    species = species_asked(dataset, recipe)
    pool = _pool(dataset)
    for place, row in enumerate(dataset.asked[:limit]):
        if dataset.task == "instructions" and row.path is None:
            instruction = text_prompt(row.instruction or "")
        elif not recipe.queries:
            instruction = instruction_prompt(
                clip=row.id, instruction=row.instruction or "", task=dataset.task, labels=dataset.labels
            )
        else:
            try:
                instruction = query_prompt(
                    query=recipe.queries[query],
                    clip=row.id,
                    key=(recipe.seed, dataset.name, query),
                    species=species,
                    descriptions={kind.name: kind.description or "" for kind in recipe.species},
                    pool=pool,
                    n_examples=recipe.n_examples,
                )
            except DatasetError:
                if certain is None or place < certain:
                    raise
                continue
        yield Question(row, instruction)


def clips_heard(recipe: Recipe, dataset: Dataset, limit: int | None = None) -> list[str]:
    """The ids of all clips that are heard with a recipe's questions, examples included; each once."""
    return [
        *dict.fromkeys(
            clip
            for query in query_numbers(recipe)
            for question in questions(recipe, dataset, query, limit)
            for clip in question.instruction.clips
        )
    ]


def check_examples(recipe: Recipe, dataset: Dataset, limit: int | None = None) -> None:
    """Make sure that every clip can be asked about with the examples that the recipe wants.

    Raises:
        DatasetError: A species has too few clips for them.
    """
    if not any("audio_examples" in flags(query, recipe.name) for query in recipe.queries):
        return
    pool, asked = _pool(dataset), {row.id for row in dataset.asked[:limit]}
    for name in species_asked(dataset, recipe):
        clips = pool.get(name, [])
        itself = 0 if asked.isdisjoint(clips) else 1
        if len(clips) - itself < recipe.n_examples:
            beside = " beside a clip that is asked about" if itself else ""
            raise DatasetError(
                f"{dataset.name}: n_examples: {recipe.n_examples} example(s) of '{name}' are asked for, there are "
                f"{len(clips) - itself}{beside}; lower n_examples, or add clips"
            )


def _pool(dataset: Dataset) -> dict[str, list[str]]:
    """Species -> ids of the clips that may serve as examples."""
    pool: dict[str, list[str]] = {}
    for row in dataset.examples:
        pool.setdefault(row.label, []).append(row.id)
    return pool


def options(recipe: Recipe, dataset: Dataset, query: int) -> list[str]:
    """The answers that ``choice`` and ``loglikelihood`` decoding choose among: every target of the clips, sorted.

    Raises:
        RecipeError: The recipe's label map has none of the clips' labels.
    """
    target = recipe.target(query, dataset.name)
    labels = (row.label for row in dataset.asked)
    return candidates(labels, target=target, names=recipe.label_map, where=f"{recipe.name}, {dataset.name}")


def labels_asked(recipe: Recipe, dataset: Dataset, query: int) -> tuple[str, ...]:
    """The closed list that an answer must be one of, as labels of the dataset, sorted; empty for an open question.

    It is what the engine chooses among, or what the query lists, whatever clips are asked about.
    """
    if recipe.decoding != "generate":
        return tuple(sorted({row.label for row in dataset.asked}))
    if recipe.queries and "species_list" in flags(recipe.queries[query], recipe.name):
        return tuple(sorted(species_asked(dataset, recipe)))
    return ()


def show_prompts(recipe: Recipe, number: int) -> Iterator[tuple[Dataset, int, list[Question]]]:
    """The first prompts of every dataset and query, without an engine, a checkpoint or a decoded recording.

    Args:
        recipe: As loaded.
        number: Of each cell.
    """
    for choice in recipe.datasets:
        dataset = open_dataset(choice, recipe)
        for query in query_numbers(recipe):
            yield dataset, query, list(questions(recipe, dataset, query, number))

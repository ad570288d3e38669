"""The plan of a run as data: cells = checkpoint x dataset x query, in the order that reloads least."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_bio.errors import RecipeError
from mergekit_bio.eval.data.dataset import Dataset, open_dataset
from mergekit_bio.eval.recipe.schema import Recipe
from mergekit_bio.eval.records.predictions import read_predictions
from mergekit_bio.eval.records.run_directory import CellRecord, cell_file_name
from mergekit_bio.eval.run.checkpoints import RunCheckpoint
from mergekit_bio.eval.run.questions import check_examples, query_numbers, questions


@dataclass(frozen=True, kw_only=True)
class PlannedCell:
    """What one checkpoint is asked about one dataset with one query.

    Attributes:
        rows: The number of clips.
        file: Its predictions file, in the run directory.
    """

    checkpoint: RunCheckpoint
    dataset: Dataset
    query: int
    rows: int
    file: str

    def __str__(self) -> str:
        return f"{self.checkpoint.name}, {self.dataset.name}, query {self.query}"


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that a run will do.

    Attributes:
        recipe: As resolved, with the checkpoints of the command line.
        out: The run directory.
        engine: Its name.
        limit: The first so many clips of every dataset only.
        cells: All queries of all datasets, checkpoint by checkpoint.
        max_audios: Most audios in a prompt.
    """

    recipe: Recipe
    out: Path
    engine: str
    limit: int | None
    checkpoints: tuple[RunCheckpoint, ...]
    datasets: tuple[Dataset, ...]
    cells: tuple[PlannedCell, ...]
    max_audios: int

    @property
    def rows(self) -> int:
        """The number of answers of the complete run."""
        return sum(cell.rows for cell in self.cells)

    def answered(self, cell: PlannedCell) -> int:
        """How many answers of a cell an earlier start has left."""
        file = self.out / cell.file
        return min(len(read_predictions(file)), cell.rows) if file.exists() else 0


def plan_run(
    recipe: Recipe, checkpoints: Sequence[RunCheckpoint], *, out: Path, engine: str, limit: int | None = None
) -> RunPlan:
    """Open the data and lay out the cells; no checkpoint is touched and no recording decoded.

    Raises:
        DatasetError: Data cannot be had, is damaged, or has too few clips for the examples.
        RecipeError: The recipe asks for what no engine does.
    """
    if recipe.generate.repetition_penalty != 1.0:
        raise RecipeError(f"{recipe.name}: generate.repetition_penalty: the engines have none; leave it at 1.0")
    if limit is not None and limit < 1:
        raise RecipeError(f"--limit {limit}: ask about at least one clip")
    datasets = tuple(open_dataset(choice, recipe) for choice in recipe.datasets)
    for dataset in datasets:
        check_examples(recipe, dataset, limit)
    alphas = [checkpoint.alpha for checkpoint in checkpoints]
    distinct = len(set(alphas)) == len(alphas)
    return RunPlan(
        recipe=recipe,
        out=out,
        engine=engine,
        limit=limit,
        checkpoints=tuple(checkpoints),
        datasets=datasets,
        cells=tuple(
            PlannedCell(
                checkpoint=checkpoint,
                dataset=dataset,
                query=query,
                rows=len(dataset.clips[:limit]),
                file=cell_file_name(
                    dataset=dataset.name,
                    query=query,
                    checkpoint=checkpoint.name,
                    # Two checkpoints of one strength are told apart by their names.
                    alpha=checkpoint.alpha if distinct else None,
                ),
            )
            for checkpoint in checkpoints
            for dataset in datasets
            for query in query_numbers(recipe)
        ),
        max_audios=max(
            len(question.instruction.clips)
            for dataset in datasets
            for query in query_numbers(recipe)
            for question in questions(recipe, dataset, query, 1)
        ),
    )


def cell_records(
    plan: RunPlan, *, weights: Mapping[RunCheckpoint, dict[str, Any]], dtype: str | None
) -> dict[str, CellRecord]:
    """File -> record of every cell, with all that decides its predictions.

    Args:
        plan: Of ``plan_run``.
        weights: What tells each checkpoint from others.
        dtype: The data type that the engine was asked to compute in, if it was.
    """
    recipe = plan.recipe
    data = {dataset.name: dataset.fingerprint() for dataset in plan.datasets}
    generate = {
        "max_new_tokens": recipe.generate.max_new_tokens,
        "num_beams": recipe.generate.num_beams,
        "temperature": recipe.generate.temperature,
        "length_penalty": recipe.generate.length_penalty,
    }
    records = {}
    for cell in plan.cells:
        query = recipe.queries[cell.query] if recipe.queries else None
        target = recipe.target(cell.query, cell.dataset.name)
        identity = {
            "checkpoint": weights[cell.checkpoint],
            "data": data[cell.dataset.name],
            "clip_seconds": cell.dataset.seconds,
            "query": query,
            "species": [[one.name, one.description] for one in recipe.species],
            "top_k_species": recipe.top_k_species,
            "n_examples": recipe.n_examples,
            "seed": recipe.seed,
            "decoding": recipe.decoding,
            "generate": generate if recipe.decoding == "generate" else None,
            # Names to choose from; scoring may change them afterwards, generated answers do not depend on them.
            "choices": None if recipe.decoding == "generate" else {"target": target, "names": recipe.label_map},
            "engine": plan.engine,
            "dtype": dtype,
        }
        records[cell.file] = CellRecord(
            file=cell.file,
            dataset=cell.dataset.name,
            task=cell.dataset.task,
            query=cell.query,
            checkpoint=cell.checkpoint.name,
            rows=cell.rows,
            identity=identity,
            alpha=cell.checkpoint.alpha,
            target=target,
            query_text=query,
        )
    return records


def to_document(plan: RunPlan) -> dict[str, Any]:
    """The plan as JSON-serialisable values."""
    return {
        "recipe": plan.recipe.name,
        "out": str(plan.out),
        "engine": plan.engine,
        "to_merge": [checkpoint.name for checkpoint in plan.checkpoints if checkpoint.missing],
        "answers": plan.rows,
        "cells": [
            {
                "checkpoint": cell.checkpoint.name,
                "source": cell.checkpoint.source,
                "alpha": cell.checkpoint.alpha,
                "dataset": cell.dataset.name,
                "query": cell.query,
                "clips": cell.rows,
                "answered": plan.answered(cell),
                "file": cell.file,
            }
            for cell in plan.cells
        ],
    }

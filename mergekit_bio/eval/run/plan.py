"""The plan of a run as data: cells = checkpoint x dataset x query, in the order that reloads least."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_bio.errors import RecipeError
from mergekit_bio.eval.data.dataset import UNREADABLE, Dataset, open_dataset
from mergekit_bio.eval.recipe.schema import Recipe
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.kept_answers import AskedNow
from mergekit_bio.eval.records.predictions import read_predictions
from mergekit_bio.eval.records.run_directory import cell_file_name
from mergekit_bio.eval.run.checkpoints import RunCheckpoint
from mergekit_bio.eval.run.questions import check_examples, labels_asked, options, query_numbers, questions


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
    cells: tuple[Cell, ...]
    max_audios: int

    @property
    def rows(self) -> int:
        """The number of answers of the complete run."""
        return sum(cell.rows or 0 for cell in self.cells)

    def checkpoint(self, cell: Cell) -> RunCheckpoint:
        """The checkpoint that a cell asks."""
        return next(checkpoint for checkpoint in self.checkpoints if checkpoint.name == cell.checkpoint)

    def dataset(self, cell: Cell) -> Dataset:
        """The dataset that a cell asks about."""
        return self.dataset_named(cell.dataset)

    def dataset_named(self, name: str) -> Dataset:
        """The dataset of that name."""
        return next(dataset for dataset in self.datasets if dataset.name == name)

    def answered(self, cell: Cell) -> int:
        """How many answers of a cell an earlier start has left."""
        file = self.out / cell.file
        return min(len(read_predictions(file)), cell.rows or 0) if file.exists() else 0


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
            Cell(
                file=cell_file_name(
                    dataset=dataset.name,
                    query=query,
                    checkpoint=checkpoint.name,
                    # Two checkpoints of one strength are told apart by their names.
                    alpha=checkpoint.alpha if distinct else None,
                ),
                dataset=dataset.name,
                task=dataset.task,
                query=query,
                checkpoint=checkpoint.name,
                rows=len(dataset.asked[:limit]),
                alpha=checkpoint.alpha,
                target=recipe.target(query, dataset.name),
                query_text=recipe.queries[query] if recipe.queries else None,
                labels=labels_asked(recipe, dataset, query),
            )
            for checkpoint in checkpoints
            for dataset in datasets
            for query in query_numbers(recipe)
        ),
        max_audios=max(
            1,  # of instructions maybe none is heard
            *(
                len(question.instruction.clips)
                for dataset in datasets
                for query in query_numbers(recipe)
                for question in questions(recipe, dataset, query, 1)
            ),
        ),
    )


def identified_cells(
    plan: RunPlan, *, weights: Mapping[RunCheckpoint, dict[str, Any]], dtype: str | None, baseline: bool = False
) -> tuple[Cell, ...]:
    """The cells with all that decides their predictions.

    Args:
        plan: Of ``plan_run``.
        weights: What tells each checkpoint from others.
        dtype: The data type that the engine was asked to compute in, if it was.
        baseline: Whether the checkpoints are other people's models.
    """
    recipe = plan.recipe
    data = {dataset.name: dataset.fingerprint() for dataset in plan.datasets}
    generate = {
        "max_new_tokens": recipe.generate.max_new_tokens,
        "num_beams": recipe.generate.num_beams,
        "temperature": recipe.generate.temperature,
        "length_penalty": recipe.generate.length_penalty,
    }
    cells = []
    for cell in plan.cells:
        identity = {
            "checkpoint": weights[plan.checkpoint(cell)],
            "data": data[cell.dataset],
            "clip_seconds": plan.dataset(cell).seconds,
            "query": cell.query_text,
            "species": [[species.name, species.description] for species in recipe.species],
            "top_k_species": recipe.top_k_species,
            "n_examples": recipe.n_examples,
            "seed": recipe.seed,
            "decoding": recipe.decoding,
            "ends_scored": recipe.decoding == "loglikelihood",
            "generate": generate if recipe.decoding == "generate" else None,
            # Names to choose from; scoring may change them afterwards, generated answers do not depend on them.
            "choices": None if recipe.decoding == "generate" else {"target": cell.target, "names": recipe.label_map},
            "engine": plan.engine,
            "dtype": dtype,
            **({"baseline": True} if baseline else {}),
        }
        cells.append(replace(cell, identity=identity))
    return tuple(cells)


def asked_now(plan: RunPlan) -> dict[str, AskedNow]:
    """For each predictions file what its cell asks of all clips, those beyond a limit too, which have answers maybe."""
    by_query: dict[tuple[str, int], AskedNow] = {}
    for dataset in plan.datasets:
        clips = dataset.clip_digests()
        labels = {row.id: row.label for row in dataset.asked}
        for query in query_numbers(plan.recipe):
            listed = [] if plan.recipe.decoding == "generate" else options(plan.recipe, dataset, query)
            digests: dict[str, str | None] = {}
            for question in questions(plan.recipe, dataset, query, certain=plan.limit):
                if any(clips[clip_id].startswith(UNREADABLE) for clip_id in question.instruction.clips):
                    digests[question.row.id] = None
                    continue
                texts = "\0".join([question.instruction.text, *listed]).encode()
                heard = b"\0".join(clips[clip_id] for clip_id in question.instruction.clips)
                digests[question.row.id] = hashlib.sha256(texts + b"\0" + heard).hexdigest()[:16]
            by_query[dataset.name, query] = AskedNow(digests, labels)
    return {cell.file: by_query[cell.dataset, cell.query] for cell in plan.cells}


def to_document(plan: RunPlan) -> dict[str, Any]:
    """The plan as JSON-serialisable values."""
    return {
        "recipe": plan.recipe.name,
        "out": str(plan.out),
        "engine": plan.engine,
        "to_merge": [checkpoint.name for checkpoint in plan.checkpoints if checkpoint.missing],
        "prompts": plan.rows,
        "answers": plan.rows,
        "cells": [
            {
                "checkpoint": cell.checkpoint,
                "source": plan.checkpoint(cell).source,
                "alpha": cell.alpha,
                "dataset": cell.dataset,
                "query": cell.query,
                "clips": cell.rows,
                "answered": plan.answered(cell),
                "file": cell.file,
            }
            for cell in plan.cells
        ],
    }

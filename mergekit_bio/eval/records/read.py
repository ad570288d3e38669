"""Cells of runs, read back from disk: our own run directories and the layout of the published predictions."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from glob import escape
from pathlib import Path
from textwrap import shorten
from typing import Any

from mergekit_bio.errors import RecipeError, RunError
from mergekit_bio.eval.components import components
from mergekit_bio.eval.label_map import read_label_map
from mergekit_bio.eval.paper_questions import NAMED_COMPONENTS, paper_names, paper_target
from mergekit_bio.eval.prompt import question
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.predictions import Prediction, read_predictions
from mergekit_bio.eval.records.run_directory import RECORD_NAME, read_record

_PUBLISHED_NAME = re.compile(
    r"beans_zero_eval_(?P<dataset>.+)_query(?P<query>\d{1,4})_lora(?P<hundredths>\d{1,6})\.jsonl(\.gz)?"
)
#: What the user says in the chat template that the published prompts stand in.
_USER_TURN = re.compile(r"<\|start_header_id\|>user<\|end_header_id\|>(.*?)<\|eot_id\|>", re.DOTALL)
#: Of a cell's identity, how was answered and not what was asked.
_OF_ANSWERS = {"engine", "dtype", "generate", "baseline"}
#: Where names were published with predictions: in their folder, or for several experiments beside the folder.
_NAME_FILES = ("{dataset}_vernacular_scientific_mapping.jsonl", "{dataset}_names.jsonl", "{dataset}_names_*.jsonl")


def read_runs(paths: list[Path], label_maps: Sequence[Path] = ()) -> list[Cell]:
    """Read every cell below the given paths.

    Args:
        paths: Run directories, folders of published predictions files, folders of such folders, or single
            published files. A file that several of them lead to counts once.
        label_maps: Used instead of the label maps that the runs bring, for the datasets whose labels they have.

    Returns:
        The cells in the order of run, dataset, query and alpha; those that have no answer yet are among them.

    Raises:
        RunError: A path holds no run or something damaged, or there is no prediction at all.
        RecipeError: A label map cannot be read, or two of them have another name for a label.
    """
    # 1. Every cell below the paths; one that several of them lead to counts once.
    names = _joined(label_maps)
    by_file: dict[Path, Cell] = {}
    for path in paths:
        cells_there = list(_cells_at(path, names))
        if not cells_there:
            raise RunError(f"{path}: no run in it (no {RECORD_NAME}, no beans_zero_eval_*.jsonl)")
        for cell in cells_there:
            by_file.setdefault(cell.path.resolve(), cell)
    if not any(cell.predictions for cell in by_file.values()):
        raise RunError(f"{', '.join(map(str, paths))}: no prediction yet; let `mergekit-bio eval` go on")

    # 2. Names that differ, and the order of the report: runs as given, then dataset, query and alpha.
    cells = _with_distinct_names([*by_file.values()])
    order = {name: index for index, name in enumerate(dict.fromkeys(cell.run for cell in cells))}

    def place(cell: Cell) -> tuple[Any, ...]:
        return order[cell.run], cell.sweep, cell.alpha is None, cell.alpha or 0.0, cell.checkpoint

    return sorted(cells, key=place)


def _joined(label_maps: Sequence[Path]) -> dict[str, str]:
    """The names of all maps."""
    names: dict[str, str] = {}
    source: dict[str, Path] = {}
    for path in label_maps:
        for label, name in read_label_map(path).items():
            if names.setdefault(label, name) != name:
                raise RecipeError(
                    f"{path}: the label {label!r} is {name!r} here and {names[label]!r} in {source[label]}; give one"
                )
            source.setdefault(label, path)
    return names


def _has_labels(names: Mapping[str, str], rows: Sequence[Prediction]) -> bool:
    """Whether a label map is about these clips."""
    return any(row.label in names for row in rows)


def _with_distinct_names(cells: list[Cell]) -> list[Cell]:
    """The cells with names that tell them apart.

    Runs of one name in different folders are called by their folders, unless they are parts of one. Two checkpoints of
    a sweep have one name where a run was started again with another checkpoint of the same strength; their files are
    added to the name.
    """
    by_name: dict[str, list[Cell]] = {}
    for cell in cells:
        by_name.setdefault(cell.run, []).append(cell)
    whole = {name: _are_one_run(of_name) for name, of_name in by_name.items()}
    cells = [cell if whole[cell.run] else replace(cell, run=str(cell.folder)) for cell in cells]
    cells_of_name = Counter((cell.sweep, cell.checkpoint) for cell in cells)
    return [
        replace(cell, checkpoint=f"{cell.checkpoint} ({cell.file})")
        if cells_of_name[cell.sweep, cell.checkpoint] > 1
        else cell
        for cell in cells
    ]


def _are_one_run(cells: Sequence[Cell]) -> bool:
    """Whether cells are of one folder, or what the tasks of an array leave: other checkpoints, and all else equal.

    Of other people's models only what they were asked need be equal.
    """
    if len({cell.folder for cell in cells}) == 1:
        return True
    ours = [cell for cell in cells if not cell.baseline]
    for compared, of_answers in ((ours, {"checkpoint"}), (cells, {"checkpoint"} | _OF_ANSWERS)):
        asked: dict[object, dict[str, Any]] = {}
        for cell in compared:
            identity = {key: value for key, value in cell.identity.items() if key not in of_answers}
            if asked.setdefault(cell.sweep, identity) != identity:
                return False
    return len({cell.file for cell in cells}) == len(cells)


def _cells_at(path: Path, names: Mapping[str, str]) -> Iterator[Cell]:
    if not path.exists():
        raise RunError(f"{path}: no such run")
    if path.is_file():
        yield from _published([path], names)
    elif (path / RECORD_NAME).is_file():
        yield from _recorded(path, names)
    elif files := [file for file in sorted(path.iterdir()) if _PUBLISHED_NAME.fullmatch(file.name)]:
        yield from _published(files, names)
    else:
        for folder in filter(Path.is_dir, sorted(path.iterdir())):
            if any(file.name == RECORD_NAME or _PUBLISHED_NAME.fullmatch(file.name) for file in folder.iterdir()):
                yield from _cells_at(folder, names)


def _recorded(path: Path, names: Mapping[str, str]) -> Iterator[Cell]:
    """The cells of a run directory of ours; ``names`` instead of its own label map where they are about its clips."""
    record = read_record(path)
    for cell in record.cells:
        file = path / cell.file
        rows = read_predictions(file) if file.exists() else ()
        yield replace(
            cell,
            run=record.name,
            folder=path,
            predictions=_by_id(rows),
            order=tuple(row.id for row in rows),
            names=names if _has_labels(names, rows) else record.label_map,
            scorer=record.scorer,
        )


def _published(files: list[Path], names: Mapping[str, str]) -> Iterator[Cell]:
    """The cells of published predictions files, whose names say what nothing else does."""
    for file in files:
        if file.with_name(f"{file.name}.gz") in files:
            raise RunError(f"{file}: stands there zipped too; keep one")
        name = _PUBLISHED_NAME.fullmatch(file.name)
        if not name:
            raise RunError(f"{file}: not named as a published file (beans_zero_eval_DATASET_queryN_loraNNN.jsonl[.gz])")
        run, dataset, query = file.resolve().parent.name, name["dataset"], int(name["query"])
        alpha = int(name["hundredths"]) / 100
        rows = read_predictions(file)
        predictions = _by_id(rows)
        notes = []

        # 1. What is right: the paper knows it for its own questions, for every other one it is the label.
        prompt = next((row.prompt for row in predictions if row.prompt), None)
        turn = _USER_TURN.search(prompt or "")
        asked = question(turn[1] if turn else prompt) if prompt else None
        target = paper_target(dataset, query=asked, number=query)
        if dataset in NAMED_COMPONENTS and target is None:
            shown = "the file has no prompts" if asked is None else repr(shorten(asked, 80, placeholder=" ..."))
            notes.append(f"none of the paper's questions ({shown}); scored against the label")

        # 2. The scientific names that this takes: those given, else those beside the file, else the paper's.
        named: Mapping[str, str] = {}
        if target in ("scientific", "combined"):
            named = names if _has_labels(names, rows) else _names_beside(file.parent, dataset)
            if not named:
                of_paper = paper_names(dataset)
                named = read_label_map(of_paper)
                notes.append(
                    f"no list of scientific names beside the files; the paper's is used (labels/{of_paper.name})"
                )
        yield Cell(
            file=file.name,
            dataset=dataset,
            task=components()[dataset].task if dataset in components() else "classification",
            query=query,
            checkpoint=f"alpha {alpha:.2f}",
            rows=None,
            alpha=alpha,
            target=target or "label",
            run=run,
            folder=file.parent,
            predictions=predictions,
            order=tuple(row.id for row in rows),
            names=named,
            notes=tuple(f"{run}, {dataset}, query {query}: {note}" for note in notes),
        )


@cache
def _names_beside(folder: Path, dataset: str) -> Mapping[str, str]:
    """The scientific names that were published with the predictions; empty without them."""
    if (folder / "names.jsonl").exists():
        return read_label_map(folder / "names.jsonl")
    for place in (folder, folder.resolve().parent):
        for pattern in _NAME_FILES:
            for path in sorted(place.glob(pattern.format(dataset=escape(dataset)))):
                return read_label_map(path)
    return {}


def _by_id(rows: tuple[Prediction, ...]) -> tuple[Prediction, ...]:
    return tuple(sorted(rows, key=lambda row: row.id))

"""A run on disk: run.json says what was asked of whom, the predictions files hold the answers; resuming and reading.

::

    RUN/run.json                                                  RunRecord
    RUN/beans_zero_eval_DATASET_queryQ_lora040.jsonl              one cell, named as the published ones
    RUN/beans_zero_eval_DATASET_queryQ_model-NAME.jsonl           a checkpoint without a single alpha
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from mergekit_bio.audio.clip import CLIP_SECONDS
from mergekit_bio.errors import OutputError, RunError
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.kept_answers import AskedNow, KeptAnswers, keep_answers, kept_answers, notes
from mergekit_bio.eval.records.predictions import PredictionWriter, read_predictions
from mergekit_bio.outside_data import FORBID_EXTRA, Document, changes, read_json

RECORD_NAME = "run.json"
LOCK_NAME = ".run.lock"

#: What decided predictions before an identity said so: every clip was 10 s long, whatever its component, and a label's
#: end did not count for its score.
_UNSAID = {"clip_seconds": CLIP_SECONDS, "ends_scored": False}


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """The content of run.json.

    Attributes:
        recipe: As resolved.
        label_map: label -> scientific name, where a target needs it.
        environment: Versions, hashes, engine settings, timings: whatever a reader may want to know.
        format: Version of this layout.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    name: str
    recipe: dict[str, Any]
    scorer: str
    cells: tuple[Cell, ...]
    label_map: dict[str, str] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    format: Literal[1] = 1


def cell_file_name(*, dataset: str, query: int, checkpoint: str, alpha: float | None) -> str:
    """The file of a cell: the reference's name where alpha is a whole number of hundredths."""
    hundredths = None if alpha is None else round(alpha * 100)
    if alpha is not None and hundredths is not None and hundredths >= 0 and abs(alpha * 100 - hundredths) < 1e-6:
        model = f"lora{hundredths:03d}"
    else:
        model = f"model-{_slug(checkpoint)}"
    return f"beans_zero_eval_{_slug(dataset)}_query{query}_{model}.jsonl"


def _slug(text: str) -> str:
    """File-name safe, and different for different texts."""
    safe = re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-.")
    return safe if safe == text else f"{safe[:60]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def read_record(directory: Path) -> RunRecord:
    """Read and check run.json.

    Raises:
        RunError: It is missing, damaged or of another version.
    """
    path = directory / RECORD_NAME
    record = Document(path, read_json(path, error=RunError), RunError).checked(RunRecord)
    for cell in record.cells:
        if Path(cell.file).name != cell.file:
            raise RunError(f"{path}: the file {cell.file!r} is not in the run directory")
    return record


class RunDirectory(AbstractContextManager["RunDirectory"]):
    """A run being written by this process, and by no other.

    Use as a context manager. The directory is made when missing, and ``record`` is on disk before the first prediction.
    Cells that the directory holds from an earlier start are kept, and continued where the record asks for them again.
    Where the data has changed since, answers are kept clip by clip.

    Args:
        path: The directory.
        record: What it will be a run of.
        asked: Predictions file -> what its cell asks now.

    Attributes:
        notes: What a user must be told about answers that were kept.

    Raises:
        RunError: Another process writes the run, or it was answered under another configuration (the error names the
            keys), or it was written by another version.
        OutputError: The directory cannot be written.
    """

    def __init__(self, path: Path, record: RunRecord, asked: Mapping[str, AskedNow] | None = None) -> None:
        self.path = path
        self.notes: list[str] = []
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / LOCK_NAME).open("wb")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from None
        with ExitStack() as stack:  # whatever goes wrong below lets go of the lock
            stack.enter_context(lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                message = "another process is writing this run; wait for it or give another --out"
                raise RunError(f"{path}: {message}") from None
            kept: dict[str, KeptAnswers] = {}
            if (path / RECORD_NAME).exists():
                self.record, kept = _continued(path, record, asked or {})
            else:
                self.record = record
            by_dataset: dict[str, list[KeptAnswers]] = {}
            for cell in record.cells:
                if cell.file in kept:
                    keep_answers(path / cell.file, kept[cell.file])
                    by_dataset.setdefault(cell.dataset, []).append(kept[cell.file])
            self.notes += notes(by_dataset)
            self._write()
            self._lock = stack.pop_all()

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def writer(self, cell: Cell) -> PredictionWriter:
        """Open a cell's predictions file; ``done`` of the writer are the ids to leave out."""
        return PredictionWriter(self.path / cell.file)

    def add_seconds(self, cell: Cell, seconds: float) -> None:
        """Add to the time spent on a cell."""
        cells = (
            replace(known, seconds=known.seconds + seconds) if known.file == cell.file else known
            for known in self.record.cells
        )
        self.record = replace(self.record, cells=tuple(cells))
        self._write()

    def note(self, values: Mapping[str, Any]) -> None:
        """Add to the record's ``environment``."""
        self.record = replace(self.record, environment={**self.record.environment, **values})
        self._write()

    def _write(self) -> None:
        """Replace run.json whole or not at all."""
        document = asdict(replace(self.record, cells=())) | {"cells": [cell.recorded() for cell in self.record.cells]}
        new = self.path / (RECORD_NAME + ".partial")
        try:
            with new.open("w", encoding="utf-8") as file:
                json.dump(document, file, indent=1, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path / RECORD_NAME)
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path / RECORD_NAME}: {error.strerror}; run the command again"
            ) from None


def _continued(
    path: Path, wanted: RunRecord, asked: Mapping[str, AskedNow]
) -> tuple[RunRecord, dict[str, KeptAnswers]]:
    """The record of a run that goes on: the cells of both, no answer of them under two configurations.

    With it come, for each predictions file that has answers, those that still stand.
    """
    # 1. A cell that has answers may only be asked again under the configuration that they were given under. What it
    #    asks about a clip may have changed: the others' answers stand.
    kept: dict[str, KeptAnswers] = {}
    started = read_record(path)
    before = {cell.file: cell for cell in started.cells}
    for cell in wanted.cells:
        if cell.file not in before:
            continue
        # Through JSON, as the one on disk went: a tuple is a list there.
        identity = _UNSAID | json.loads(json.dumps(cell.identity))
        answered_under = _UNSAID | before[cell.file].identity
        file = path / cell.file
        # What failed before its first answer may be started otherwise.
        rows = read_predictions(file) if file.exists() else ()
        if not rows:
            continue
        known = cell.file in asked and all(row.question for row in rows)
        if known:
            kept[cell.file] = kept_answers(rows, asked[cell.file])
        # Where no answer stands, it is other data altogether.
        if known and kept[cell.file].rows:
            identity, answered_under = ({**of, "data": None} for of in (identity, answered_under))
        if answered_under != identity:
            raise RunError(
                f"{path}: started with another configuration: {changes(answered_under, identity)}; restore it, or give "
                "another --out for a new run"
            )

    # 2. The new cells first, then those of before that are not asked again. The time spent on a cell is kept.
    cells = {cell.file: cell for cell in wanted.cells}
    for cell in started.cells:
        cells[cell.file] = replace(cells.get(cell.file, cell), seconds=cell.seconds)

    # 3. The label map is the new one. The cells of before may be scored with names that it lacks.
    files = {cell.file for cell in wanted.cells}
    names_needed = any(cell.target != "label" for cell in started.cells if cell.file not in files)
    record = replace(
        wanted,
        cells=tuple(cells.values()),
        label_map={**started.label_map, **wanted.label_map} if names_needed else wanted.label_map,
        environment={**started.environment, **wanted.environment},
    )
    return record, kept

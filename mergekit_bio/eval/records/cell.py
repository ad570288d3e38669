"""The cell: what one checkpoint is asked about one dataset with one query. Plan, run.json and report share it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from mergekit_bio.eval.components import Task
from mergekit_bio.eval.label_map import Target
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.outside_data import FORBID_EXTRA

#: A part of a cell that reading it back adds, and run.json does not hold.
_READ_BACK = {"read_back": True}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a run, planned, recorded or read back.

    Attributes:
        file: The name of its predictions file, in the run directory.
        query: The number of the query in the recipe.
        checkpoint: What tables call the checkpoint.
        rows: The number of clips that the complete cell has; None if nobody says.
        identity: All that decides the predictions, nested by key. A file is only continued under an equal one. Empty
            in a plan, which has not looked at weights and recordings.
        alpha: The merge strength; None for a checkpoint not merged with one number.
        query_text: The query as in the recipe; None where the dataset has its own instruction.
        labels: The closed list that the answer had to be one of, as labels of the dataset; empty for an open question.
        run: Name of the run or of the published experiment.
        predictions: Ordered by id, so that cells of one sweep are aligned; none where there is no answer yet.
        order: The ids in the order of the file; empty where that is the order of ``predictions``.
        names: label -> scientific name, where ``target`` needs it.
        scorer: The scorer that the run asks for; None in the published layout.
        notes: What a reader of its metrics must be told.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = FORBID_EXTRA

    file: str
    dataset: str
    task: Task
    query: int
    checkpoint: str
    rows: int | None
    identity: dict[str, Any] = field(default_factory=dict)
    alpha: float | None = None
    target: Target = "label"
    query_text: str | None = None
    labels: tuple[str, ...] = ()
    seconds: float = 0.0
    run: str = field(default="", metadata=_READ_BACK)
    folder: Path = field(default_factory=Path, metadata=_READ_BACK)
    predictions: tuple[Prediction, ...] = field(default=(), metadata=_READ_BACK)
    order: tuple[str, ...] = field(default=(), metadata=_READ_BACK)
    names: Mapping[str, str] = field(default_factory=dict, metadata=_READ_BACK)
    scorer: str | None = field(default=None, metadata=_READ_BACK)
    notes: tuple[str, ...] = field(default=(), metadata=_READ_BACK)

    def __str__(self) -> str:
        return f"{self.run}, {self.dataset}, query {self.query}, {self.checkpoint}"

    @property
    def path(self) -> Path:
        """Its predictions file."""
        return self.folder / self.file

    @property
    def baseline(self) -> bool:
        """Whether another model answered, which a sweep is compared with."""
        return bool(self.identity.get("baseline"))

    @property
    def sweep(self) -> tuple[str, str, int, str, str]:
        """The same for all cells that are compared: a recipe whose queries change may use a number again."""
        return self.run, self.dataset, self.query, self.target, self.query_text or ""

    def recorded(self) -> dict[str, Any]:
        """What run.json holds of it."""
        kept = [part.name for part in fields(self) if not part.metadata]
        return {name: getattr(self, name) for name in kept if name != "labels" or self.labels}

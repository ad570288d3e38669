"""The 22 components of BEANS-Zero: what each should hold."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from mergekit_bio.audio.clip import CLIP_SECONDS

#: What is asked of a dataset; BEANS-Zero has the first three.
Task = Literal["classification", "detection", "captioning", "instructions"]


@dataclass(frozen=True)
class Component:
    """One component, as the configuration of the beans-zero library describes it (EarthSpeciesProject/BEANS-Zero).

    Attributes:
        name: The value of the column ``dataset_name``.
        duration: Seconds that every clip is cut or padded to: the longest duration that the component states, or 10.
        labels: Every label, "None" included where a detection clip may be empty; None for captioning.
    """

    name: str
    task: Task
    rows: int
    duration: float
    labels: tuple[str, ...] | None


@cache
def components() -> dict[str, Component]:
    """All components by name, in the benchmark's order."""
    rows = json.loads(Path(__file__).with_name("beans_zero_components.json").read_text(encoding="utf-8"))
    return {
        row["name"]: Component(
            name=row["name"],
            task=row["task"],
            rows=row["rows"],
            duration=float(row["max_duration_s"] or CLIP_SECONDS),
            labels=row["labels"] and tuple(row["labels"]),
        )
        for row in rows
    }

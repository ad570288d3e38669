"""One dataset's rows, which are asked about; their recordings are decoded when they are needed."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_bio.audio.decoding import Note
from mergekit_bio.errors import AudioError, DatasetError
from mergekit_bio.eval.components import Task, components
from mergekit_bio.eval.recipe.schema import DatasetChoice, Recipe
from mergekit_bio.outside_data import nearest

#: Where a file's digest would begin that cannot be read, for now.
UNREADABLE = b"cannot be read"


#: See the attributes ``recording`` and ``recordings`` of ``Dataset``.
Recording = Callable[[str, Note], tuple[np.ndarray, int]]
Recordings = Callable[[Sequence[str], Note], Iterable[tuple[np.ndarray, int] | AudioError]]


class RecordingError(DatasetError):
    """One recording is no use; others of the dataset may be."""


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """One row of a dataset, without its recording.

    Attributes:
        id: Unique within the dataset.
        label: Comma-separated for detection, a text for captioning, the constraint for instructions.
        instruction: The dataset's own question, its audio slot included; None where it has none.
        path: The recording's file, for local data; None for an instruction without audio.
        start: Where in the file it begins, in seconds.
        end: Where it ends; None for the end of the file. Of what is longer than a clip the beginning is heard.
    """

    id: str
    label: str
    instruction: str | None = None
    path: Path | None = None
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True, slots=True)
class Download:
    """Recordings that are fetched together.

    Attributes:
        bytes: How many.
        fetch: Gets them, whole or not at all.
    """

    bytes: int
    fetch: Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The rows of one dataset.

    Attributes:
        name: The component, or the name of the local folder.
        asked: The rows that are asked about, in the dataset's order.
        examples: The rows that in-context examples are drawn from.
        labels: The number of labels that the dataset has as a whole; None where nobody counts.
        seconds: What every recording is cut or padded to before the model hears it.
        notes: What a user must be told about the data.
        recording: Row id -> samples, float64 [samples] or [samples, channels], and their rate in Hz; what a user should
            know of the recording is told to the second argument.
        recordings: Ids of rows that are parts of one file, by their starts -> each as ``recording`` gives it, or what
            is wrong with it, in one way through the file; None where rows have no files.
        channel: Which channel of the recordings is heard, counted from 1; None is the mean of all.
        downloads: Row ids -> what has to be fetched before their recordings are on this disk; None where nothing is.
    """

    name: str
    task: Task
    asked: tuple[DatasetRow, ...]
    examples: tuple[DatasetRow, ...]
    labels: int | None
    seconds: float
    source: str
    recording: Recording
    recordings: Recordings | None = None
    channel: int | None = None
    notes: tuple[str, ...] = ()
    downloads: Callable[[Sequence[str]], list[Download]] | None = None

    def audio(self, row_id: str, note: Note = lambda text: None) -> tuple[np.ndarray, int]:
        """The recording of a row, cut at the dataset's longest duration; samples and rate as ``recording`` gives them.

        Args:
            row_id: The row.
            note: Is told what a user should know of the recording.

        Raises:
            RecordingError: The row has no usable recording.
            AudioError: The file cannot be decoded.
            DatasetError: The data cannot be had.
        """
        samples, rate = self.recording(row_id, note)
        return samples[: round(self.seconds * rate)], rate

    def audios(
        self, row_ids: Sequence[str], note: Note = lambda text: None
    ) -> Iterator[tuple[np.ndarray, int] | AudioError]:
        """The recordings of rows that are parts of one file, in the order of their starts, as ``audio`` gives each.

        A row's error stands in its place.
        """
        assert self.recordings is not None
        for found in self.recordings(row_ids, note):
            yield found if isinstance(found, AudioError) else (found[0][: round(self.seconds * found[1])], found[1])

    def fingerprint(self) -> str:
        """SHA-256 over ids, labels, instructions and, for local data, the recordings' bytes and the channel."""
        digest = hashlib.sha256()
        if self.channel is not None:
            digest.update(f"channel {self.channel}".encode() + b"\0")
        contents = self._contents()
        for row in sorted({*self.asked, *self.examples}, key=lambda row: row.id):
            for part in (row.id, row.label, row.instruction or ""):
                digest.update(part.encode() + b"\0")
            if row.path is not None:
                digest.update(contents[row.path])
        return f"sha256:{digest.hexdigest()}"

    def clip_digests(self) -> dict[str, bytes]:
        """Row id -> what decides how its clip sounds: a file's bytes, part and channel; of other data the row's id."""
        heard = b"" if self.channel is None else f"\0channel {self.channel}".encode()
        contents = self._contents()
        digests = {}
        for row in {*self.asked, *self.examples}:
            part = f"\0{row.start}-{row.end}".encode() if row.start or row.end is not None else b""
            digests[row.id] = (row.id.encode() if row.path is None else contents[row.path]) + part + heard
        return digests

    def _contents(self) -> dict[Path, bytes]:
        """The digest of each recording's file; many rows may be parts of one."""
        return {path: _file_digest(path) for path in {row.path for row in (*self.asked, *self.examples)} if path}

    def species(self, top: int) -> list[str]:
        """The most frequent labels, the most frequent first, equals by name."""
        counts = Counter(row.label for row in self.asked)
        return sorted(counts, key=lambda label: (-counts[label], label))[:top]


def _file_digest(path: Path) -> bytes:
    """SHA-256 of a file, read once as long as it stays as it is; of one that cannot be read, no digest of any file."""
    try:
        stat = path.stat()
        return _digest_of_version(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)
    except OSError:
        return UNREADABLE


@lru_cache(1 << 20)
def _digest_of_version(path: Path, *version: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def open_dataset(choice: DatasetChoice, recipe: Recipe) -> Dataset:
    """Open one of a recipe's datasets and keep the rows that the recipe asks about.

    Only the rows' texts are read; recordings are decoded when ``audio`` asks for them.

    Raises:
        DatasetError: The data is missing, damaged or not of the expected schema, or has no clip of a species.
        MissingPackageError: The ``datasets`` package is not installed.
    """
    channel = None if choice.channel == "mean" else choice.channel
    if choice.path is not None and choice.task == "instructions":
        from mergekit_bio.eval.data.instructions import open_instructions

        dataset = open_instructions(Path(choice.path), name=choice.name, channel=channel)
    elif choice.path is not None:
        from mergekit_bio.eval.data.audio_folder import open_audio_folder

        dataset = open_audio_folder(
            Path(choice.path),
            name=choice.name,
            task=choice.task or "classification",
            channel=channel,
            label_column=choice.label_column,
        )
    else:
        from mergekit_bio.eval.data.beans_zero import open_component

        component = components()[choice.name]
        dataset = open_component(component, source=recipe.data, streaming=recipe.streaming)
    wanted = species_asked(dataset, recipe)
    if not wanted:
        return dataset
    present = {row.label for row in dataset.asked}
    for name in wanted:
        if name not in present:
            raise DatasetError(f"{dataset.name}: no clip of the species '{name}'{nearest(name, sorted(present))}")
    kept = set(wanted)
    return replace(
        dataset,
        asked=tuple(row for row in dataset.asked if row.label in kept),
        examples=tuple(row for row in dataset.examples if row.label in kept),
    )


def species_asked(dataset: Dataset, recipe: Recipe) -> list[str]:
    """The names behind ``{species_list}``: the recipe's, or the most frequent; empty where neither is asked for."""
    if recipe.species:
        return [species.name for species in recipe.species]
    return [] if recipe.top_k_species is None else dataset.species(recipe.top_k_species)


def unique_rows(rows: Sequence[DatasetRow], where: str) -> tuple[DatasetRow, ...]:
    """The rows; DatasetError where there is none, or two share an id."""
    if not rows:
        raise DatasetError(f"{where}: no clip in it")
    ((row_id, count),) = Counter(row.id for row in rows).most_common(1)
    if count > 1:
        raise DatasetError(f"{where}: the id '{row_id}' stands in {count} rows")
    return tuple(rows)


def checked_samples(samples: Any, where: str) -> np.ndarray:
    """Samples as float64; RecordingError where there is none, or one is not finite."""
    values = np.asarray(samples, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise RecordingError(f"{where}: the recording is empty or not finite")
    return values

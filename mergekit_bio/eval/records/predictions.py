"""The predictions file: one JSON object a line, appended as the answers come.

The first six keys are those of the reference implementation, under the same names, so that the tools of the beans-zero
library read the file as it is. Files may be gzipped.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar

from annotated_types import Ge

from mergekit_bio.errors import OutputError, RunError
from mergekit_bio.outside_data import Document, parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a model answered about one clip.

    Attributes:
        prediction: The decoded answer, untouched: every scorer starts from it.
        label: What the dataset says; comma-separated for detection.
        id: The clip's id, unique within its dataset.
        dataset_name: The BEANS-Zero component or the name of a local dataset.
        prompt: The whole prompt, chat template included.
        lora_scale: The merge strength alpha; None for a checkpoint that was not merged with one number.
        prompt_tokens: Length of the prompt in tokens, the audio prefixes included.
        logprob: Sum of the log-probabilities of the generated tokens (natural logarithm).
        example_ids: The clips that the prompt used as examples, in the order of their placeholders.
        choice_logprobs: For ``decoding: loglikelihood``, the log-probability of each option.
        audio: The recording's file, for local data.
        start: Where in it the clip begins, in seconds, and ``end``, where it ends; None: where the file does.
        channel: Which channel of it was heard, counted from 1; None is the mean of all.
        question: What tells the question and its recordings from any other: a run asks again where it has changed.
    """

    # Predictions of other programs may say more.
    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "ignore", "allow_inf_nan": False}

    prediction: str
    label: str
    id: str
    dataset_name: str
    prompt: str | None = None
    lora_scale: float | None = None
    prompt_tokens: Annotated[int, Ge(0)] | None = None
    generated_ids: tuple[Annotated[int, Ge(0)], ...] | None = None
    logprob: float | None = None
    example_ids: tuple[str, ...] | None = None
    choice_logprobs: dict[str, float] | None = None
    audio: str | None = None
    start: float | None = None
    end: float | None = None
    channel: Annotated[int, Ge(1)] | None = None
    question: str | None = None

    def to_line(self) -> bytes:
        """The line of the file, its newline included. The reference's six keys are always there."""
        values = {key: getattr(self, key) for key in _KEYS}
        kept = {key: value for key, value in values.items() if value is not None or key in _REFERENCE_KEYS}
        return (json.dumps(kept, ensure_ascii=False) + "\n").encode()


_KEYS = tuple(field.name for field in fields(Prediction))
_REFERENCE_KEYS = _KEYS[:6]


def parse_line(line: bytes, where: str) -> Prediction:
    """Read one line of a predictions file; keys that are not ours are ignored.

    Raises:
        RunError: The line is not JSON, lacks a required key, or a value has the wrong type.
    """
    row = parse_json(line, source=where, error=RunError)
    if isinstance(row.get("id"), int) and not isinstance(row["id"], bool):
        row["id"] = str(row["id"])
    return Document(where, row, RunError).checked(Prediction)


def read_predictions(path: Path) -> tuple[Prediction, ...]:
    """Read a predictions file, plain or gzipped.

    A last line without its newline that does not parse is what a killed run leaves behind: it is left out, as the
    run asks that clip again.

    Raises:
        RunError: The file cannot be read, a line is damaged, or an id stands in it twice.
    """
    rows: list[Prediction] = []
    first_line: dict[str, int] = {}
    for number, line in _lines(path):
        try:
            row = parse_line(line, f"{path}:{number}")
        except RunError:
            if line.endswith(b"\n"):
                raise
            break
        if row.id in first_line:
            raise RunError(f"{path}:{number}: the id {row.id!r} stands in line {first_line[row.id]} already")
        first_line[row.id] = number
        rows.append(row)
    return tuple(rows)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line that is not blank."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            stream: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if zipped else raw
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"{path}: cannot be read ({error}); is the file complete?") from None


class PredictionWriter(AbstractContextManager["PredictionWriter"]):
    """Appends predictions to a file such that a kill at any moment loses at most the line being written.

    The file is made when missing. Opening an existing one cuts off an unfinished last line and reads the ids that are
    ``done``.

    Raises:
        RunError: The file is damaged before its last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: set[str] = set()
        if path.exists():
            with path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
            self.done = {row.id for row in read_predictions(path)}
        self._file = path.open("ab", buffering=0)

    def append(self, prediction: Prediction) -> None:
        """Write one row through to the file system.

        Raises:
            RunError: The id was written before.
            OutputError: The disk is full or refuses; what was written so far stays and can be resumed.
        """
        if prediction.id in self.done:
            raise RunError(f"{self.path}: the id {prediction.id!r} has an answer already")
        rest = memoryview(prediction.to_line())
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            row = len(self.done) + 1
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}; run the command again to go on from row {row}"
            ) from None
        self.done.add(prediction.id)

    def close(self) -> None:
        """Flush to the disk and close."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

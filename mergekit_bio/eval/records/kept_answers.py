"""Which answers of an earlier start still stand, clip by clip, when the data has changed since."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mergekit_bio.errors import OutputError
from mergekit_bio.eval.records.predictions import Prediction

#: Where answers go that no longer stand, in the run directory, under the name of their cell's file.
REPLACED = "replaced"


@dataclass(frozen=True)
class AskedNow:
    """What a cell asks now.

    Attributes:
        questions: Clip id -> what tells its question and recordings from any other; None where a recording cannot be
            read at the moment. Of all clips that can be asked about, those beyond a limit too.
        labels: Clip id -> label.
    """

    questions: Mapping[str, str | None]
    labels: Mapping[str, str]


@dataclass
class KeptAnswers:
    """The answers of a file, held against what is asked now.

    Attributes:
        rows: Those that stand, with today's labels.
        replaced: Those that do not.
        again: Clips whose question or recording is another one now.
        gone: Clips that are not asked about any more.
        relabelled: Clips whose label is another one now: what was answered still stands.
    """

    rows: list[Prediction] = field(default_factory=list)
    replaced: list[Prediction] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)


def kept_answers(rows: Sequence[Prediction], now: AskedNow) -> KeptAnswers:
    """Sort out answers. Where nobody knows whether a recording is another one now, its answers stand."""
    kept = KeptAnswers()
    for row in rows:
        if row.id not in now.questions:
            kept.gone.append(row.id)
        elif now.questions[row.id] not in (None, row.question):
            kept.again.append(row.id)
        else:
            if row.label != now.labels[row.id]:
                kept.relabelled.append(row.id)
                row = replace(row, label=now.labels[row.id])
            kept.rows.append(row)
            continue
        kept.replaced.append(row)
    return kept


def keep_answers(path: Path, kept: KeptAnswers) -> None:
    """Write a predictions file anew, whole or not at all; what does not stand is added to the folder ``REPLACED``.

    Raises:
        OutputError: It cannot be written; the file is as it was.
    """
    if not (kept.replaced or kept.relabelled):
        return
    new = path.with_name(path.name + ".partial")
    try:
        if kept.replaced:
            aside = path.parent / REPLACED / path.name
            aside.parent.mkdir(exist_ok=True)
            with aside.open("ab") as file:
                file.writelines(row.to_line() for row in kept.replaced)
        with new.open("wb") as file:
            file.writelines(row.to_line() for row in kept.rows)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; run the command again") from None


def notes(by_dataset: Mapping[str, Sequence[KeptAnswers]]) -> Iterator[str]:
    """What a user must be told, a line for each dataset and kind of change."""
    for dataset, several in by_dataset.items():
        for kind, says in (
            ("again", "asked again, because the question or a recording has changed"),
            ("gone", "not asked about any more"),
            ("relabelled", "scored with another label now"),
        ):
            ids = sorted({clip for kept in several for clip in getattr(kept, kind)})
            if ids:
                shown = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
                aside = "" if kind == "relabelled" else f"; the old answers are in {REPLACED}/"
                yield f"{dataset}: {len(ids)} clip{'s' * (len(ids) > 1)} {says} ({shown}){aside}"

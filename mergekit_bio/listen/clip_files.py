"""The likeliest windows of each answer, cut to files for listening."""

import csv
import heapq
import io
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_bio.audio.finding import CLIPS_COLUMNS, CLIPS_LIST, holds_clips
from mergekit_bio.errors import AudioError, OutputError
from mergekit_bio.listen.publishing import problems_with
from mergekit_bio.listen.tables.interface import as_text

#: Bytes of a name that is made of an answer or of a recording's; file systems take 255 in all.
_NAME_BYTES = 80

#: Gives parts of a recording (start and length in seconds) as samples and rate, or what is wrong with one.
Cut = Callable[[Path, Sequence[tuple[float, float]]], Iterable[tuple[object, int] | AudioError]]


@dataclass(frozen=True, order=True)
class Found:
    """An answer that may be worth hearing; the likelier is the greater, of equals the earlier."""

    probability: float
    order: int
    answer: str
    recording: str
    start: float
    end: float


class Likeliest:
    """Keeps the likeliest windows of each answer, of however many come.

    Args:
        count: How many of each.
    """

    def __init__(self, count: int) -> None:
        self._count, self._seen = count, 0
        self._kept: dict[str, list[Found]] = defaultdict(list)

    def add(self, answer: str, probability: float, *, recording: str, start: float, end: float) -> None:
        """One more window."""
        self._seen += 1
        kept, found = self._kept[answer], Found(probability, -self._seen, answer, recording, start, end)
        if len(kept) < self._count:
            heapq.heappush(kept, found)
        else:
            heapq.heappushpop(kept, found)

    def ranked(self) -> dict[str, list[Found]]:
        """Answer -> its windows, the likeliest first."""
        return {answer: sorted(self._kept[answer], reverse=True) for answer in sorted(self._kept)}


def check_folder(folder: Path, recordings: Iterable[Path] = ()) -> None:
    """Raise OutputError where a folder holds what is not ours, or recordings that are asked about."""
    for path in recordings:
        if path.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"{folder}: holds {path}, which is asked about; give --clips a new folder")
    with problems_with(folder):
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise OutputError(f"{there}: is a file; --clips needs a folder")
    if not os.access(there, os.W_OK):
        raise OutputError(f"{there}: may not be written; give --clips another folder")
    if folder.is_dir() and any(folder.iterdir()) and not holds_clips(folder):
        raise OutputError(f"{folder}: holds other files; give --clips a new folder")


def write_clips(
    ranked: dict[str, list[Found]],
    folder: Path,
    *,
    cut: Cut,
    note: Callable[[str], None],
) -> int:
    """Cut windows out of their recordings: ``FOLDER/ANSWER/01_0.93_RECORDING_120.0-130.0.wav``.

    What an earlier call wrote there is replaced. ``clips.csv`` lists the files.

    Args:
        ranked: Answer -> its windows, the likeliest first.
        folder: Where to; made where it is missing.
        cut: :func:`mergekit_bio.audio.recording.read_parts`.
        note: Is told of recordings that cannot be cut.

    Returns:
        How many files were written.

    Raises:
        OutputError: The folder holds what is not ours, or cannot be written.
    """
    check_folder(folder)
    planned = list(_planned(ranked))
    written = 0
    with problems_with(folder):
        _remove_earlier(folder)
        folder.mkdir(parents=True, exist_ok=True)
        # The list first: whatever is interrupted, the next call knows what is its own.
        with (folder / CLIPS_LIST).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow(CLIPS_COLUMNS)
            file.flush()
            for name, found in planned:
                row = (name, found.answer, f"{found.probability:.6g}", found.recording, found.start, found.end)
                table.writerow([as_text(str(value)) for value in row])
        for recording, clips in _by_recording(planned).items():
            parts = [(found.start, found.end - found.start) for _, found in clips]
            for (name, found), samples in zip(clips, cut(Path(recording), parts), strict=True):
                if isinstance(samples, AudioError):
                    note(f"no clip of {found.recording} at {found.start:g} s: {samples}")
                else:
                    _write(folder / name, *samples)
                    written += 1
    return written


def _by_recording(planned: Iterable[tuple[str, Found]]) -> dict[str, list[tuple[str, Found]]]:
    """Files by recording, in the order of their starts."""
    clips: dict[str, list[tuple[str, Found]]] = defaultdict(list)
    for name, found in sorted(planned, key=lambda clip: clip[1].start):
        clips[found.recording].append((name, found))
    return clips


def _write(path: Path, samples: object, rate: int) -> None:
    import soundfile

    encoded = io.BytesIO()  # not the file: libsndfile does not say what a disk refuses
    soundfile.write(encoded, samples, rate, format="WAV", subtype="PCM_16")
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(encoded.getbuffer())
    partial.replace(path)


def _planned(ranked: dict[str, list[Found]]) -> Iterable[tuple[str, Found]]:
    """The files' names, relative to the folder."""
    folders: dict[str, str] = {}
    for answer, windows in ranked.items():
        name = plain = file_name(answer)
        number = 1
        # Case does not tell names apart on every disk.
        while folders.setdefault(name.casefold(), answer) != answer:
            number += 1
            name = f"{plain}-{number}"
        for rank, found in enumerate(windows, start=1):
            recording = file_name(Path(found.recording).stem)
            place = f"{found.start:.1f}-{found.end:.1f}"
            yield f"{name}/{rank:02d}_{found.probability:.2f}_{recording}_{place}.wav", found


def file_name(text: str) -> str:
    """A text as a part of a file's name that every system takes."""
    safe = re.sub(r"[^\w.+-]+", "-", unicodedata.normalize("NFC", text)).strip("-.")
    return safe.encode(errors="ignore")[:_NAME_BYTES].decode(errors="ignore") or "-"


def _remove_earlier(folder: Path) -> None:
    """Remove the files that the folder's list names, and the folders that are empty then."""
    index = folder / CLIPS_LIST
    if not index.is_file():
        return
    with index.open(newline="", encoding="utf-8") as file:
        paths = [folder / row["file"] for row in csv.DictReader(file) if row.get("file")]
    ours = [path for path in paths if path.suffix == ".wav" and path.resolve().is_relative_to(folder.resolve())]
    for path in ours:
        path.unlink(missing_ok=True)
        path.with_suffix(".partial").unlink(missing_ok=True)
    for parent in {path.parent for path in ours} - {folder}:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()

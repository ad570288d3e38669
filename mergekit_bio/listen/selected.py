"""The windows that a user's tables name, recording by recording."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_bio.audio.selections import RecordingFinder, Selection, is_there, read_selections
from mergekit_bio.audio.waveform import MIN_SECONDS
from mergekit_bio.errors import AudioError

#: Start and end of a window, in seconds of its recording.
Span = tuple[float, float]

#: What a folder of tables is searched for.
_SUFFIXES = (".txt", ".csv", ".tsv", ".jsonl")
#: By how much floats may make a selection shorter than it was drawn: 0.7 - 0.2 is below 0.5.
_ROUNDING = 1e-6
#: Rows that are refused are named, so many of them; the others are counted.
_NAMED = 5


@dataclass(frozen=True)
class Selected:
    """The windows of each recording.

    Attributes:
        windows: Recording -> its windows in order of their starts, each once; recordings in the order they came in.
        notes: What a user should know: rows that are refused, recordings that are not there.
    """

    windows: dict[Path, tuple[Span, ...]]
    notes: tuple[str, ...]


def find_tables(paths: Sequence[Path]) -> list[Path]:
    """The tables that are named, and those in and below folders that are named, but for what is hidden.

    Raises:
        AudioError: There is none.
    """
    tables: list[Path] = []
    for path in paths:
        inside = [path]
        if path.is_dir():
            below = sorted(filter(Path.is_file, path.rglob("*")))
            inside = [file for file in below if _may_be_table(file.relative_to(path))]
        if not inside:
            raise AudioError(f"{path}: holds no tables ({', '.join(_SUFFIXES)})")
        tables += inside
    return tables


def _may_be_table(file: Path) -> bool:
    """By its name. What macOS keeps beside a table on other systems' disks, ``._wren.txt``, is none."""
    return file.suffix.lower() in _SUFFIXES and not any(part.startswith(".") for part in file.parts)


def select_windows(
    tables: Sequence[Path], recordings: Sequence[Path], *, window: float, hop: float, elsewhere: bool = False
) -> Selected:
    """What tables name of recordings.

    A selection that is longer than a window becomes several; one that is shorter than 0.5 s is refused, and named.

    Args:
        tables: Raven's, Audacity's, or CSV.
        recordings: What they may be about.
        window: Seconds that are heard at a time.
        hop: Seconds from one window's start to the next, in a long selection.
        elsewhere: Whether a table may also name recordings that are not among them, by their whole path.

    Raises:
        AudioError: A table is none, or damaged, or does not tell which recording it is about; or no window is left.
    """
    finder = RecordingFinder(recordings)
    spans: dict[Path, set[Span]] = defaultdict(set)
    short: list[Selection] = []
    told: list[str] = []
    missing: dict[str, int] = defaultdict(int)
    far: dict[Path, Path] = {}
    rows = 0
    for table in tables:
        counting_on: set[Path] = set()
        for selection in read_selections(table, error=AudioError):
            rows += 1
            path = finder.find(selection, table, error=AudioError)
            if path is None and elsewhere and is_there(Path(selection.recording or "")):
                path = Path(selection.recording or "")
                path = far.setdefault(path.resolve(), path)  # however a row spells it
            if path is None:
                missing[selection.recording or ""] += 1
            elif selection.seconds < MIN_SECONDS - _ROUNDING:
                short.append(selection)
            else:
                spans[path].update(_split(selection, window=window, hop=hop))
                if "Begin Time (s)" in selection.values and "File Offset (s)" not in selection.values:
                    counting_on.add(path)
        if len(counting_on) > 1:
            told.append(
                f"{table}: is about {len(counting_on)} recordings and has no column File Offset (s): its begin times "
                "are taken as they are in each of them, and Raven's count on from one to the next"
            )
    notes = [
        f"{selection.where}: refused: it lasts {selection.seconds:.2f} s of at least {MIN_SECONDS}"
        for selection in short
    ]
    if len(notes) > _NAMED:
        notes[_NAMED:] = [f"refused: {len(notes) - _NAMED} more selections of less than {MIN_SECONDS} s"]
    if missing:
        names = ", ".join(list(missing)[:2]) + (", ..." if len(missing) > 2 else "")
        count = sum(missing.values())
        notes.append(
            f"left out: {count} selections of {len(missing)} recordings that are not among those named ({names})"
        )
    notes += told
    if finder.by_name:
        written, path = next(iter(finder.by_name.items()))
        others = f"; so are {len(finder.by_name) - 1} more" if len(finder.by_name) > 1 else ""
        notes.append(f"found by name alone: {written} is taken to be {path}{others}")
    if not spans:
        named = ", ".join(map(str, tables[:3])) + (", ..." if len(tables) > 3 else "")
        reason = "; ".join(notes) if rows else "no selection in it"
        raise AudioError(f"{named}: nothing to ask about: {reason}")
    order = {path: place for place, path in enumerate(recordings)}
    paths = sorted(spans, key=lambda path: (order.get(path, len(order)), str(path)))
    return Selected({path: tuple(sorted(spans[path])) for path in paths}, tuple(notes))


def _split(selection: Selection, *, window: float, hop: float) -> list[Span]:
    """A selection's windows. What is left behind the last one is one more from 0.5 s on."""
    spans: list[Span] = []
    start, covered = selection.start, selection.start
    while not spans or selection.end - max(start, covered) >= MIN_SECONDS - _ROUNDING:
        covered = min(start + window, selection.end)
        spans.append((round(start, 6), round(covered, 6)))
        start += hop
    return spans

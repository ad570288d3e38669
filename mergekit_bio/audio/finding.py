"""Which files of a folder are recordings; whatever is left out is said."""

import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_bio.audio.file_kind import HEAD_BYTES, is_recording
from mergekit_bio.errors import AudioError

#: What bears one of these names is meant to be a recording, and is named where it is none. Other files are opened.
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("wav", "wave", "bwf", "rf64", "w64", "flac", "aif", "aiff", "aifc", "au", "snd", "caf", "sph", "voc"),
        *("ogg", "oga", "opus", "mp3", "mp2", "m4a", "m4b", "aac", "ac3", "wma", "wv", "amr", "tta", "ape"),
        *("mp4", "mov", "3gp", "3g2", "webm", "mkv", "mka", "avi"),
    )
)

#: Lists the files in a folder of clips that were cut out of recordings, and tells it from any other.
CLIPS_LIST = "clips.csv"
CLIPS_COLUMNS = ("file", "answer", "probability", "recording", "start", "end")

#: Folders of systems, beside hidden ones: what lies there was thrown away or is nobody's recording.
_SYSTEM_FOLDERS = {"$recycle.bin", "system volume information"}


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        recordings: Files that are, or should be, recordings: the files named, and those of folders by their paths.
        notes: What a user should know was left out; a sentence for each folder and kind.
    """

    recordings: list[Path]
    notes: list[str]


@dataclass
class _LeftOut:
    """What was left out of one folder."""

    hidden: list[str] = field(default_factory=list)
    clips: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    dead_links: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)

    def notes(self) -> Iterator[str]:
        if self.hidden:
            yield f"left out {_counted(len(self.hidden), 'hidden entry', 'hidden entries')} ({_some(self.hidden)})"
        if self.clips:
            folders = _counted(len(self.clips), "folder of clips", "folders of clips")
            yield f"left out {folders} that --clips has cut ({_some(self.clips)})"
        if self.others:
            kinds = [f"{count} {suffix or 'without suffix'}" for suffix, count in self.others.most_common()]
            files = _counted(self.others.total(), "file that is no recording", "files that are no recordings")
            yield f"left out {files} ({_some(kinds)})"
        if self.dead_links:
            links = _counted(len(self.dead_links), "link that leads", "links that lead")
            yield f"left out {links} nowhere ({_some(self.dead_links)})"
        if self.links:
            links = _counted(len(self.links), "link to a recording that is", "links to recordings that are")
            yield f"left out {links} there too ({_some(self.links)})"
        if self.unreadable:
            files = _counted(len(self.unreadable), "entry that cannot be read", "entries that cannot be read")
            yield f"left out {files} ({_some(self.unreadable)})"


def find_recordings(paths: Iterable[str | Path]) -> Found:
    """The files named, and the recordings in and below the folders named, in order of their paths.

    A file of a folder is a recording by its name or by its content. Hidden files and folders, and systems' own such as
    ``$RECYCLE.BIN``, are left out, and so are folders of clips that were cut out of recordings, unless they are named.
    A folder that is reached twice, by links or by name, is entered once; so is a recording beside which a link to it
    lies.

    Raises:
        AudioError: A path does not exist or is no file or folder, or a folder holds no recording.
    """
    recordings: list[Path] = []
    notes: list[str] = []
    entered: set[tuple[int, int]] = set()
    for path in map(Path, paths):
        if path.is_dir():
            left_out = _LeftOut()
            again = _identity(path) in entered
            inside = _without_links(sorted(_below(path, path, entered, left_out)), path, left_out)
            of_folder = [*left_out.notes()]
            if not inside and not again:
                raise AudioError(f"{path}: holds no recordings" + "".join(f"; {text}" for text in of_folder))
            recordings += inside
            notes += [f"{path}: {text}" for text in of_folder]
        elif path.is_file():
            recordings.append(path)
        elif path.exists():
            raise AudioError(f"{path}: is neither a file nor a folder; write it to a file first")
        else:
            raise AudioError(f"{path}: no such file or folder")
    return Found(recordings, notes)


def _without_links(paths: list[Path], root: Path, left_out: _LeftOut) -> list[Path]:
    """Without links to others of them."""
    if not any(path.is_symlink() for path in paths):
        return paths
    files = {path.resolve() for path in paths if not path.is_symlink()}
    links = {path for path in paths if path.is_symlink() and path.resolve() in files}
    left_out.links += [str(path.relative_to(root)) for path in sorted(links)]
    return [path for path in paths if path not in links]


def _below(folder: Path, root: Path, entered: set[tuple[int, int]], left_out: _LeftOut) -> Iterator[Path]:
    """The recordings of a folder and the folders in it; what is left out is noted."""
    identity = _identity(folder)
    if identity in entered:
        return
    entered.add(identity)
    try:
        paths = sorted(folder.iterdir())
    except OSError:
        left_out.unreadable.append(str(folder.relative_to(root)))
        return
    for path in paths:
        name = str(path.relative_to(root))
        if path.name.startswith(".") or path.name.lower() in _SYSTEM_FOLDERS:
            left_out.hidden.append(name)
            continue
        try:
            mode = path.stat().st_mode
        except OSError:
            (left_out.dead_links if path.is_symlink() else left_out.unreadable).append(name)
            continue
        if stat.S_ISDIR(mode) and holds_clips(path):
            left_out.clips.append(name)
        elif stat.S_ISDIR(mode):
            yield from _below(path, root, entered, left_out)
        elif not stat.S_ISREG(mode):
            left_out.others["device or pipe"] += 1
        elif path.suffix.lower() in SUFFIXES:
            yield path
        else:
            try:
                with path.open("rb") as file:
                    head = file.read(HEAD_BYTES)
            except OSError:
                left_out.unreadable.append(name)
                continue
            if is_recording(head):
                yield path
            else:
                left_out.others[path.suffix.lower()] += 1


def holds_clips(folder: Path) -> bool:
    """Whether a folder is one of clips that were cut out of recordings, by the first line of its list."""
    try:
        with (folder / CLIPS_LIST).open("rb") as file:
            return file.readline(1000).rstrip() == ",".join(CLIPS_COLUMNS).encode()
    except OSError:
        return False


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _some(names: list[str]) -> str:
    """The first of some names."""
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")

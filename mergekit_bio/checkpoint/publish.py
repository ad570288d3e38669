"""A directory that appears complete or not at all.

The work happens in ``.NAME.partial`` beside the output, under a lock that dies with its process; the last step is a
rename. An output that is there and empty may be a mount point, or the only place that can be written: there the work
happens inside, and the last step moves it up. What a killed process leaves behind is recognised by its name, and put
back or removed by the next one. Work that can be gone on with has a key, ``.NAME.KEY.partial``: the next one with that
key goes on with it, and others leave it alone.
"""

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_bio.checkpoint.file_names import fitting
from mergekit_bio.errors import OutputError

#: What is made beside an output, or in it where that is empty: ``.NAME.partial``, ...
_OWN = ("partial", "old", "lock")
#: As long as any ending of such a name.
_ENDING = ".0123456789abcdef.partial"


@contextmanager
def staged(
    out: Path,
    *,
    mark: str,
    foreign_file: Callable[[Path], str | None] = lambda _: None,
    overwrite: bool = False,
    fsync: bool = True,
    key: str | None = None,
    journal: str | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Iterator[Path]:
    """A scratch directory that becomes ``out`` when the block ends well, and vanishes when it does not.

    Args:
        out: The directory to make; its parents are created.
        mark: Name of the file that marks a directory as written by us. Only a directory that has it, or that holds
            nothing but directories that have it, is ever overwritten.
        foreign_file: Names something in a directory with that mark that somebody else has put there; then it is not
            overwritten either.
        overwrite: Replace an existing ``out``.
        fsync: Have everything on the disk before the rename, so that a power cut leaves all or nothing.
        key: Eight hexadecimal digits that tell the work apart from any other that would become ``out``: if a process
            that did the same was killed, the scratch directory holds what it has left. Without one it is empty.
        journal: A file in the scratch directory from which work is gone on with. It is no part of ``out``, and removed
            when only the rename is left to do: what makes sure that all is on the disk may take long.
        note: Called with a line about what was left by processes that did something else.

    Raises:
        OutputError: ``out`` exists, is being written by somebody else, or cannot be written.
    """
    out = out.absolute()
    try:
        within = _is_empty(out)
        room = out if within else out.parent
        room.mkdir(parents=True, exist_ok=True)
        stem = _stem(out)
        partial, old, lock = (room / f"{stem}.{kind}" for kind in _OWN)
        with _locked(lock, out):
            _put_back(old, out)
            if within and not _is_empty(out):
                raise OutputError(f"{out}: another process has just written it; choose another --out")
            replaces = not within and os.path.lexists(out) and not _is_empty(out)
            if replaces:
                _refuse(out, mark, foreign_file, overwrite)
            _remove(partial)
            if key is not None:
                partial = room / f"{stem}.{key}.partial"
            for other in sorted(room.iterdir()):
                if other != partial and _keyed(stem).fullmatch(other.name):
                    note(
                        f"{other}: holds {bytes_in(other) / 1e9:.3g} GB of other work on {out.name} that was cut off; "
                        "it is left alone, remove it if nobody is to go on with it"
                    )
            partial.mkdir(exist_ok=True)
            try:
                yield partial
                if fsync:
                    _sync_tree(partial)
                if journal is not None:
                    (partial / journal).unlink()
                    if fsync:
                        _sync(partial)
                if within:
                    _move_up(partial, out, last=mark)
                else:
                    if replaces:
                        _refuse(out, mark, foreign_file, overwrite)  # once more: the work took a while
                        out.rename(old)
                    partial.rename(out)
                if fsync:
                    _sync(room)
            finally:
                _put_back(old, out)
                _remove(partial)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{out}: the disk is full; nothing was left behind, free some space or use --out"
            ) from error
        if error.strerror is None:  # not the system's
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise OutputError(f"{out}: cannot be written: {error.strerror}{where}") from error


@contextmanager
def _locked(lock: Path, out: Path) -> Iterator[None]:
    """Hold ``lock`` while the block runs. The file is removed at the end, so a taker makes sure it still has a name."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(f"{out}: another process is writing it now; wait, or choose another --out") from None
        try:
            if lock.stat().st_ino == os.fstat(descriptor).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(descriptor)
    try:
        yield
    finally:
        lock.unlink()
        os.close(descriptor)


def _is_empty(out: Path) -> bool:
    """Whether ``out`` is a directory, and nobody has put anything in it."""
    return out.is_dir() and not out.is_symlink() and not _entries(out)


def _entries(out: Path) -> list[Path]:
    """What ``out`` holds, but for what we or the file system have left there."""
    stem = _stem(out)
    leftovers = {*(f"{stem}.{kind}" for kind in _OWN), "lost+found"}
    return sorted(
        path for path in out.iterdir() if path.name not in leftovers and not _keyed(stem).fullmatch(path.name)
    )


def _keyed(stem: str) -> re.Pattern[str]:
    """Names of scratch directories with a key; those of an output whose name goes on, ``NAME.5``, are none."""
    return re.compile(rf"{re.escape(stem)}\.[0-9a-f]{{8}}\.partial")


def _stem(out: Path) -> str:
    """How the names of what is made beside an output begin: ``.NAME``, shortened where the whole would be too long."""
    return fitting(f".{out.name}", _ENDING).removesuffix(_ENDING)


def bytes_in(folder: Path) -> int:
    """Bytes that a folder's files take on the disk, a file with several names counted once."""
    stats = {stat.st_ino: stat for stat in (path.lstat() for path in folder.rglob("*") if path.is_file())}
    return sum(min(stat.st_size, 512 * stat.st_blocks) for stat in stats.values())


def _refuse(out: Path, mark: str, foreign_file: Callable[[Path], str | None], overwrite: bool) -> None:
    """Leave an existing ``out`` alone unless it is wholly ours, and to be overwritten."""
    if not overwrite:
        raise OutputError(f"{out}: exists already; use --overwrite, or choose another --out")
    if out.is_symlink() or not out.is_dir():
        raise OutputError(f"{out}: is no directory, so it is not overwritten; choose another --out")
    if out.is_mount():
        raise OutputError(f"{out}: is a mount point, which cannot be exchanged; empty it, or choose another --out")
    for folder in [out] if (out / mark).is_file() else _entries(out):
        ours = not folder.is_symlink() and (folder / mark).is_file()
        foreign = foreign_file(folder) if ours else ""  # the folder itself
        if foreign is not None:
            raise OutputError(
                f"{folder / foreign}: no merge has written it, so {out} is not overwritten; move it away, or choose "
                "another --out"
            )


def _put_back(old: Path, out: Path) -> None:
    """End an exchange that was cut off: where both are there the old one goes, a lone one gets its name back."""
    if not os.path.lexists(out) and old.is_dir():
        old.rename(out)
    _remove(old)


def _move_up(partial: Path, out: Path, *, last: str) -> None:
    """Move what ``partial`` holds into ``out``, the mark of a whole one at the end; nothing stays where that fails."""
    if appeared := _entries(out):
        raise OutputError(f"{appeared[0]}: appeared meanwhile, so nothing was written; choose another --out")
    names = sorted((path.name for path in partial.iterdir()), key=lambda name: (name == last, name))
    try:
        for name in names:
            (partial / name).rename(out / name)
    except BaseException:
        for name in names:
            if not os.path.lexists(partial / name):  # it is the one that was moved
                _remove(out / name)
                (out / name).unlink(missing_ok=True)
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

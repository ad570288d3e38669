"""A directory that appears complete or not at all.

The work happens in ``.NAME.partial`` beside the output, under a lock that dies with its process; the last step is a
rename. What a killed process leaves behind is recognised by its name and removed by the next one.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergekit_bio.errors import OutputError

_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG)


@contextmanager
def staged(out: Path, *, ours: str, overwrite: bool = False, fsync: bool = True) -> Iterator[Path]:
    """A scratch directory that becomes ``out`` when the block ends well, and vanishes when it does not.

    Args:
        out: The directory to make; its parents are created.
        ours: Name of a file that marks a directory as written by us, here or one level down; only such a directory
            is ever overwritten.
        overwrite: Replace an existing ``out``.
        fsync: Have everything on the disk before the rename, so that a power cut leaves all or nothing.

    Raises:
        OutputError: ``out`` exists, is being written by somebody else, or cannot be written.
    """
    out = out.absolute()
    partial, old = out.with_name(f".{out.name}.partial"), out.with_name(f".{out.name}.old")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out.with_name(f".{out.name}.lock"), out):
            _refuse_existing(out, ours, overwrite)
            for leftover in (partial, old):
                _remove(leftover)
            partial.mkdir()
            try:
                yield partial
                if fsync:
                    _sync_tree(partial)
                if out.exists():
                    out.rename(old)
                partial.rename(out)
                if fsync:
                    _sync(out.parent)
            finally:
                for leftover in (partial, old):
                    _remove(leftover)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutputError(
                f"{out}: the disk is full; nothing was left behind, free some space or use --out"
            ) from error
        if error.errno in _UNWRITABLE:
            raise OutputError(f"{out}: cannot be written: {error.strerror} ({error.filename})") from error
        raise


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


def _refuse_existing(out: Path, ours: str, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        out.rmdir()
    elif not overwrite:
        raise OutputError(f"{out}: exists already; use --overwrite, or choose another --out")
    elif out.is_symlink() or not ((out / ours).is_file() or any(out.glob(f"*/{ours}"))):
        raise OutputError(f"{out}: was not written by mergekit-bio (no {ours} in it), so it is not overwritten")


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

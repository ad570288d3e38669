"""Copying bytes between files without carrying them through Python."""

import ctypes
import errno
import fcntl
import os
import sys
from pathlib import Path

#: ``FICLONE`` of linux/fs.h: share the extents of another file (btrfs, XFS, bcachefs), copying on write.
_FICLONE = 0x40049409
#: Of sync_file_range(2): begin to write what is dirty, and wait for nothing.
_SYNC_FILE_RANGE_WRITE = 2
_UNSUPPORTED = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ENOTTY}
_CHUNK = 8 << 20


def reflink(source: int, target: int) -> bool:
    """Make ``target`` share all of ``source``'s data, copy-on-write.

    Args:
        source: Descriptor open for reading.
        target: Descriptor open for writing.

    Returns:
        Whether the file system could; if not, nothing has changed.
    """
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def copy_range(source: int, source_offset: int, target: int, target_offset: int, count: int) -> None:
    """Copy ``count`` bytes inside the kernel; through memory where the file systems cannot.

    Raises:
        OSError: As the system gives it (no space, ...), and EIO if the source ends early.
    """
    if sys.platform != "linux":
        _copy_through_memory(source, source_offset, target, target_offset, count)
        return
    while count:
        try:
            done = os.copy_file_range(source, target, count, source_offset, target_offset)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            _copy_through_memory(source, source_offset, target, target_offset, count)
            return
        if done == 0:
            raise OSError(errno.EIO, "the source file became shorter while it was copied")
        source_offset, target_offset, count = source_offset + done, target_offset + done, count - done


def _copy_through_memory(source: int, source_offset: int, target: int, target_offset: int, count: int) -> None:
    buffer = memoryview(bytearray(min(count, _CHUNK)))
    while count:
        done = os.preadv(source, [buffer[:count]], source_offset)
        if done == 0:
            raise OSError(errno.EIO, "the source file became shorter while it was copied")
        write_exactly(target, buffer[:done], target_offset)
        source_offset, target_offset, count = source_offset + done, target_offset + done, count - done


def write_exactly(descriptor: int, buffer: memoryview | bytes, offset: int) -> None:
    """Write all of ``buffer`` at ``offset``."""
    view = memoryview(buffer)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def start_write_back(file: Path, offset: int, count: int) -> None:
    """Have the disk begin with bytes that were just written; they stay in memory. It may wait for a busy disk."""
    if sys.platform == "linux":
        # What this says does not matter: only fsync tells whether bytes are on the disk.
        with file.open("rb", buffering=0) as stream:
            begin = ctypes.CDLL(None).sync_file_range
            begin(stream.fileno(), ctypes.c_int64(offset), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


def link_or_copy(source: Path, target: Path) -> bool:
    """Make ``target`` a hard link to ``source``, or a copy where the file system has no hard links.

    Returns:
        Whether it is a link.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _UNSUPPORTED | {errno.EMLINK}:
            raise
        with source.open("rb") as reader, target.open("xb") as writer:
            copy_range(reader.fileno(), 0, writer.fileno(), 0, os.fstat(reader.fileno()).st_size)
        return False
    return True

"""The bytes of a recording as decoders read them through Python."""

from io import FileIO, RawIOBase
from typing import Any


class ByteSource(RawIOBase):
    """A file from a byte on, as if it began there, with a few bytes replaced.

    The libraries tell a disk's error badly: libsndfile takes one in a callback for the end of the file, and FFmpeg says
    "Input/output error" and "Operation not permitted" of damaged files too. So what reading raises is kept here, the
    library is told that the file ends, and whoever called it asks :meth:`check`.

    Args:
        file: The file, without a buffer. It stays open.
        start: Its byte that is the first.
        end: Its byte behind the last; None for the file's end.
        instead: Bytes that stand in the file's stead, and where, counted from ``start``.
        name: What a library that asks is told.
    """

    def __init__(
        self,
        file: FileIO,
        start: int = 0,
        end: int | None = None,
        *,
        instead: tuple[int, bytes] = (0, b""),
        name: str = "recording",
    ) -> None:
        self._file, self._start, self._end, self._instead = file, start, end, instead
        self._failure: BaseException | None = None
        self.name = name

    def check(self) -> None:
        """Raise what reading has raised: OSError, or an interruption that came meanwhile."""
        if self._failure is not None:
            raise self._failure

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            position = self.tell()
            left = len(buffer) if self._end is None else max(0, self._end - self._start - position)
            count = self._file.readinto(memoryview(buffer)[:left])
        except BaseException as failure:  # none may pass through a library that is not Python's
            self._failure = failure
            return 0
        at, instead = self._instead
        for offset in range(max(at, position), min(at + len(instead), position + count)):
            buffer[offset - position : offset - position + 1] = instead[offset - at : offset - at + 1]
        return count

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence == 0:
            offset += self._start
        elif whence == 2 and self._end is not None:
            offset, whence = self._end + offset, 0
        return self._file.seek(offset, whence) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

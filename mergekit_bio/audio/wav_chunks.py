"""The chunks of a WAV file (RIFF, RF64, BW64): which there are, and how long its samples are."""

import errno
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from typing import BinaryIO

_NAME = re.compile(rb"[ -~]{4}")
#: The size of a chunk that is too large for 32 bits, or that nobody knew when it was written.
_UNKNOWN = 0xFFFFFFFF
#: Chunks that often stand behind the samples, even where the file is cut off.
_BEHIND_SAMPLES = {b"LIST", b"id3 ", b"ID3 ", b"bext", b"iXML", b"cue ", b"smpl", b"guan", b"wamd", b"junk", b"JUNK"}


def wav_chunks(file: BinaryIO | FileIO) -> Iterator[tuple[bytes, int, int | None]]:
    """Each chunk's name, where its content begins and how many bytes that is; of other files nothing.

    The file stands at the content then, and may be read from. They end where something stands that is no chunk, such as
    samples whose size was never written, and behind samples of a size that the file does not tell: None, or 0 in RF64.
    """
    file.seek(0)
    head = file.read(12)
    if head[:4] not in (b"RIFF", b"RF64", b"BW64") or head[8:] != b"WAVE":
        return
    end = file.seek(0, 2)
    position, size_elsewhere = 12, 0
    while position + 8 <= end:
        file.seek(position)
        name, said = struct.unpack("<4sI", file.read(8))
        position += 8
        if not is_chunk_name(name):
            return
        size: int | None = said
        if name == b"ds64":
            _, size_elsewhere = struct.unpack("<QQ", file.read(16).ljust(16, b"\0"))
            file.seek(position)
        elif name == b"data" and said == _UNKNOWN:
            size = None if head[:4] == b"RIFF" else size_elsewhere
        yield name, position, size
        if size is None or (said and not size):
            return
        position += size + size % 2


@dataclass(frozen=True)
class WavLength:
    """How long a WAV is, in seconds. Of other files all are 0.

    Attributes:
        stated: By its header. The sizes of a recorder whose battery died are 0, or those of an earlier moment; beyond
            4 GB, what is left of them in 32 bits; of a WAV out of a pipe, infinite.
        there: If its samples go on to the file's end; the same where something else follows them.
        zeros: How much of the file behind its samples is zero, to the file's end, and no sound.
    """

    stated: float = 0.0
    there: float = 0.0
    zeros: float = 0.0


def wav_length(file: FileIO) -> WavLength:
    """How long a WAV is by its header, and by its size."""
    bytes_a_second = 0
    for name, position, size in wav_chunks(file):
        if name == b"fmt ":
            *_, bytes_a_second = struct.unpack("<HHII", file.read(12).ljust(12, b"\0"))
        elif name == b"data":
            return _length_of(file, position, size, bytes_a_second) if bytes_a_second else WavLength()
    return WavLength()


def _length_of(file: FileIO, position: int, size: int | None, bytes_a_second: int) -> WavLength:
    """The same for samples that begin at a place and have a size."""
    end = file.seek(0, 2)
    there = (end - position) / bytes_a_second
    if size is None:
        return WavLength(math.inf, there)
    behind = position + size
    if size and behind < end:
        if is_zero_from(file, behind):
            return WavLength(there, there, (end - behind) / bytes_a_second)
        if end - behind < 64 or are_chunks(file, behind, RIFF) or (behind % 2 and are_chunks(file, behind + 1, RIFF)):
            return WavLength(there, there)
    return WavLength(size / bytes_a_second, there)


@dataclass(frozen=True)
class ChunkLayout:
    """How chunks of a family of files are laid out.

    Attributes:
        head: Name and size, in the words of ``struct``.
        counted: Bytes of the head that the size counts too.
        aligned: Contents are filled up to multiples of this.
    """

    head: str
    counted: int
    aligned: int

    def read(self, file: FileIO, position: int) -> tuple[bytes, int] | None:
        """The name of the chunk at a place, and the size of its content; None where the file ends before."""
        file.seek(position)
        head = file.read(struct.calcsize(self.head))
        if len(head) < struct.calcsize(self.head):
            return None
        name, size = struct.unpack(self.head, head)
        return name, size - self.counted

    def following(self, position: int, size: int) -> int:
        """Where the chunk begins that follows one at a place."""
        return position + struct.calcsize(self.head) + size + -size % self.aligned


RIFF = ChunkLayout("<4sI", 0, 2)


def is_chunk_name(name: bytes) -> bool:
    """Whether a chunk may have this name; W64's are longer, and begin as the others do."""
    return _NAME.fullmatch(name[:4]) is not None


def are_chunks(file: FileIO, position: int, layout: ChunkLayout) -> bool:
    """Whether chunks stand behind a file's samples, and not more samples.

    Samples may look like a chunk's name, and be followed by what may be its size. But they hardly look like one chunk
    after the other to the file's end, or to zeros.
    """
    end = file.seek(0, 2)
    first = position
    while position < end - 1:  # a last byte may fill up a chunk
        head = layout.read(file, position)
        if head is None or not is_chunk_name(head[0]):
            return position > first and is_zero_from(file, position)
        if head[0] in _BEHIND_SAMPLES:
            return True
        if head[1] < 0:
            return False
        position = layout.following(position, head[1])
    return position <= end + layout.aligned


def is_zero_from(file: FileIO, position: int) -> bool:
    """Whether a file is zero from a place to its end, as where a recorder has reserved more than it wrote."""
    zeros = bytes(1 << 18)
    while True:
        try:
            # The holes of a sparse file are passed over.
            position = os.lseek(file.fileno(), position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole
                return True
        file.seek(position)
        block = file.read(len(zeros))
        if block != zeros[: len(block)]:
            return False
        if not block:
            return True
        position += len(block)

"""The chunks of a WAV file (RIFF, RF64, BW64): which there are, and how long its samples are."""

import math
import re
import struct
from collections.abc import Iterator
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
        if not _NAME.fullmatch(name):
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


def wav_seconds(file: FileIO) -> tuple[float, float]:
    """How long a WAV is by its header, and how long if its samples go on to the file's end; of other files 0 and 0.

    Where other chunks follow the samples both are the same. The sizes of a recorder whose battery died are 0, or those
    of an earlier moment; beyond 4 GB, what is left of them in 32 bits; of a WAV out of a pipe, infinite.
    """
    bytes_a_second = 0
    for name, position, size in wav_chunks(file):
        if name == b"fmt ":
            *_, bytes_a_second = struct.unpack("<HHII", file.read(12).ljust(12, b"\0"))
        elif name == b"data":
            return _seconds_of(file, position, size, bytes_a_second) if bytes_a_second else (0, 0)
    return 0, 0


def _seconds_of(file: FileIO, position: int, size: int | None, bytes_a_second: int) -> tuple[float, float]:
    """The same for samples that begin at a place and have a size."""
    end = file.seek(0, 2)
    there = (end - position) / bytes_a_second
    if size is None:
        return math.inf, there
    if size and size < end - position:
        file.seek(position + size)
        behind = file.read(64)
        # Padding is no sound, nor is a chunk, which begins at once or at the next even byte. Samples that look like its
        # name are followed by what would be a size beyond the end of the file.
        chunk = re.match(rb"\0?([ -~]{4})(....)", behind, re.DOTALL)
        is_chunk = chunk and (
            chunk[1] in _BEHIND_SAMPLES or position + size + chunk.end() + int.from_bytes(chunk[2], "little") <= end
        )
        if len(behind) < 64 or is_chunk or not behind.strip(b"\0"):
            return there, there
    return size / bytes_a_second, there

"""AIFF, AU, CAF and W64 whose header says that there are fewer samples than there are.

As a recorder leaves it that lost its power, and a converter that was stopped: the samples are there, and the size of an
earlier moment, or 0. (WAV and its relatives are in :mod:`mergekit_bio.audio.wav_chunks`.)
"""

import struct
from dataclasses import dataclass
from io import FileIO

from mergekit_bio.audio.wav_chunks import ChunkLayout, are_chunks, is_chunk_name, is_zero_from

_AIFF = ChunkLayout(">4sI", 0, 2)
_CAF = ChunkLayout(">4sq", 0, 1)
_W64 = ChunkLayout("<16sq", 24, 8)
#: Beginning of the file -> its chunks, and where the first of them is.
_LAYOUTS = {b"FORM": (_AIFF, 12), b"caff": (_CAF, 8), b"riff": (_W64, 40)}
#: Beginning of the chunk that holds samples -> bytes of it before the first.
_SAMPLES = {_AIFF: (b"SSND", 8), _CAF: (b"data", 4), _W64: (b"data", 0)}
#: The size in an AU that nobody knew when it was written.
_UNKNOWN = 0xFFFFFFFF


@dataclass(frozen=True)
class SampleSize:
    """What a header says of the samples' size, where more stands behind them.

    Attributes:
        stated: The size, in bytes.
        there: What it would be if the samples went on to the file's end.
        zeros: Whether all behind it is zero, and so no sound.
        mended: Where a size stands that libsndfile believes, and what makes it read on to the file's end; without bytes
            where it need not be told.
    """

    stated: int
    there: int
    zeros: bool
    mended: tuple[int, bytes]


def sample_size(file: FileIO) -> SampleSize | None:
    """What the header of an AIFF, AU, CAF or W64 says; None where it says what is there, and of other files."""
    file.seek(0)
    head = file.read(12)
    end = file.seek(0, 2)
    if head[:4] == b".snd" and len(head) == 12:
        position, size = struct.unpack(">II", head[4:])
        if size == _UNKNOWN:
            return None
        return _size_of(file, position, size, end, None, (8, struct.pack(">I", _UNKNOWN)))
    layout, position = _LAYOUTS.get(head[:4], (None, 0))
    while layout is not None and (found := layout.read(file, position)) is not None:
        name, size = found
        samples, before = _SAMPLES[layout]
        if name.startswith(samples):
            content = position + struct.calcsize(layout.head)
            if layout is _CAF and size < 0:  # to the file's end, as it says
                return None
            # libsndfile reads a W64 to the file's end in any case, and an AIFF of size 0.
            mended = {
                _AIFF: (content - 4, bytes(4)),
                _CAF: (content - 8, struct.pack(">q", end - content)),
                _W64: (0, b""),
            }
            return _size_of(file, content + before, max(0, size - before), end, layout, mended[layout])
        if size < 0 or not is_chunk_name(name):
            return None
        position = layout.following(position, size)
    return None


def _size_of(
    file: FileIO, position: int, size: int, end: int, layout: ChunkLayout | None, mended: tuple[int, bytes]
) -> SampleSize | None:
    """The same for samples that begin at a place and have a size."""
    behind = position + size
    if end - behind < 64:
        return None
    if layout is not None and are_chunks(file, behind + -behind % layout.aligned, layout):
        return None
    # W64: what is zero is heard.
    zeros = size > 0 and layout is not _W64 and is_zero_from(file, behind)
    return SampleSize(size, end - position, zeros, (0, b"") if zeros else mended)

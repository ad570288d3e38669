"""The recordings of a report's page: what the model heard of each, as Opus, so that a page can be mailed."""

import base64
import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mergekit_bio.audio.clip import CLIP_SECONDS
from mergekit_bio.audio.config import SAMPLING_RATE
from mergekit_bio.errors import AudioError, MissingPackageError
from mergekit_bio.eval.records.predictions import Prediction

#: Recordings go into the page until they fill this many bytes, a third more as text; the rest is linked.
AUDIO_BUDGET = 3_600_000
#: Bits a second of Opus. The first that lets all recordings into the page is taken. The last still has all frequencies
#: up to 8 kHz; with 9,000 Opus leaves the upper half out.
BITRATES = (48_000, 32_000, 24_000, 16_000, 12_000, 10_000)
#: At the lowest of these, frames of 120 ms take a quarter fewer bytes than the usual 20, and a complexity of 3 of 10
#: half the time. Without "bitexact" the same recording would give other bytes each time.
_OPUS = {"frame_duration": "120", "compression_level": "3", "vbr": "on"}
_WEBM = {"fflags": "+bitexact"}
#: What the container adds to a recording, in bytes.
_CONTAINER_BYTES = 1000


@dataclass(frozen=True)
class Part:
    """What a model heard of a recording.

    Attributes:
        path: The recording's file.
        start: Where it begins, in seconds, and ``end``, where it ends; None for the file's end. Of what is longer than
            a clip the beginning is heard.
        channel: The channel that was heard, counted from 1; None for the mean of all.
    """

    path: str
    start: float
    end: float | None
    channel: int | None

    @classmethod
    def of(cls, row: Prediction) -> "Part | None":
        """What was heard for a row; None where it names no recording."""
        return None if row.audio is None else cls(row.audio, row.start or 0.0, row.end, row.channel)

    @property
    def longest(self) -> float:
        """Seconds that it takes at most."""
        return CLIP_SECONDS if self.end is None else min(CLIP_SECONDS, self.end - self.start)

    def seconds(self) -> float:
        """How long it is, as far as its file says so without being decoded."""
        from mergekit_bio.audio.decoding import stated_length

        stated = stated_length(Path(self.path))[1]
        return min(self.longest, max(0.0, stated - self.start)) if stated else self.longest


def page_sources(
    rows: Iterable[Prediction], folder: Path, *, progress: Callable[[int], None] = lambda _: None
) -> dict[Part, str]:
    """Where the page in ``folder`` finds what was heard: each part of a recording once, while its file is there.

    It is a data URL of WebM with Opus, mono at 16 kHz, which every browser plays. Once the page is full, and for what
    cannot be decoded, it is the way to the file. ``progress`` is called with 1 for each.
    """
    # In the order of the rows.
    parts = [part for part in dict.fromkeys(map(Part.of, rows)) if part is not None and Path(part.path).is_file()]
    bitrate, room, at_once = _bitrate(parts), AUDIO_BUDGET, 4 * (os.cpu_count() or 1)
    sources: dict[Part, str] = {}
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(parts), at_once):
            some = parts[first : first + at_once]
            tried = pool.map(partial(encode, bitrate=bitrate), some) if room > 0 else [None] * len(some)
            for part, encoded in zip(some, tried, strict=True):
                if encoded is not None:
                    room -= len(encoded)
                if encoded is None or room < 0:
                    sources[part] = _link(part, folder)
                else:
                    sources[part] = "data:audio/webm;base64," + base64.b64encode(encoded).decode()
                progress(1)
    return sources


def _link(part: Part, folder: Path) -> str:
    """The way to the file, and to the part of it."""
    way = quote(os.path.relpath(Path(part.path).resolve(), folder.resolve()))
    whole = not part.start and part.end is None
    return way if whole else f"{way}#t={part.start:g},{part.start + part.longest:g}"


def _bitrate(parts: Sequence[Part]) -> int:
    seconds = sum(part.seconds() for part in parts)
    room = AUDIO_BUDGET - len(parts) * _CONTAINER_BYTES
    return next((rate for rate in BITRATES if seconds * rate / 8 <= room), BITRATES[-1])


def encode(part: Part, *, bitrate: int) -> bytes | None:
    """What was heard of a recording as WebM with Opus, mono at 16 kHz; None where it cannot be decoded.

    Raises:
        MissingPackageError: PyAV or soundfile is not installed.
    """
    try:
        import av
    except ImportError:
        raise MissingPackageError("av", "eval", "putting recordings into the page") from None
    import numpy as np

    from mergekit_bio.audio.recording import read_samples

    try:
        samples, rate = read_samples(part.path, start=part.start, seconds=part.longest, channel=part.channel)
    except AudioError:
        return None
    mono = samples if samples.ndim == 1 else samples.mean(axis=1)
    frame = av.AudioFrame.from_ndarray(mono.clip(-1, 1).astype(np.float32)[None], format="flt", layout="mono")
    frame.sample_rate = rate
    resampler = av.AudioResampler(format="flt", layout="mono", rate=SAMPLING_RATE)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="webm", options=_WEBM) as file:
        stream: Any = file.add_stream("libopus", rate=SAMPLING_RATE, options=_OPUS)
        stream.layout, stream.bit_rate = "mono", bitrate
        for resampled in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(resampled))
        file.mux(stream.encode(None))
    return buffer.getvalue()

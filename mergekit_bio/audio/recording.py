"""Recordings: cut into windows or heard in part, however long they are."""

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bio.audio.clip import CLIP_SECONDS, Clip, samples_of
from mergekit_bio.audio.config import SAMPLING_RATE
from mergekit_bio.audio.decoding import Block, Note, begins_anywhere, decode
from mergekit_bio.audio.levels import Levels
from mergekit_bio.audio.waveform import (
    MIN_SECONDS,
    check_channels,
    check_duration,
    fit,
    pad_to_minimum,
    prepare,
    resample_blocks,
)
from mergekit_bio.errors import AudioError

if TYPE_CHECKING:
    import numpy as np
    import torch

#: Raised whenever decoding, mixing or resampling gives other samples than it did.
_DECODER = 2
#: Seconds between two parts that are worth to be left out.
_LONG_GAP = 30.0


def read_windows(
    path: str | Path,
    *,
    window: float = CLIP_SECONDS,
    hop: float | None = None,
    channel: int | None = None,
    note: Note | None = None,
) -> "Windows":
    """Cut a recording into windows, reading no further than the next one needs.

    Each is a clip of 10 s, with silence behind a window that is shorter. The windows cover the recording to its end; a
    last remainder of less than 0.5 s is no window of its own.

    Args:
        path: A recording in any usual format (wav, flac, ogg, mp3, m4a, ...), or a video with sound.
        window: Seconds a window, 0.5 to 10.
        hop: Seconds from one window's start to the next; the same as ``window`` by default.
        channel: The channel that is heard, counted from 1; None for the mean of all.
        note: Is told, in sentences that begin with the path, what a user should know of the recording: that it is
            longer than its header says, say.

    Returns:
        An iterator over the windows. Of a recording that breaks midway it gives what lies before the break; then it
        raises.

    Raises:
        AudioError: The window is no use; or, when windows are asked for, the recording (not decodable, empty, too
            short, not finite, ...).
    """
    hop = window if hop is None else hop
    check_windows(window=window, hop=hop)
    return Windows(Path(path), window=window, hop=hop, channel=channel, note=note)


class Windows(Iterator[Clip]):
    """The windows of a recording, one after the other; :func:`read_windows` makes it.

    Attributes:
        whole: Seconds of a window, but for the last one.
        sampling_rate: The recording's, in Hz; 0 before the first window.
        channels: How many it has.
        seconds: How much of it has been heard: when the windows have ended, its length.
    """

    def __init__(self, path: Path, *, window: float, hop: float, channel: int | None, note: Note | None) -> None:
        self.whole = round(window * SAMPLING_RATE) / SAMPLING_RATE
        self._listening = _Listening(path, channel, note)
        self._clips = self._cut(round(window * SAMPLING_RATE), round(hop * SAMPLING_RATE))

    @property
    def sampling_rate(self) -> int:
        return self._listening.rate

    @property
    def channels(self) -> int:
        return self._listening.channels

    @property
    def seconds(self) -> float:
        return self._listening.seconds

    def __next__(self) -> Clip:
        return next(self._clips)

    def close(self) -> None:
        """Close the file, where not all windows are wanted."""
        self._clips.close()

    def _cut(self, window: int, hop: int) -> Generator[Clip, None, None]:
        with self._listening.named():
            for start, samples in _cut(self._resampled(), window, hop):
                waveform = fit(samples, clip_samples=samples_of(CLIP_SECONDS))
                yield Clip(waveform, start=start / SAMPLING_RATE, end=(start + samples.numel()) / SAMPLING_RATE)
            if self._listening.broken:
                raise self._listening.broken

    def _resampled(self) -> "Iterator[torch.Tensor]":
        """The recording as mono float64 blocks at 16 kHz, up to where it breaks."""
        yield from _resampled(self._listening)
        if not self._listening.broken:
            check_duration(round(self.seconds * self.sampling_rate), self.sampling_rate)


def check_windows(*, window: float, hop: float | None) -> None:
    """Raise AudioError for a window that is too short, longer than a clip, or does not move."""
    if not MIN_SECONDS <= window <= CLIP_SECONDS:
        raise AudioError(f"a window of {window:g} s is outside {MIN_SECONDS} to {CLIP_SECONDS:g} s")
    if hop is not None and not 1 / SAMPLING_RATE <= hop < float("inf"):
        raise AudioError(f"a hop of {hop:g} s does not move the window")


def parse_channel(text: str) -> int | None:
    """What ``--channel`` says: None for "mean", else a channel's number, counted from 1.

    Raises:
        AudioError: It is something else.
    """
    if text == "mean":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise AudioError(f"a channel is 'mean' or a number from 1, not '{text}'")
    return int(text)


def read_clip(
    path: str | Path,
    *,
    start: float = 0.0,
    seconds: float = CLIP_SECONDS,
    channel: int | None = None,
    note: Note | None = None,
) -> Clip:
    """A part of a recording as a clip of 10 s, with silence behind it: cut at the recording's own rate, then resampled.

    Args:
        path: As in :func:`read_windows`, and so ``channel`` and ``note``.
        start: Where the part begins, in seconds.
        seconds: How long it is, 0.5 to 10; it ends earlier where the recording does.

    Raises:
        AudioError: The recording is no use, or no such part of it.
    """
    _check_part(seconds)
    samples, rate = read_samples(path, start=start, seconds=seconds, channel=channel, note=note)
    try:
        return _cut_out(samples, rate, start)
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from error


def read_clips(
    path: str | Path,
    parts: Iterable[tuple[float, float]],
    *,
    channel: int | None = None,
    note: Note | None = None,
) -> Generator[Clip, None, None]:
    """Many parts of a recording, each as :func:`read_clip` gives it, in one way through the recording.

    Args:
        path: As in :func:`read_windows`, and so ``channel`` and ``note``.
        parts: Start and length of each, in seconds, in the order of their starts; they may overlap.

    Raises:
        AudioError: The recording is no use, or breaks before the end of a part; by :class:`BehindTheEnd` where less
            than half a second of a part is there. (Of more, the part is shorter.)
    """
    parts, given = list(parts), 0
    listening = _Listening(Path(path), channel, note)
    with listening.named(), suppress(_Changes):
        for (start, seconds), (_, samples, rate) in zip(parts, _parts(listening, _checked_parts(parts)), strict=True):
            if len(samples) < min(MIN_SECONDS, seconds) * rate - 1:
                raise BehindTheEnd(f"of {start:g} to {start + seconds:g} s only {len(samples) / rate:.2f} s are there")
            yield _cut_out(samples, rate, start)
            given += 1
    # Over a change of the rate each part is heard by itself.
    for start, seconds in _checked_parts(parts[given:]):
        yield _clip_over_changes(Path(path), start, seconds, channel)


class BehindTheEnd(AudioError):
    """Of a part of a recording less than half a second is there."""


class _Changes(AudioError):
    """A recording's rate or channels change."""


def _clip_over_changes(path: Path, start: float, seconds: float, channel: int | None) -> Clip:
    """A part of a recording in which streams of several rates are chained: each resampled, then cut."""
    listening = _Listening(path, channel, note=None)  # whoever came to the change was told
    asked = round(seconds * SAMPLING_RATE)
    with listening.named():
        _, samples = next(_cut(_resampled(listening, start), asked, asked), (0, None))
        if listening.broken and (samples is None or samples.numel() < asked):
            raise listening.broken
        if samples is None:
            there = max(0.0, listening.seconds - start)
            raise BehindTheEnd(f"of {start:g} to {start + seconds:g} s only {there:.2f} s are there")
        waveform = fit(samples, clip_samples=samples_of(CLIP_SECONDS))
        return Clip(waveform, start=start, end=start + samples.numel() / SAMPLING_RATE)


def read_parts(
    path: str | Path,
    parts: Iterable[tuple[float, float]],
    *,
    channel: int | None = None,
    mixed: bool = True,
    note: Note | None = None,
) -> "Iterator[tuple[np.ndarray[Any, Any], int] | AudioError]":
    """Many parts of a recording, each as :func:`read_samples` gives it, in one way through the recording.

    Args:
        path: As in :func:`read_windows`, and so ``channel`` and ``note``.
        mixed: As in :func:`read_samples`.
        parts: Start and length of each, in seconds, in the order of their starts; they may overlap.

    Returns:
        For each part its samples and their rate, or what is wrong with it.
    """
    parts, given = list(parts), 0
    listening = _Listening(Path(path), channel, note, mixed=mixed)
    with suppress(AudioError), listening.named():
        for _, samples, rate in _parts(listening, parts):
            given += 1
            yield (samples[:, 0] if samples.shape[1] == 1 else samples), rate
    # What is behind a break cannot be had; what else does not go in one way, such as over a change of the rate, is read
    # by itself.
    for start, seconds in parts[given:]:
        if listening.broken and start >= listening.seconds:
            yield AudioError(f"{path}: {listening.broken}")
            continue
        try:
            yield read_samples(path, start=start, seconds=seconds, channel=channel, mixed=mixed, note=note)
        except AudioError as error:
            yield error


def _parts(
    listening: "_Listening", parts: Iterable[tuple[float, float]]
) -> "Iterator[tuple[float, np.ndarray[Any, Any], int]]":
    """Start in seconds, samples ``[frames, channels]`` and rate in Hz of each part, in one way through a recording.

    It begins at the first of them, and leaves long gaps out where the file allows.

    Raises:
        AudioError: See :func:`read_clips`.
    """
    import numpy as np

    blocks: Generator[Block, None, None] | None = None
    held: np.ndarray[Any, Any] = np.empty((0, 1))
    held_from = rate = 0
    for start, seconds in parts:
        if blocks is None:
            blocks = listening.blocks(start)
        elif rate and start > listening.seconds + _LONG_GAP and begins_anywhere(listening.path):
            blocks.close()
            blocks = listening.blocks(start)
            held, held_from = held[:0], round(start * rate)
        # 1. Read on until the part is held, and let go of what lies before it.
        while not rate or held_from + len(held) < round((start + seconds) * rate):
            block = next(blocks, None)
            if block is None:
                break
            if rate and (block.rate, block.samples.shape[1]) != (rate, held.shape[1]):
                raise _Changes(f"its rate or channels change after {listening.seconds:.2f} s")
            if not rate:
                rate, held_from = block.rate, round(start * block.rate)
                held = block.samples
            else:
                held = np.concatenate((held, block.samples))
            passed = min(max(0, round(start * rate) - held_from), len(held))
            held, held_from = held[passed:], held_from + passed
        # 2. Cut it out. The last one may be shorter than was asked for.
        first = round(start * rate) - held_from
        length = round((start + seconds) * rate) - round(start * rate)
        samples = held[first : first + length]
        if listening.broken and (not rate or len(samples) < length):
            raise listening.broken
        if not len(samples):
            its_length = f"; it is {listening.seconds:.2f} s long" if listening.seconds < start else ""
            raise BehindTheEnd(f"there is nothing from {start:g} s on{its_length}")
        yield start, samples, rate


def _checked_parts(parts: Iterable[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    for start, seconds in parts:
        _check_part(seconds)
        yield start, seconds


def _check_part(seconds: float) -> None:
    """Raise AudioError for a part that is too short or longer than a clip, by more than floats are rounded."""
    if not MIN_SECONDS - 1e-6 <= seconds <= CLIP_SECONDS + 1e-6:
        raise AudioError(f"a part of {seconds:g} s is outside {MIN_SECONDS} to {CLIP_SECONDS:g} s")


def _cut_out(samples: "np.ndarray[Any, Any]", rate: int, start: float) -> Clip:
    """A clip of what was cut out of a recording, ``[frames]`` or ``[frames, channels]``, at its own rate."""
    mono = _mono(samples).numpy() if samples.ndim == 2 else samples
    if len(mono) >= MIN_SECONDS * rate - 1:  # half a second may lack half a sample
        mono = pad_to_minimum(mono, rate)
    waveform = prepare(mono, sampling_rate=rate, clip_samples=samples_of(CLIP_SECONDS))
    return Clip(waveform, start=start, end=start + len(samples) / rate)


def read_samples(
    path: str | Path,
    *,
    seconds: float,
    start: float = 0.0,
    channel: int | None = None,
    mixed: bool = True,
    note: Note | None = None,
) -> "tuple[np.ndarray[Any, Any], int]":
    """Decode a part of a recording, and nothing behind it.

    A recording that breaks in this part is heard up to there, if that is 0.5 s or more, and ``note`` is told.

    Args:
        path: As in :func:`read_windows`, and so ``channel`` and ``note``; but all channels are given, not their mean.
        seconds: How long the part is.
        start: Where it begins, in seconds.
        mixed: Whether the channels will be mixed: then more than 16 are refused, and what a mean loses is noted.

    Returns:
        float64 ``[samples]``, or ``[samples, channels]`` of several, and their rate in Hz: those from
        ``round(start * rate)`` to ``round((start + seconds) * rate)``, or to the recording's end.

    Raises:
        AudioError: The recording is no use, or ends before ``start``.
    """
    import numpy as np

    listening = _Listening(Path(path), channel, note, mixed=mixed)
    with listening.named():
        taken: list[np.ndarray[Any, Any]] = []
        frames = rate = 0
        for block in listening.blocks(start):
            if taken and block.rate != rate:
                listening.tell(f"its rate changes from {rate} to {block.rate} Hz; what comes before is heard")
                break
            rate = block.rate
            length = round((start + seconds) * rate) - round(start * rate)
            taken.append(block.samples[: length - frames])
            frames += len(taken[-1])
            if frames >= length:
                break
        else:
            if listening.broken:
                if frames < MIN_SECONDS * rate or not frames:
                    raise listening.broken
                listening.tell(f"{listening.broken}; what comes before is heard")
        if not frames:
            raise AudioError(f"there is nothing in it from {start:g} s on" if start else "there are no samples")
        if len({samples.shape[1] for samples in taken}) > 1:  # mono and stereo, chained
            taken = [samples.mean(axis=1, keepdims=True) for samples in taken]
        joined = np.concatenate(taken)
        return (joined[:, 0] if joined.shape[1] == 1 else joined), rate


@lru_cache
def decoder() -> str:
    """What the samples of a clip depend on beside its recording: our own way, and the versions of the libraries."""
    import torch

    libraries = [f"torch {torch.__version__}"]
    try:
        import soundfile
    except (ImportError, OSError):
        libraries.append("no soundfile")
    else:
        libraries.append(f"soundfile {soundfile.__version__}, {soundfile.__libsndfile_version__}")
    try:
        import av
    except ImportError:
        libraries.append("no av")
    else:
        libraries.append(f"av {av.__version__}, {'.'.join(map(str, av.library_versions['libavcodec']))}")
    return f"{_DECODER}, {', '.join(libraries)}"


@dataclass
class _Listening:
    """One way through a recording, from a place to its end, its break, or as far as somebody listens.

    Attributes:
        path: The recording.
        channel: What is heard of it: a channel, counted from 1, or None for all.
        note: Is told what a user should know.
        mixed: Whether all are heard as their mean.
        rate: Its rate in Hz, and ``channels`` how many it has; 0 at first.
        seconds: Where we are.
        broken: Why it ended before its end.
    """

    path: Path
    channel: int | None
    note: Note | None
    mixed: bool = True
    rate: int = 0
    channels: int = 0
    seconds: float = 0.0
    broken: AudioError | None = None

    def __post_init__(self) -> None:
        self._levels = Levels(mixed=self.mixed and self.channel is None)

    def tell(self, text: str) -> None:
        """Note a sentence about the recording."""
        if self.note is not None:
            self.note(f"{self.path}: {text}")

    @contextmanager
    def named(self) -> Iterator[None]:
        """Errors in the block name the recording; at its end, what was odd about the levels is noted."""
        try:
            yield
        except AudioError as error:
            raise AudioError(f"{self.path}: {error}") from error
        finally:
            if text := "; ".join(self._levels.notes()):
                self.tell(text)

    def blocks(self, start: float = 0.0) -> Generator[Block, None, None]:
        """What is heard: blocks of finite samples, ``[frames, channels]``, or ``[frames, 1]`` of one channel."""
        self.seconds = start
        try:
            for block in decode(self.path, note=self.tell, start=start):
                yield from self._heard(block)
        except (AudioError, OSError) as error:
            reason = f"cannot be read ({error.strerror or error})" if isinstance(error, OSError) else str(error)
            self.broken = AudioError(f"breaks after {self.seconds:.2f} s: {reason}" if self.rate else reason)
            self.broken.__cause__ = error  # a disk that has gone is told from a recording that is no use

    def _heard(self, block: Block) -> Iterator[Block]:
        """What is heard of a block: all of it, or its beginning before an error is raised."""
        import numpy as np

        channels = block.samples.shape[1]
        if self.channel is None and self.mixed:
            check_channels(channels)
        elif self.channel is not None and self.channel > channels:
            raise AudioError(f"there is no channel {self.channel}; it has {channels}")
        samples = block.samples if self.channel is None else block.samples[:, self.channel - 1 : self.channel]
        whole = bool(np.isfinite(samples).all())
        if not whole:
            samples = samples[: int(np.isfinite(samples).all(axis=1).argmin())]
        if len(samples):
            self.rate, self.channels = self.rate or block.rate, self.channels or channels
            self.seconds += len(samples) / block.rate
            self._levels.add(samples)
            yield Block(samples, block.rate)
        if not whole:
            raise AudioError("holds NaN or infinity")


def _mono(samples: "np.ndarray[Any, Any]") -> "torch.Tensor":
    """The mean of the channels, ``[frames, channels]`` to ``[frames]``, float64."""
    import torch

    return torch.from_numpy(samples).mean(dim=1)


def _resampled(listening: "_Listening", start: float = 0.0) -> "Iterator[torch.Tensor]":
    """What is heard from a place on as mono float64 blocks at 16 kHz."""
    # Streams of several rates may be chained in one file. Each is resampled by itself.
    for rate, blocks in groupby(listening.blocks(start), key=lambda block: block.rate):
        yield from resample_blocks((_mono(block.samples) for block in blocks), sampling_rate=rate)


def _cut(blocks: "Iterable[torch.Tensor]", window: int, hop: int) -> "Iterator[tuple[int, torch.Tensor]]":
    """Start and samples of every window of a stream; all in samples."""
    import torch

    held = torch.empty(0, dtype=torch.float64)
    held_from = start = 0
    for block in blocks:
        held = torch.cat((held, block))
        # Only a window with something behind it is surely not the last one.
        while held_from + held.numel() > start + window:
            yield start, held[start - held_from :][:window]
            start += hop
        passed = min(max(0, start - held_from), held.numel())
        held, held_from = held[passed:], held_from + passed
    # What no window covers yet is one more if it is long enough; the only one there is may lack a sample by rounding.
    total = held_from + held.numel()
    covered = start - hop + window if start else 0
    least = MIN_SECONDS * SAMPLING_RATE - (0 if start else 1)
    if total - max(start, covered) >= least:
        yield start, held[start - held_from :]

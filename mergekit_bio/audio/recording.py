"""Recordings on disk: found, decoded and cut into windows, however long they are."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bio.audio.clip import CLIP_SECONDS, Clip, samples_of
from mergekit_bio.audio.config import SAMPLING_RATE
from mergekit_bio.audio.waveform import MIN_SECONDS, check_channels, check_duration, check_rate, fit, resample_blocks
from mergekit_bio.errors import AudioError, MissingPackageError

if TYPE_CHECKING:
    import numpy as np
    import torch

#: Frames that are decoded at a time: ten seconds at 52 kHz. So an hour of ultrasound takes no more memory than a clip.
_BLOCK_FRAMES = 1 << 19

#: Raised whenever decoding, mixing or resampling gives other samples than it did.
_DECODER = 1

_SUFFIXES = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".aifc", ".au", ".caf", ".w64", ".rf64"}


def find_recordings(paths: Iterable[str | Path]) -> list[Path]:
    """The files named, and the recordings in and below the folders named, in order of their paths.

    Raises:
        AudioError: A path does not exist, or a folder holds no recording.
    """
    recordings: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
            if not inside:
                raise AudioError(f"{path}: holds no recordings ({', '.join(sorted(_SUFFIXES))})")
            recordings += inside
        elif path.exists():
            recordings.append(path)
        else:
            raise AudioError(f"{path}: no such file or folder")
    return recordings


def read_windows(path: str | Path, *, window: float = CLIP_SECONDS, hop: float | None = None) -> Iterator[Clip]:
    """Cut a recording into windows, reading no further than the next one needs.

    Each is a clip of 10 s, with silence behind a window that is shorter. The windows cover the recording to its end. A
    last remainder of less than 0.5 s would be mostly silence: that window is moved back to end with the recording.

    Args:
        path: A file that libsndfile decodes (wav, flac, ogg, mp3, ...).
        window: Seconds a window, 0.5 to 10.
        hop: Seconds from one window's start to the next; the same as ``window`` by default.

    Raises:
        AudioError: The file is no use (not decodable, empty, too short, not finite, ...), or the window is.
    """
    hop = window if hop is None else hop
    check_windows(window=window, hop=hop)
    with _opened(Path(path)) as file:
        blocks = resample_blocks(_decode(file), sampling_rate=file.samplerate)
        for start, samples in _cut(blocks, round(window * SAMPLING_RATE), round(hop * SAMPLING_RATE)):
            waveform = fit(samples, clip_samples=samples_of(CLIP_SECONDS))
            yield Clip(waveform, start=start / SAMPLING_RATE, end=(start + samples.numel()) / SAMPLING_RATE)


def check_windows(*, window: float, hop: float | None) -> None:
    """Raise AudioError for a window that is too short, longer than a clip, or does not move."""
    if not MIN_SECONDS <= window <= CLIP_SECONDS:
        raise AudioError(f"a window of {window:g} s is outside {MIN_SECONDS} to {CLIP_SECONDS:g} s")
    if hop is not None and not 1 / SAMPLING_RATE <= hop < float("inf"):
        raise AudioError(f"a hop of {hop:g} s does not move the window")


def read_clip(path: str | Path) -> Clip:
    """The first 10 s of a recording: what NatureLM-audio hears of a file given as one audio.

    Raises:
        AudioError: The file is no use.
    """
    return next(read_windows(path))


def read_beginning(path: Path, *, seconds: float) -> "tuple[np.ndarray, int]":
    """Decode the first seconds of a recording, and nothing after them.

    Returns:
        float64 ``[samples]``, or ``[samples, channels]`` of several, and their rate in Hz.

    Raises:
        AudioError: The file is not decodable, or of an impossible rate or number of channels.
    """
    with _opened(path) as file:
        return file.read(round(seconds * file.samplerate), dtype="float64"), file.samplerate


@lru_cache
def decoder() -> str:
    """What the samples of a clip depend on beside its recording: our own way, and the versions of the libraries."""
    import torch

    try:
        import soundfile
    except (ImportError, OSError):
        libraries = "no soundfile"
    else:
        libraries = f"soundfile {soundfile.__version__}, {soundfile.__libsndfile_version__}"
    return f"{_DECODER}, {libraries}, torch {torch.__version__}"


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
        needed = max(0, min(start - held_from, held.numel() - window))
        held, held_from = held[needed:], held_from + needed
    total = held_from + held.numel()
    covered = start - hop + window if start else 0
    if covered < total and start < total:
        if total - start < MIN_SECONDS * SAMPLING_RATE:
            start = max(0, total - window)
        yield start, held[start - held_from :]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A recording as a ``soundfile.SoundFile``; whatever is wrong with it is an AudioError that names it."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package without its C library
        raise MissingPackageError("soundfile", "eval", "reading recordings") from error
    try:
        # By descriptor, so that libsndfile goes by what is in the file and not by its name.
        with path.open("rb") as raw, soundfile.SoundFile(raw.fileno(), closefd=False) as file:
            check_rate(file.samplerate)
            check_channels(file.channels)
            yield file
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from error
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", str(error))  # without the number of the descriptor
        raise AudioError(f"{path}: cannot be decoded as audio ({reason.rstrip('.')})") from error
    except OSError as error:
        raise AudioError(f"{path}: cannot be read ({error.strerror or error})") from error


def _decode(file: Any) -> "Iterator[torch.Tensor]":
    """Mono float64 blocks of an open ``soundfile.SoundFile`` at its own rate."""
    import torch

    frames = 0
    step = min(int(CLIP_SECONDS * file.samplerate), _BLOCK_FRAMES)
    while len(block := file.read(step, dtype="float64", always_2d=True)):
        mono = torch.from_numpy(block).mean(dim=1)
        if not mono.isfinite().all():
            raise AudioError(f"holds NaN or infinity after {frames / file.samplerate:.1f} s")
        frames += len(block)
        yield mono
    check_duration(frames, file.samplerate)

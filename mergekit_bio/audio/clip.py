"""One audio as a model hears it: samples at 16 kHz, and the seconds that they are cut or padded to."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergekit_bio.audio.config import SAMPLING_RATE
from mergekit_bio.audio.waveform import MIN_SECONDS
from mergekit_bio.errors import AudioError

if TYPE_CHECKING:
    import torch

#: What is heard of a recording where nobody says otherwise, and the longest clip that there is (NatureLM-audio).
CLIP_SECONDS = 10.0


@dataclass(frozen=True, eq=False)
class Clip:
    """One audio, prepared: what the tower hears.

    Its length is stated and never taken from a recording: a recording of 3 s is a clip of 10 s, with silence at its
    end, unless its caller says that 3 s are to be heard. The model's answer depends on it, and so does the number of
    prefix tokens (29 for 10 s, 8 for 3 s).

    Attributes:
        waveform: float64 ``[seconds * 16000]`` at 16 kHz, of :func:`mergekit_bio.audio.waveform.prepare`.
        seconds: Its length, 0.5 to 10.
        start: Where it begins in its recording, in seconds.
        end: Where it ends there: before ``start + seconds`` where the recording ends first.
    """

    waveform: "torch.Tensor"
    seconds: float = CLIP_SECONDS
    start: float = 0.0
    end: float = CLIP_SECONDS

    def __post_init__(self) -> None:
        if self.waveform.shape != (samples_of(self.seconds),):
            raise ValueError(f"a clip of {self.seconds:g} s has not the shape {tuple(self.waveform.shape)}")

    @classmethod
    def from_samples(cls, samples: Any, *, sampling_rate: int, seconds: float = CLIP_SECONDS) -> "Clip":
        """Prepare an array of samples.

        Args:
            samples: As :func:`mergekit_bio.audio.waveform.prepare` takes them.
            sampling_rate: Samples a second of ``samples``.
            seconds: What they are cut or padded to, 0.5 to 10.

        Raises:
            AudioError: The samples or the seconds are no use.
        """
        from mergekit_bio.audio.waveform import prepare

        waveform = prepare(samples, sampling_rate=sampling_rate, clip_samples=samples_of(seconds))
        return cls(waveform, seconds, end=seconds)

    @cached_property
    def digest(self) -> str:
        """sha256 of the length and of every sample."""
        from mergekit_bio.checkpoint.digest import tensor_sha256

        return hashlib.sha256(f"{self.seconds:g} s {tensor_sha256(self.waveform.double())}".encode()).hexdigest()


def samples_of(seconds: float) -> int:
    """How many samples a clip of so many seconds has.

    Raises:
        AudioError: No clip is that long.
    """
    if not MIN_SECONDS <= seconds <= CLIP_SECONDS:
        raise AudioError(f"a clip of {seconds:g} s is outside {MIN_SECONDS} to {CLIP_SECONDS:g} s")
    return round(seconds * SAMPLING_RATE)

"""One audio as a model hears it: samples at 16 kHz, and the seconds that they are cut or padded to."""

import hashlib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergekit_bio.audio.config import SAMPLING_RATE
from mergekit_bio.audio.waveform import MIN_SECONDS
from mergekit_bio.errors import AudioError

if TYPE_CHECKING:
    import torch

#: What is heard of a recording where nobody says otherwise, and the longest clip that there is (NatureLM-audio).
CLIP_SECONDS = 10.0


class Clip:
    """One audio, prepared: what the tower hears. It is not to be changed.

    Its length is stated and never taken from a recording: a recording of 3 s is a clip of 10 s, with silence at its
    end, unless its caller says that 3 s are to be heard. The model's answer depends on it, and so does the number of
    prefix tokens (29 for 10 s, 8 for 3 s).

    Args:
        waveform: float64 ``[seconds * 16000]`` at 16 kHz, of :func:`mergekit_bio.audio.waveform.prepare`; or a function
            that decodes it, called when the samples are asked for.
        seconds: Its length, 0.5 to 10.
        start: Where it begins in its recording, in seconds.
        end: Where it ends there: before ``start + seconds`` where the recording ends first.
        digest: The clip's ``digest``, where it is known. Whoever has the prefix of that digest decodes nothing.

    Raises:
        AudioError: No clip is that long.
        ValueError: The waveform has another length.
    """

    def __init__(
        self,
        waveform: "torch.Tensor | Callable[[], torch.Tensor]",
        seconds: float = CLIP_SECONDS,
        start: float = 0.0,
        end: float = CLIP_SECONDS,
        *,
        digest: str | None = None,
    ) -> None:
        self.seconds, self.start, self.end = seconds, start, end
        self.samples = samples_of(seconds)
        if callable(waveform):
            self._decode = waveform
        else:
            self.waveform = self._checked(waveform)
        if digest is not None:
            self.digest = digest

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
    def waveform(self) -> "torch.Tensor":
        """float64 ``[samples]``; decoded once."""
        return self._checked(self._decode())

    @cached_property
    def digest(self) -> str:
        """sha256 of the length and of every sample."""
        from mergekit_bio.checkpoint.digest import tensor_sha256

        return hashlib.sha256(f"{self.seconds:g} s {tensor_sha256(self.waveform.double())}".encode()).hexdigest()

    def _checked(self, waveform: "torch.Tensor") -> "torch.Tensor":
        if waveform.shape != (self.samples,):
            raise ValueError(f"a clip of {self.seconds:g} s has not the shape {tuple(waveform.shape)}")
        return waveform


def samples_of(seconds: float) -> int:
    """How many samples a clip of so many seconds has.

    Raises:
        AudioError: No clip is that long.
    """
    if not MIN_SECONDS <= seconds <= CLIP_SECONDS:
        raise AudioError(f"a clip of {seconds:g} s is outside {MIN_SECONDS} to {CLIP_SECONDS:g} s")
    return round(seconds * SAMPLING_RATE)

"""How loud a window is, so that silence need not be asked about."""

import math

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.config import SAMPLING_RATE
from mergekit_bio.errors import AudioError

#: 50 ms: short enough for a single call in ten seconds of silence, as SoX and FFmpeg measure their "RMS peak".
_FRAME = SAMPLING_RATE // 20


def check_level(decibels: float | None) -> None:
    """Raise AudioError for a level that no window is above."""
    if decibels is not None and not -200 <= decibels < 0:
        raise AudioError(f"--skip-quiet {decibels:g}: a level is in dB below full scale, such as -60")


def loudest(clip: Clip) -> float:
    """The level of a window's loudest 50 ms: its root mean square in dB of full scale, minus infinity for silence.

    A constant offset, which cheap recorders have, does not count.
    """
    heard = clip.waveform[: round((clip.end - clip.start) * SAMPLING_RATE)]
    frames = (heard - heard.mean()).unfold(0, _FRAME, _FRAME)
    power = float(frames.square().mean(dim=1).max())
    return 10 * math.log10(power) if power > 0 else -math.inf


def is_quiet(clip: Clip, decibels: float | None) -> bool:
    """Whether nothing in a window is as loud as a level; never where there is no level."""
    return decibels is not None and loudest(clip) < decibels

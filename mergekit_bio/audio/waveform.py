"""From an array of samples at any rate to what the tower hears: mono, 16 kHz, of a clip's length, within [-1, 1]."""

import math
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mergekit_bio.audio.config import SAMPLING_RATE
from mergekit_bio.errors import AudioError

if TYPE_CHECKING:
    import numpy as np
    import torch

#: Shorter recordings are refused, as NatureLM-audio does.
MIN_SECONDS = 0.5

#: From infrasound loggers to ultrasound recorders.
MIN_RATE, MAX_RATE = 100, 2_000_000

#: More channels are an array of microphones, of which a mean makes no sense.
MAX_CHANNELS = 16

# resampy's "kaiser_best" filter, which NatureLM-audio resamples with: a windowed sinc of 50 crossings of its time axis,
# tabulated 8192 times a crossing.
_ZEROS = 50
_ROLLOFF = 0.9173473612080061
_BETA = 12.984585247040012
_TABLE = 8192

#: Samples that a step of the resampler takes, and gives, at least. One step of the ratio of 48 kHz, three to one,
#: would be a convolution with one output, twenty to seventy times slower for the same sums.
_LEAST_STEP = (256, 64)


def prepare(
    samples: "torch.Tensor | np.ndarray[Any, Any] | Sequence[float]",
    *,
    sampling_rate: int = SAMPLING_RATE,
    clip_samples: int = 10 * SAMPLING_RATE,
) -> "torch.Tensor":
    """Bring one recording into the form the tower hears, in NatureLM-audio's order.

    Mean over the channels (the smaller axis of two), resample, cut, pad with zeros at the end, clamp (so the
    resampler's overshoot is clamped). No normalisation of level.

    Args:
        samples: Floating point, ``[samples]`` or two axes of which the smaller are channels.
        sampling_rate: Samples a second of ``samples``.
        clip_samples: Length of the result.

    Returns:
        float64 ``[clip_samples]``. Single precision would put a noise floor into the quietest mel bins.

    Raises:
        AudioError: The samples are no use: empty, too short, not finite, too many channels, an impossible rate.
    """
    import torch

    check_rate(sampling_rate)
    waveform = torch.as_tensor(samples)
    if not waveform.is_floating_point():
        raise AudioError(f"samples must be floating point in [-1, 1], not {waveform.dtype}; divide by full scale first")
    waveform = waveform.double()
    if waveform.ndim == 2:
        check_channels(min(waveform.shape))
        waveform = waveform.mean(dim=0 if waveform.shape[0] < waveform.shape[1] else 1)
    if waveform.ndim != 1:
        raise AudioError(f"samples must have one axis, or two with channels, not the shape {tuple(waveform.shape)}")
    check_duration(waveform.numel(), sampling_rate)
    if not waveform.isfinite().all():
        raise AudioError("samples hold NaN or infinity")
    return fit(resample(waveform, sampling_rate=sampling_rate), clip_samples=clip_samples)


def fit(waveform: "torch.Tensor", *, clip_samples: int) -> "torch.Tensor":
    """Cut ``[samples]`` to ``[clip_samples]`` or pad it with zeros at the end, then clamp it to [-1, 1]."""
    import torch

    waveform = waveform[:clip_samples]
    return torch.nn.functional.pad(waveform, (0, clip_samples - waveform.numel())).clamp(-1, 1)


def resample(waveform: "torch.Tensor", *, sampling_rate: int) -> "torch.Tensor":
    """Resample float64 ``[samples]`` to 16 kHz; see :func:`resample_blocks`."""
    import torch

    return torch.cat(list(resample_blocks([waveform], sampling_rate=sampling_rate)))


def resample_blocks(blocks: "Iterable[torch.Tensor]", *, sampling_rate: int) -> "Iterator[torch.Tensor]":
    """Resample a stream to 16 kHz; the blocks together equal the resampling of the whole.

    The filter is resampy's "kaiser_best", which NatureLM-audio uses: the two differ by less than -120 dB.

    A ratio of rates with large terms (44101 Hz) would need a filter bank of gigabytes; it is rounded to the nearest
    one that takes some 64 MB, by less than 0.02 %: what a recorder's clock may be off itself.

    Args:
        blocks: Consecutive float64 ``[samples]``.
        sampling_rate: Their rate.

    Yields:
        Consecutive float64 ``[samples]`` at 16 kHz; ``floor(n * 16000 / sampling_rate)`` in all.
    """
    import torch

    if sampling_rate == SAMPLING_RATE:
        yield from blocks
        return
    exact = Fraction(sampling_rate, SAMPLING_RATE)
    ratio = exact.limit_denominator(math.isqrt(int(2**23 / exact)))
    taken, given = _LEAST_STEP
    repeats = max(1, taken // ratio.numerator, -(-given // ratio.denominator))
    old, new = repeats * ratio.numerator, repeats * ratio.denominator
    kernels = _kernels(old, new)
    reach = (kernels.shape[1] - old) // 2
    context = math.ceil(reach / old) * old

    # Every ``old`` samples become ``new`` ones, each weighed by its own kernel: a convolution of ``new`` channels.
    def convert(piece: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(piece, (reach, reach + old))
        phases = torch.nn.functional.conv1d(padded[None, None], kernels[:, None], stride=old)[0]
        return phases.T.flatten()[: -(-piece.numel() * new // old)]

    before = pending = torch.empty(0, dtype=torch.float64)
    received = emitted = 0
    for block in blocks:
        received += block.numel()
        pending = torch.cat((pending, block))
        # Whole steps whose kernels reach no further than what has come. What lies before them is resampled again with
        # them, for its neighbourhood, and its part of the result skipped.
        ready = (pending.numel() - reach) // old * old
        if ready > 0:
            skipped = before.numel() // old * new
            resampled = convert(torch.cat((before, pending[: ready + reach])))
            yield resampled[skipped : skipped + ready // old * new]
            emitted += ready // old * new
            before = torch.cat((before, pending[:ready]))[-context:]
            pending = pending[ready:]
    # The end, behind which there is silence.
    rest = torch.cat((before, pending))
    skipped = before.numel() // old * new
    yield (convert(rest) if received else rest)[skipped : skipped + received * new // old - emitted]


@lru_cache(maxsize=4)
def _kernels(old: int, new: int) -> "torch.Tensor":
    """What ``old`` samples and their neighbours weigh in each of the ``new`` samples that take their place.

    Returns:
        float64 ``[new, reach + old + reach]``; kept for the next recording of this rate, and not to be written to.
    """
    import torch

    scale = min(1.0, new / old)
    # resampy steps through its table in whole entries, which stretches the filter by up to 1/800; the stretch is part
    # of what the model was trained on.
    step = int(_TABLE * scale) / _TABLE
    reach = math.ceil(_ZEROS / step)
    place = torch.arange(new, dtype=torch.float64)[:, None] * old / new  # of the new samples, among the old
    sample = torch.arange(-reach, old + reach)
    whole = place.floor()
    behind, ahead = scale * (place - whole), scale * (1 - (place - whole))
    distance = torch.where(sample <= whole, behind + (whole - sample) * step, ahead + (sample - whole - 1) * step)
    inside = (1 - (distance / _ZEROS).square()).clamp(min=0)
    taper = torch.special.i0(_BETA * inside.sqrt()) / torch.special.i0(torch.tensor(_BETA, dtype=torch.float64))
    return torch.where(inside > 0, scale * _ROLLOFF * torch.sinc(_ROLLOFF * distance) * taper, 0.0)


def check_rate(sampling_rate: int) -> None:
    """Raise AudioError for a sampling rate that no recorder has."""
    if not MIN_RATE <= sampling_rate <= MAX_RATE:
        raise AudioError(f"a sampling rate of {sampling_rate} Hz is outside {MIN_RATE} to {MAX_RATE} Hz")


def check_channels(channels: int) -> None:
    """Raise AudioError where there are more channels than a mean makes sense of."""
    if channels > MAX_CHANNELS:
        raise AudioError(f"{channels} channels are more than the {MAX_CHANNELS} that are mixed; choose one (--channel)")


def pad_to_minimum(samples: "np.ndarray[Any, Any]", sampling_rate: int) -> "np.ndarray[Any, Any]":
    """Put silence behind a recording of less than 0.5 s, which :func:`prepare` would refuse.

    It changes nothing about what is heard: every clip is followed by silence up to its length. ``samples`` are
    ``[samples]``, or ``[samples, channels]``.
    """
    import numpy as np

    lacking = math.ceil(MIN_SECONDS * sampling_rate) - len(samples)
    return np.pad(samples, [(0, lacking)] + [(0, 0)] * (samples.ndim - 1)) if lacking > 0 else samples


def check_duration(samples: int, sampling_rate: int) -> None:
    """Raise AudioError for a recording that is empty or shorter than 0.5 s."""
    if samples == 0:
        raise AudioError("there are no samples")
    if samples < MIN_SECONDS * sampling_rate:
        raise AudioError(f"{samples / sampling_rate:.2f} s is too short; at least {MIN_SECONDS} s are needed")

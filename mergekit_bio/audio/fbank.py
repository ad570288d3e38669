"""The mel filter bank that BEATs reads: Kaldi's, in double precision."""

import math

import torch

from mergekit_bio.audio.config import FRAME_LENGTH, FRAME_SHIFT, MEL_BINS, SAMPLING_RATE

# BEATs (Chen et al. 2022; microsoft/unilm, beats/BEATs.py): 16-bit full scale, and the mean and twice the standard
# deviation of AudioSet's filter banks.
_FULL_SCALE = 2**15
_MEAN, _SCALE = 15.41663, 2 * 6.55582

# Kaldi's defaults (kaldi-asr/kaldi, feat/feature-window.h and feat/mel-computations.h).
_PREEMPHASIS = 0.97
_POVEY = 0.85
_FFT = 512
_LOWEST_HZ = 20
_FLOOR = torch.finfo(torch.float32).eps


def fbank(waveform: torch.Tensor) -> torch.Tensor:
    """Kaldi's log mel energies, normalised as BEATs does.

    Computed in float64, whatever comes in: in float32 the quiet bins are ill conditioned (they differ by up to
    6e-3 between processors; in float64 by less than 1e-5).

    Args:
        waveform: ``[batch, samples]`` at 16 kHz, full scale 1.

    Returns:
        float32 ``[batch, frames, 128]``; 998 frames for 10 s.
    """
    window = torch.hann_window(FRAME_LENGTH, periodic=False, dtype=torch.float64, device=waveform.device) ** _POVEY
    filters = mel_filters().to(waveform.device, torch.float64)
    # A clip at a time, which bounds the memory of the spectra.
    energies = [_log_mel(clip, window, filters) for clip in waveform.double() * _FULL_SCALE]
    return ((torch.stack(energies) - _MEAN) / _SCALE).float()


def _log_mel(clip: torch.Tensor, window: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """``[samples]`` -> ``[frames, 128]``, of whole frames only."""
    frames = clip.unfold(0, FRAME_LENGTH, FRAME_SHIFT)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat((frames[:, :1], frames[:, :-1]), dim=1)  # a frame's first sample precedes itself
    spectrum = torch.fft.rfft((frames - _PREEMPHASIS * before) * window, n=_FFT)
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ filters).clamp(min=_FLOOR).log()


def mel_filters() -> torch.Tensor:
    """Triangles on the mel scale, float32 ``[257, 128]``: the share of every FFT bin in every mel bin.

    Made in float32, as the model's training made them. The last FFT bin, at half the sampling rate, counts nowhere.
    """

    def mel(hertz: torch.Tensor) -> torch.Tensor:
        return 1127 * torch.log(1 + hertz / 700)

    hertz = torch.arange(_FFT // 2) * (SAMPLING_RATE / _FFT)
    low, high = (1127 * math.log(1 + edge / 700) for edge in (_LOWEST_HZ, SAMPLING_RATE / 2))
    corners = low + torch.arange(MEL_BINS + 2) * ((high - low) / (MEL_BINS + 1))
    left, top, right = corners[:-2], corners[1:-1], corners[2:]
    mels = mel(hertz)[:, None]
    triangles = torch.minimum((mels - left) / (top - left), (right - mels) / (right - top)).clamp(min=0)
    return torch.nn.functional.pad(triangles, (0, 0, 0, 1))

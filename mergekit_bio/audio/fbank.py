"""The mel filter bank that BEATs reads, in double precision."""

import torch

from mergekit_bio.audio.config import FRAME_LENGTH, FRAME_SHIFT, MEL_BINS, SAMPLING_RATE
from mergekit_bio.errors import MissingPackageError

# BEATs (Chen et al. 2022; microsoft/unilm, beats/BEATs.py): 16-bit full scale, and the mean and twice the standard
# deviation of AudioSet's filter banks.
_FULL_SCALE = 2**15
_MEAN, _SCALE = 15.41663, 2 * 6.55582


def fbank(waveform: torch.Tensor) -> torch.Tensor:
    """Kaldi's log mel energies, normalised as BEATs does.

    Computed in float64, whatever comes in: in float32 the quiet bins are ill conditioned (they differ by up to
    6e-3 between processors; in float64 by less than 1e-5).

    Args:
        waveform: ``[batch, samples]`` at 16 kHz, full scale 1.

    Returns:
        float32 ``[batch, frames, 128]``; 998 frames for 10 s.
    """
    try:
        from torchaudio.compliance import kaldi
    except ImportError as error:
        raise MissingPackageError("torchaudio", "eval", "the audio encoder") from error
    milliseconds = 1000 / SAMPLING_RATE
    energies = [
        kaldi.fbank(
            clip[None] * _FULL_SCALE,
            num_mel_bins=MEL_BINS,
            sample_frequency=SAMPLING_RATE,
            frame_length=FRAME_LENGTH * milliseconds,
            frame_shift=FRAME_SHIFT * milliseconds,
        )
        for clip in waveform.double()
    ]
    return ((torch.stack(energies) - _MEAN) / _SCALE).float()

"""A picture of what the model hears."""

import base64
import io

import numpy as np

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.config import SAMPLING_RATE

#: What is quieter than the loudest by so many dB is black.
_RANGE_DB = 70.0
#: Samples of a window, and from one window to the next: 32 ms and 8 ms.
_WINDOW, _HOP = 512, 128


def spectrogram_png(clip: Clip) -> bytes:
    """A clip's power over time and frequency, up to the 8 kHz that the model hears, as a PNG."""
    from matplotlib.figure import Figure

    waveform = clip.waveform.numpy()
    frames = np.lib.stride_tricks.sliding_window_view(waveform, _WINDOW)[::_HOP] * np.hanning(_WINDOW)
    level = 10 * np.log10(np.abs(np.fft.rfft(frames)).T ** 2 + 1e-12)
    figure = Figure(figsize=(6.4, 1.9), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(
        level,
        aspect="auto",
        origin="lower",
        cmap="magma",
        extent=(0, clip.seconds, 0, SAMPLING_RATE / 2000),
        vmin=level.max() - _RANGE_DB,
        interpolation="bilinear",
    )
    axes.set_xlabel("seconds")
    axes.set_ylabel("kHz")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def as_data_url(png: bytes) -> str:
    """A picture that lies in no file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"

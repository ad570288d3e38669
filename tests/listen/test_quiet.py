"""How loud a window is, against FFmpeg's measure of the same."""

import math

import numpy as np
import pytest

from mergekit_bio.audio.clip import Clip
from mergekit_bio.errors import AudioError
from mergekit_bio.listen.quiet import check_level, is_quiet, loudest

RATE = 16_000


def clip(samples: np.ndarray) -> Clip:
    made = Clip.from_samples(samples, sampling_rate=RATE)
    return Clip(made.waveform, start=0.0, end=len(samples) / RATE)


def ffmpegs_rms_peak(samples: np.ndarray) -> float:
    """The filter astats' "RMS peak" over windows of 50 ms, which move smoothly over the samples."""
    import av

    graph = av.filter.Graph()
    source = graph.add_abuffer(format="flt", sample_rate=RATE, layout="mono", time_base=None)
    stats = graph.add("astats", "metadata=1:length=0.05:measure_perchannel=RMS_peak:measure_overall=none")
    sink = graph.add("abuffersink")
    source.link_to(stats)
    stats.link_to(sink)
    graph.configure()
    frame = av.AudioFrame.from_ndarray(samples.astype(np.float32)[None], format="flt", layout="mono")
    frame.sample_rate = RATE
    source.push(frame)
    return float(sink.pull().metadata["lavfi.astats.1.RMS_peak"])


@pytest.mark.parametrize("level", [-20.0, -55.0])
def test_the_level_is_that_of_the_loudest_moment(level: float) -> None:
    random = np.random.default_rng(0)
    samples = random.normal(0, 1e-4, 10 * RATE)
    seconds = np.arange(RATE // 4) / RATE
    samples[5 * RATE :][: len(seconds)] += np.sqrt(2) * 10 ** (level / 20) * np.sin(2 * np.pi * 3000 * seconds)

    assert loudest(clip(samples)) == pytest.approx(level, abs=0.3)
    assert loudest(clip(samples)) == pytest.approx(ffmpegs_rms_peak(samples), abs=0.7)


def test_an_offset_is_silence() -> None:
    assert loudest(clip(np.full(RATE, 0.25))) == -math.inf
    assert loudest(clip(np.zeros(RATE))) == -math.inf


def test_what_lies_behind_a_short_recording_does_not_count() -> None:
    assert loudest(clip(np.tile([0.1, -0.1], RATE // 4))) == pytest.approx(-20)


def test_a_window_is_quiet_below_the_level_only() -> None:
    quiet = clip(np.tile([0.001, -0.001], RATE))

    assert is_quiet(quiet, -59.9) and not is_quiet(quiet, -60.1) and not is_quiet(quiet, None)


@pytest.mark.parametrize("level", [0, 60, math.nan, -1000])
def test_a_level_that_makes_no_sense_is_refused(level: float) -> None:
    with pytest.raises(AudioError, match="such as -60"):
        check_level(level)

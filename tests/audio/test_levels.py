"""What is odd about a recording's levels is said once, and only where it is odd."""

from pathlib import Path

import numpy as np
import pytest
import soundfile

from mergekit_bio.audio.recording import read_samples, read_windows

RATE = 8000
NOISE = np.random.default_rng(0).normal(0, 0.1, (25 * RATE, 4)).clip(-1, 1)
CHOOSE = "--channel {0} hears the strongest alone (in a recipe: channel: {0})"


@pytest.fixture
def notes(tmp_path: Path):
    """What is said of samples, by who hears all of them and by who hears ten seconds."""

    def of(samples: np.ndarray, **options: int) -> list[str]:
        path = tmp_path / "a.wav"
        soundfile.write(path, samples, RATE, subtype="FLOAT")
        whole: list[str] = []
        beginning: list[str] = []
        for _ in read_windows(path, note=whole.append, **options):
            pass
        read_samples(path, seconds=10, note=beginning.append, **options)
        assert whole == beginning
        return [note.removeprefix(f"{path}: ") for note in whole]

    return of


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_of_an_ordinary_recording_nothing_is_said(notes, channels: int) -> None:
    assert notes(NOISE[:, :channels]) == []
    assert notes(np.repeat(NOISE[:, :1], channels, axis=1)) == []
    assert notes(NOISE[:, :channels] * 1.9) == []  # an overshoot, up to twice full scale


def test_samples_far_above_full_scale_are_clipped_and_named(notes) -> None:
    samples = NOISE[:, :2].copy()
    samples[100] = -30_000
    assert notes(samples) == ["its samples reach 3e+04 times full scale and are clipped; divide them by that first"]


def test_channels_of_opposite_phase_are_named(notes) -> None:
    samples = np.stack([NOISE[:, 0], -1.001 * NOISE[:, 0]], axis=1) + 0.01
    said = "its channels cancel each other out (opposite phase): their mean is next to silence; "
    assert notes(samples) == [said + CHOOSE.format(2)]
    assert notes(samples, channel=1) == []


def test_dead_channels_are_named(notes) -> None:
    samples = NOISE * [1, 1, 1.5, 1]
    samples[:, 1] = 0.02  # an offset is no sound
    samples[:, 3] = 0
    said = "channels 2, 4 are silent, so that the mean is weaker than what was recorded; "
    assert notes(samples) == [said + CHOOSE.format(3)]
    assert notes(samples[:, :2]) == [said.replace("channels 2, 4 are", "channel 2 is") + CHOOSE.format(1)]
    assert notes(samples, channel=3) == []


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_an_offset_alone_is_not_said_to_be_of_opposite_phase(notes, value: float) -> None:
    assert notes(np.full((11 * RATE, 1), value)) == []


def test_silence_is_named(notes) -> None:
    assert notes(np.zeros((11 * RATE, 2))) == ["it holds nothing but silence"]
    samples = NOISE[:, :2].copy()
    samples[:, 1] = 0
    assert notes(samples, channel=2) == ["it holds nothing but silence"]

import numpy as np
import pytest
import resampy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mergekit_bio.audio import waveform
from mergekit_bio.audio.waveform import prepare, resample, resample_blocks
from mergekit_bio.errors import AudioError


def decibels(error: torch.Tensor, signal: torch.Tensor) -> float:
    return float(20 * torch.log10(error.norm() / signal.norm()))


def noise(rate: int) -> np.ndarray:
    return np.random.default_rng(rate).standard_normal(2 * rate + 7)


def sweep(rate: int) -> np.ndarray:
    """Every frequency up to Nyquist, in two seconds."""
    time = np.arange(2 * rate) / rate
    return np.sin(2 * np.pi * (rate / 2) * time**2 / 4)


@pytest.mark.parametrize("signal", [noise, sweep])
@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000])
def test_resampling_is_the_references_to_120_decibels(rate: int, signal: object) -> None:
    samples = signal(rate)
    expected = torch.from_numpy(resampy.resample(samples, rate, 16_000))  # its default is kaiser_best

    resampled = resample(torch.from_numpy(samples), sampling_rate=rate)

    assert resampled.shape == expected.shape
    assert decibels(resampled - expected, expected) < -120


@pytest.mark.parametrize("rate", [8000, 24_000, 32_000, 48_000, 96_000, 192_000, 384_000, 500_000])
def test_how_many_samples_a_step_takes_changes_no_sample(rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = torch.rand(rate // 2 + 7, dtype=torch.float64, generator=torch.Generator().manual_seed(rate)) - 0.5

    resampled = resample(samples, sampling_rate=rate)
    monkeypatch.setattr(waveform, "_LEAST_STEP", (1, 1))
    block_by_block = resample(samples, sampling_rate=rate)

    assert (resampled - block_by_block).abs().max() <= 1e-14


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30_000), min_size=1, max_size=6), st.sampled_from([8000, 22_050, 44_100, 96_000]))
def test_a_stream_resamples_as_the_whole_does(sizes: list[int], rate: int) -> None:
    samples = torch.randn(sum(sizes), dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    streamed = torch.cat(list(resample_blocks(samples.split(sizes), sampling_rate=rate)))
    whole = resample(samples, sampling_rate=rate)

    assert streamed.shape == whole.shape
    assert torch.allclose(streamed, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rate", [101, 7999, 15_999, 44_101, 1_999_993])
def test_rates_without_a_common_factor_keep_time_and_pitch(rate: int) -> None:
    tone = min(rate, 16_000) // 8
    samples = torch.sin(2 * torch.pi * tone * torch.arange(rate, dtype=torch.float64) / rate)

    resampled = resample(samples, sampling_rate=rate)

    assert resampled.numel() == pytest.approx(16_000, rel=2e-4)
    spectrum = torch.fft.rfft(resampled, n=16_000).abs() / 8000
    assert spectrum.argmax() == tone
    assert spectrum.max() == pytest.approx(1, abs=0.05)


def test_mono_is_the_mean_over_the_smaller_axis() -> None:
    stereo = torch.randn(2, 16_000, dtype=torch.float64).clamp(-1, 1)

    expected = torch.nn.functional.pad(stereo.mean(0), (0, 144_000))
    assert prepare(stereo).equal(expected)
    assert prepare(stereo.T).equal(expected)


def test_cuts_pads_and_clamps_after_resampling() -> None:
    square = torch.sign(torch.sin(torch.arange(44_100 * 11, dtype=torch.float64) / 7))

    clip = prepare(square, sampling_rate=44_100)

    assert clip.shape == (160_000,)
    assert clip.dtype == torch.float64
    assert clip.abs().max() == 1  # the overshoot of the filter, clamped
    assert prepare(square[:44_100], sampling_rate=44_100)[16_000:].abs().max() == 0


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (torch.zeros(0), 16_000, "no samples"),
        (torch.zeros(7999), 16_000, "too short"),
        (torch.full((16_000,), float("nan")), 16_000, "NaN"),
        (torch.full((16_000,), float("inf")), 16_000, "NaN or infinity"),
        (torch.zeros(16_000, dtype=torch.int16), 16_000, "int16"),
        (torch.zeros(16_000), 0, "0 Hz"),
        (torch.zeros(16_000), 1_000_000_000, "1000000000 Hz"),
        (torch.zeros(64, 16_000), 16_000, "64 channels"),
        (torch.zeros(2, 2, 16_000), 16_000, "shape"),
    ],
)
def test_refuses_what_is_no_use(samples: torch.Tensor, rate: int, message: str) -> None:
    with pytest.raises(AudioError, match=message):
        prepare(samples, sampling_rate=rate)


def test_reproduces_the_references_processor(golden) -> None:
    vectors = load_file(golden / "vectors.safetensors")

    clip = prepare(vectors["processor_in_44100_stereo"].double(), sampling_rate=44_100)

    # 1e-6 of full scale, or -120 dB: resampy's table is interpolated, ours is the formula.
    expected = vectors["processor_out_head"].double()
    assert (clip[: len(expected)] - expected).abs().max() < 1e-6
    assert not clip[11_200:].any()

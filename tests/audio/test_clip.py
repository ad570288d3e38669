"""A clip is as long as it says, whatever recording it is of, and its prefix is that of its own length."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from audio.eager import EagerTower
from safetensors.torch import load_file

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.audio.recording import read_clip
from mergekit_bio.engine.prefix_cache import PrefixCache
from mergekit_bio.errors import AudioError

TOKENS = {3: 8, 5: 14, 10: 29}


@pytest.fixture(scope="module")
def tower(golden: Path) -> AudioPrefix:
    return AudioPrefix.from_pretrained(golden / "naturelm-tiny")


@pytest.fixture(scope="module")
def eager(golden: Path) -> EagerTower:
    return EagerTower(golden / "naturelm-tiny")


def recording(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, round(seconds * 16_000))


def padded(samples: np.ndarray, seconds: float) -> np.ndarray:
    """By hand: cut, or followed by silence."""
    samples = samples[: round(seconds * 16_000)]
    return np.concatenate((samples, np.zeros(round(seconds * 16_000) - len(samples))))


@pytest.mark.parametrize("seconds", [0.5, 3, 5, 7.25, 10])
@pytest.mark.parametrize("recorded", [0.5, 3, 12])
def test_a_recording_is_cut_and_padded_to_the_clips_length(seconds: float, recorded: float) -> None:
    samples = recording(recorded)

    clip = Clip.from_samples(samples, sampling_rate=16_000, seconds=seconds)

    assert clip.seconds == seconds
    assert np.array_equal(clip.waveform.numpy(), padded(samples, seconds))


def test_a_clip_is_ten_seconds_long_unless_its_caller_says_otherwise(tmp_path: Path) -> None:
    import soundfile

    soundfile.write(tmp_path / "short.wav", recording(3), 16_000, subtype="DOUBLE")
    for clip in (Clip.from_samples(recording(3), sampling_rate=16_000), read_clip(tmp_path / "short.wav")):
        assert clip.seconds == 10
        assert np.array_equal(clip.waveform.numpy(), padded(recording(3), 10))


@pytest.mark.parametrize("seconds", [0, -3, 0.49, 10.01, math.inf, math.nan])
def test_a_length_that_no_clip_has_is_refused(seconds: float) -> None:
    with pytest.raises(AudioError, match=r"a clip of \S+ s is outside 0\.5 to 10 s"):
        Clip.from_samples(recording(3), sampling_rate=16_000, seconds=seconds)


def test_a_waveform_of_another_length_is_no_clip() -> None:
    with pytest.raises(ValueError, match="a clip of 10 s has not the shape"):
        Clip(torch.zeros(48_000))


def test_the_oracle_is_the_reference(eager: EagerTower, golden: Path) -> None:
    """For 10 s there are the reference's own tensors."""
    vectors = load_file(golden / "vectors.safetensors")

    for waveform, expected in zip(vectors["raw_wav"], vectors["prefix_f64in"], strict=True):
        assert (eager(waveform.double().numpy()) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("seconds", TOKENS)
@pytest.mark.parametrize("recorded", [1, 12])
def test_prefixes_of_every_length_are_the_plain_towers(
    tower: AudioPrefix, eager: EagerTower, seconds: int, recorded: float
) -> None:
    samples = recording(recorded, seed=1)

    (prefix,) = PrefixCache(tower)([Clip.from_samples(samples, sampling_rate=16_000, seconds=seconds)])

    assert len(prefix) == TOKENS[seconds]
    assert (prefix - eager(padded(samples, seconds))).abs().max() < 2e-5


def test_clips_of_several_lengths_are_encoded_together_each_at_its_own(tower: AudioPrefix, eager: EagerTower) -> None:
    lengths = [3, 10, 5, 3, 10, 3]
    clips = [
        Clip.from_samples(recording(4, seed=n), sampling_rate=16_000, seconds=seconds)
        for n, seconds in enumerate(lengths)
    ]

    with torch.no_grad():
        prefixes = tower.embed([tower.features(clip.waveform[None])[0] for clip in clips], at_most=2)

    for n, (seconds, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
        assert (prefix - eager(padded(recording(4, seed=n), seconds))).abs().max() < 2e-5


def test_the_prefix_of_three_seconds_is_not_the_beginning_of_that_of_ten(tower: AudioPrefix) -> None:
    """BEATs hears the silence at the end of the longer one."""
    short, long = (Clip.from_samples(recording(3), sampling_rate=16_000, seconds=seconds) for seconds in (3, 10))

    eight, all_of_them = PrefixCache(tower)([short, long])

    assert (eight - all_of_them[:8]).abs().max() > 1e-2


def test_the_cache_tells_the_lengths_of_one_recording_apart(tower: AudioPrefix, tmp_path: Path) -> None:
    clips = [Clip.from_samples(recording(2), sampling_rate=16_000, seconds=seconds) for seconds in (3, 10, 5, 3)]
    assert len({clip.digest for clip in clips}) == 3
    cache = PrefixCache(tower, folder=tmp_path, batch_size=4)

    prefixes = cache(clips)

    assert cache.encoded == 3
    cache.flush()
    later = PrefixCache(tower, folder=tmp_path)  # from the disk
    for again in (cache(clips), later(clips)):
        assert [len(prefix) for prefix in again] == [8, 29, 14, 8]
        assert all(torch.equal(*pair) for pair in zip(again, prefixes, strict=True))
    assert (cache.encoded, later.encoded) == (3, 0)


def test_a_clip_is_decoded_once_and_when_its_samples_are_asked_for() -> None:
    whole = Clip.from_samples(recording(5), sampling_rate=16_000, seconds=5)
    decoded = []

    def decode() -> torch.Tensor:
        decoded.append(1)
        return whole.waveform

    clip = Clip(decode, 5, end=5, digest=whole.digest)
    assert (clip.seconds, clip.samples, clip.digest, decoded) == (5, 80_000, whole.digest, [])
    assert torch.equal(clip.waveform, whole.waveform) and torch.equal(clip.waveform, whole.waveform)
    assert decoded == [1]
    assert Clip(decode, 5, end=5).digest == whole.digest
    with pytest.raises(ValueError, match="a clip of 10 s has not the shape"):
        _ = Clip(decode).waveform

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from mergekit_bio.audio.recording import find_recordings, read_clip, read_windows
from mergekit_bio.audio.waveform import prepare
from mergekit_bio.errors import AudioError


def tone(seconds: float, rate: int = 16_000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate)) / rate)


def spans(path: Path, **options: float) -> list[tuple[float, float]]:
    return [(round(w.start, 3), round(w.end, 3)) for w in read_windows(path, **options)]


@pytest.fixture
def recording(tmp_path: Path):
    def write(samples: np.ndarray, rate: int = 16_000, name: str = "clip.wav", **options: str) -> Path:
        soundfile.write(tmp_path / name, samples, rate, **options)
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.5, [(0, 0.5)]),
        (7, [(0, 7)]),
        (10, [(0, 10)]),
        (19, [(0, 10), (10, 19)]),
        (20, [(0, 10), (10, 20)]),
        (20.3, [(0, 10), (10, 20), (10.3, 20.3)]),
        (31, [(0, 10), (10, 20), (20, 30), (30, 31)]),
    ],
)
def test_windows_cover_a_recording_to_its_end(recording, seconds: float, expected: list) -> None:
    assert spans(recording(tone(seconds))) == expected


@pytest.mark.parametrize(
    ("window", "hop", "expected"),
    [
        (10, 5, [(0, 10), (5, 15), (10, 20)]),
        (4, 8, [(0, 4), (8, 12), (16, 20)]),
        (4, 9, [(0, 4), (9, 13), (18, 20)]),
        (3, 17, [(0, 3), (17, 20)]),
        (5, None, [(0, 5), (5, 10), (10, 15), (15, 20)]),
    ],
)
def test_window_and_hop(recording, window: float, hop: float | None, expected: list) -> None:
    assert spans(recording(tone(20)), window=window, hop=hop) == expected


@pytest.mark.parametrize("rate", [16_000, 22_050, 44_100])
def test_a_window_of_a_long_recording_is_that_stretch_of_the_whole(recording, rate: int) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 25 * rate)
    path = recording(samples, rate, subtype="DOUBLE")
    from mergekit_bio.audio.waveform import resample

    whole = resample(torch.from_numpy(samples), sampling_rate=rate)
    for window in read_windows(path, hop=7.5):
        start, end = round(window.start * 16_000), round(window.end * 16_000)
        assert torch.allclose(window.waveform[: end - start], whole[start:end].clamp(-1, 1), atol=1e-12, rtol=0)
        assert not window.waveform[end - start :].any()


@pytest.mark.parametrize(
    ("name", "tolerance"), [("a.wav", 4e-5), ("a.flac", 4e-5), ("a.ogg", 0.1), ("a.mp3", 0.1), ("without_suffix", 4e-5)]
)
def test_decodes_the_usual_formats_by_content(recording, tmp_path: Path, name: str, tolerance: float) -> None:
    samples = np.stack([tone(2, 44_100), 0.5 * tone(2, 44_100)], axis=1)
    written = recording(samples, 44_100, name if "." in name else "a.wav")
    path = written.rename(tmp_path / name)

    expected = prepare(samples, sampling_rate=44_100)
    inner = slice(2000, 28_000)  # lossy codecs ring at the edges
    assert (read_clip(path).waveform[inner] - expected[inner]).abs().max() < tolerance


def test_three_hours_are_read_in_the_memory_of_a_few_windows(recording) -> None:
    hours = 3
    silence = np.zeros(2000 * 3600 * hours, dtype=np.int16)
    path = recording(silence, 2000, "long.flac")
    del silence
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count = sum(1 for _ in read_windows(path))

    assert count == hours * 360
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB; the whole is 1.4 GB at 16 kHz


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (np.zeros(0), 16_000, "no samples"),
        (tone(0.4), 16_000, "0.40 s is too short"),
        (np.full(16_000, np.nan), 16_000, "NaN"),
        (np.zeros((16_000, 64)), 16_000, "64 channels"),
        (tone(1), 1_000_000_000, "1000000000 Hz"),
    ],
)
def test_a_recording_of_no_use_is_named_with_the_reason(recording, samples, rate: int, message: str) -> None:
    path = recording(samples, rate, subtype="FLOAT")

    with pytest.raises(AudioError, match=message) as error:
        list(read_windows(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_nan_deep_inside_a_recording_is_found_and_placed(recording) -> None:
    samples = tone(25)
    samples[-100] = np.nan

    with pytest.raises(AudioError, match=r"NaN or infinity after 20\.0 s"):
        list(read_windows(recording(samples, subtype="FLOAT")))


def test_a_rate_of_0_hz_is_refused(recording) -> None:
    path = recording(tone(1))
    raw = bytearray(path.read_bytes())
    raw[24:28] = bytes(4)  # the WAV header's rate
    path.write_bytes(raw)

    with pytest.raises(AudioError, match=r"clip\.wav"):
        list(read_windows(path))


@pytest.mark.parametrize("content", [b"", b"This is no audio.\n" * 100, b"RIFF\x24\x00\x00\x00WAVE", b"\0" * 5000])
@pytest.mark.parametrize("name", ["text.wav", "text.mp3", "text.raw", "text"])
def test_what_is_not_audio_is_refused(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(AudioError, match=rf"{name}: cannot be decoded as audio \([A-Z]\D+\)"):
        list(read_windows(path))


@pytest.mark.parametrize(("window", "hop"), [(0.4, None), (10.5, None), (float("nan"), None), (10, 0), (10, -1)])
def test_impossible_windows_are_refused(recording, window: float, hop: float | None) -> None:
    with pytest.raises(AudioError, match="window"):
        list(read_windows(recording(tone(1)), window=window, hop=hop))


def test_finds_recordings_below_folders_and_keeps_named_files(recording, tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    names = ["b/2.FLAC", "b/deep/1.wav", "b/notes.txt", "odd.name"]
    for name in names:
        (tmp_path / name).touch()

    found = find_recordings([tmp_path / "odd.name", tmp_path / "b"])

    assert found == [tmp_path / "odd.name", tmp_path / "b/2.FLAC", tmp_path / "b/deep/1.wav"]


def test_an_empty_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="no recordings"):
        find_recordings([tmp_path])
    with pytest.raises(AudioError, match=r"gone\.wav: no such file"):
        find_recordings([tmp_path / "gone.wav"])

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mergekit_bio.audio import recording as recordings
from mergekit_bio.audio.decoding import Block
from mergekit_bio.audio.recording import read_clip, read_parts, read_windows
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
        (10.001, [(0, 10)]),
        (20.49, [(0, 10), (10, 20)]),
        (20.5, [(0, 10), (10, 20), (20, 20.5)]),
        (31, [(0, 10), (10, 20), (20, 30), (30, 31)]),
    ],
)
def test_windows_cover_a_recording_to_its_last_half_second(recording, seconds: float, expected: list) -> None:
    assert spans(recording(tone(seconds))) == expected


def test_how_much_was_heard_is_known_to_the_sample(recording) -> None:
    windows = read_windows(recording(np.stack([tone(20.3, 44_100)] * 2, axis=1), 44_100))
    assert (windows.sampling_rate, windows.seconds) == (0, 0)
    next(windows)
    assert (windows.sampling_rate, windows.channels) == (44_100, 2)
    list(windows)
    assert windows.seconds == pytest.approx(20.3, abs=1e-9)


@pytest.mark.parametrize(
    ("window", "hop", "expected"),
    [
        (10, 5, [(0, 10), (5, 15), (10, 20)]),
        (4, 8, [(0, 4), (8, 12), (16, 20)]),
        (4, 9, [(0, 4), (9, 13), (18, 20)]),
        (3, 17, [(0, 3), (17, 20)]),
        (10, 3.3, [(0, 10), (3.3, 13.3), (6.6, 16.6), (9.9, 19.9)]),
        (4, 7.8, [(0, 4), (7.8, 11.8), (15.6, 19.6)]),
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

    list(read_windows(recording(np.zeros(60_000), 2000, "short.flac")))  # what the libraries take themselves
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

    with pytest.raises(AudioError, match=r"breaks after 24\.99 s: holds NaN or infinity"):
        list(read_windows(recording(samples, subtype="FLOAT")))


@pytest.mark.parametrize(
    ("breaks", "expected"),
    [(25, [(0, 10), (10, 20), (20, 25)]), (20.3, [(0, 10), (10, 20)]), (0.6, [(0, 0.6)]), (0.3, [])],
)
def test_what_lies_before_a_break_is_heard_as_if_the_recording_ended_there(recording, breaks, expected) -> None:
    samples = tone(34)
    path = recording(samples[: round(breaks * 16_000)], name="whole.wav", subtype="FLOAT")
    samples[round(breaks * 16_000)] = np.inf
    windows, heard = read_windows(recording(samples, subtype="FLOAT")), []

    with pytest.raises(AudioError, match=rf"clip\.wav: breaks after {breaks:.2f} s: holds NaN or infinity"):
        for window in windows:
            heard.append(window)

    assert [(window.start, window.end) for window in heard] == expected
    assert windows.seconds == pytest.approx(breaks)
    if heard:
        assert all(map(torch.equal, (w.waveform for w in heard), (w.waveform for w in read_windows(path))))


def test_a_rate_of_0_hz_is_refused(recording) -> None:
    path = recording(tone(1))
    raw = bytearray(path.read_bytes())
    raw[24:28] = bytes(4)  # the WAV header's rate
    path.write_bytes(raw)

    with pytest.raises(AudioError, match=r"clip\.wav"):
        list(read_windows(path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"This is no audio.\n" * 100, "text"),
        ("Wren\n".encode("utf-16"), "text"),
        (b"\0" * 5000, "nothing but zeros"),
        (b"\n<!DOCTYPE html>\n<html><body>Please log in", "an HTML page: the download failed"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", "a Git LFS pointer.*git lfs pull"),
        (b"/annex/objects/SHA256E-s1--a.wav\n", "a git-annex pointer.*git annex get"),
        (b"#EXTM3U\nhttp://127.0.0.1:9/a.mp3\n", "a playlist"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "an image"),
        (b"\0\0\0\x18ftypheic" + bytes(99), "an image"),
        (b"%PDF-1.7\n\xff", "a PDF document"),
        (b"PK\x03\x04" + bytes(range(200)), "a ZIP archive: unpack it"),
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "what macOS keeps beside a file"),
    ],
)
@pytest.mark.parametrize("name", ["file.wav", "file.mp3", "file"])
def test_a_file_that_is_no_recording_says_what_it_is(tmp_path: Path, content: bytes, said: str, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(AudioError, match=rf"{name}: cannot be decoded as audio: it is {said}") as error:
        list(read_windows(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"RIFF\x24\x00\x00\x00WAVE", b"OggS" + bytes(99), b"fLaC" + bytes(99), b"ID3\x04" + bytes(99), b"\x80\x07"],
)
@pytest.mark.parametrize("name", ["file.wav", "file.raw", "file.txt"])
def test_half_a_header_is_refused_in_one_line(tmp_path: Path, content: bytes, name: str, capfd) -> None:
    path = tmp_path / name
    path.write_bytes(content)

    with pytest.raises(AudioError, match=rf"{name}: cannot be decoded as audio \(.+\)") as error:
        list(read_windows(path))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # the libraries' own lines, that name no file


@pytest.mark.parametrize(("window", "hop"), [(0.4, None), (10.5, None), (float("nan"), None), (10, 0), (10, -1)])
def test_impossible_windows_are_refused(recording, window: float, hop: float | None) -> None:
    with pytest.raises(AudioError, match="window"):
        list(read_windows(recording(tone(1)), window=window, hop=hop))


@pytest.mark.parametrize(("form", "most"), [("WAV", 3 * 20), ("FLAC", 400)])
def test_of_parts_far_apart_no_more_is_decoded_than_the_format_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, most: int
) -> None:
    rate, seconds = 1000, 2000
    samples = np.random.default_rng(0).integers(-9999, 9999, rate * seconds).astype("<i2")
    soundfile.write(tmp_path / "a", samples, rate, format=form)
    decoded = 0.0
    decode = recordings.decode

    def counted(*arguments: Any, **named: Any) -> Iterator[Block]:
        nonlocal decoded
        for block in decode(*arguments, **named):
            decoded += len(block.samples) / block.rate
            yield block

    monkeypatch.setattr(recordings, "decode", counted)
    parts = [(100.2, 5.0), (104.1, 0.25), (300.5, 10.0), (390.0, 10.0)]
    heard = [part for part in read_parts(tmp_path / "a", parts) if not isinstance(part, AudioError)]

    assert decoded <= most
    for (start, length), (part, _) in zip(parts, heard, strict=True):
        expected = samples[round(start * rate) : round((start + length) * rate)] / 2**15
        assert np.array_equal(part, expected)


def test_of_parts_of_a_recording_that_breaks_those_before_are_heard(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 30_000)
    samples[20_000] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, 1000, subtype="FLOAT")
    notes: list[str] = []

    first, shorter, *lost = read_parts(tmp_path / "a.wav", [(1, 5), (15, 10), (20.5, 2), (25, 2)], note=notes.append)

    assert not isinstance(first, AudioError) and len(first[0]) == 5000
    assert not isinstance(shorter, AudioError) and len(shorter[0]) == 5000
    assert [str(error) for error in lost] == [f"{tmp_path / 'a.wav'}: breaks after 20.00 s: holds NaN or infinity"] * 2
    assert any("what comes before is heard" in note for note in notes)

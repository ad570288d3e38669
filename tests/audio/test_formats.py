"""Recordings as ffmpeg writes them, in every format at hand: what is heard is what ffmpeg decodes."""

import random
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.decoding import decode, stated_length
from mergekit_bio.audio.recording import read_clip, read_clips, read_parts, read_samples, read_windows
from mergekit_bio.errors import AudioError
from mergekit_bio.listen.reading import OpenRecording, windows_of

if not shutil.which("ffmpeg"):
    pytest.skip("ffmpeg is not installed: no recordings in its formats can be made", allow_module_level=True)

RATES = (8000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 64_000, 96_000, 192_000, 384_000)
SECONDS = 1.3

#: File -> rate, channels and what ffmpeg is told; decoded without a loss that could differ.
EXACT: dict[str, tuple[int, int, str]] = {
    **{f"{rate}.wav": (rate, 1, "-c:a pcm_s16le") for rate in RATES},
    **{
        f"{codec}.wav": (44_100, 2, f"-c:a {codec}")
        for codec in (
            "pcm_u8",
            "pcm_s24le",
            "pcm_s32le",
            "pcm_f32le",
            "pcm_f64le",
            "pcm_alaw",
            "pcm_mulaw",
        )
    },
    "bwf.wav": (48_000, 1, "-c:a pcm_s24le -write_bext 1 -metadata description=Wren -metadata originator=recorder"),
    "rf64.wav": (48_000, 2, "-c:a pcm_s16le -rf64 always"),
    "guano.wav": (384_000, 1, "-c:a pcm_s16le"),
    "four.wav": (48_000, 4, "-c:a pcm_s16le"),
    "sixteen.wav": (48_000, 16, "-c:a pcm_s24le"),
    "a.w64": (44_100, 2, "-c:a pcm_s16le"),
    "a.aiff": (44_100, 2, "-c:a pcm_s24be"),
    "a.au": (44_100, 1, "-c:a pcm_s16be"),
    "a.caf": (96_000, 2, "-c:a pcm_s24le"),
    "alac.caf": (44_100, 2, "-c:a alac"),
    "16.flac": (44_100, 2, "-c:a flac"),
    "24.flac": (384_000, 1, "-c:a flac -sample_fmt s32"),
    "four.flac": (48_000, 4, "-c:a flac"),
    "ogg_flac.ogg": (44_100, 2, "-c:a flac"),
    "a.wv": (44_100, 2, "-c:a wavpack"),
    "a.tta": (44_100, 2, "-c:a tta"),
    "alac.m4a": (44_100, 2, "-c:a alac"),
    "pcm.mov": (48_000, 2, "-c:a pcm_s16le"),
    "flac.mkv": (48_000, 2, "-c:a flac"),
    "a.voc": (8000, 1, "-c:a pcm_u8"),
    "a.sox": (44_100, 2, "-c:a pcm_s32le"),
    "adpcm_ms.wav": (22_050, 1, "-c:a adpcm_ms"),
    "g722.wav": (16_000, 1, "-c:a g722"),
    "g726.wav": (8000, 1, "-c:a g726"),
}
#: And of lossy formats, whose decoders round differently.
LOSSY: dict[str, tuple[int, int, str]] = {
    "adpcm_ima.wav": (44_100, 2, "-c:a adpcm_ima_wav"),
    "cbr.mp3": (44_100, 2, "-c:a libmp3lame -b:a 128k"),
    "vbr.mp3": (48_000, 1, "-c:a libmp3lame -q:a 4"),
    "low.mp3": (8000, 1, "-c:a libmp3lame -b:a 16k"),
    "bare.mp3": (22_050, 1, "-c:a libmp3lame -write_xing 0 -id3v2_version 0"),
    "in_wav.wav": (44_100, 1, "-c:a libmp3lame"),
    "a.mp2": (44_100, 2, "-c:a mp2"),
    "a.m4a": (44_100, 2, "-c:a aac"),
    "a.aac": (32_000, 1, "-c:a aac"),
    "a.mp4": (48_000, 2, "-c:a aac"),
    "a.3gp": (16_000, 1, "-c:a aac"),
    "a.ac3": (48_000, 2, "-c:a ac3"),
    "a.wma": (44_100, 2, "-c:a wmav2"),
    "a.webm": (48_000, 2, "-c:a libopus"),
    "vorbis.webm": (44_100, 2, "-c:a libvorbis"),
    "a.opus": (48_000, 1, "-c:a libopus"),
    "a.ogg": (44_100, 2, "-c:a libvorbis"),
    "a.spx": (16_000, 1, "-c:a libspeex"),
    "a.avi": (44_100, 2, "-c:a libmp3lame"),
    "a.ts": (48_000, 2, "-c:a mp2"),
    "a.flv": (44_100, 2, "-c:a aac"),
}
#: Those whose headers say nothing of their length.
LENGTHLESS = {"a.voc", "a.aac", "a.ac3", "a.ts"}
#: Where libsndfile and ffmpeg round a step of the codec differently.
STEPS = {"adpcm_ima.wav": 2e-3}
FILES = EXACT | LOSSY


def ffmpeg(*arguments: object) -> str:
    done = subprocess.run(
        ["ffmpeg", "-hide_banner", "-nostdin", "-y", *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files that this ffmpeg has an encoder for, each beside what it decodes of them (.f64)."""
    root = tmp_path_factory.mktemp("formats")
    encoders = {words[1] for line in ffmpeg("-encoders").splitlines() if len(words := line.split()) > 1}
    files = {name: made for name, made in FILES.items() if made[2].split()[1] in encoders}
    # 1. What was recorded: chirps with noise, another one in each channel.
    sources = list(dict.fromkeys(made[:2] for made in files.values()))
    for rate, channels in sources:
        time = np.arange(round(SECONDS * rate)) / rate
        noise = np.random.default_rng(rate + channels).normal(0, 0.02, (len(time), channels))
        chirps = [0.4 * np.sin(2 * np.pi * (300 + 90 * n + 500 * time) * time) for n in range(channels)]
        (np.stack(chirps, axis=1) + noise).astype("<f8").tofile(root / f"{rate}_{channels}.source")
    # 2. In every format, and decoded; both in one go.
    inputs = [
        ("-f", "f64le", "-ar", rate, "-ac", channels, "-i", root / f"{rate}_{channels}.source")
        for rate, channels in sources
    ]
    outputs = [("-map", sources.index(made[:2]), *made[2].split(), root / name) for name, made in files.items()]
    ffmpeg("-v", "error", *(word for words in (*inputs, *outputs) for word in words))
    if (root / "guano.wav").exists():
        add_chunk(root / "guano.wav", b"guan", b"GUANO|Version: 1.0\nTimestamp: 2026-05-01T21:00:00+02:00\nMake: Bat\n")
    decoded = [
        ("-map", number, "-c:a", "pcm_f64le", "-f", "f64le", root / f"{name}.f64") for number, name in enumerate(files)
    ]
    ffmpeg(
        "-v",
        "error",
        *(word for name in files for word in ("-i", root / name)),
        *(word for words in decoded for word in words),
    )
    return root


def add_chunk(path: Path, name: bytes, content: bytes) -> None:
    """Put a chunk behind the samples of a WAV file, as recorders do."""
    content += b" " * (len(content) % 2)
    whole = path.read_bytes() + name + struct.pack("<I", len(content)) + content
    path.write_bytes(whole[:4] + struct.pack("<I", len(whole) - 8) + whole[8:])


@pytest.mark.parametrize("name", FILES)
def test_a_recording_is_heard_as_ffmpeg_decodes_it(folder: Path, name: str) -> None:
    if not (folder / name).exists():
        pytest.skip(f"this ffmpeg cannot write {name}")
    rate, channels, _ = FILES[name]
    notes: list[str] = []

    samples, heard_rate = read_samples(folder / name, seconds=60, note=notes.append)

    expected = np.fromfile(folder / f"{name}.f64").reshape(-1, channels).mean(axis=1)
    heard = samples if samples.ndim == 1 else samples.mean(axis=1)
    assert heard_rate == rate and heard.shape == expected.shape
    assert np.abs(heard - expected).max() <= (0 if name in EXACT else STEPS.get(name, 2e-6))
    assert not notes
    stated = 0 if name in LENGTHLESS else len(expected) / rate
    assert stated_length(folder / name) == (rate, pytest.approx(stated, abs=0.25))  # an mp3's padding counts


@pytest.mark.parametrize("name", ["384000.wav", "sixteen.wav", "24.flac", "cbr.mp3", "a.m4a", "a.ogg", "a.webm"])
@pytest.mark.parametrize("suffix", ["", ".wave", ".m4a", ".txt", ".WAV"])
def test_a_recording_is_known_by_its_content_whatever_its_name(
    folder: Path, tmp_path: Path, name: str, suffix: str
) -> None:
    path = tmp_path / f"a colon: and a | in it{suffix}"
    path.symlink_to(folder / name)
    assert all(map(np.array_equal, read_samples(path, seconds=60), read_samples(folder / name, seconds=60)))


@pytest.mark.parametrize("name", ["four.wav", "four.flac", "sixteen.wav"])
def test_a_channel_is_heard_alone(folder: Path, name: str) -> None:
    every = np.fromfile(folder / f"{name}.f64").reshape(-1, FILES[name][1])
    for number in (1, 3, 4):
        heard, rate = read_samples(folder / name, seconds=60, channel=number)
        assert np.array_equal(heard, every[:, number - 1])
        (window,) = read_windows(folder / name, channel=number)
        assert np.array_equal(window.waveform, Clip.from_samples(heard, sampling_rate=rate).waveform)
    with pytest.raises(AudioError, match=rf"{name}: there is no channel 17; it has {every.shape[1]}"):
        next(read_windows(folder / name, channel=17))


def test_of_seventeen_channels_one_has_to_be_named(folder: Path, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (8000, 17)).astype("<f8")
    samples.tofile(tmp_path / "source")
    source = ("-f", "f64le", "-ar", 8000, "-ac", 17, "-i", tmp_path / "source")
    ffmpeg("-v", "error", *source, "-c:a", "pcm_f64le", tmp_path / "a.wav")
    refused = r"a\.wav: 17 channels are more than the 16 that are mixed; choose one"
    with pytest.raises(AudioError, match=refused):
        read_samples(tmp_path / "a.wav", seconds=1)
    with pytest.raises(AudioError, match=refused):
        next(read_windows(tmp_path / "a.wav"))
    assert np.array_equal(read_samples(tmp_path / "a.wav", seconds=1, channel=17)[0], samples[:, 16])


@pytest.mark.parametrize("name", ["8000.wav", "16.flac", "cbr.mp3", "a.m4a", "a.ogg", "a.wma"])
def test_parts_are_those_of_the_whole_from_wherever_they_begin(folder: Path, name: str) -> None:
    whole, rate = read_samples(folder / name, seconds=60)
    parts = [(0.0, 0.5), (0.1234, 0.6), (0.2, 0.55), (0.7, 0.6)]
    for (start, seconds), clip in zip(parts, read_clips(folder / name, parts), strict=True):
        first = round(start * rate)
        expected = whole[first : round((start + seconds) * rate)]
        assert np.array_equal(read_samples(folder / name, start=start, seconds=seconds)[0], expected)
        alone = read_clip(folder / name, start=start, seconds=seconds)
        assert (clip.start, clip.end) == (alone.start, alone.end) == (start, start + len(expected) / rate)
        assert np.array_equal(clip.waveform, alone.waveform)
        assert np.array_equal(clip.waveform, Clip.from_samples(expected, sampling_rate=rate).waveform)
    for (start, seconds), part in zip(parts[1:], read_parts(folder / name, parts[1:]), strict=True):
        expected, _ = read_samples(folder / name, start=start, seconds=seconds)
        assert np.array_equal(part[0], expected) and part[1] == rate
    *clips, missing = read_parts(folder / name, [(0.1, 0.3), (0.9, 9.0), (20, 1)])
    assert [len(clip[0]) for clip in clips] == [round(0.4 * rate) - round(0.1 * rate), len(whole) - round(0.9 * rate)]
    assert "nothing in it from 20 s on" in str(missing)
    with pytest.raises(AudioError, match=rf"{name}: there is nothing .*from 20 s on"):
        read_clip(folder / name, start=20)
    with pytest.raises(AudioError, match=rf"{name}: there is nothing from 20 s on; it is 1\.[23]\d s long"):
        list(read_clips(folder / name, [(0, 1), (20, 1)]))


@pytest.mark.parametrize("name", ["8000.wav", "16.flac", "cbr.mp3", "a.m4a", "a.ogg", "a.wma"])
def test_of_windows_that_are_named_the_whole_recording_is_known_how_long_it_is(folder: Path, name: str) -> None:
    opened = OpenRecording(str(folder / name), windows=((0.2, 0.7),))
    windows = windows_of(window=10.0, hop=10.0, channel=None)(opened, pytest.fail)
    assert [(clip.start, clip.end) for clip in windows] == [(0.2, 0.7)]
    rate, channels, _ = FILES[name]
    assert windows.sampling_rate == rate
    assert windows.seconds == pytest.approx(len(np.fromfile(folder / f"{name}.f64")) / channels / rate, abs=0.1)


@pytest.mark.repeated(1, 20)
@pytest.mark.filterwarnings("error")
def test_a_damaged_recording_is_heard_in_part_or_refused_in_one_line(folder: Path, tmp_path: Path, count: int) -> None:
    generator = random.Random(0)
    for name in FILES:
        if not (folder / name).exists():
            continue
        whole = (folder / name).read_bytes()
        for _ in range(count):
            damaged = bytearray(whole)
            for _ in range(generator.choice((1, 3, 30))):  # in the header, or anywhere
                damaged[generator.randrange(generator.choice((64, len(whole))))] = generator.randrange(256)
            if generator.random() < 0.3:
                del damaged[generator.randrange(len(damaged)) :]
            (tmp_path / name).write_bytes(damaged)
            try:
                samples, rate = read_samples(tmp_path / name, seconds=10)
            except AudioError as error:
                assert str(tmp_path / name) in str(error) and "\n" not in str(error)
            else:
                assert 100 <= rate <= 2_000_000 and 0 < len(samples) <= 10 * rate and np.isfinite(samples).all()


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    picture = ("-f", "lavfi", "-i", "color=s=32x32:d=1:r=5")
    tones = [("-f", "lavfi", "-i", f"sine={hertz}:r=48000:d=1") for hertz in (440, 880)]
    ffmpeg("-v", "error", *picture, root / "silent.mp4", root / "silent.webm")
    ffmpeg("-v", "error", *picture, *tones[0], root / "sound.mp4", root / "sound.mkv")
    both = ("-map", 0, "-map", 1, "-c:a", "pcm_s16le")
    ffmpeg("-v", "error", *tones[0], *tones[1], *both, root / "tracks.mkv")
    return root


@pytest.mark.parametrize("name", ["silent.mp4", "silent.webm"])
def test_a_video_without_sound_is_called_that(videos: Path, name: str) -> None:
    with pytest.raises(AudioError, match=rf"{name}: is a video without sound"):
        next(read_windows(videos / name))


@pytest.mark.parametrize("name", ["sound.mp4", "sound.mkv", "tracks.mkv"])
def test_of_a_video_the_sound_is_heard_and_of_several_tracks_one_that_is_named(videos: Path, name: str) -> None:
    notes: list[str] = []
    heard, rate = read_samples(videos / name, seconds=9, note=notes.append)
    frequencies = np.fft.rfftfreq(len(heard), 1 / rate)
    assert frequencies[np.abs(np.fft.rfft(heard)).argmax()] == pytest.approx(440, abs=2)
    several = [f"{videos / name}: there are 2 audio tracks in it; number 1 is heard"]
    assert notes == (several if name == "tracks.mkv" else [])


@pytest.mark.parametrize("name", ["flac.mkv", "a.webm"])
def test_what_ffmpeg_calls_the_systems_error_in_a_file_that_was_cut_off_is_the_files(
    folder: Path, tmp_path: Path, name: str
) -> None:
    """ "Input/output error", say, in its header; the next time it would be the same."""
    if not (folder / name).exists():
        pytest.skip(f"this ffmpeg cannot write {name}")
    whole = (folder / name).read_bytes()
    for end in range(50, 800, 50):
        (tmp_path / name).write_bytes(whole[:end])
        with pytest.raises(AudioError) as caught:
            list(decode(tmp_path / name, note=str))
        assert caught.value.__cause__ is None

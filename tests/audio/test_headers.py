"""Recordings whose headers lie are heard to their end, and a note says so."""

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio.failing_disk import fail_reads

from mergekit_bio.audio.decoding import decode, stated_length
from mergekit_bio.audio.recording import read_clips, read_samples, read_windows
from mergekit_bio.errors import AudioError

RATE = 22_050
#: Twelve seconds and something: one window and a part of another.
SAMPLES = np.random.default_rng(0).uniform(-0.5, 0.5, 271_215)
SECONDS = len(SAMPLES) / RATE
NO_LENGTH = "its header states no length; 12.30 s are heard"


def written(path: Path, form: str, samples: np.ndarray = SAMPLES, rate: int = RATE, **options: str) -> bytes:
    """The bytes of a sound file."""
    soundfile.write(path, samples, rate, format=form, **options)
    return path.read_bytes()


def patched(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


def heard(path: Path) -> tuple[float, list[str], list[tuple[float, float]]]:
    """Seconds, notes without the path before them, and windows."""
    notes: list[str] = []
    windows = read_windows(path, note=notes.append)
    spans = [(round(window.start, 2), round(window.end, 2)) for window in windows]
    assert all(note.startswith(f"{path}: ") for note in notes)
    return windows.seconds, [note.removeprefix(f"{path}: ") for note in notes], spans


def with_wav_sizes(content: bytes, data: int, riff: int) -> bytes:
    at = content.index(b"data")
    return patched(patched(content, at + 4, struct.pack("<I", data)), 4, struct.pack("<I", riff))


@pytest.mark.parametrize(
    ("data", "riff", "note"),
    [
        (0, 36, NO_LENGTH),  # the battery died
        (0, 0, NO_LENGTH),
        (0xFFFFFFFF, 0xFFFFFFFF, NO_LENGTH),  # written into a pipe
        (len(SAMPLES), 36 + len(SAMPLES), "its header says 6.15 s; 12.30 s are heard"),  # died a while after the header
        (len(SAMPLES) * 4, 36, "its header says 24.60 s; 12.30 s are heard"),
    ],
)
def test_a_wav_is_as_long_as_its_samples_whatever_its_sizes_say(tmp_path, data: int, riff: int, note: str) -> None:
    whole = written(tmp_path / "a.wav", "WAV")
    expected, _ = soundfile.read(tmp_path / "a.wav")
    (tmp_path / "a.wav").write_bytes(with_wav_sizes(whole, data, riff))

    assert heard(tmp_path / "a.wav") == (pytest.approx(SECONDS), [note], [(0, 10), (10, 12.3)])
    assert np.array_equal(read_samples(tmp_path / "a.wav", seconds=60)[0], expected)
    assert stated_length(tmp_path / "a.wav") == (RATE, pytest.approx(SECONDS))


@pytest.mark.parametrize(
    "behind",
    [
        b"LIST\x04\0\0\0INFO",
        b"guan\x90\0\0\0" + b"GUANO|Version: 1" * 9,
        b"mine\x80\0\0\0" + b"\x01" * 128 + b"too \x02\0\0\0\xff\xff" + bytes(500),
        bytes(4000),
        b"\xff\x01",
    ],
)
def test_what_stands_behind_a_wavs_samples_is_not_heard(tmp_path, behind: bytes) -> None:
    (tmp_path / "a.wav").write_bytes(written(tmp_path / "a.wav", "WAV") + behind)
    assert heard(tmp_path / "a.wav") == (pytest.approx(SECONDS), [], [(0, 10), (10, 12.3)])


@pytest.mark.parametrize("size", [b"\xf0\xf1\xf2\xf3", b"\x11\0\0\0"])
def test_samples_that_look_like_a_chunks_name_are_heard(tmp_path, size: bytes) -> None:
    """A stale size ends where the next samples, of 8 bits, read "wxyz" and a number."""
    loud = np.tile(np.frombuffer(b"wxyz" + size, np.uint8).astype(float) / 128 - 1, RATE)
    whole = written(tmp_path / "a.wav", "WAV", loud, subtype="PCM_U8")
    (tmp_path / "a.wav").write_bytes(with_wav_sizes(whole, 4 * RATE, 36))
    assert heard(tmp_path / "a.wav")[:2] == (8.0, ["its header says 4.00 s; 8.00 s are heard"])


def test_silence_where_a_stale_size_ends_is_heard_and_what_follows(tmp_path) -> None:
    """A recorder that lost its power wrote 6 s into its header, and digital silence goes on for a second there."""
    samples = SAMPLES.copy()
    samples[6 * RATE : 7 * RATE] = 0
    whole = written(tmp_path / "a.wav", "WAV", samples)
    (tmp_path / "a.wav").write_bytes(with_wav_sizes(whole, 2 * 6 * RATE, 36 + 2 * 6 * RATE))
    note = "its header says 6.00 s; 12.30 s are heard"
    assert heard(tmp_path / "a.wav") == (pytest.approx(SECONDS), [note], [(0, 10), (10, 12.3)])


def test_a_day_of_nothing_behind_the_samples_is_left_out_with_a_note_and_costs_nothing(tmp_path) -> None:
    """A sparse file: read through, it would be 40 GB."""
    written(tmp_path / "a.wav", "WAV")
    seconds = 40e9 / 2 / RATE
    os.truncate(tmp_path / "a.wav", 44 + 2 * len(SAMPLES) + 40_000_000_000)
    note = f"{seconds:.2f} s of zeros behind the 12.30 s that its header says are left out"
    assert heard(tmp_path / "a.wav") == (pytest.approx(SECONDS), [note], [(0, 10), (10, 12.3)])
    assert stated_length(tmp_path / "a.wav") == (RATE, pytest.approx(SECONDS))
    with (tmp_path / "a.wav").open("r+b") as file:  # and with sound behind the hole all of it is
        file.seek(-2000, 2)
        file.write(b"\x10\x20" * 1000)
    assert stated_length(tmp_path / "a.wav") == (RATE, pytest.approx(SECONDS + seconds))


#: Of each format: where the size of its samples stands, how it is written, and what it counts beside them.
SIZES = {
    "AIFF": (lambda content: content.index(b"SSND") + 4, ">I", 8),
    "AU": (lambda content: 8, ">I", 0),
    "CAF": (lambda content: content.index(b"data") + 4, ">q", 4),
    "W64": (lambda content: content.index(b"data\xf3") + 16, "<q", 24),
}
HALF = "its header says 6.15 s; 12.30 s are heard"


def with_size(content: bytes, form: str, size: int) -> bytes:
    """With another size of the samples, in bytes."""
    find, kind, more = SIZES[form]
    at = find(content)
    assert struct.unpack_from(kind, content, at)[0] == 2 * len(SAMPLES) + more, "as libsndfile has written it"
    return patched(content, at, struct.pack(kind, size + more))


@pytest.mark.parametrize("form", SIZES)
@pytest.mark.parametrize(("size", "note"), [(len(SAMPLES) - 1, HALF), (0, NO_LENGTH)])
def test_other_formats_are_as_long_as_their_samples_too(tmp_path, form: str, size: int, note: str) -> None:
    whole = written(tmp_path / "a", form)
    expected, _ = soundfile.read(tmp_path / "a")
    (tmp_path / "a").write_bytes(with_size(whole, form, size))

    assert heard(tmp_path / "a") == (pytest.approx(SECONDS, abs=1e-4), [note], [(0, 10), (10, 12.3)])
    assert np.array_equal(read_samples(tmp_path / "a", seconds=60)[0][: len(expected)], expected)
    part = slice(round(9.5 * RATE), round(11.5 * RATE))
    assert np.array_equal(read_samples(tmp_path / "a", start=9.5, seconds=2)[0], expected[part])
    assert stated_length(tmp_path / "a") == (RATE, pytest.approx(SECONDS, abs=1e-4))


def test_an_aiff_whose_power_was_lost_before_any_size_was_written_is_heard(tmp_path) -> None:
    """FORM 46, no frames in COMM, and 8 in SSND: those of its own fields."""
    whole = with_size(written(tmp_path / "a", "AIFF"), "AIFF", 0)
    without = patched(whole, whole.index(b"COMM") + 10, bytes(4))
    (tmp_path / "a").write_bytes(patched(without, 4, struct.pack(">I", 46)))
    assert heard(tmp_path / "a") == (pytest.approx(SECONDS), [NO_LENGTH], [(0, 10), (10, 12.3)])


@pytest.mark.parametrize(
    ("form", "behind", "notes"),
    [
        ("AIFF", b"NAME\0\0\0\x10Acrocephalus 123" + b"AUTH\0\0\x08\0" + b"me" * 1024, []),
        ("CAF", b"info\0\0\0\0\0\0\x40\0" + b"by\0me\0" * 2730 + b"abcd", []),
        ("AU", bytes(22_050), ["0.50 s of zeros behind the 12.30 s that its header says are left out"]),
        ("AIFF", bytes(22_050), ["0.50 s of zeros behind the 12.30 s that its header says are left out"]),
        ("CAF", bytes(22_050), ["0.50 s of zeros behind the 12.30 s that its header says are left out"]),
    ],
)
def test_what_stands_behind_other_formats_samples_is_not_heard(tmp_path, form: str, behind: bytes, notes) -> None:
    (tmp_path / "a").write_bytes(written(tmp_path / "a", form) + behind)
    assert heard(tmp_path / "a") == (pytest.approx(SECONDS), notes, [(0, 10), (10, 12.3)])


@pytest.mark.parametrize("form", ["WAV", "AIFF", "stale CAF", "OGG", "chained OGG", "FLAC", "MP3"])
def test_a_disk_that_fails_is_told_from_a_recording_that_does(tmp_path, form: str, capfd) -> None:
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, 40 * RATE)
    whole = written(tmp_path / "a", form.split()[-1], noise)
    if form == "chained OGG":
        (tmp_path / "a").write_bytes(written(tmp_path / "a", "OGG", SAMPLES[: 5 * RATE]) + whole)
    if form == "stale CAF":
        (tmp_path / "a").write_bytes(patched(whole, whole.index(b"data") + 4, struct.pack(">q", RATE)))
    notes: list[str] = []
    blocks = decode(tmp_path / "a", note=notes.append)
    seconds = 0.0
    with pytest.raises(OSError) as caught:
        for block in blocks:
            seconds += len(block.samples) / block.rate
            if seconds > 9:
                fail_reads(tmp_path / "a")
    assert caught.value.errno == errno.EIO
    assert 9 < seconds < 35 and not [note for note in notes if "damaged" in note]
    assert capfd.readouterr() == ("", "")


def test_a_part_of_a_recording_that_cannot_be_sought_in_is_the_whole_ones(tmp_path) -> None:
    """GSM 6.10 in a WAV."""
    written(tmp_path / "a.wav", "WAV", rate=8000, subtype="GSM610")
    whole, rate = read_samples(tmp_path / "a.wav", seconds=60)
    part, _ = read_samples(tmp_path / "a.wav", start=2.5, seconds=3)
    assert np.array_equal(part, whole[round(2.5 * rate) : round(5.5 * rate)])


def test_an_rf64_of_a_recorder_that_lost_its_power_is_heard(tmp_path) -> None:
    whole = written(tmp_path / "a.wav", "RF64")
    (tmp_path / "a.wav").write_bytes(patched(whole, whole.index(b"ds64") + 8, bytes(24)))
    assert heard(tmp_path / "a.wav") == (pytest.approx(SECONDS), [NO_LENGTH], [(0, 10), (10, 12.3)])


@pytest.mark.parametrize("form", ["WAV", "RF64", "W64", "AIFF", "AU", "CAF", "FLAC", "MP3", "OGG"])
def test_a_file_that_was_cut_off_is_heard_to_where_it_was(tmp_path, form: str) -> None:
    whole = written(tmp_path / "a", form)
    (tmp_path / "a").write_bytes(whole[: len(whole) * 9 // 10])
    seconds, notes, spans = heard(tmp_path / "a")
    assert 0.8 * SECONDS < seconds < 0.91 * SECONDS
    assert spans == [(0, 10), (10, round(seconds, 2))]
    if form not in ("CAF", "OGG"):  # of these the libraries do not tell
        assert len(notes) == 1 and notes[0].startswith("its header says 12.3")


def with_flac_total(content: bytes, total: int) -> bytes:
    """STREAMINFO's number of samples is of 36 bits (RFC 9639, section 8.2)."""
    assert content[:4] == b"fLaC"
    (word,) = struct.unpack(">Q", content[18:26])
    return patched(content, 18, struct.pack(">Q", word & ~((1 << 36) - 1) | total))


@pytest.mark.parametrize(
    ("total", "notes"),
    [
        (0, [NO_LENGTH]),
        (len(SAMPLES) // 2, ["its header says 6.15 s; 12.30 s are heard"]),
        (2 * len(SAMPLES), ["its header says 24.60 s; 12.30 s are heard"]),
        (len(SAMPLES), []),
    ],
)
def test_a_flac_is_as_long_as_its_frames(tmp_path, total: int, notes: list[str]) -> None:
    whole = written(tmp_path / "a.flac", "FLAC")
    expected, _ = soundfile.read(tmp_path / "a.flac")
    (tmp_path / "a.flac").write_bytes(with_flac_total(whole, total))
    assert heard(tmp_path / "a.flac") == (pytest.approx(SECONDS), notes, [(0, 10), (10, 12.3)])
    assert np.array_equal(read_samples(tmp_path / "a.flac", seconds=60)[0], expected)


def test_a_length_that_is_passed_is_noted_by_who_hears_no_further(tmp_path) -> None:
    (tmp_path / "a.flac").write_bytes(with_flac_total(written(tmp_path / "a.flac", "FLAC"), len(SAMPLES) // 2))
    notes: list[str] = []
    assert len(read_samples(tmp_path / "a.flac", seconds=10, note=notes.append)[0]) == 10 * RATE
    assert notes == [f"{tmp_path / 'a.flac'}: it goes on behind the 6.15 s that its header says"]


def test_mp3s_one_behind_the_other_are_all_heard(tmp_path) -> None:
    first, second = written(tmp_path / "a.mp3", "MP3"), written(tmp_path / "a.mp3", "MP3", SAMPLES[: 5 * RATE])
    (tmp_path / "a.mp3").write_bytes(first + second)
    seconds, (note,), _ = heard(tmp_path / "a.mp3")
    assert seconds == pytest.approx(SECONDS + 5, abs=0.2)
    assert note == f"its header says 12.36 s; {seconds:.2f} s are heard"


def test_named_parts_are_heard_on_both_sides_of_a_change_of_the_rate_and_across_it(tmp_path) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(8 * 48_000) / 48_000)  # at half the rate 16 s of 500 Hz
    chained = [written(tmp_path / "a.ogg", "OGG", tone, rate) for rate in (48_000, 24_000)]
    (tmp_path / "a.ogg").write_bytes(b"".join(chained))
    notes: list[str] = []

    clips = list(read_clips(tmp_path / "a.ogg", [(1, 3), (5.7, 5), (12, 2), (22.7, 4)], note=notes.append))

    spans = [(1, 4), (5.7, 10.7), (12, 14), (22.7, 24)]
    assert [(clip.start, clip.end) for clip in clips] == [pytest.approx(span, abs=1e-3) for span in spans]
    before, across, behind, last = (clip.waveform for clip in clips)
    assert [hertz(before[:48_000]), hertz(across[:36_000])] == pytest.approx([1000, 1000], abs=1)
    low = [hertz(across[38_000:80_000]), hertz(behind[:32_000]), hertz(last[:20_000])]
    assert low == pytest.approx([500, 500, 500], abs=1)
    assert notes == [f"{tmp_path / 'a.ogg'}: more than one Ogg stream is chained in it, the first of 8.00 s"]
    with pytest.raises(AudioError, match=r"a\.ogg: of 23\.8 to 26\.8 s only 0\.20 s are there"):
        list(read_clips(tmp_path / "a.ogg", [(7, 2), (23.8, 3)]))


def hertz(samples) -> float:
    """The strongest frequency of samples at 16 kHz."""
    return 16_000 / len(samples) * np.abs(np.fft.rfft(samples)).argmax()


def test_mp3s_of_two_rates_one_behind_the_other_are_heard_at_their_own(tmp_path) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(4 * 44_100) / 44_100)  # at half the rate 8 s of 500 Hz
    first = written(tmp_path / "a.mp3", "MP3", tone)
    second = written(tmp_path / "a.mp3", "MP3", np.stack([tone, tone], axis=1), 44_100)
    (tmp_path / "a.mp3").write_bytes(first + second)
    windows = list(read_windows(tmp_path / "a.mp3"))
    assert windows[-1].end == pytest.approx(12, abs=0.3)
    assert hertz(windows[0].waveform[16_000:112_000]) == pytest.approx(500, abs=1)
    assert hertz(windows[0].waveform[144_000:]) == pytest.approx(1000, abs=1)


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_ogg_streams_are_all_heard_each_at_its_own_rate(tmp_path, subtype: str) -> None:
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(9 * 48_000) / 48_000)  # at half the rate 18 s of 500 Hz
    parts = [(tone, 48_000), (np.stack([tone, tone], axis=1), 24_000), (tone[:240_000], 48_000)]
    chained = [written(tmp_path / "a.ogg", "OGG", samples, rate, subtype=subtype) for samples, rate in parts]
    (tmp_path / "a.ogg").write_bytes(b"".join(chained))
    notes: list[str] = []

    reading = read_windows(tmp_path / "a.ogg", note=notes.append)
    first, second, third, _ = reading

    assert reading.seconds == pytest.approx(9 + 18 + 5, abs=0.01)
    assert notes == [f"{tmp_path / 'a.ogg'}: 3 Ogg streams are chained in it, the first of 9.00 s; 32.00 s are heard"]
    assert stated_length(tmp_path / "a.ogg") == (48_000, pytest.approx(32, abs=0.01))
    assert hertz(first.waveform[:128_000]) == pytest.approx(1000, abs=1)
    assert hertz(second.waveform) == pytest.approx(500, abs=1)
    assert hertz(third.waveform[:96_000]) == pytest.approx(500, abs=1)
    assert hertz(third.waveform[120_000:]) == pytest.approx(1000, abs=1)


@pytest.mark.parametrize(("form", "lost"), [("MP3", 0.6), ("FLAC", 0.5)])
def test_damage_in_the_middle_costs_what_is_damaged_and_is_noted(tmp_path, form: str, lost: float, capfd) -> None:
    whole = written(tmp_path / "a", form)
    (tmp_path / "a").write_bytes(patched(whole, len(whole) // 2, bytes(1500)))

    seconds, notes, spans = heard(tmp_path / "a")

    assert SECONDS - lost < seconds < SECONDS
    assert len(notes) == 1 and ("are heard" in notes[0] or "damaged" in notes[0])
    assert spans == [(0, 10), (10, round(seconds, 2))]
    assert capfd.readouterr() == ("", "")  # the libraries' own lines, that name no file


def test_a_recording_of_nothing_but_damage_is_refused(tmp_path) -> None:
    whole = written(tmp_path / "a.flac", "FLAC")
    (tmp_path / "a.flac").write_bytes(patched(whole, 100, bytes(len(whole) - 100)))
    with pytest.raises(AudioError, match=r"a\.flac: cannot be decoded as audio \(.+\)"):
        list(read_windows(tmp_path / "a.flac"))


#: How long ffmpeg hears the shared cases to be, and what is said of them.
CASES = {
    "chained.ogg": (12.3, ["2 Ogg streams are chained in it, the first of 6.00 s; 12.30 s are heard"]),
    "damaged_in_the_middle.mp3": (
        11.9,
        ["its header says 12.36 s; 11.91 s are heard; a damaged packet is left out after 6.04 s"],
    ),
    "flac_says_double.flac": (12.3, ["its header says 24.60 s; 12.30 s are heard"]),
    "flac_says_half.flac": (12.3, ["its header says 6.15 s; 12.30 s are heard"]),
    "flac_says_nothing.flac": (12.3, [NO_LENGTH]),
    "phone.m4a": (12.3, []),
    "phone.webm": (12.3, []),
    "vbr_without_xing.mp3": (12.36, ["its header says 11.77 s; 12.36 s are heard"]),
    "wav_power_lost.wav": (12.3, [NO_LENGTH]),
    "xing_says_half.mp3": (12.3, ["its header says 6.16 s; 12.30 s are heard"]),
}


@pytest.mark.parametrize("name", CASES)
def test_files_of_recorders_and_downloads_are_heard_to_their_length(cases: Path, name: str) -> None:
    length, said = CASES[name]
    seconds, notes, spans = heard(cases / "audio" / name)
    assert seconds == pytest.approx(length, abs=0.02)
    assert spans == [(0, 10), (10, round(seconds, 2))]
    assert notes == said

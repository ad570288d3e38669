"""Recordings read ahead: in order, so far and no further, and gone when nobody needs them."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio.failing_disk import fail_reads
from listen.archive import WINDOWS, write_recording

from mergekit_bio.audio.recording import read_windows
from mergekit_bio.errors import MissingPackageError
from mergekit_bio.listen.reading import Ended, OpenRecording, Window, WindowReader, windows_of

AHEAD = 20


def reader_of(paths, cut=None, *, first: int = 0) -> WindowReader:
    recordings = [OpenRecording(str(path), first) for path in paths]
    cut = cut or windows_of(window=10.0, hop=10.0, channel=None)
    return WindowReader(recordings, cut, prepare=list, ahead=AHEAD)


def described(items) -> list[tuple]:
    return [
        (Path(item.recording).name, item.number, item.clip.start) if isinstance(item, Window) else item.seconds
        for item in items
    ]


@pytest.mark.parametrize("count", [1, 4, 100])
def test_windows_come_in_order_whatever_is_taken_at_a_time(archive: Path, count: int) -> None:
    paths = [archive / name for name in dict.fromkeys(name for name, *_ in WINDOWS)]
    reader, taken = reader_of(paths), []
    while items := reader.take(count):
        assert sum(isinstance(item, Window) for item in items) <= count
        taken += items
    reader.close()
    windows = [item for item in taken if isinstance(item, Window)]
    assert [(item.recording, item.clip.start, item.clip.end) for item in windows] == [
        (str(archive / name), start, end) for name, start, end in WINDOWS
    ]
    ended = [item for item in taken if isinstance(item, Ended)]
    assert [(item.recording, item.seconds, item.sampling_rate) for item in ended] == [
        (str(path), seconds, rate)
        for path, seconds, rate in zip(paths, (3, 25, 30, 11), (16_000, 8_000, 44_100, 22_050), strict=True)
    ]
    assert all(item.error is None for item in ended)


def test_windows_that_were_heard_before_are_left_out(archive: Path) -> None:
    reader = reader_of([archive / "site 1/b.flac"], first=2)
    assert described(reader.take(9)) == [("b.flac", 2, 20.0), 25.0]
    assert reader.take(9) == []
    reader.close()


def test_it_reads_so_far_ahead_and_no_further_and_ends_when_it_is_closed(tmp_path: Path) -> None:
    write_recording(tmp_path / "long.wav", 300, 8_000)
    decoded, threads = [], threading.active_count()

    def cut(recording, note):
        windows = read_windows(recording.path, window=1.0, note=note)
        following = type(windows).__next__

        class Counted(type(windows)):
            def __next__(self):
                decoded.append(1)
                return following(self)

        windows.__class__ = Counted
        return windows

    reader = reader_of([tmp_path / "long.wav"], cut)
    while len(decoded) < AHEAD:
        time.sleep(0.01)
    before = 0
    while len(decoded) != before:  # until it waits
        before = len(decoded)
        time.sleep(0.5)
    assert AHEAD <= len(decoded) < 100
    reader.close()
    assert threading.active_count() == threads and len(decoded) < 100


@pytest.mark.parametrize("suffix", ["flac", "wav"])
def test_a_window_that_a_failing_disk_cuts_is_left_for_the_next_time(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"night.{suffix}"
    write_recording(file, 45, 16_000)

    def cut(recording, note):
        windows = read_windows(recording.path, note=note)
        following = type(windows).__next__

        class Failing(type(windows)):
            def __next__(self):
                clip = following(self)
                fail_reads(file)
                return clip

        windows.__class__ = Failing
        return windows

    def taken(reader) -> tuple[list[tuple[int, float, float]], Ended]:
        *windows, ended = reader.take(100)
        reader.close()
        return [(item.number, item.clip.start, item.clip.end) for item in windows], ended

    before, broken = taken(reader_of([file], cut))
    assert broken.passing and "Input/output error" in broken.error
    assert before == [(0, 0.0, 10.0), (1, 10.0, 20.0)] and 20 <= broken.seconds < 45
    behind, ended = taken(reader_of([file], first=len(before)))
    assert behind == [(2, 20.0, 30.0), (3, 30.0, 40.0), (4, 40.0, 45.0)] and ended.error is None


def test_windows_that_are_named_behind_a_recordings_end_are_left_out_and_noted(tmp_path: Path) -> None:
    write_recording(tmp_path / "a.wav", 24, 8_000)
    named = OpenRecording(str(tmp_path / "a.wav"), windows=((1, 3), (22, 26), (23.8, 26), (40, 44)))
    reader = WindowReader([named], windows_of(window=10.0, hop=10.0, channel=None), prepare=list, ahead=AHEAD)
    *windows, ended = reader.take(100)
    reader.close()
    assert [(item.clip.start, item.clip.end) for item in windows] == [(1, 3), (22, 24)]
    assert (ended.seconds, ended.error) == (24, None)
    left_out = "of 23.8 to 26 s only 0.20 s are there: left out, and so are 1 more, to that of 40 to 44 s"
    assert ended.notes == (f"{tmp_path / 'a.wav'}: {left_out}",)


def test_a_recording_that_breaks_for_good_keeps_its_last_window(tmp_path: Path) -> None:
    samples = np.zeros(27 * 8_000)
    samples[25 * 8_000] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, 8_000, subtype="FLOAT")
    reader = reader_of([tmp_path / "a.wav"])
    *windows, ended = reader.take(100)
    reader.close()
    assert [(item.clip.start, item.clip.end) for item in windows] == [(0, 10), (10, 20), (20, 25)]
    assert not ended.passing and "breaks after 25.00 s" in ended.error


def test_more_may_be_asked_for_than_wait(tmp_path: Path) -> None:
    write_recording(tmp_path / "long.wav", 50, 8_000)
    reader, taken = reader_of([tmp_path / "long.wav"], windows_of(window=1.0, hop=1.0, channel=None)), []
    while items := reader.take(1000):
        taken += items
    reader.close()
    assert [number for _, number, _ in described(taken[:-1])] == [*range(50)]


def test_what_makes_reading_impossible_is_raised_where_windows_are_taken(archive: Path) -> None:
    def cut(recording, note):
        if recording.path.endswith("b.flac"):
            raise MissingPackageError("ears", "eval", "hearing")
        return read_windows(recording.path, note=note)

    reader = reader_of([archive / "a.wav", archive / "site 1/b.flac"], cut)
    assert described(reader.take(9)) == [("a.wav", 0, 0.0), 3.0]
    with pytest.raises(MissingPackageError):
        reader.take(9)
    reader.close()

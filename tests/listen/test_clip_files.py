"""The likeliest windows of each answer as files."""

import csv
import random
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from listen.archive import QUESTION, Listening, ask

from mergekit_bio.audio.finding import find_recordings
from mergekit_bio.errors import AudioError, OutputError
from mergekit_bio.listen.clip_files import Likeliest, check_folder, file_name, write_clips


def cut(path: Path, parts: list[tuple[float, float]]) -> Iterator[tuple[np.ndarray, int] | AudioError]:
    assert parts == sorted(parts), "one way through the recording"
    for start, seconds in parts:
        if path.exists():
            yield soundfile.read(path, start=round(start * 44_100), frames=round(seconds * 44_100))
        else:
            yield AudioError(f"{path}: is gone")


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (12 * 44_100, 2))
    soundfile.write(tmp_path / "night.flac", samples, 44_100)
    return tmp_path / "night.flac"


def test_the_likeliest_of_each_answer_are_kept_and_of_equals_the_first() -> None:
    windows = [(f"answer {n % 3}", n // 5 / 100) for n in range(200)]
    order = list(range(200))
    random.Random(0).shuffle(order)
    kept = Likeliest(4)
    for n in order:
        kept.add(*windows[n], recording="a.wav", start=n, end=n + 1)

    for answer, found in kept.ranked().items():
        place = {n: number for number, n in enumerate(order)}
        mine = [n for n in range(200) if windows[n][0] == answer]
        expected = sorted(mine, key=lambda n: (-windows[n][1], place[n]))[:4]
        assert [item.start for item in found] == expected


def test_files_are_the_recordings_samples(tmp_path: Path, recording: Path) -> None:
    kept = Likeliest(2)
    kept.add("marsh wren", 0.5, recording=str(recording), start=0, end=2.5)
    kept.add("marsh wren", 0.925, recording=str(recording), start=2.5, end=5)
    kept.add("marsh wren", 0.1, recording=str(recording), start=5, end=7.5)
    kept.add("none of these", 0.75, recording=str(recording), start=10, end=12)

    count = write_clips(kept.ranked(), tmp_path / "clips", cut=cut, note=pytest.fail)

    assert count == 3
    with (tmp_path / "clips/clips.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["answer"], row["probability"]) for row in rows] == [
        ("marsh-wren/01_0.93_night_2.5-5.0.wav", "marsh wren", "0.925"),
        ("marsh-wren/02_0.50_night_0.0-2.5.wav", "marsh wren", "0.5"),
        ("none-of-these/01_0.75_night_10.0-12.0.wav", "none of these", "0.75"),
    ]
    assert {str(path.relative_to(tmp_path / "clips")) for path in (tmp_path / "clips").rglob("*.*")} == {
        "clips.csv",
        *(row["file"] for row in rows),
    }
    heard, rate = soundfile.read(tmp_path / "clips" / rows[0]["file"], dtype="int16")
    whole, _ = soundfile.read(recording, dtype="int16")
    assert rate == 44_100 and (heard == whole[round(2.5 * rate) : 5 * rate]).all()


def test_all_channels_of_an_array_of_microphones_of_which_one_is_heard_are_cut(tmp_path: Path, merged: Path) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (3 * 16_000, 17))
    (tmp_path / "array").mkdir()
    soundfile.write(tmp_path / "array/a.wav", samples, 16_000)
    question = replace(QUESTION, channel=3, choices=("marsh wren", "sora"))
    listening = Listening()

    outcome = ask(merged, tmp_path / "array", question=question, clips=(1, tmp_path / "clips"), listener=listening)

    (clip,) = (tmp_path / "clips").rglob("*.wav")
    whole, _ = soundfile.read(tmp_path / "array/a.wav", dtype="int16")
    assert outcome.clips == 1 and not [note for note in listening.notes if "channel" in note]
    assert np.array_equal(soundfile.read(clip, dtype="int16")[0], whole)


def test_another_call_replaces_what_was_written_and_nothing_else(tmp_path: Path, recording: Path) -> None:
    folder = tmp_path / "clips"
    for answer, probability in (("sora", 0.5), ("rail", 0.75)):
        kept = Likeliest(1)
        kept.add(answer, probability, recording=str(recording), start=0, end=1)
        write_clips(kept.ranked(), folder, cut=cut, note=pytest.fail)
        (folder / "notes.txt").write_text("mine")

    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        "clips.csv", "notes.txt", "rail/01_0.75_night_0.0-1.0.wav",
    ]  # fmt: skip
    assert not (folder / "sora").exists()


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.doc").write_text("years of work")

    with pytest.raises(OutputError, match="holds other files"):
        write_clips({}, tmp_path / "mine", cut=cut, note=pytest.fail)


def test_a_table_of_others_with_the_same_name_is_not_taken_for_ours(tmp_path: Path, recording: Path) -> None:
    (tmp_path / "clips.csv").write_text("file,start,end\nnight.flac,0,1\n")

    with pytest.raises(OutputError, match="holds other files"):
        write_clips({}, tmp_path, cut=cut, note=pytest.fail)
    assert find_recordings([tmp_path]).recordings == [recording]


def test_clips_among_the_recordings_are_not_asked_about(tmp_path: Path, recording: Path) -> None:
    kept = Likeliest(1)
    kept.add("sora", 0.5, recording=str(recording), start=0, end=1)
    write_clips(kept.ranked(), folder := tmp_path / "best/clips", cut=cut, note=pytest.fail)

    found = find_recordings([tmp_path])
    assert found.recordings == [recording]
    assert found.notes == [f"{tmp_path}: left out 1 folder of clips that --clips has cut (best/clips)"]
    named = find_recordings([folder]).recordings
    assert [path.parent.name for path in named] == ["sora"], "who names it means it"
    with pytest.raises(OutputError, match="which is asked about"):
        check_folder(folder, named)


def test_a_recording_that_is_gone_is_named_and_the_others_are_cut(tmp_path: Path, recording: Path) -> None:
    kept, notes = Likeliest(2), []
    kept.add("sora", 0.5, recording=str(tmp_path / "gone.wav"), start=0, end=1)
    kept.add("sora", 0.4, recording=str(recording), start=0, end=1)

    assert write_clips(kept.ranked(), tmp_path / "clips", cut=cut, note=notes.append) == 1
    assert len(notes) == 1 and "gone.wav" in notes[0]


def test_a_disk_that_is_full_is_an_error_that_says_so(tmp_path: Path, recording: Path) -> None:
    kept = Likeliest(1)
    kept.add("sora", 0.5, recording=str(recording), start=0, end=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OutputError, match=r"clips: cannot be written \(File too large\)"):
            write_clips(kept.ranked(), tmp_path / "clips", cut=cut, note=pytest.fail)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("Marsh Wren", "Marsh-Wren"),
        ("../../etc/passwd", "etc-passwd"),
        ('AC/DC: "live"', "AC-DC-live"),
        ("étoile 🐸", "étoile"),
        ("...", "-"),
        ("é" * 200, "é" * 40),
    ],
)
def test_answers_become_names_that_every_disk_takes(answer: str, name: str) -> None:
    assert file_name(answer) == name


def test_answers_of_one_name_have_folders_of_their_own(tmp_path: Path, recording: Path) -> None:
    kept = Likeliest(1)
    for answer in ("a/b", "a b", "A:b"):
        kept.add(answer, 0.5, recording=str(recording), start=0, end=1)
    write_clips(kept.ranked(), tmp_path / "clips", cut=cut, note=pytest.fail)

    assert sorted(path.name.lower() for path in (tmp_path / "clips").iterdir() if path.is_dir()) == [
        "a-b", "a-b-2", "a-b-3",
    ]  # fmt: skip

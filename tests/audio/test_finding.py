"""Which files of a folder are heard, and what is said of the others."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mergekit_bio.audio.finding import find_recordings
from mergekit_bio.errors import AudioError


@pytest.fixture
def folder(tmp_path: Path):
    """Makes empty files, and with a format real recordings."""
    root = tmp_path / "folder"

    def make(*names: str, **recordings: str) -> Path:
        for name in [*names, *recordings]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        for name, form in recordings.items():
            soundfile.write(root / name, np.zeros(100), 8000, format=form)
        return root

    return make


def found(*paths: Path) -> list[str]:
    return [str(path) for path in find_recordings(paths).recordings]


def test_recordings_below_folders_by_their_paths_and_files_as_they_are_named(folder) -> None:
    root = folder("b/2.FLAC", "b/deep/1.wav", "b/a.m4a", "odd.name")

    expected = [root / "odd.name", root / "b/2.FLAC", root / "b/a.m4a", root / "b/deep/1.wav", root / "odd.name"]
    assert find_recordings([root / "odd.name", root / "b", root / "odd.name"]).recordings == expected


def test_a_recording_is_found_by_its_content_whatever_its_name(folder) -> None:
    root = folder(
        **{"a.wave": "WAV", "nosuffix": "FLAC", "c.dat": "MP3", "d.txt": "OGG", "e.bin": "AIFF", "f.001": "W64"}
    )

    assert found(root) == [str(root / name) for name in ("a.wave", "c.dat", "d.txt", "e.bin", "f.001", "nosuffix")]


def test_what_is_left_out_is_counted_by_kind(folder) -> None:
    root = folder("a.wav", "notes.txt", "b/list.txt", "b/photo.JPG", "README")
    (root / "gone.wav").symlink_to(root / "nowhere.wav")
    os.mkfifo(root / "pipe.wav")

    assert find_recordings([root]).notes == [
        f"{root}: left out 5 files that are no recordings (2 .txt, 1 without suffix, 1 .jpg, 1 device or pipe)",
        f"{root}: left out 1 link that leads nowhere (gone.wav)",
    ]


def test_hidden_files_and_the_systems_folders_are_left_out_with_a_count(folder) -> None:
    root = folder("a.wav", "._a.wav", ".Trash-1000/b.wav", "$RECYCLE.BIN/c.wav", "deep/.hidden.wav", "deep/d.wav")

    result = find_recordings([root])

    assert result.recordings == [root / "a.wav", root / "deep/d.wav"]
    (note,) = result.notes
    assert note.startswith(f"{root}: left out 4 hidden entries (") and "$RECYCLE.BIN" in note and "._a.wav" in note


def test_a_hidden_folder_that_is_named_is_heard(folder) -> None:
    root = folder(".cache/a.wav")
    assert found(root / ".cache") == [str(root / ".cache/a.wav")]


def test_links_to_folders_are_entered_once(folder, tmp_path: Path) -> None:
    root = folder("a/1.wav", "b/2.wav")
    (root / "a/loop").symlink_to(root)
    (root / "c").symlink_to(root / "b")
    (root / "far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/3.wav").touch()

    assert found(root) == [str(root / name) for name in ("a/1.wav", "b/2.wav", "far/3.wav")]
    assert found(root / "a", root) == [str(root / name) for name in ("a/1.wav", "a/loop/b/2.wav", "a/loop/far/3.wav")]


def test_a_link_to_a_recording_of_the_folder_is_left_out_with_a_count(folder, tmp_path: Path) -> None:
    """Others are heard: what they lead to is not there itself, as in git-annex's folders."""
    root = folder("a/1.wav", "a/2.wav")
    (root / "b").mkdir()
    (root / "b/1.wav").symlink_to(root / "a/1.wav")
    (tmp_path / "3.wav").touch()
    (root / "b/3.wav").symlink_to(tmp_path / "3.wav")

    there = find_recordings([root])
    assert there.recordings == [root / name for name in ("a/1.wav", "a/2.wav", "b/3.wav")]
    assert there.notes == [f"{root}: left out 1 link to a recording that is there too (b/1.wav)"]
    assert found(root / "b/1.wav") == [str(root / "b/1.wav")]


def test_a_folder_without_recordings_says_what_is_in_it(folder) -> None:
    root = folder("notes.txt", ".hidden.wav")
    with pytest.raises(AudioError, match=r"holds no recordings; left out 1 hidden entry .*; left out 1 file that"):
        find_recordings([root])


def test_what_is_no_file_and_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"gone\.wav: no such file"):
        find_recordings([tmp_path / "gone.wav"])
    with pytest.raises(AudioError, match="/dev/zero: is neither a file nor a folder"):
        find_recordings(["/dev/zero"])

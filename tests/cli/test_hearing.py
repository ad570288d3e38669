"""Recordings whose headers lie, through the commands: heard to their length, with a note."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

Run = Callable[..., tuple[int, str, str]]

#: How long ffmpeg hears them to be, and what a user is told of them.
LENGTHS = {
    "chained.ogg": (12.3, "2 Ogg streams are chained in it"),
    "damaged_in_the_middle.mp3": (11.9, "a damaged packet is left out after 6.04 s"),
    "flac_says_double.flac": (12.3, "its header says 24.60 s"),
    "flac_says_half.flac": (12.3, "its header says 6.15 s"),
    "flac_says_nothing.flac": (12.3, "its header states no length"),
    "phone.m4a": (12.3, None),
    "phone.webm": (12.3, None),
    "vbr_without_xing.mp3": (12.36, "its header says 11.77 s"),
    "wav_power_lost.wav": (12.3, "its header states no length"),
    "xing_says_half.mp3": (12.3, "its header says 6.16 s"),
}


def assert_told(err: str, folder: Path, told: dict[str, str | None]) -> None:
    """Each of these sentences, and no other, is noted of its file."""
    notes = [line for line in err.splitlines() if str(folder) in line and "left out 1 file" not in line]
    assert len(notes) == len([note for note in told.values() if note])
    for name, note in told.items():
        if note:
            (line,) = [line for line in notes if f"{folder / name}: " in line]
            assert note in line


def test_ask_hears_them_to_their_length(command_line: Run, merged: Path, cases: Path) -> None:
    folder = cases / "audio"
    question = ("-p", "What is it?", "--max-new-tokens", 1, "--beams", 1, "--device", "cpu")
    code, out, err = command_line("ask", merged, folder, *question, "--json")

    assert code == 0, err
    document = json.loads(out)
    assert document["failed"] == []
    windows = defaultdict(list)
    for answer in document["answers"]:
        (recording,) = answer["recordings"]
        windows[Path(recording).name].append((answer["start"], answer["end"]))
    assert set(windows) == set(LENGTHS)
    for name, (length, _) in LENGTHS.items():
        assert windows[name] == [(0, 10), (10, pytest.approx(length, abs=0.02))]
    assert f"{folder}: left out 1 file that is no recording (1 .md)" in err
    assert_told(err, folder, {name: note for name, (_, note) in LENGTHS.items()})


def test_embed_hears_them_to_their_length(command_line: Run, merged: Path, cases: Path, tmp_path: Path) -> None:
    folder = cases / "audio"
    code, _, err = command_line("embed", merged, folder, "--out", tmp_path / "e.npz", "--device", "cpu")

    assert code == 0, err
    arrays = np.load(tmp_path / "e.npz")
    ends = {Path(path).name: arrays["end"][arrays["recording"] == n] for n, path in enumerate(arrays["recordings"])}
    assert set(ends) == set(LENGTHS)
    for name, (length, _) in LENGTHS.items():
        assert ends[name].tolist() == [10, pytest.approx(length, abs=0.02)]
    assert_told(err, folder, {name: note for name, (_, note) in LENGTHS.items()})


def test_eval_hears_their_first_ten_seconds(command_line: Run, merged: Path, cases: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recordings"
    folder.mkdir()
    for name in LENGTHS:
        shutil.copyfile(cases / "audio" / name, folder / name)
    lines = [f"{name},{label}\n" for name, label in zip(LENGTHS, ["wren", "owl"] * 5, strict=True)]
    (folder / "metadata.csv").write_text("file_name,label\n" + "".join(lines))
    recipe = {
        "checkpoints": [str(merged)],
        "datasets": [{"path": str(folder), "channel": 1}],
        "queries": ["What is it?"],
        "generate": {"max_new_tokens": 1, "num_beams": 1},
    }
    (tmp_path / "cases.yaml").write_text(yaml.safe_dump(recipe))

    on_cpu = ("--engine", "transformers", "--engine-option", "device=cpu", "--no-report")
    code, _, err = command_line("eval", tmp_path / "cases.yaml", "--out", tmp_path / "run", *on_cpu)

    assert code == 0, err
    (predictions,) = (tmp_path / "run").glob("*.jsonl")
    assert [json.loads(line)["id"] for line in predictions.read_text().splitlines()] == list(LENGTHS)
    heard_otherwise = {
        "chained.ogg": "more than one Ogg stream is chained in it, the first of 6.00 s",
        "damaged_in_the_middle.mp3": "a damaged packet is left out after 6.04 s",
        "flac_says_half.flac": "it goes on behind the 6.15 s that its header says",
        "flac_says_nothing.flac": "its header states no length",
        "wav_power_lost.wav": "its header states no length",
        "xing_says_half.mp3": "it goes on behind the 6.16 s that its header says",
    }
    assert_told(err, folder, heard_otherwise)

"""What a user sees of an archive that is being asked about."""

import re
from pathlib import Path

import pytest
from demo.terminal import COLUMNS, PROGRAM, on_a_terminal
from listen.archive import QUESTION, WINDOWS, Listening, ask

from mergekit_bio.listen.progress import RecordingCounter
from mergekit_bio.listen.reading import Ended, OpenRecording


def command(merged: Path, archive: Path, out: Path) -> list[str]:
    words = ["ask", merged, archive, "--prompt", QUESTION.prompt, "--beams", 1, "--max-new-tokens", 4, "--out", out]
    return [*map(str, words), "--engine", "transformers", "--device", "cpu"]


@pytest.mark.long
def test_a_terminal_of_80_columns_shows_the_pace_and_what_failed(archive: Path, merged: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/text.wav").write_text("no audio")
    words = command(merged, archive, tmp_path / "birds.csv")
    shown = on_a_terminal(PROGRAM, *words[:2], tmp_path / "bad", *words[2:], cwd=tmp_path)
    drawn = [line for line in shown.lines if line.strip()]
    assert any(re.search(r"listening .* \d/5 [\d.]+ windows/\w+, 0:00:\d\d left, 1 failed", line) for line in drawn)
    assert all(len(line.rstrip()) <= COLUMNS for line in drawn if str(tmp_path) not in line)
    assert f"{len(WINDOWS)} windows of 4 recordings -> {tmp_path / 'birds.csv'}" in drawn


def test_progress_counts_windows_and_recordings_and_goes_by_bytes(archive: Path, merged: Path, tmp_path: Path) -> None:
    listening = Listening()
    ask(merged, archive, tmp_path / "birds.csv", listener=listening)
    last = listening.heard[-1]
    assert (last.recordings, last.done, last.failed, last.windows, last.seconds_left) == (4, 4, 0, len(WINDOWS), 0.0)
    assert last.rate is not None and last.rate > 0
    sizes, listening = {"a": 100, "b": 300}, Listening()
    still_open = [OpenRecording(name, size=size) for name, size in sizes.items()]
    counter = RecordingCounter(5, still_open, failed=1, listener=listening, workers=lambda: 2)
    counter.add(3, [], seconds=6.0)
    counter.add(3, [Ended("a", 30.0, 16_000), Ended("c", 0.0, None, "no use")], seconds=3.0)
    first, second = listening.heard
    assert (first.done, first.failed, first.seconds_left) == (3, 1, None)
    assert (second.done, second.failed, second.windows, second.workers) == (5, 2, 6, 2)
    assert second.seconds_left == pytest.approx(3 * 6 / second.rate)

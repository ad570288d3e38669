"""An archive that is gone on with: after it was stopped, when it has grown, under another question."""

import csv
import os
import shutil
import sqlite3
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from listen.archive import (
    QUESTION,
    WINDOWS,
    Listening,
    ask,
    rows_without_a_table,
    write_recording,
)
from permissions import for_everybody, unprivileged

from mergekit_bio.engine.transformers import TransformersEngine
from mergekit_bio.errors import AudioError, EngineError, OutputError, RunError
from mergekit_bio.listen.journal import Journal
from mergekit_bio.listen.question import Question


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many windows an engine is asked about, call by call."""
    calls: list[int] = []
    generate = TransformersEngine.generate

    def counting(engine, prompts, decoding):
        calls.append(len(prompts))
        return generate(engine, prompts, decoding)

    monkeypatch.setattr(TransformersEngine, "generate", counting)
    return calls


@pytest.fixture
def recordings(archive: Path, tmp_path: Path) -> Path:
    """A copy of the archive, to be changed."""
    return shutil.copytree(archive, tmp_path / "recordings")


def table(folder: Path) -> list[tuple[str, float, float, str]]:
    """(Recording, start, end, answer) of every row."""
    with (folder / "birds.csv").open(newline="") as file:
        rows = csv.DictReader(file)
        return [(row["recording"], float(row["start"]), float(row["end"]), row["answer"]) for row in rows]


class Stopping(Listening):
    """Stops it after the first batch."""

    def standing(self, standing) -> None:
        raise KeyboardInterrupt


def test_what_was_answered_before_it_stopped_is_not_asked_again(
    archive: Path, answered: Path, merged: Path, tmp_path: Path, asked: list[int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        ask(merged, archive, tmp_path / "birds.csv", listener=Stopping())
    there = table(tmp_path)
    assert 0 < len(there) < len(WINDOWS) and there == table(answered)[: len(there)], "in the table as they come"
    ask(merged, archive, tmp_path / "birds.csv")
    assert sum(asked) == len(WINDOWS)
    assert (tmp_path / "birds.csv").read_bytes() == (answered / "birds.csv").read_bytes()


def test_a_row_that_a_kill_has_cut_is_whole_again(archive: Path, answered: Path, merged: Path, tmp_path: Path) -> None:
    here = shutil.copytree(answered, tmp_path / "here")
    whole = (here / "birds.csv").read_bytes()
    (here / "birds.csv").write_bytes(whole[:-20])
    ask(merged, archive, here / "birds.csv")
    assert (here / "birds.csv").read_bytes() == whole


def test_a_finished_table_starts_no_engine(
    archive: Path, answered: Path, merged: Path, tmp_path: Path, asked: list[int]
) -> None:
    here = shutil.copytree(answered, tmp_path / "here")
    outcome = ask(merged, archive, here / "birds.csv")
    assert (outcome.recordings, outcome.windows, outcome.failed, asked) == (4, len(WINDOWS), {}, [])


def test_only_recordings_that_are_new_or_have_changed_are_asked_about(
    recordings: Path, merged: Path, tmp_path: Path, asked: list[int]
) -> None:
    out, listening = tmp_path / "birds.csv", Listening()
    ask(merged, recordings, out)
    before, _ = table(tmp_path), asked.clear()
    write_recording(recordings / "site 0/new.wav", 12)
    write_recording(recordings / "a.wav", 21, seed=1)
    ask(merged, recordings, out, listener=listening)
    assert sum(asked) == 2 + 3
    assert listening.notes == ["note: 1 recording has changed and will be asked about anew", f"loading {merged}"]
    names = [Path(name).relative_to(recordings).as_posix() for name, *_ in table(tmp_path)]
    assert names == ["a.wav"] * 3 + ["site 0/new.wav"] * 2 + [name for name, *_ in WINDOWS[1:]]
    assert table(tmp_path)[5:] == before[1:]


def test_a_recording_that_failed_is_tried_again_once_it_has_changed(
    recordings: Path, merged: Path, tmp_path: Path, asked: list[int]
) -> None:
    out, bad = tmp_path / "birds.csv", recordings / "site 1/bad.wav"
    bad.write_bytes(b"no audio")
    for listening, failures in ((Listening(), 1), (Listening(), 0)):
        outcome = ask(merged, recordings, out, listener=listening)
        assert list(outcome.failed) == [str(bad)] and "bad.wav: " in outcome.failed[str(bad)]
        assert len(listening.failures) == failures, "heard once"
    assert sum(asked) == len(WINDOWS)
    write_recording(bad, 12)
    assert ask(merged, recordings, out).failed == {}
    assert sum(asked) == len(WINDOWS) + 2 and len(table(tmp_path)) == len(WINDOWS) + 2


def test_what_may_not_be_read_is_a_failure_of_its_own_and_tried_again_once_it_may(
    archive: Path, merged: Path, answered: Path, asked: list[int]
) -> None:
    # `answered` has imported everything, which may lie where only root may read.
    with for_everybody(archive) as recordings, for_everybody(merged) as model:
        for number in range(11):
            write_recording(recordings / f"site 0/{number:02d}.wav", 3)
            (recordings / f"site 0/{number:02d}.wav").chmod(0)
        out = recordings.parent / "birds.csv"
        with unprivileged():
            outcome = ask(model, recordings, out)
            assert len(outcome.failed) == 11 and all("Permission denied" in error for error in outcome.failed.values())
            assert outcome.windows == sum(asked) == len(WINDOWS)
            ask(model, recordings, out)
            assert sum(asked) == len(WINDOWS), "not tried again"
        for number in range(10):
            (recordings / f"site 0/{number:02d}.wav").chmod(0o644)
        (recordings / "a.wav").chmod(0)
        with unprivileged():
            outcome = ask(model, recordings, out)
        assert sum(asked) == outcome.windows == len(WINDOWS) + 10, (
            "what was answered stays, whether it may be read or not"
        )
        assert list(outcome.failed) == [str(recordings / "site 0/10.wav")]


class Vanishing(Listening):
    """The disk goes after the first batch."""

    def __init__(self, disk: Path) -> None:
        super().__init__()
        self.disk = disk

    def standing(self, standing) -> None:
        if self.disk.exists():
            self.disk.rename(self.disk.with_name("gone"))


def test_what_could_not_be_read_because_the_disk_went_is_asked_about_when_it_is_back(
    recordings: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(50):
        write_recording(recordings / f"site 3/{number:02d}.wav", 12, 8_000)
    with pytest.raises(AudioError, match=r"\d\d recordings in a row could not be read") as caught:
        ask(merged, recordings, tmp_path / "birds.csv", listener=Vanishing(recordings))
    assert "is the disk there? Run the command again to go on" in str(caught.value)
    (tmp_path / "gone").rename(recordings)
    outcome = ask(merged, recordings, tmp_path / "birds.csv")
    assert outcome.failed == {} and outcome.broken == {}
    assert outcome.windows == len(table(tmp_path)) == len(WINDOWS) + 50 * 2


def test_an_engine_that_fails_leaves_no_reader_behind(
    recordings: Path, merged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*given):
        raise EngineError("out of memory")

    write_recording(recordings / "a.wav", 600, 8_000)
    monkeypatch.setattr(TransformersEngine, "generate", failing)
    threads = threading.active_count()
    with pytest.raises(EngineError, match="out of memory"):
        ask(merged, recordings)
    assert not [thread for thread in threading.enumerate() if thread.name == "window reader"]
    assert threading.active_count() == threads


def test_a_mistake_that_is_corrected_is_no_failure_any_more(recordings: Path, merged: Path, tmp_path: Path) -> None:
    for name in ("a.wav", "site 1/b.flac", "site 2/b.flac"):
        (recordings / name).unlink()
    wrong, right = (replace(QUESTION, channel=channel) for channel in (5, 2))
    assert len(ask(merged, recordings, tmp_path / "birds.csv", question=wrong).failed) == 1
    outcome = ask(merged, recordings, tmp_path / "birds.csv", question=right)
    assert (outcome.failed, outcome.windows) == ({}, 3)


def test_a_recording_that_was_moved_is_in_the_table_once(
    recordings: Path, merged: Path, tmp_path: Path, asked: list[int]
) -> None:
    ask(merged, recordings, tmp_path / "birds.csv")
    (recordings / "site 1/c.wav").rename(recordings / "site 2/c.wav")
    listening = Listening()
    ask(merged, recordings, tmp_path / "birds.csv", listener=listening)
    assert len(table(tmp_path)) == len(WINDOWS) and sum(asked) == len(WINDOWS) + 3
    assert "has answers about 1 other recordings, which are not named now" in listening.notes[0]
    ask(merged, recordings, tmp_path / "birds.csv", overwrite=True)
    assert sum(asked) == 2 * len(WINDOWS) + 3, "asked anew"


def test_a_file_of_the_users_beside_a_journal_is_left_alone(
    archive: Path, answered: Path, merged: Path, tmp_path: Path
) -> None:
    here = shutil.copytree(answered, tmp_path / "here")
    (here / "birds.txt").write_text("my list of species")
    with pytest.raises(OutputError, match=r"birds\.txt: exists already"):
        ask(merged, archive, here / "birds.txt")
    assert (here / "birds.txt").read_text() == "my list of species"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": "Which bird?"}, 'prompt was "Which species is it?" and is now "Which bird?"'),
        ({"window": 5.0, "hop": 5.0}, "hop was 10.0 and is now 5.0; window was 10.0 and is now 5.0"),
        ({"num_beams": 3}, "num_beams was 1 and is now 3"),
        ({"channel": 2}, "channel was null and is now 2"),
    ],
)
def test_another_question_is_refused_and_says_what_changed(
    archive: Path, answered: Path, merged: Path, tmp_path: Path, changes: dict, said: str
) -> None:
    here = shutil.copytree(answered, tmp_path / "here")
    values = {"prompt": QUESTION.prompt, "num_beams": 1, "max_new_tokens": 4} | changes
    with pytest.raises(RunError, match="answers another question") as caught:
        ask(merged, archive, here / "birds.csv", question=Question(**values))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert (here / "birds.csv").read_bytes() == (answered / "birds.csv").read_bytes()


def test_another_model_is_refused_and_overwritten_where_that_is_said(
    archive: Path, answered: Path, merged: Path, tmp_path: Path
) -> None:
    import mergekit_bio

    sources = {"base": merged.parent / "llama", "adapter": merged.parent / "naturelm", "device": "cpu"}
    (other,) = mergekit_bio.merge(**sources, alphas=[1.0], out=tmp_path / "alpha-1.00")
    here = shutil.copytree(answered, tmp_path / "here")
    with pytest.raises(RunError, match=r"answers another question: checkpoint\.folded was "):
        ask(other.path, archive, here / "birds.csv")
    ask(other.path, archive, here / "birds.csv", overwrite=True)
    with (here / "birds.csv").open(newline="") as file:
        assert {row["alpha"] for row in csv.DictReader(file)} == {"1.0"}


def test_a_key_that_an_older_journal_lacks_was_its_default(archive: Path, answered: Path, merged: Path, tmp_path: Path):
    here = shutil.copytree(answered, tmp_path / "here")
    with sqlite3.connect(here / "birds.journal") as database:
        database.execute("UPDATE facts SET value = json_remove(value, '$.channel') WHERE name = 'identity'")
    database.close()
    ask(merged, archive, here / "birds.csv")
    with pytest.raises(RunError, match="channel was null and is now 2"):
        ask(merged, archive, here / "birds.csv", question=Question(prompt=QUESTION.prompt, channel=2, num_beams=1))


def test_two_at_once_are_refused(archive: Path, merged: Path, tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "birds.journal", {}, unsaid={}),
        pytest.raises(RunError, match="another process is writing"),
    ):
        ask(merged, archive, tmp_path / "birds.csv")


@pytest.mark.parametrize("content", [b"my diary, which is no database of any kind " * 50, b""])
def test_a_file_that_is_no_journal_is_left_alone(archive: Path, merged: Path, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "birds.journal"
    file.write_bytes(content)
    if not content:
        with sqlite3.connect(file) as database:
            database.execute("CREATE TABLE diary (entry TEXT)")
        database.close()
    before = file.read_bytes()
    with pytest.raises(RunError, match="is no journal") as caught:
        ask(merged, archive, tmp_path / "birds.csv")
    assert "\n" not in str(caught.value) and file.read_bytes() == before


def test_a_recording_named_twice_is_asked_about_once(
    archive: Path, merged: Path, asked: list[int], monkeypatch
) -> None:
    monkeypatch.chdir(archive)
    from mergekit_bio.listen.reading import each_once

    named = [Path("site 1/c.wav"), Path("a.wav"), archive / "a.wav", Path("site 1/../a.wav")]
    assert each_once(named) == named[:2]


def test_alone_and_in_the_folder_a_recording_has_the_same_answers(archive: Path, answered: Path, merged: Path) -> None:
    """With a hop, a window and a batch of its own, too."""
    rows = table(answered)
    for name in ("a.wav", "site 1/c.wav"):
        alone = rows_without_a_table(merged, archive / name)
        assert alone == [row for row in rows if row[0] == str(archive / name)]


def test_a_name_that_is_no_text_is_gone_on_with(merged: Path, tmp_path: Path, asked: list[int]) -> None:
    folder = tmp_path / "folder"
    write_recording(folder / "a.wav", 3)
    (folder / "a.wav").rename(folder / os.fsdecode(b"\xff.wav"))
    for _ in range(2):
        ask(merged, folder, tmp_path / "birds.csv")
    ((name, *_),) = table(tmp_path)
    assert name == f"{folder}/\\udcff.wav" and asked == [1]

"""Recordings that cannot be heard, and data that changes between two starts of a run, with a real engine."""

import csv
import errno
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import soundfile
from eval.evaluation import Evaluation, write_evaluation
from typer.testing import CliRunner

from mergekit_bio.cli.app import app
from mergekit_bio.errors import DatasetError, RunError
from mergekit_bio.eval.data import dataset
from mergekit_bio.eval.records.kept_answers import REPLACED, AskedNow, kept_answers
from mergekit_bio.eval.records.predictions import Prediction, read_predictions
from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.eval.report.build import build_report
from mergekit_bio.eval.run.asking import _unbroken
from mergekit_bio.eval.run.evaluate import Run, evaluate
from mergekit_bio.eval.run.progress import SilentListener

RATE = 8000
SPECIES = ("Coruro", "Minke Whale", "Spotted Elachura")
#: How a recording may be no use: what is at its end only shows when it is heard.
BROKEN = {
    "007": b"<!doctype html><title>404</title>",
    "023": b"",
    "041": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "042": bytes(4000),
    "088": None,  # breaks after 0.3 s, which is too little to hear
}


class Listening(SilentListener):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def write_tone(path: Path, number: int) -> None:
    soundfile.write(path, 0.5 * np.sin(np.arange(RATE) * (0.1 + 0.02 * number)), RATE)


def write_metadata(folder: Path, labels: dict[str, str]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "label"), *labels.items()])


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Evaluation:
    """A base and an adapter; each test makes its recordings."""
    return write_evaluation(tmp_path_factory.mktemp("sources"))


def recipe_about(sources: Evaluation, folder: Path, **changes) -> Path:
    """One strength, asked an open question about a folder of recordings."""
    merge = {"base": str(sources.base), "adapter": str(sources.adapter), "alphas": [1.0]}
    plain = {"merge": merge, "datasets": [{"path": str(folder)}], "queries": ["Which species is it?"]}
    shared = {"top_k_species": None, "n_examples": None, "generate": {"max_new_tokens": 3, "num_beams": 1}}
    return sources.variant(folder.parent.name, **(plain | shared | changes))


def started(recipe: Path, out: Path, **options) -> tuple[Run, list[str], Path]:
    """A start of a run, what was said, and its one predictions file."""
    listening = Listening()
    done = evaluate(
        recipe=recipe, out=out, listener=listening, engine="transformers", engine_options={"device": "cpu"}, **options
    )
    return done, [note for note in listening.notes if "merged" not in note], out / done.record.cells[0].file


def encoded(run: Run) -> int:
    """Clips that went through the audio tower, all starts together."""
    return run.record.environment["clips_encoded"]


def test_a_run_with_5_bad_recordings_of_100_finishes_and_completes_once_they_are_mended(sources, tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for number in range(100):
        write_tone(folder / f"{number:03d}.wav", number)
    write_metadata(folder, {f"{number:03d}.wav": SPECIES[number % 3] for number in range(100)})
    sound = shutil.copytree(folder, tmp_path / "sound/recordings")
    for name, content in BROKEN.items():
        (folder / f"{name}.wav").write_bytes(content or b"")
    soundfile.write(folder / "088.wav", np.r_[np.zeros(3 * RATE // 10), np.nan], RATE, subtype="DOUBLE")
    recipe, out = recipe_about(sources, folder), tmp_path / "run"

    # It finishes, names each bad recording once, and counts what is missing.
    done, notes, file = started(recipe, out)
    first = file.read_bytes()
    bad = {f"{name}.wav" for name in BROKEN}
    assert {row.id for row in read_predictions(file)} == {f"{number:03d}.wav" for number in range(100)} - bad
    assert encoded(done) == 95
    left_out = [note for note in notes if note.startswith("note: left out: ")]
    assert len(left_out) == 5 and all(sum(name in note for note in left_out) == 1 for name in bad)
    assert "5 of 100 answers are missing, because 5 recordings cannot be heard; mend" in notes[-1]
    report = build_report(read_runs([out]))
    assert any("incomplete, 95 of 100 clips" in note for note in report.notes)

    # As long as they are as they were, nothing is asked.
    again, notes, _ = started(recipe, out)
    assert file.read_bytes() == first and encoded(again) == 95 and "5 of 100 answers are missing" in notes[-1]

    # Mended, they alone are asked.
    for name in bad:
        shutil.copy(sound / name, folder / name)
    whole, notes, _ = started(recipe, out)
    assert file.read_bytes().startswith(first) and len(read_predictions(file)) == 100
    assert encoded(whole) == 100 and notes == [] and not (out / REPLACED).exists()
    _, _, of_sound = started(recipe_about(sources, sound), tmp_path / "whole", limit=25)
    mended, never_broken = (
        {row.id: (row.generated_ids, row.question) for row in read_predictions(path)} for path in (file, of_sound)
    )
    assert len(never_broken) == 25 and never_broken.items() <= mended.items()


def test_a_run_of_recordings_that_are_all_no_use_does_not_start(sources, tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.wav").write_bytes(b"<html>")
    write_metadata(folder, {"a.wav": "wren", "b.wav": "owl"})
    with pytest.raises(DatasetError, match=r"no recording of it can be heard: .*a\.wav"):
        started(recipe_about(sources, folder), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_changes_changes_its_own_clips_only_and_says_so(sources, tmp_path):
    folder, out = tmp_path / "recordings", tmp_path / "run"
    folder.mkdir()
    labels = {f"{number}.wav": SPECIES[number % 3] for number in range(6)}
    for number in range(8):
        write_tone(folder / f"{number}.wav", number)
    write_metadata(folder, labels)
    recipe = recipe_about(sources, folder)
    _, _, file = started(recipe, out)
    before = {row.id: row for row in read_predictions(file)}

    # One label is mended, one recording is another, one is gone, one is new.
    write_tone(folder / "3.wav", 50)
    labels = {**labels, "0.wav": "Marsh Wren", "7.wav": "Coruro"}
    del labels["5.wav"]
    write_metadata(folder, labels)
    done, notes, _ = started(recipe, out)
    after = {row.id: row for row in read_predictions(file)}
    assert after.keys() == labels.keys() and {name: row.label for name, row in after.items()} == labels
    assert all(after[name] == before[name] for name in ("1.wav", "2.wav", "4.wav"))
    assert after["0.wav"] == replace(before["0.wav"], label="Marsh Wren")
    assert after["3.wav"].question != before["3.wav"].question
    assert encoded(done) == 6 + 2
    assert [note.removeprefix("note: recordings: 1 clip ") for note in notes] == [
        "asked again, because the question or a recording has changed (3.wav); the old answers are in replaced/",
        "not asked about any more (5.wav); the old answers are in replaced/",
        "scored with another label now (0.wav)",
    ]
    aside = read_predictions(out / REPLACED / file.name)
    assert {row.id: row for row in aside} == {name: before[name] for name in ("3.wav", "5.wav")}
    (scored,) = build_report(read_runs([out]), scorer="exact").scores
    assert dict(zip(scored.ids, scored.targets, strict=True)) == labels

    # A list that every question names is another question about every clip.
    listing = {"top_k_species": 9, "queries": ["Which? {species_list}"]}
    started(recipe_about(sources, folder, **listing), tmp_path / "listed")
    write_metadata(folder, labels | {"0.wav": "Marsh Tit"})
    with pytest.raises(RunError, match="data was"):
        started(recipe_about(sources, folder, **listing), tmp_path / "listed")


def test_a_bad_example_leaves_the_questions_open_that_hear_it(sources, tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    names = {f"{number}.wav": SPECIES[number % 2] for number in range(4)}
    for number in range(4):
        write_tone(folder / f"{number}.wav", number)
    write_metadata(folder, names)
    shown = {
        "top_k_species": 2, "n_examples": 1,
        "queries": ["{audio_examples}\nNow name the species in <Audio><AudioHere></Audio>"],
    }  # fmt: skip
    recipe = recipe_about(sources, folder, **shown)
    _, _, whole = started(recipe, tmp_path / "whole")
    rows = read_predictions(whole)
    bad = rows[0].example_ids[0]
    hearing = {row.id for row in rows if bad in (row.id, *row.example_ids)}
    assert {bad, rows[0].id} <= hearing < {*names}
    (folder / bad).write_bytes(b"<html>")
    _, notes, file = started(recipe, tmp_path / "run")
    assert {row.id for row in read_predictions(file)} == {*names} - hearing
    assert f"{len(hearing)} of 4 answers are missing, because 1 recording cannot be heard" in notes[-1]


def test_a_run_that_says_nothing_else_says_what_it_leaves_out(sources, tmp_path):
    folder = tmp_path / "recordings"
    folder.mkdir()
    write_tone(folder / "0.wav", 0)
    (folder / "1.wav").write_bytes(b"<html>")
    write_metadata(folder, {"0.wav": "wren", "1.wav": "owl"})
    command = ["eval", recipe_about(sources, folder), "--out", tmp_path / "run", "--no-report", "--quiet"]
    options = ["--engine", "transformers", "--engine-option", "device=cpu"]
    done = CliRunner().invoke(app, [str(part) for part in command + options])
    assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'run'}\n"
    first, last = done.stderr.splitlines()
    assert "1.wav" in first and "1 of 2 answers are missing, because 1 recording cannot be heard" in last


def row(name: str, **changes) -> Prediction:
    values = {"prediction": "x", "label": "a", "id": name, "dataset_name": "d", "question": "1"}
    return Prediction(**(values | changes))


def test_every_row_is_kept_or_set_aside_and_what_cannot_be_read_now_stands():
    now = AskedNow(questions={"a": "1", "b": "2", "away": None}, labels={"a": "a", "b": "a", "away": "b"})
    rows = [row("a"), row("b"), row("away"), row("gone")]
    kept = kept_answers(rows, now)
    assert [one.id for one in kept.rows] == ["a", "away"] and [one.id for one in kept.replaced] == ["b", "gone"]
    assert (kept.again, kept.gone, kept.relabelled) == (["b"], ["gone"], ["away"])
    assert kept.rows[1].label == "b"


def failing_disk(read, name: str, path: Path, *version: int) -> bytes:
    """A disk that does not give one file at the moment."""
    if path.name == name:
        raise OSError(errno.EIO, "Input/output error")
    return read(path, *version)


def test_a_start_with_a_limit_looks_at_every_answer_that_there_is(sources, tmp_path, monkeypatch):
    folder, out = tmp_path / "recordings", tmp_path / "run"
    folder.mkdir()
    for number in range(6):
        write_tone(folder / f"{number}.wav", number)
    labels = {f"{number}.wav": SPECIES[number % 2] for number in range(6)}
    write_metadata(folder, labels)
    recipe = recipe_about(sources, folder)
    _, _, file = started(recipe, out)
    before = {row.id: row for row in read_predictions(file)}
    # Beyond the limit one recording is another, one is set apart for examples, and one cannot be read for the moment.
    write_tone(folder / "3.wav", 50)
    with (folder / "metadata.csv").open("w", newline="") as table:
        rows = [(name, label, "examples" if name == "4.wav" else "") for name, label in labels.items()]
        csv.writer(table).writerows([("file_name", "label", "split"), *rows])
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_digest_of_version", partial(failing_disk, dataset._digest_of_version, "5.wav"))
        _, notes, _ = started(recipe, out, limit=1)
    assert {row.id: row for row in read_predictions(file)} == {
        name: before[name] for name in ("0.wav", "1.wav", "2.wav", "5.wav")
    }
    assert [note.partition("; ")[0].removeprefix("note: recordings: 1 clip ") for note in notes] == [
        "asked again, because the question or a recording has changed (3.wav)", "not asked about any more (4.wav)",
    ]  # fmt: skip
    _, notes, _ = started(recipe, out)
    assert notes == [] and {row.id for row in read_predictions(file)} == labels.keys() - {"4.wav"}


def test_a_sampled_answer_draws_by_its_place_whatever_is_left_out():
    heard = [(place, f"question {place}", None if place in (3, 6) else f"prompt {place}") for place in range(2, 9)]
    assert [places for places, _, _ in _unbroken(heard, sampled=True)] == [[2], [4, 5], [7, 8]]
    assert [places for places, _, _ in _unbroken(heard, sampled=False)] == [[2, 4, 5, 7, 8]]
    assert [asked for _, asked, _ in _unbroken(heard, sampled=True)][1] == ["question 4", "question 5"]
    assert list(_unbroken([(0, "question", None)], sampled=False)) == []

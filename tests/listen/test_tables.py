"""Answers as tables: every format, read by what the field reads it with."""

import csv
import json
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import soundfile
from listen.archive import QUESTION, RECORDINGS, WINDOWS, ask, write_recording

from mergekit_bio.engine.transformers import TransformersEngine
from mergekit_bio.errors import OutputError

COLUMNS = ["recording", "start", "end", "time", "answer", "model", "alpha", "prompt"]


@pytest.fixture
def here(answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished table's folder, where no engine may start."""
    monkeypatch.setattr(TransformersEngine, "start", lambda *arguments: pytest.fail("everything is answered already"))
    return shutil.copytree(answered, tmp_path / "here")


def read_csv(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def answers(folder: Path) -> list[str]:
    return [row["answer"] for row in read_csv(folder / "birds.csv")]


def test_a_csv_has_a_row_a_window_in_order(answered: Path, archive: Path, merged: Path) -> None:
    rows = read_csv(answered / "birds.csv")
    assert list(rows[0]) == COLUMNS
    assert [(row["recording"], float(row["start"]), float(row["end"])) for row in rows] == [
        (str(archive / name), start, end) for name, start, end in WINDOWS
    ]
    assert {(row["model"], row["alpha"], row["prompt"]) for row in rows} == {(str(merged), "0.5", QUESTION.prompt)}
    assert all(row["answer"] for row in rows)


def test_another_format_is_written_without_the_model(here: Path, archive: Path, merged: Path) -> None:
    ask(merged, archive, here / "birds.jsonl")
    rows = [json.loads(line) for line in (here / "birds.jsonl").read_text().splitlines()]
    assert [list(row) for row in rows] == [COLUMNS] * len(WINDOWS)
    assert [(row["start"], row["end"], row["alpha"]) for row in rows] == [
        (start, end, 0.5) for _, start, end in WINDOWS
    ]
    assert [row["answer"] for row in rows] == answers(here)
    ask(merged, archive, here / "birds.txt")
    lines = (here / "birds.txt").read_text().splitlines()
    assert lines[1].startswith(f"{archive}/site 1/b.flac [0.0-10.0 s]  ") and len(lines) == len(WINDOWS)


def test_parquet_opens_in_pandas(here: Path, archive: Path, merged: Path) -> None:
    pandas = pytest.importorskip("pandas")
    ask(merged, archive, here / "birds.parquet")
    table = pandas.read_parquet(here / "birds.parquet")
    assert list(table.columns) == COLUMNS
    assert [str(table[column].dtype) for column in ("start", "end", "alpha")] == ["float64"] * 3
    assert table["answer"].tolist() == answers(here) and table["end"].tolist() == [end for *_, end in WINDOWS]


#: Raven Pro 1.6 User's Manual, chapter 6: what a selection table's columns may hold. A table is text with tabs, its
#: first line names the columns, a view is a waveform or a spectrogram with its number, and selections are numbered.
RAVEN = {
    "Selection": r"[1-9]\d*",
    "View": r"(Spectrogram|Waveform) [1-9]\d*",
    "Channel": r"[1-9]\d*",
    "Begin Time (s)": r"\d+\.\d+",
    "End Time (s)": r"\d+\.\d+",
    "Low Freq (Hz)": r"\d+\.\d+",
    "High Freq (Hz)": r"\d+\.\d+",
    "Begin Path": r"/[^\t]+",
    "Begin File": r"[^\t/]+",
    "File Offset (s)": r"\d+\.\d+",
}


def read_raven(file: Path) -> list[dict]:
    """Rows of a selection table, every cell as strict as the manual; times and frequencies are numbers."""
    text = file.read_text(encoding="utf-8")
    assert text.endswith("\n") and "\r" not in text
    header, *lines = (line.split("\t") for line in text[:-1].split("\n"))
    assert header == [*RAVEN, "Answer"]
    rows = []
    for number, cells in enumerate(lines, start=1):
        row = dict(zip(header, cells, strict=True))
        for column, form in RAVEN.items():
            assert re.fullmatch(form, row[column]), (column, row[column])
        row |= {column: float(row[column]) for column in RAVEN if column.endswith(("(s)", "(Hz)"))}
        assert int(row["Selection"]) == number
        assert row["Begin Time (s)"] < row["End Time (s)"] and row["Low Freq (Hz)"] < row["High Freq (Hz)"]
        sound = soundfile.info(row["Begin Path"])
        assert row["High Freq (Hz)"] <= sound.samplerate / 2 and row["Begin File"] == Path(row["Begin Path"]).name
        assert row["File Offset (s)"] + row["End Time (s)"] - row["Begin Time (s)"] <= sound.duration + 1e-6
        rows.append(row)
    return rows


def test_raven_opens_a_table_a_recording(here: Path, archive: Path, merged: Path) -> None:
    shutil.copytree(here, tables := here.with_name("tables"))
    (tables / "birds.journal").rename(tables / "answers.journal")
    ask(merged, archive, tables, table_format="raven")
    assert sorted(str(file.relative_to(tables)) for file in tables.rglob("*.selections.txt")) == [
        f"{name}.selections.txt" for name, *_ in RECORDINGS
    ]
    for name, windows in groupby(WINDOWS, key=lambda window: window[0]):
        rows = read_raven(tables / f"{name}.selections.txt")
        spans = [(start, end) for _, start, end in windows]
        assert [(row["Begin Time (s)"], row["End Time (s)"]) for row in rows] == spans
        assert [row["File Offset (s)"] for row in rows] == [start for start, _ in spans]
        assert {row["Begin Path"] for row in rows} == {str(archive / name)}
    assert read_raven(tables / "site 1/b.flac.selections.txt")[0]["High Freq (Hz)"] == 4000
    assert read_raven(tables / "a.wav.selections.txt")[0]["High Freq (Hz)"] == 8000, "all that the model hears"


def begins_of(archive: Path) -> dict[str, float]:
    """Where each recording begins when all are opened as one sound."""
    begins: dict[str, float] = {}
    for name, *_ in RECORDINGS:
        begins[str(archive / name)] = sum(soundfile.info(file).duration for file in begins)
    return begins


def test_ravens_table_of_all_recordings_counts_on_from_the_one_before(here: Path, archive: Path, merged: Path) -> None:
    """As Raven opens several files as one sound: where a file begins is the length of all before it."""
    ask(merged, archive, here / "birds.txt", table_format="raven")
    rows = read_raven(here / "birds.txt")
    assert [row["Answer"] for row in rows] == [" ".join(text.split()) for text in answers(here)]
    begins = begins_of(archive)
    for row, (_, start, end) in zip(rows, WINDOWS, strict=True):
        begin = begins[row["Begin Path"]]
        assert row["File Offset (s)"] == start
        assert (row["Begin Time (s)"], row["End Time (s)"]) == pytest.approx((begin + start, begin + end), abs=1e-5)


def test_a_recording_without_answers_is_as_long_in_ravens_table_as_any(here: Path, archive: Path, merged: Path) -> None:
    with closing(sqlite3.connect(here / "birds.journal", isolation_level=None)) as journal:
        too_quiet = "SELECT id FROM recordings WHERE CAST(path AS TEXT) LIKE '%/site 1/b.flac'"
        assert journal.execute(f"UPDATE windows SET answer = NULL WHERE recording IN ({too_quiet})").rowcount == 3
    ask(merged, archive, here / "birds.txt", table_format="raven")
    rows, begins = read_raven(here / "birds.txt"), begins_of(archive)
    assert len(rows) == len(WINDOWS) - 3
    for row in rows:
        assert row["Begin Time (s)"] - row["File Offset (s)"] == pytest.approx(begins[row["Begin Path"]], abs=1e-5)


def test_audacity_imports_a_label_track_a_recording(here: Path, archive: Path, merged: Path) -> None:
    """Audacity's manual, "Importing and Exporting Labels": start, end (s) and the label, with tabs, a line each."""
    shutil.copytree(here, tracks := here.with_name("tracks"))
    (tracks / "birds.journal").rename(tracks / "answers.journal")
    ask(merged, archive, tracks, table_format="audacity")
    for name, windows in groupby(WINDOWS, key=lambda window: window[0]):
        lines = (tracks / f"{name}.labels.txt").read_text(encoding="utf-8").splitlines()
        parts = [re.fullmatch(r"(\d+\.\d+)\t(\d+\.\d+)\t([^\t]*)", line).groups() for line in lines]
        assert [(float(start), float(end)) for start, end, _ in parts] == [(start, end) for _, start, end in windows]


def test_no_table_of_a_recording_tells_what_is_no_longer_so(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has become no recording, and all where another question begins anew and is stopped at once."""
    archive, tracks = tmp_path / "archive", tmp_path / "tracks"
    for name in ("a.wav", "b.wav", "gone.wav"):
        write_recording(archive / name, 1)
    asked = {"table_format": "audacity", "overwrite": True}
    ask(merged, archive, tracks, **asked)
    (tracks / "mine.labels.txt").write_text("mine")
    assert tables_in(tracks) == ["a.wav", "b.wav", "gone.wav", "mine"]
    (archive / "a.wav").write_text("no sound")
    (archive / "gone.wav").unlink()
    ask(merged, archive, tracks, table_format="audacity")
    assert tables_in(tracks) == ["b.wav", "gone.wav", "mine"], "what is gone was answered"

    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformersEngine, "start", stopped)
    with pytest.raises(KeyboardInterrupt):
        ask(merged, archive, tracks, question=replace(QUESTION, prompt="How many?"), **asked)
    assert tables_in(tracks) == ["mine"]


def tables_in(folder: Path) -> list[str]:
    return sorted(file.name.removesuffix(".labels.txt") for file in folder.glob("*.labels.txt"))


@pytest.mark.parametrize(
    ("out", "table_format", "said"),
    [
        ("birds.xlsx", None, "the name must end in .csv, .jsonl, .txt, .parquet"),
        ("birds", None, "folders are for --format raven or audacity"),
        ("birds.csv", "raven", "name a folder, or one .txt for all recordings"),
        ("birds.txt", "audacity", "name a folder"),
        ("birds", "ravn", "--format ravn: no such format; did you mean 'raven'?"),
        ("nowhere/birds.csv", None, "nowhere: no such folder"),
        ("mine.csv", None, "mine.csv: exists already; choose another --out or pass --overwrite"),
    ],
)
def test_a_table_that_cannot_be_written_is_refused_in_one_line(
    here: Path, archive: Path, merged: Path, out: str, table_format: str | None, said: str
) -> None:
    (here / "mine.csv").write_text("mine")
    with pytest.raises(OutputError) as caught:
        ask(merged, archive, here / out, table_format=table_format)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert (here / "mine.csv").read_text() == "mine"


def test_an_answer_of_several_lines_stays_one_row(tmp_path: Path) -> None:
    from mergekit_bio.listen.asking import Answer, AnsweredWindow
    from mergekit_bio.listen.journal import Journal
    from mergekit_bio.listen.reading import Ended
    from mergekit_bio.listen.tables.choice import table_class
    from mergekit_bio.listen.tables.interface import About

    recording = str(tmp_path / "tab\tand  two\rünïcode.wav")
    text = 'A wren,\n"Troglodytes"\tsings;\r\nagain\rand again'
    soundfile.write(recording, [0.0] * 16_000, 16_000)
    about = About(root=tmp_path, model="m", alpha=None, prompt="What?")
    with Journal(None, {}, unsaid={}) as journal:
        journal.open_recordings([recording])
        journal.add([AnsweredWindow(recording, 0, 0.0, 1.0, Answer(text))], [Ended(recording, 1.0, 16_000)])
        for name, table_format in (("a.csv", None), ("a.txt", None), ("r.txt", "raven"), ("labels", "audacity")):
            out = tmp_path / name
            table = table_class(out, table_format)(out, about)
            table.begin(journal)
            table.finish(journal)
    (row,) = read_csv(tmp_path / "a.csv")
    assert (row["recording"], row["answer"], row["alpha"]) == (recording, text, "")
    pandas = pytest.importorskip("pandas")
    assert pandas.read_csv(tmp_path / "a.csv")["answer"].tolist() == [text]
    one_line = 'A wren, "Troglodytes" sings; again and again'
    assert (tmp_path / "a.txt").read_text().splitlines()[-1].endswith(one_line)
    cells = (tmp_path / "r.txt").read_text().splitlines()[1].split("\t")
    assert (cells[8], cells[-1]) == ("tab and  two ünïcode.wav", one_line)
    (track,) = (tmp_path / "labels").glob("*.txt")
    assert track.read_text() == f"0.000000\t1.000000\t{one_line}\n"

"""Annotated archives as benchmarks: parts of long recordings, named in Raven's tables or in metadata.csv."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from mergekit_bio.audio import recording
from mergekit_bio.demo.calls import call
from mergekit_bio.demo.run import MODEL
from mergekit_bio.demo.species import UNHEARD
from mergekit_bio.errors import DatasetError, RecipeError
from mergekit_bio.eval.data.audio_folder import open_audio_folder
from mergekit_bio.eval.recipe.schema import load_recipe
from mergekit_bio.eval.records.predictions import read_predictions
from mergekit_bio.eval.run import headers
from mergekit_bio.eval.run.evaluate import Run, evaluate
from mergekit_bio.eval.run.progress import SilentListener
from mergekit_bio.merging.merge import merge

RATE = 22_050
COLUMNS = (
    "Selection",
    "View",
    "Channel",
    "Begin Time (s)",
    "End Time (s)",
    "Low Freq (Hz)",
    "High Freq (Hz)",
    "Species",
)


def write_raven(file: Path, rows: list[tuple[float, float, str]]) -> None:
    """A table as Raven saves it: every selection in both of its views."""
    with file.open("w") as table:
        print(*COLUMNS, sep="\t", file=table)
        for number, (start, end, label) in enumerate(rows, start=1):
            for view in ("Waveform 1", "Spectrogram 1"):
                print(number, view, 1, f"{start:.9f}", f"{end:.9f}", 0, RATE / 2, label, sep="\t", file=table)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Four long recordings of five species, with a table of ten selections each."""
    folder = tmp_path_factory.mktemp("archive")
    random = np.random.default_rng(7)
    for number in range(4):
        (folder / f"site{number % 2}").mkdir(exist_ok=True)
        calls, rows = [], []
        for place in range(10):
            species = UNHEARD[random.integers(len(UNHEARD))]
            sung = call(voice=species.voice, phrase=species.phrase, random=random)
            seconds = np.arange(10 * RATE) / RATE
            calls.append(np.interp(seconds, np.arange(len(sung)) / 16_000, sung))
            start = 10 * place + random.uniform(0, 4)
            rows.append((round(start, 6), round(start + random.uniform(0.6, 6), 6), species.scientific))
        samples = np.stack([np.concatenate(calls), 0.5 * np.concatenate(calls)], axis=1)
        file = folder / f"site{number % 2}/night{number}.wav"
        soundfile.write(file, samples, RATE, subtype="PCM_16")
        write_raven(file.with_suffix(".Table.1.selections.txt"), rows)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "alpha-0.50"
    merge(base=MODEL / "base", adapter=MODEL / "adapter", alphas=[0.5], out=out, device="cpu")
    return out


def run_about(folder: Path, checkpoint: Path, out: Path, listener: SilentListener | None = None, **choice) -> Run:
    """A run that asks about the folder."""
    recipe = {
        "checkpoints": [str(checkpoint)],
        "datasets": [{"path": str(folder), "name": "archive", **choice}],
        "queries": ["What is the scientific name for the focal species in the audio?"],
        "generate": {"max_new_tokens": 12, "num_beams": 1},
        "scorer": "exact",
    }
    out.mkdir()
    (out / "archive.yaml").write_text(yaml.safe_dump(recipe))
    options = {"device": "cpu", "dtype": "float32"}
    return evaluate(
        recipe=out / "archive.yaml",
        out=out / "run",
        engine="transformers",
        engine_options=options,
        listener=listener,
    )


def answers(folder: Path, checkpoint: Path, out: Path, **choice) -> list[tuple[str, str, str, float]]:
    """Id, label, answer and its log-probability, in the order of the ids."""
    run = run_about(folder, checkpoint, out, **choice)
    (cell,) = run.record.cells
    rows = read_predictions(run.path / cell.file)
    return sorted((row.id, row.label, row.prediction, pytest.approx(row.logprob, abs=1e-4)) for row in rows)


def test_a_table_of_labelled_windows_is_answered_as_files_that_are_cut_out(archive, checkpoint, tmp_path):
    cut = tmp_path / "cut"
    cut.mkdir()
    with (cut / "metadata.csv").open("w", newline="") as metadata:
        writer = csv.writer(metadata)
        writer.writerow(["file_name", "label"])
        for table in sorted(archive.rglob("*.txt")):
            for row in csv.DictReader(table.open(), delimiter="\t", quoting=csv.QUOTE_NONE):
                if row["View"] == "Waveform 1":
                    start, end = float(row["Begin Time (s)"]), float(row["End Time (s)"])
                    name = f"{table.name.partition('.')[0]}-{start:08.4f}.wav"
                    samples, rate = soundfile.read(
                        table.with_name(table.name.partition(".")[0] + ".wav"),
                        start=round(start * RATE), stop=round(end * RATE), dtype="int16",
                    )  # fmt: skip
                    soundfile.write(cut / name, samples, rate)
                    writer.writerow([name, row["Species"]])

    windows = answers(archive, checkpoint, tmp_path / "windows", label_column="Species")
    files = answers(cut, checkpoint, tmp_path / "files")

    assert len(windows) == len(files) == 40
    by_place = sorted(windows, key=lambda row: (row[0].split("/")[1][:6], float(row[0].split(":")[1].split("-")[0])))
    assert [row[1:] for row in by_place] == [row[1:] for row in files]
    assert len({answer for _, _, answer, _ in files}) > 3


def test_a_recording_of_many_rows_is_looked_at_once_and_named_once(archive, checkpoint, tmp_path, monkeypatch):
    folder = shutil.copytree(archive, tmp_path / "copy")
    (folder / "site0/night2.wav").write_text("<!doctype html><title>404</title>")
    looked_at, notes = [], []

    class Listening(SilentListener):
        def note(self, text: str) -> None:
            notes.append(text)

    def read_samples(path: Path, **options):
        looked_at.append(path.name)
        return recording.read_samples(path, **options)

    monkeypatch.setattr(headers, "read_samples", read_samples)
    run = run_about(folder, checkpoint, tmp_path / "out", listener=Listening(), label_column="Species")

    assert sorted(looked_at) == [f"night{number}.wav" for number in range(4)]
    (named,) = [note for note in notes if note.startswith("note: left out: ")]
    assert "night2.wav" in named
    assert len(read_predictions(run.path / run.record.cells[0].file)) == 30


def test_metadata_may_name_parts_of_recordings(archive, checkpoint, tmp_path):
    folder = shutil.copytree(archive, tmp_path / "copy", ignore=shutil.ignore_patterns("*.txt"))
    tables = sorted(archive.rglob("night0*.txt"))
    rows = [
        row for table in tables for row in csv.DictReader(table.open(), delimiter="\t") if row["View"] == "Waveform 1"
    ]
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "start", "end", "Species"])
        for row in rows:
            writer.writerow(["site0/night0.wav", row["Begin Time (s)"], row["End Time (s)"], row["Species"]])

    of_table = answers(tables[0], checkpoint, tmp_path / "table", label_column="Species")
    of_metadata = answers(folder, checkpoint, tmp_path / "metadata", label_column="Species")

    assert len(of_table) == 10
    assert [row[1:] for row in of_metadata] == [row[1:] for row in of_table]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One recording of thirty seconds in which every sample says where it is."""
    soundfile.write(tmp_path / "a.wav", np.arange(30 * 1000) / 32768, 1000, subtype="PCM_16")
    return tmp_path


def rows(folder: Path, metadata: str) -> dict[str, tuple[float, float]]:
    """Id -> the first and last second that are heard."""
    (folder / "metadata.csv").write_text(metadata)
    dataset = open_audio_folder(folder, name="f", task="classification")
    heard = {row.id: dataset.audio(row.id) for row in dataset.asked}
    return {
        row_id: (samples[0] * 32768 / rate, samples[-1] * 32768 / rate) for row_id, (samples, rate) in heard.items()
    }


def test_a_part_begins_and_ends_where_its_row_says(folder):
    metadata = "file_name,start,end,label\na.wav,1.5,4,x\na.wav,,2,y\na.wav,21,,x\na.wav,,,z\na.wav,3,25,y\n"
    assert rows(folder, metadata) == {
        "a.wav:1.5-4": (1.5, 3.999),
        "a.wav:0-2": (0, 1.999),
        "a.wav:21-": (21, 29.999),
        "a.wav": (0, 9.999),
        "a.wav:3-25": (3, 12.999),
    }


def test_of_a_longer_part_the_beginning_is_heard_and_a_note_says_so(folder):
    (folder / "metadata.csv").write_text("file_name,start,end,label\na.wav,3,25,y\na.wav,1,2,x\n")

    (note,) = open_audio_folder(folder, name="f", task="classification").notes
    assert note == "f: 1 of 2 parts of recordings are longer than 10 s; their first 10 s are heard"


def test_a_recording_of_many_rows_counts_once_for_the_fingerprint_and_all_its_rows_do(folder):
    def fingerprint(*starts: int) -> str:
        lines = "".join(f"a.wav,{start},{start + 1},x\n" for start in starts)
        (folder / "metadata.csv").write_text("file_name,start,end,label\n" + lines)
        return open_audio_folder(folder, name="f", task="classification").fingerprint()

    assert fingerprint(1, 2) == fingerprint(2, 1) != fingerprint(1, 3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a.wav,4,2,x", "metadata.csv:2: ends at 2 s, which is not behind its start at 4 s"),
        ("a.wav,two,4,x", "metadata.csv:2: start: 'two' is no time in seconds"),
        ("a.wav,-1,4,x", "metadata.csv:2: start: '-1' is no time in seconds"),
        ("a.wav,1,2,x\na.wav,1.0,2.0,y", "metadata.csv:3: the id 'a.wav:1-2' stands in"),
    ],
)
def test_bad_times_are_named_with_their_line(folder, line, said):
    with pytest.raises(DatasetError) as error:
        rows(folder, "file_name,start,end,label\n" + line + "\n")

    assert said in str(error.value)


@pytest.mark.parametrize("start", ["true", "[1]", '"one"', "-1", "1e999", "1" + "0" * 400])
def test_a_time_that_json_writes_otherwise_is_named_with_its_line(folder, start):
    (folder / "metadata.jsonl").write_text(f'{{"file_name": "a.wav", "start": {start}, "label": "x"}}\n')
    with pytest.raises(DatasetError, match=r"metadata\.jsonl:1: start: .* is no time in seconds"):
        open_audio_folder(folder, name="f", task="classification")


def test_a_part_behind_the_end_of_its_recording_is_named(folder):
    with pytest.raises(Exception, match=r"a\.wav: there is nothing in it from 31 s on"):
        rows(folder, "file_name,start,end,label\na.wav,31,32,x\n")


def test_selections_of_one_stretch_are_one_row_with_all_labels_where_several_may_be_right(folder):
    write_raven(folder / "a.txt", [(1, 2, "wren"), (1, 2, "sora"), (1, 2, "wren"), (3, 4, "rail")])

    dataset = open_audio_folder(folder, name="f", task="detection", label_column="Species")
    assert [(row.id, row.label) for row in dataset.asked] == [("a.wav:1-2", "wren, sora"), ("a.wav:3-4", "rail")]
    with pytest.raises(DatasetError, match=r"a\.txt:4: 'sora' is about the same stretch as 'wren' .*task: detection"):
        open_audio_folder(folder, name="f", task="classification", label_column="Species")


@pytest.mark.parametrize(
    ("label_column", "rows", "said"),
    [
        (None, [(1, 2, "wren")], "a.txt:2: which column holds the label? Say label_column: Selection or View"),
        ("Specis", [(1, 2, "wren")], "a.txt:2: no column 'Specis'; did you mean 'Species'?"),
        ("Species", [(1, 2, "")], "a.txt:2: no Species"),
        ("Species", [], "no clip in it"),
    ],
)
def test_what_is_wrong_with_a_table_is_named_with_its_line(folder, label_column, rows, said):
    write_raven(folder / "a.txt", rows)

    with pytest.raises(DatasetError) as error:
        open_audio_folder(folder, name="f", task="classification", label_column=label_column)
    assert said in str(error.value)


def test_a_table_about_a_recording_that_is_not_there_is_named(folder):
    (folder / "b.txt").write_text(
        "Selection\tBegin Time (s)\tEnd Time (s)\tBegin File\tSpecies\n1\t1\t2\tc.wav\twren\n"
    )

    with pytest.raises(DatasetError, match=r"b\.txt:2: the recording 'c\.wav' is not in"):
        open_audio_folder(folder, name="f", task="classification", label_column="Species")


def test_a_component_has_no_label_column(tmp_path):
    (tmp_path / "r.yaml").write_text("checkpoints: [x]\ndatasets: [{name: cbi, label_column: Species}]\n")

    with pytest.raises(RecipeError, match=r"r\.yaml:2: datasets: .*leave label_column out"):
        load_recipe(tmp_path / "r.yaml")

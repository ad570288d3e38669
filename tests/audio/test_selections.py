"""Tables of windows as Raven, Audacity and BirdNET write them, and the recordings that they are about."""

import csv
from pathlib import Path

import pytest

from mergekit_bio.audio.selections import RecordingFinder, Selection, is_raven_table, read_selections
from mergekit_bio.errors import AudioError

#: Columns of a table that Raven Pro 1.6 saves, each selection drawn in two views.
RAVEN = """\
Selection	View	Channel	Begin Time (s)	End Time (s)	Low Freq (Hz)	High Freq (Hz)	Species
1	Waveform 1	1	1.500000000	3.250000000	0.000	22050.000	Marsh Wren
1	Spectrogram 1	1	1.500000000	3.250000000	1200.000	7800.000	Marsh Wren
2	Waveform 1	1	12.100000000	12.400000000	0.000	22050.000	"the "odd" one"
2	Spectrogram 1	1	12.100000000	12.400000000	900.000	3000.000	"the "odd" one"
"""

#: One table about several files: times are those of all files one after the other.
RAVEN_OF_FILES = """\
Selection	View	Channel	Begin Time (s)	End Time (s)	Low Freq (Hz)	High Freq (Hz)	Begin Path	File Offset (s)
1	Spectrogram 1	1	5	8	0	8000	C:\\field\\site1\\a.wav	5
2	Spectrogram 1	1	63.5	66.75	0	8000	C:\\field\\site1\\b.wav	3.5
3	Spectrogram 1	1	121.0	124.0	0	8000	C:\\field\\site2\\a.wav	1.0
"""

#: The example of Audacity's manual, "Extended format with frequency ranges".
AUDACITY = """\
1.000000	1.000000	This point was clicked at 6928.456055 Hz
\\	6928.456055	6928.456055
2.000000	2.500000	Low frequency undefined, High frequency 6334.588867 Hz
\\	-1.000000	6334.588867
3.000000	3.500000	Low frequency 8908.015625, High frequency undefined
\\	8908.015625	-1.000000
4.000000	4.500000	Low frequency 1484.669312 Hz, High frequency 2969.338523 Hz
\\	1484.669312	2969.338523
"""

BIRDNET = """\
Start (s),End (s),Scientific name,Common name,Confidence,File
0.0,3.0,Troglodytes troglodytes,Eurasian Wren,0.7211,/field/site1/a.wav
3.0,6.0,Turdus merula,Eurasian Blackbird,0.5421,/field/site1/a.wav
"""


def read(tmp_path: Path, text: str, name: str = "table.txt") -> list[Selection]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_selections(tmp_path / name, error=AudioError)


def times(selections: list[Selection]) -> list[tuple[float, float]]:
    return [(selection.start, selection.end) for selection in selections]


def test_a_raven_selection_counts_once_however_many_views_it_has(tmp_path: Path) -> None:
    selections = read(tmp_path, RAVEN)

    assert times(selections) == [(1.5, 3.25), (12.1, 12.4)]
    assert [selection.values["Species"] for selection in selections] == ["Marsh Wren", '"the "odd" one"']
    assert [selection.recording for selection in selections] == [None, None]
    assert selections[1].where == f"{tmp_path / 'table.txt'}:4"
    assert is_raven_table(tmp_path / "table.txt")


def test_in_a_raven_table_about_files_the_offset_is_the_start(tmp_path: Path) -> None:
    selections = read(tmp_path, RAVEN_OF_FILES)

    assert times(selections) == [(5, 8), (3.5, 6.75), (1, 4)]
    assert selections[2].recording == "C:\\field\\site2\\a.wav"


@pytest.mark.parametrize("separator", [",", ";"])
def test_ravens_table_as_a_spreadsheet_saves_it_is_the_same(tmp_path: Path, separator: str) -> None:
    """One row a selection, and the offset is the start."""
    rows = [line.split("\t") for line in RAVEN_OF_FILES.splitlines()]
    doubled = [rows[0], *(row for row in rows[1:] for _ in "ab")]
    with (tmp_path / "table.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(doubled)
    selections = read_selections(tmp_path / "table.csv", error=AudioError)

    assert times(selections) == [(5, 8), (3.5, 6.75), (1, 4)]
    assert [selection.recording for selection in selections] == [row[7] for row in rows[1:]]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_a_raven_table_is_known_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    marks = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}
    (tmp_path / "table.txt").write_bytes(marks.get(encoding, b"") + RAVEN.encode(encoding))

    assert is_raven_table(tmp_path / "table.txt")
    assert times(read_selections(tmp_path / "table.txt", error=AudioError)) == [(1.5, 3.25), (12.1, 12.4)]


def test_selections_of_tables_that_were_joined_are_all_there(tmp_path: Path) -> None:
    header, *rows = RAVEN.splitlines(keepends=True)
    more = [row.replace("1.5", "21.5", 1).replace("3.25", "23.25", 1) for row in rows[:2]]

    assert times(read(tmp_path, header + "".join(rows + more))) == [(1.5, 3.25), (12.1, 12.4), (21.5, 23.25)]


def test_audacitys_labels_are_read_without_their_frequencies(tmp_path: Path) -> None:
    selections = read(tmp_path, AUDACITY)

    assert times(selections) == [(1, 1), (2, 2.5), (3, 3.5), (4, 4.5)]
    assert selections[0].values["label"] == "This point was clicked at 6928.456055 Hz"
    assert not is_raven_table(tmp_path / "table.txt")


@pytest.mark.parametrize(
    "text",
    [
        BIRDNET,
        *(f"{column},start,end\na.wav,0,3.0\na.wav,3,6\n" for column in ("file", "recording", "filepath", "IN FILE")),
    ],
)
def test_csv_tables_name_recordings_and_times(tmp_path: Path, text: str) -> None:
    selections = read(tmp_path, text, "table.csv")

    assert times(selections) == [(0, 3), (3, 6)]
    assert {Path(selection.recording).name for selection in selections} == {"a.wav"}


def test_a_comma_may_be_the_decimal_point(tmp_path: Path) -> None:
    assert times(read(tmp_path, "1,5\t3,25\twren\n")) == [(1.5, 3.25)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RAVEN.replace("12.100000000", "twelve", 1), ":4: begin time (s): 'twelve' is no time in seconds"),
        (RAVEN.replace("3.250000000", "1.25", 1), ":2: ends at 1.25 s, before its start at 1.5 s"),
        ("1.0\t2.0\ta\n-1.0\t2.0\tb\n", ":2: start: '-1.0' is no time in seconds"),
        ("file,begin,end\na.wav,1,2\n", "no column 'start'"),
        ("Marsh Wren\n", "no column 'start'"),
        (RAVEN.replace("Channel", "View", 1), ":1: the column 'View' stands twice"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(AudioError) as error:
        read(tmp_path, text + ("x\n" if text == "Marsh Wren\n" else ""))

    assert message in str(error.value) and str(tmp_path / "table.txt") in str(error.value)


def find(recordings: list[str], named: str | None, table: str = "table.txt") -> str | None:
    selection = Selection(0, 1, "table.txt:2", named)
    found = RecordingFinder(map(Path, recordings)).find(selection, Path(table), error=AudioError)
    return None if found is None else str(found)


TREE = ["/data/site1/a.wav", "/data/site1/b.wav", "/data/site2/a.wav"]


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("b.wav", "/data/site1/b.wav"),
        ("C:\\field\\site2\\a.wav", "/data/site2/a.wav"),
        ("site1/a.wav", "/data/site1/a.wav"),
        ("c.wav", None),
    ],
)
def test_a_recording_is_found_by_its_name_and_the_folders_above_it(named: str, found: str | None) -> None:
    assert find(TREE, named) == found


def test_a_path_that_leads_to_a_file_names_it_or_a_copy_of_it(tmp_path: Path) -> None:
    """Recorders of many sites write the same names."""
    for place, content in {"site1": b"one", "site2": b"two", "copy": b"one", "longer": b"one and more"}.items():
        (tmp_path / place).mkdir()
        (tmp_path / place / "20240501_050000.WAV").write_bytes(content)
    named = [f"{tmp_path}/site1/20240501_050000.WAV", "site1/20240501_050000.WAV"]
    for place, is_found in {"site1": True, "site2": False, "copy": True, "longer": False}.items():
        recording = tmp_path / place / "20240501_050000.WAV"
        for name in named:
            found = RecordingFinder([recording]).find(
                Selection(0, 1, "here", name), tmp_path / "t.txt", error=AudioError
            )
            assert found == (recording if is_found else None), (place, name)


def test_what_is_found_by_its_name_alone_is_told() -> None:
    finder = RecordingFinder([Path("/data/site1/a.wav"), Path("/data/site1/b.wav")])
    for named in ("a.wav", "C:\\field\\site1\\a.wav", "C:\\field\\site2\\b.wav"):
        assert finder.find(Selection(0, 1, "here", named), Path("table.txt"), error=AudioError)

    assert finder.by_name == {"C:\\field\\site2\\b.wav": Path("/data/site1/b.wav")}


def test_a_name_is_found_however_its_accents_are_written() -> None:
    assert find(["/data/e\u0301toile.wav", "/data/b.wav"], "\u00e9toile.wav") == "/data/e\u0301toile.wav"


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ("b.Table.1.selections.txt", "/data/site1/b.wav"),
        ("b.BirdNET.selection.table.txt", "/data/site1/b.wav"),
        ("b.txt", "/data/site1/b.wav"),
    ],
)
def test_a_table_that_names_no_recording_is_about_the_one_of_its_name(table: str, found: str) -> None:
    assert find(TREE, None, table) == found


def test_a_table_that_names_no_recording_is_about_the_only_one() -> None:
    assert find(["/data/x.wav"], None, "labels.txt") == "/data/x.wav"


@pytest.mark.parametrize(
    ("named", "table", "message"),
    [
        ("a.wav", "table.txt", "'a.wav' could be /data/site1/a.wav or /data/site2/a.wav; name it further"),
        (None, "labels.txt", "names no recording, and of the 3 recordings none has the table's name"),
        (None, "a.txt", "names no recording, and of the 3 recordings several have the table's name"),
    ],
)
def test_a_recording_that_cannot_be_told_is_an_error(named: str | None, table: str, message: str) -> None:
    with pytest.raises(AudioError, match=r"table\.txt:2: ") as error:
        find(TREE, named, table)

    assert message in str(error.value)

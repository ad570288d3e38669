"""Tables become the windows that are asked about."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bio.errors import AudioError
from mergekit_bio.listen.selected import Selected, find_tables, select_windows


def select(tmp_path: Path, rows: str, recordings: str = "a.wav b.wav", **options) -> Selected:
    (tmp_path / "table.csv").write_text("file,start,end\n" + rows)
    given = {"window": 10.0, "hop": 10.0} | options
    return select_windows([tmp_path / "table.csv"], [Path(name) for name in recordings.split()], **given)


def test_windows_are_in_order_and_each_is_asked_once(tmp_path: Path) -> None:
    selected = select(tmp_path, "b.wav,5,8\na.wav,7.5,9\na.wav,1,3\nb.wav,5,8\n")

    assert selected.windows == {Path("a.wav"): ((1, 3), (7.5, 9)), Path("b.wav"): ((5, 8),)}
    assert selected.notes == ()


@pytest.mark.parametrize(
    ("seconds", "options", "windows"),
    [
        (10.0, {}, [(3, 13)]),
        (10.49, {}, [(3, 13)]),  # as in a whole recording, a tail below 0.5 s is no window
        (10.5, {}, [(3, 13), (13, 13.5)]),
        (25.0, {}, [(3, 13), (13, 23), (23, 28)]),
        (5.0, {"window": 2.0, "hop": 2.0}, [(3, 5), (5, 7), (7, 8)]),
        (5.0, {"window": 4.0, "hop": 1.0}, [(3, 7), (4, 8)]),
        (5.0, {"window": 1.0, "hop": 3.0}, [(3, 4), (6, 7)]),
    ],
)
def test_a_long_selection_is_heard_in_windows(tmp_path: Path, seconds: float, options: dict, windows: list) -> None:
    assert select(tmp_path, f"a.wav,3,{3 + seconds}\n", **options).windows == {Path("a.wav"): tuple(windows)}


@given(st.floats(0, 1e5), st.floats(0.5, 100), st.floats(0.5, 10))
def test_windows_cover_a_selection_but_for_less_than_half_a_second(start: float, seconds: float, window: float) -> None:
    from mergekit_bio.audio.selections import Selection
    from mergekit_bio.listen.selected import _split

    spans = _split(Selection(start, start + seconds, "here"), window=window, hop=window)
    assert spans[0][0] == pytest.approx(start, abs=1e-6)
    assert all(left[1] == pytest.approx(right[0], abs=2e-6) for left, right in pairwise(spans))
    assert all(0.5 - 1e-5 <= end - begin <= window + 2e-6 for begin, end in spans)
    assert -1e-5 <= start + seconds - spans[-1][1] < 0.5


def test_half_a_second_is_long_enough_wherever_it_begins(tmp_path: Path) -> None:
    rows = "".join(f"a.wav,{n / 10},{(n + 5) / 10}\n" for n in range(1000)) + "b.wav,0.2,10.7\n"
    selected = select(tmp_path, rows)

    assert selected.notes == ()
    assert selected.windows[Path("a.wav")] == tuple((n / 10, (n + 5) / 10) for n in range(1000))
    assert selected.windows[Path("b.wav")] == ((0.2, 10.2), (10.2, 10.7))


def test_short_selections_are_refused_by_their_rows(tmp_path: Path) -> None:
    selected = select(tmp_path, "a.wav,1,1.25\na.wav,2,3\n" + "a.wav,4,4\n" * 9)

    assert selected.windows == {Path("a.wav"): ((2, 3),)}
    assert selected.notes[0] == f"{tmp_path / 'table.csv'}:2: refused: it lasts 0.25 s of at least 0.5"
    assert selected.notes[5:] == ("refused: 5 more selections of less than 0.5 s",)


def test_recordings_that_were_not_named_are_left_out_and_counted(tmp_path: Path) -> None:
    selected = select(tmp_path, "a.wav,2,3\nc.wav,2,3\nc.wav,4,6\nd.wav,1,2\n")

    assert [*selected.windows] == [Path("a.wav")]
    assert selected.notes == ("left out: 3 selections of 2 recordings that are not among those named (c.wav, d.wav)",)


def test_what_is_found_by_its_name_alone_is_noted_once(tmp_path: Path) -> None:
    selected = select(tmp_path, "E:\\x\\a.wav,2,3\nE:\\x\\a.wav,4,6\nE:\\y\\b.wav,1,2\n", "/data/a.wav /data/b.wav")

    assert selected.notes == ("found by name alone: E:\\x\\a.wav is taken to be /data/a.wav; so are 1 more",)


def test_a_whole_path_may_lead_elsewhere_where_that_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "far.wav").write_text("")

    assert [*select(tmp_path, f"{tmp_path / 'far.wav'},2,3\n", elsewhere=True).windows] == [tmp_path / "far.wav"]


def test_a_recording_is_one_however_rows_spell_it(tmp_path: Path) -> None:
    (tmp_path / "far.wav").write_text("")
    rows = f"{tmp_path}/far.wav,2,3\n{tmp_path}/../{tmp_path.name}/far.wav,4,5\n"

    assert select(tmp_path, rows, elsewhere=True).windows == {tmp_path / "far.wav": ((2, 3), (4, 5))}


def test_begin_times_that_may_count_on_over_recordings_are_told(tmp_path: Path) -> None:
    (table := tmp_path / "table.txt").write_text(
        "Selection\tBegin Time (s)\tEnd Time (s)\tBegin File\n1\t1\t3\ta.wav\n2\t61\t63\tb.wav\n"
    )
    selected = select_windows([table], [Path("a.wav"), Path("b.wav")], window=10, hop=10)

    assert selected.windows == {Path("a.wav"): ((1, 3),), Path("b.wav"): ((61, 63),)}
    (note,) = selected.notes
    assert note.startswith(f"{table}: is about 2 recordings and has no column File Offset (s): ")


@pytest.mark.parametrize(
    ("rows", "message"),
    [("", "no selection in it"), ("c.wav,1,2\n", "not among those named (c.wav)"), ("a.wav,1,1.1\n", "lasts 0.10 s")],
)
def test_where_no_window_is_left_it_is_an_error(tmp_path: Path, rows: str, message: str) -> None:
    with pytest.raises(AudioError) as error:
        select(tmp_path, rows)

    assert message in str(error.value) and "table.csv: nothing to ask about" in str(error.value)


def test_a_folder_of_tables_is_all_of_them(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "notes.doc"):
        (tmp_path / name).write_text("")

    assert find_tables([tmp_path]) == [tmp_path / "a.txt", tmp_path / "b.txt"]
    with pytest.raises(AudioError, match="holds no tables"):
        (tmp_path / "empty").mkdir()
        find_tables([tmp_path / "empty"])


def test_tables_in_folders_are_those_of_the_recordings_in_folders_of_that_name(tmp_path: Path) -> None:
    """As ``ask --out tables --format audacity`` writes them."""
    recordings = [tmp_path / site / "a.wav" for site in ("s1", "s2")]
    for number, site in enumerate(("s1", "s2", ".trash")):
        (tmp_path / "tables" / site).mkdir(parents=True)
        (tmp_path / "tables" / site / "a.wav.labels.txt").write_text(f"{number}.0\t{number + 2}.0\twren\n")
    tables = find_tables([tmp_path / "tables"])

    selected = select_windows(tables, recordings, window=10, hop=10)
    assert selected.windows == {recordings[0]: ((0, 2),), recordings[1]: ((1, 3),)}


def test_what_macos_keeps_beside_a_table_is_none_and_capital_letters_make_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "WREN.TXT").write_text("1.0\t2.0\tx\n")
    (tmp_path / "._WREN.TXT").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X")
    assert find_tables([tmp_path]) == [tmp_path / "WREN.TXT"]

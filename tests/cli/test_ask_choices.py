"""``mergekit-bio ask`` with choices, about chosen windows, and what it says at the end."""

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from scipy.special import softmax

from mergekit_bio.audio.recording import read_clip
from mergekit_bio.engine.interface import Prompt
from mergekit_bio.engine.transformers import TransformersEngine

RATE = 22_050
SPECIES = ["marsh wren", "marsh", "gray wolf", "tree frog"]
QUESTION = "Which species is it? One of: {species_list}"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(command_line: Run, tmp_path: Path) -> Run:
    (tmp_path / "species.txt").write_text("# of the marsh\n" + "\n".join(SPECIES))
    (tmp_path / "two.txt").write_text("\n".join(SPECIES[2:]))
    return lambda *arguments: command_line("ask", *arguments, "--device", "cpu", "--engine", "transformers")


@pytest.fixture
def nights(tmp_path: Path) -> Path:
    """Two nights' recordings of 25 s; the second window of the first is silence."""
    random = np.random.default_rng(5)
    folder = tmp_path / "nights"
    (folder / "site1").mkdir(parents=True)
    for name in ("site1/20180406_235955.wav", "site1/20180407_040000.wav"):
        samples = random.uniform(-0.5, 0.5, 25 * RATE)
        if name.endswith("235955.wav"):
            samples[9 * RATE : 21 * RATE] *= 1e-5
        soundfile.write(folder / name, samples, RATE)
    return folder


def asked(run: Run, *arguments: object) -> dict:
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_a_choices_probability_is_its_share_of_all_choices(run: Run, nights: Path, merged: Path, tmp_path) -> None:
    document = asked(run, merged, nights, "-p", QUESTION, "--choices", tmp_path / "species.txt")

    engine = TransformersEngine(merged, device="cpu")
    prompt = QUESTION.replace("{species_list}", ", ".join(SPECIES))
    assert len(document["answers"]) == 6
    for answer in document["answers"]:
        clip = read_clip(answer["recordings"][0], start=answer["start"], seconds=answer["end"] - answer["start"])
        (scores,) = engine.loglikelihood([Prompt(prompt, (clip,))], SPECIES)
        expected = dict(zip(SPECIES, softmax([*scores.values()]), strict=True))
        ranked = [(answer["text"], answer["probability"]), *[(o["text"], o["probability"]) for o in answer["others"]]]
        assert [text for text, _ in ranked] == sorted(SPECIES, key=lambda species: -expected[species])[:3]
        assert dict(ranked) == pytest.approx({text: expected[text] for text, _ in ranked}, abs=1e-3)


def test_a_table_has_the_next_two_and_the_time(run: Run, nights: Path, merged: Path, tmp_path: Path) -> None:
    out = tmp_path / "birds.csv"
    code, _, err = run(merged, nights, "-p", QUESTION, "--choices", tmp_path / "two.txt", "--none", "--out", out)

    assert code == 0, err
    with out.open() as file:
        rows = list(csv.DictReader(file))
    choices = {*SPECIES[2:], "none of these"}
    for row in rows:
        assert {row["answer"], row["second"], row["third"]} == choices
        probabilities = [float(row[f"{column}probability"]) for column in ("", "second_", "third_")]
        assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) == pytest.approx(1)
    assert [row["time"] for row in rows] == [
        "2018-04-06T23:59:55", "2018-04-07T00:00:05", "2018-04-07T00:00:15",
        "2018-04-07T04:00:00", "2018-04-07T04:00:10", "2018-04-07T04:00:20",
    ]  # fmt: skip


def test_what_is_not_likely_enough_is_left_out_and_counted(run: Run, nights: Path, merged: Path, tmp_path) -> None:
    arguments = (merged, nights, "-p", QUESTION, "--choices", tmp_path / "species.txt", "--out", tmp_path / "birds.csv")
    code, out, err = run(*arguments)
    assert code == 0, err
    with (tmp_path / "birds.csv").open() as file:
        probabilities = sorted(float(row["probability"]) for row in csv.DictReader(file))
    least = (probabilities[2] + probabilities[3]) / 2

    # The answers are there already; the table is made of them anew.
    code, out, err = run(*arguments, "--min-probability", least)

    assert code == 0 and "3 answers are left out: they are less likely than --min-probability" in out
    with (tmp_path / "birds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(float(row["probability"]) for row in rows) == probabilities[3:]
    (bad := tmp_path / "bad.wav").write_text("no sound")
    code, out, err = run(*arguments[:1], bad, *arguments[1:-2], "--min-probability", 1, "--json")
    assert code == 0, err
    assert (json.loads(out)["answers"], [Path(one["recording"]) for one in json.loads(out)["failed"]]) == ([], [bad])
    raven = tmp_path / "birds.txt"
    code, _, err = run(*arguments[:-1], raven, "--format", "raven", "--min-probability", least)
    assert code == 0, err
    with raven.open() as file:
        selections = list(csv.DictReader(file, delimiter="\t"))
    assert [row["Selection"] for row in selections] == ["1", "2", "3"]


def test_quiet_windows_are_not_asked_about_and_counted(run: Run, nights: Path, merged: Path) -> None:
    document = asked(run, merged, nights, "-p", "What is it?", "--skip-quiet", -60, "--max-new-tokens", 3)

    assert [answer["start"] for answer in document["answers"]] == [0, 20, 0, 10, 20]
    assert document["summary"]["quiet"] == 1


def test_a_table_with_quiet_windows_goes_on_where_it_stopped(run: Run, nights: Path, merged: Path, tmp_path) -> None:
    arguments = (merged, nights, "-p", "What is it?", "--skip-quiet", -60, "--max-new-tokens", 3)
    out = ("--out", tmp_path / "answers.csv")
    first = asked(run, *arguments, *out)
    table = (tmp_path / "answers.csv").read_text()
    again = asked(run, *arguments, *out)

    assert first == again and (tmp_path / "answers.csv").read_text() == table
    code, _, err = run(*arguments[:-3], -50, *arguments[-2:], *out)
    assert code == 1 and "skip_quiet was -60.0 and is now -50.0" in err


def test_the_end_says_what_was_answered_by_recording_and_by_day(run: Run, nights: Path, merged: Path, tmp_path) -> None:
    arguments = (merged, nights, "-p", QUESTION, "--choices", tmp_path / "species.txt")
    document = asked(run, *arguments)
    code, out, err = run(*arguments)

    summary, answers = document["summary"], document["answers"]
    assert summary["answers"] == Counter(answer["text"] for answer in answers)
    for path in sorted(nights.rglob("*.wav")):
        mine = Counter(answer["text"] for answer in answers if answer["recordings"] == [str(path)])
        assert summary["recordings"][str(path)] == mine
    assert {day: sum(counts.values()) for day, counts in summary["days"].items()} == {"2018-04-06": 1, "2018-04-07": 5}
    assert code == 0 and len(out.splitlines()) == 6  # the summary is no answer
    for text in ("windows", "recordings", "2018-04-07", *summary["answers"]):
        assert text in err


def write_table(file: Path, *rows: tuple) -> Path:
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return file


def test_only_the_windows_of_a_table_are_asked_about(run: Run, nights: Path, merged: Path, tmp_path: Path) -> None:
    labels = write_table(
        nights / "site1/20180407_040000.txt", (1.5, 4.25, "song"), (5, 20.25, "calls"), (24, 24.2, "x")
    )
    arguments = ("-p", QUESTION, "--choices", tmp_path / "species.txt")
    code, out, err = run(merged, "--windows", labels, *arguments, "--json")

    assert code == 0, err
    document = json.loads(out)
    assert [(answer["start"], answer["end"]) for answer in document["answers"]] == [(1.5, 4.25), (5, 15), (15, 20.25)]
    assert "20180407_040000.txt:3: refused: it lasts 0.20 s of at least 0.5" in err
    # As files that are cut out.
    samples, _ = soundfile.read(nights / "site1/20180407_040000.wav", dtype="int16")
    for answer in document["answers"]:
        cut = samples[round(answer["start"] * RATE) : round(answer["end"] * RATE)]
        soundfile.write(tmp_path / "cut.wav", cut, RATE)
        (same,) = asked(run, merged, tmp_path / "cut.wav", *arguments)["answers"]
        assert same["text"] == answer["text"] and same["probability"] == pytest.approx(answer["probability"], abs=1e-6)


def test_a_raven_table_about_several_files_is_heard_at_their_offsets(
    run: Run, nights: Path, merged: Path, tmp_path
) -> None:
    table = write_table(
        tmp_path / "season.txt",
        ("Selection", "View", "Channel", "Begin Time (s)", "End Time (s)", "Begin Path", "File Offset (s)"),
        (1, "Waveform 1", 1, 2, 5, "D:\\site1\\20180406_235955.wav", 2),
        (1, "Spectrogram 1", 1, 2, 5, "D:\\site1\\20180406_235955.wav", 2),
        (2, "Spectrogram 1", 1, 28, 30, "D:\\site1\\20180407_040000.wav", 3),
        (3, "Spectrogram 1", 1, 99, 101, "D:\\site1\\gone.wav", 3),
    )
    code, out, err = run(merged, nights, "--windows", table, "-p", "What is it?", "--max-new-tokens", 3, "--json")

    assert code == 0, err
    found = [(Path(a["recordings"][0]).name, a["start"], a["end"]) for a in json.loads(out)["answers"]]
    assert found == [("20180406_235955.wav", 2, 5), ("20180407_040000.wav", 3, 5)]
    assert "left out: 1 selections of 1 recordings that are not among those named (D:\\site1\\gone.wav)" in err


def test_other_windows_of_a_recording_are_asked_about_anew(
    run: Run, nights: Path, merged: Path, tmp_path: Path
) -> None:
    table, out = nights / "site1/20180407_040000.txt", tmp_path / "answers.csv"
    arguments = (merged, "--windows", table, "-p", "What is it?", "--max-new-tokens", 3, "--out", out)

    def starts() -> list[str]:
        code, _, err = run(*arguments)
        assert code == 0, err
        with out.open() as file:
            return [row["start"] for row in csv.DictReader(file)]

    write_table(table, (1, 2, "a"), (3, 4, "b"))
    assert starts() == ["1.0", "3.0"]
    write_table(table, (1, 2, "a"), (3, 4, "b"), (5, 6, "c"))
    assert starts() == ["1.0", "3.0", "5.0"]
    code, _, err = run(merged, nights, *arguments[3:])
    assert code == 1 and "selected was true and is now false" in err


def test_the_likeliest_windows_of_each_answer_become_files(
    run: Run, nights: Path, merged: Path, tmp_path: Path
) -> None:
    clips = tmp_path / "clips"
    document = asked(run, merged, nights, "-p", QUESTION, "--choices", tmp_path / "species.txt", "--clips", 1, clips)

    best: dict[str, dict] = {}
    for answer in document["answers"]:
        if answer["probability"] > best.get(answer["text"], {"probability": 0})["probability"]:
            best[answer["text"]] = answer
    with (clips / "clips.csv").open() as file:
        rows = {row["answer"]: row for row in csv.DictReader(file)}
    assert rows.keys() == best.keys() and document["clips"] == len(best)
    for text, row in rows.items():
        assert (row["recording"], float(row["start"])) == (best[text]["recordings"][0], best[text]["start"])
        whole, _ = soundfile.read(row["recording"], dtype="int16")
        heard, rate = soundfile.read(clips / row["file"], dtype="int16")
        start, end = round(float(row["start"]) * RATE), round(float(row["end"]) * RATE)
        assert rate == RATE and (heard == whole[start:end]).all()


def test_clips_that_cannot_be_written_lose_no_answer(run: Run, nights: Path, merged: Path, tmp_path) -> None:
    (clips := tmp_path / "clips").symlink_to(tmp_path / "gone")
    words = [merged, nights, "-p", QUESTION, "--choices", tmp_path / "two.txt", "--clips", 1, clips, "--json"]
    code, out, err = run(*words)

    assert len(json.loads(out)["answers"]) == 6
    assert code == 1 and err.rstrip().splitlines()[-1].startswith(f"error: {clips}: cannot be written")


def test_what_a_command_reads_it_does_not_write(run: Run, nights: Path, merged: Path, tmp_path) -> None:
    (species := tmp_path / "species.csv").write_text("species\nmarsh wren\ntree frog\n")
    (windows := tmp_path / "windows.csv").write_text("file,start,end\n20180407_040000.wav,1,2\n")
    for out in (species, windows):
        words = ["--choices", f"{species}:species", "--windows", windows, "--out", out, "--overwrite"]
        before = out.read_text()
        code, _, err = run(merged, nights, "-p", QUESTION, *words)
        assert code == 1 and f"{out}: is read by this command" in err
        assert out.read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nights", "--none"], "--none: there is nothing to choose from; give a list with --choices FILE"),
        (["nights", "--min-probability", "0.5"], "--min-probability: there is nothing to choose from"),
        (["nights", "--clips", "3", "clips"], "--clips: there is nothing to choose from"),
        (["nights", "--choices", "two.txt", "--clips", "0", "clips"], "--clips 0: cut at least one window"),
        (["nights", "--choices", "two.txt", "--clips", "1", "nights"], "nights: holds other files"),
        (["nights", "--choices", "two.txt", "--clips", "1", "two.txt/clips"], "two.txt: is a file; --clips needs"),
        (["nights", "--choices", "gone.txt"], "gone.txt: cannot be read"),
        (["nights", "--skip-quiet", "60"], "--skip-quiet 60: a level is in dB below full scale, such as -60"),
        (["nights", "--windows", "species.txt"], "species.txt:2: no column 'start'"),
        (["--windows", "empty"], "empty: holds no tables"),
        ([], "name recordings, or folders of them"),
        (
            ["nights", "-p", "One of {species_list}?"],
            "the prompt says {species_list}; give the list with --choices FILE",
        ),
        (
            ["nights", "-p", "One of {species_lst} in {place}?", "--choices", "two.txt"],
            "the prompt says {species_lst}; did you mean {species_list}?",
        ),
    ],
)
def test_mistakes_get_one_clear_line(
    run: Run, nights: Path, merged: Path, tmp_path: Path, monkeypatch, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)

    code, out, err = run(merged, *([] if "-p" in arguments else ["-p", "What is it?"]), *arguments)

    assert code == 1 and not out
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line

import base64
import csv
import gzip
import io
import json
import re
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote

import av
import numpy as np
import pytest
import soundfile
from eval.browser import chromium, needs_chromium, told_by_page
from rich.console import Console

from mergekit_bio.errors import OutputError, RecipeError, RunError
from mergekit_bio.eval.recipe.shipped import find_label_map
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.eval.report import figures, recordings
from mergekit_bio.eval.report.build import Report, build_report, to_document
from mergekit_bio.eval.report.files import default_folder, write_report
from mergekit_bio.eval.report.page import render_page
from mergekit_bio.eval.report.tables import print_report, sentences


def no_progress(description: str, total: int):
    return nullcontext(lambda step: None)


@pytest.fixture(scope="module")
def report(make_run):
    return build_report(read_runs([make_run()]))


@pytest.fixture(scope="module")
def written(report, tmp_path_factory):
    """A report's folder and the files in it."""
    folder = tmp_path_factory.mktemp("report") / "out"
    return folder, write_report(report, folder, progress=no_progress)


def test_the_tables_fit_100_columns_and_name_scorer_and_averages(report):
    console = Console(width=100, record=True, file=io.StringIO())
    print_report(report, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    for word in ("scorer exact", "F1 weighted", "F1 macro", "majority", "random", "best at alpha 0.5"):
        assert word in text
    assert "…" not in text


def test_the_table_of_a_narrow_terminal_breaks_no_word(report):
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(report, console)
    table = [line for line in console.export_text().splitlines() if re.match(r"[\w.]+ +\d\.\d{3}", line)]
    assert [line.split()[0] for line in table] == ["0", "0.5", "1", "majority", "random"]


def test_the_table_of_a_narrow_terminal_shows_each_share_whole_where_all_is_right(make_run):
    """The widest that a value and its interval are."""
    cells = read_runs([make_run()])
    right = [replace(row, prediction=row.label) for row in cells[0].predictions]
    closed = [replace(cell, predictions=right, labels=tuple({row.label for row in right})) for cell in cells]
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(build_report(closed), console)
    table = [line.split() for line in console.export_text().splitlines() if re.match(r"[\d.]+ +1\.000 \[1, 1\]", line)]
    assert [row[-2:] for row in table] == [["0.000", "0.000"]] * 3


@pytest.mark.parametrize("name", ["frogs[bold]", "frogs [b] [red]y"])
def test_a_name_in_brackets_is_no_markup(make_run, name):
    console = Console(width=100, record=True, file=io.StringIO())
    # A closed list, so that there is a line about the trade-off.
    cells = [replace(cell, labels=("Coruro", "Wild Boar & Sons")) for cell in read_runs([make_run(name=name)])]
    closing = [replace(cell, run=name.replace("[b]", "[/b]")) for cell in cells]
    print_report(build_report(closing), console)
    text = " ".join(console.export_text().split())
    assert text.count(f"{closing[0].run}, frogs, query 0") > 1


def test_a_run_takes_its_own_scorer_unless_another_is_asked_for(make_run):
    cells = read_runs([make_run()])
    assert build_report(cells).scorers == ["exact"]
    assert build_report(cells, scorer="beans-zero").scorers == ["beans-zero"]


def test_cells_are_compared_over_the_clips_that_all_of_them_have(make_run):
    path = make_run()
    file = path / "beans_zero_eval_frogs_query0_lora100.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:40]))
    (sweep,) = build_report(read_runs([path])).sweeps
    assert [len(item.ids) for item in sweep.scores] == [60, 60, 40]
    assert {comparison.clips for comparison in sweep.comparisons} == {40}


def test_a_table_of_cells_with_different_clips_says_how_many_each_has(make_run, tmp_path):
    path = make_run()
    file = path / "beans_zero_eval_frogs_query0_lora100.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:40]))
    report = build_report(read_runs([path]))
    console = Console(width=100, record=True, file=io.StringIO())
    print_report(report, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.split()[:2] for line in lines]
    assert all([alpha, f"({clips})"] in rows for alpha, clips in (("0", 60), ("0.5", 60), ("1", 40)))
    page = write_report(report, tmp_path, progress=no_progress)[0].read_text()
    assert "<figcaption>Against alpha (each over its own clips) <" in page
    assert ">Clips</th>" in page and "compared over the 40 that all have" in page


def test_cells_that_were_planned_and_have_no_answer_are_told(make_run):
    path = make_run()
    (path / "beans_zero_eval_frogs_query0_lora050.jsonl").unlink()
    (path / "beans_zero_eval_frogs_query0_lora100.jsonl").write_text("")
    report = build_report(read_runs([path]))
    assert [item.cell.alpha for item in report.sweeps[0].scores] == [0.0]
    assert report.notes == [
        "frogs: 2 of 3 cells have no answer yet (frogs, query 0, alpha 0.5; frogs, query 0, alpha 1.0)"
    ]


def test_the_files_of_a_report(report, written):
    folder, files = written
    assert files[0] == folder / "report.html"
    assert sorted(str(file.relative_to(folder)) for file in files) == sorted(
        [
            "report.html",
            "scores.json",
            "scores.csv",
            "comparisons.csv",
            "choices.csv",
            "trade_offs.csv",
            "labels.csv",
            "predictions.csv",
        ]
        + [
            f"figures/{name}.{suffix}"
            for name in [
                *(f"{kind}_frogs_query_0" for kind in ("sweep", "ends", "errors", "in_set")),
                "confusion_frogs_query_0_alpha_0.5",
            ]
            for suffix in ("png", "pdf")
        ]
    )
    assert json.loads((folder / "scores.json").read_text()) == json.loads(json.dumps(to_document(report)))
    with (folder / "scores.csv").open() as file:
        rows = {(row["alpha"], row["figure"]): row for row in csv.DictReader(file)}
    document = to_document(report)["sweeps"][0]["cells"][1]
    assert float(rows["0.5", "accuracy"]["value"]) == document["figures"]["accuracy"]
    assert float(rows["0.5", "accuracy"]["low"]) == document["intervals"]["accuracy"][0]
    with (folder / "predictions.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 180
    with (folder / "comparisons.csv").open() as file:
        assert {row["p_at_most"] for row in csv.DictReader(file)} <= {"True", "False"}
    with (folder / "choices.csv").open() as file:
        rows = {row["figure"]: row for row in csv.DictReader(file)}
    (choice, *_) = to_document(report)["sweeps"][0]["alpha_choices"]
    assert float(rows["accuracy"]["value"]) == choice["value"] and rows["accuracy"]["alphas"].startswith("0.5:")


def test_the_same_report_is_written_the_same(report, written, tmp_path):
    again = write_report(report, tmp_path, progress=no_progress)
    for ours, theirs in zip(written[1], again, strict=True):
        assert ours.read_bytes() == theirs.read_bytes(), ours


def page_data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def page_of(report: Report, folder: Path) -> str:
    return render_page(report, [], folder=folder, tables={}, progress=no_progress)


def test_the_page_needs_nothing_beside_it_and_holds_every_answer(report, written):
    page = written[1][0].read_text()
    assert not re.search(r'(src|href|srcset)="(?!data:|#)|url\((?!#)|@import', page)
    captions = ("Against alpha", "Base, best merge and fine-tune", "Error breakdown", "Answers that are a label")
    for caption in (*captions, "Confusion: alpha 0.5"):
        assert page.count(f"<figcaption>{caption} <") == 1
    data = page_data(page)
    texts, clips, rows = data["texts"], data["clips"], data["rows"]
    answers = {
        (data["cells"][cell][1], clips[clip][0], texts[prediction], texts[answer], texts[clips[clip][1]], not outcome)
        for cell, clip, prediction, answer, outcome, _ in zip(*rows.values(), strict=True)
    }
    expected = {
        (f"{item.cell.alpha:g}", *values)
        for item in report.scores
        for values in zip(
            item.ids, (row.prediction for row in item.cell.predictions), item.answers, item.targets, item.correct,
            strict=True,
        )
    }  # fmt: skip
    assert answers == expected and len(expected) == 180
    assert len(data["prompts"]) == 60 and data["prompts"][rows["prompt"][0]] == "<|user|>What? </script> 0"
    # Labels are text, never markup.
    assert "<b>Grig" not in page


def decoded(source: str) -> tuple[np.ndarray, int]:
    """What FFmpeg makes of a recording in the page."""
    kind, _, content = source.partition(",")
    assert kind == "data:audio/webm;base64"
    with av.open(io.BytesIO(base64.b64decode(content))) as file:
        frames = [frame.to_ndarray() for frame in file.decode(audio=0)]
        assert file.streams.audio[0].codec_context.name in ("opus", "libopus")
        return np.concatenate(frames, axis=1)[0], file.streams.audio[0].rate


def loudest(samples: np.ndarray, rate: int) -> float:
    """The strongest frequency, in Hz."""
    return float(np.abs(np.fft.rfft(samples)).argmax() * rate / len(samples))


def tones(path: Path, *frequencies: float, seconds: float = 1.0, rate: int = 44100) -> Path:
    """A recording of one tone after the other."""
    time = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, np.concatenate([0.3 * np.sin(2 * np.pi * tone * time) for tone in frequencies]), rate)
    return path


def test_recordings_are_in_the_page_once_each_while_they_exist(make_run, tmp_path):
    recording = tones(tmp_path / "clip.wav", 6500).rename(tmp_path / "clip.raw")  # its content counts, not its name
    report = build_report(read_runs([make_run(audio=str(recording))]))
    data = page_data(page_of(report, tmp_path))
    assert len(data["audio"]) == 1 and {audio for *_, audio in data["clips"]} == {0}
    samples, rate = decoded(data["audio"][0])
    assert abs(len(samples) / rate - 1) < 0.15 and abs(loudest(samples, rate) - 6500) < 10
    recording.unlink()
    data = page_data(page_of(report, tmp_path))
    assert data["audio"] == [] and {audio for *_, audio in data["clips"]} == {-1}


def test_of_a_long_recording_the_page_has_the_part_that_was_heard(make_run, tmp_path):
    recording = tones(tmp_path / "dawn.wav", 500, 1500, 3500, seconds=8)
    whole, part, rest = (
        page_data(page_of(build_report(read_runs([make_run(audio=str(recording), **where)])), tmp_path))["audio"]
        for where in ({}, {"start": 9.0, "end": 12.0}, {"start": 17.0})
    )
    for (source,), seconds, tone in ((whole, 10, 500), (part, 3, 1500), (rest, 7, 3500)):
        samples, rate = decoded(source)
        assert abs(len(samples) / rate - seconds) < 0.15 and abs(loudest(samples, rate) - tone) < 10


def test_of_two_channels_the_page_has_the_one_that_was_heard(make_run, tmp_path):
    time = np.arange(16000) / 16000
    both = [0.3 * np.sin(2 * np.pi * tone * time) for tone in (500, 3000)]
    soundfile.write(tmp_path / "stereo.wav", np.stack(both, axis=1), 16000)
    for channel, tone in ((1, 500), (2, 3000)):
        run = make_run(audio=str(tmp_path / "stereo.wav"), channel=channel)
        samples, rate = decoded(page_data(page_of(build_report(read_runs([run])), tmp_path))["audio"][0])
        power = np.abs(np.fft.rfft(samples)) ** 2
        at = {heard: power[round(heard * len(samples) / rate)] for heard in (500, 3000)}
        assert abs(loudest(samples, rate) - tone) < 10 and at[tone] > 1000 * at[3500 - tone]


def test_letters_that_no_figure_can_hold_keep_nothing_from_being_written(make_run, tmp_path, few_figures):
    cells = [
        replace(
            cell, run="a\x1bb", predictions=tuple(replace(row, label=row.label + "\x08") for row in cell.predictions)
        )
        for cell in read_runs([make_run()])
    ]
    page = write_report(build_report(cells), tmp_path, progress=no_progress)[0].read_text()
    assert "<figure>" in page and page_data(page)["texts"][0].endswith("\x08")


def test_another_model_with_other_clips_is_told_of(make_run):
    cells = read_runs([make_run()])
    other = replace(
        cells[0], checkpoint="gpt", alpha=None, identity={"baseline": True}, file="g.jsonl",
        predictions=cells[0].predictions[:3],
    )  # fmt: skip
    report = build_report([*cells, other])
    (sweep,) = report.sweeps
    assert not sweep.same_clips and [item.cell.checkpoint for item in sweep.other_models] == ["gpt"]
    (note,) = [note for note in report.notes if "different clips" in note]
    assert "60 clips: alpha 0.0, alpha 0.5, alpha 1.0; 3 clips: gpt" in note and "another model's metrics" in note
    console = Console(width=100, record=True, file=io.StringIO())
    print_report(report, console)
    assert "gpt (3)" in console.export_text()


def test_what_waits_is_counted_with_other_models_that_have_answered(make_run):
    cells = read_runs([make_run()])
    other = replace(cells[0], checkpoint="gpt", alpha=None, identity={"baseline": True}, file="g.jsonl")
    waiting = replace(cells[2], predictions=())
    (note,) = build_report([*cells[:2], other, waiting]).notes
    assert note.startswith("frogs: 1 of 4 cells have no answer yet")


def test_many_recordings_are_kept_with_their_treble_at_a_fraction_of_the_size(make_run, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).normal(size=160000) * 0.1
    soundfile.write(tmp_path / "noise.wav", noise, 16000)
    report = build_report(read_runs([make_run(audio=str(tmp_path / "noise.wav"))]))
    monkeypatch.setattr(recordings, "AUDIO_BUDGET", 15_000)
    (source,) = page_data(page_of(report, tmp_path))["audio"]
    samples, rate = decoded(source)
    assert len(source) < 20_100 < (tmp_path / "noise.wav").stat().st_size / 10
    power = np.abs(np.fft.rfft(samples)) ** 2
    bands = [part.mean() for part in np.array_split(power[: round(len(power) * 7500 / (rate / 2))], 5)]
    assert max(bands) / min(bands) < 10  # of white noise no band is 10 dB below another


def test_recordings_too_many_for_the_page_are_linked(make_run, tmp_path, monkeypatch):
    recording = tones(tmp_path / "a clip.wav", 500)
    monkeypatch.setattr(recordings, "AUDIO_BUDGET", 0)
    for where, fragment in (({}, ""), ({"start": 0.25, "end": 1.0}, "#t=0.25,1")):
        report = build_report(read_runs([make_run(audio=str(recording), **where)]))
        assert page_data(page_of(report, tmp_path / "report"))["audio"] == ["../a%20clip.wav" + fragment]


def test_a_recording_that_cannot_be_decoded_is_linked(make_run, tmp_path):
    (tmp_path / "clip.wav").write_bytes(b"no recording")
    report = build_report(read_runs([make_run(audio=str(tmp_path / "clip.wav"))]))
    assert page_data(page_of(report, tmp_path))["audio"] == ["clip.wav"]


def rows_of(page: str) -> list[str]:
    """The rows of the predictions table that a browser shows."""
    return re.findall(r'<tr class="row">(.*?)</tr>', page)


@needs_chromium
def test_the_table_can_be_searched_and_the_figures_are_seen_in_a_browser(written, tmp_path):
    page = tmp_path / "report.html"
    script = """
        field('search').value = 'GRIG clip1'; search(); document.querySelector('tr.row').click();
        for (const figure of document.querySelectorAll('figure svg'))
            figure.id = `seen ${figure.getBoundingClientRect().width > 200}`;"""
    page.write_text(
        written[1][0].read_text().replace("</body>", f"<script>onload = () => {{{script}}}</script></body>")
    )
    command = chromium(tmp_path / "profile", "--dump-dom", page.as_uri())
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    rows = rows_of(found)
    assert 0 < len(rows) < 50
    assert all("Grig" in row and "clip1" in row for row in rows)
    assert "What? &lt;/script&gt;" in found
    assert found.count('id="seen true"') == found.count("<figure") == 5


PLAY = """
document.querySelector('#predictions .open').click();
const player = document.querySelector('#predictions audio');
const tell = text => fetch('/told?' + encodeURIComponent(text), {method: 'POST'});
player.addEventListener('timeupdate', () => { if (player.currentTime > 0.2) tell(`played of ${player.duration}`); });
player.play().catch(error => tell(String(error)));
"""


@needs_chromium
def test_a_recording_plays_in_a_browser(make_run, tmp_path):
    soundfile.write(tmp_path / "clip.wav", 0.3 * np.sin(np.arange(16000) / 5), 8000)
    report = build_report(read_runs([make_run(audio=str(tmp_path / "clip.wav"))]))
    page = page_of(report, tmp_path).replace("</body>", f"<script>{PLAY}</script></body>").encode()
    address, _ = told_by_page({"/": page}, tmp_path / "profile")
    word, _, seconds = unquote(address.partition("?")[2]).rpartition(" ")
    assert word == "played of" and abs(float(seconds) - 2) < 0.15


def detections(*alphas: float) -> list[Cell]:
    """A sweep over a detection of which some clips have no label."""
    answers = ("None", "owl", "None", "wren, owl")
    rows = tuple(
        Prediction(prediction=text, label=label, id=str(number), dataset_name="night")
        for number, (text, label) in enumerate(zip(answers, ("None", "None", "owl", "owl"), strict=True))
    )
    return [
        Cell(
            file=f"{alpha}.jsonl", dataset="night", task="detection", query=0, checkpoint=f"{alpha}", rows=4,
            alpha=alpha, run="night", predictions=rows, scorer="exact",
        )
        for alpha in alphas
    ]  # fmt: skip


def test_a_detection_has_its_errors_drawn_and_both_maps_named(tmp_path):
    report = build_report(detections(0.0, 1.0))
    names = {file.stem for file in write_report(report, tmp_path, progress=no_progress)}
    assert {"sweep_night_query_0", "errors_night_query_0"} <= names
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(report, console)
    text = console.export_text()
    assert "mAP" in text and "(beans-" in text and max(map(len, text.splitlines())) <= 80
    page = (tmp_path / "report.html").read_text()
    assert ">mAP (beans-zero)</th>" in page and ">Labels missed</th>" in page


@needs_chromium
def test_a_clip_without_a_label_is_said_to_have_none_beside_its_answer(tmp_path):
    page = tmp_path / "report.html"
    page.write_text(page_of(build_report(detections(0.0)), tmp_path))
    command = chromium(tmp_path / "profile", "--dump-dom", page.as_uri())
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    answers = [
        re.findall(r'<td data-column="(?:Matched with|Target)"(?: class="(\w+)")?>([^<]*)', row)
        for row in rows_of(found)
    ]
    assert answers[:3] == [
        [("right", "no label"), ("", "no label")],
        [("wrong", "owl"), ("", "no label")],
        [("wrong", "no label"), ("", "owl")],
    ]


def test_published_runs_together_have_the_papers_figures_with_its_numbers(published):
    cells = [
        cell for cell in read_runs([published / name for name in ("watkins", "zf-indiv")]) if cell.alpha in (0.5, 1.0)
    ]
    # cbi's answers take long to score; another name makes of watkins two datasets.
    again = [replace(cell, run="cbi", dataset="cbi") for cell in cells if cell.run == "watkins"]
    planned = figures.figures_of(build_report(again + cells, scorer="paper"))
    drawn = dict(zip(figures.file_names(planned), planned, strict=True))
    of_one = {"sweep_watkins_query_0", "names_watkins"}
    of_one |= {f"{kind}_watkins_query_2_combined_name" for kind in ("ends", "errors")}
    assert of_one | {"in_set_watkins_query_1_scientific_name", "wordings_zf-indiv"} <= {*drawn}
    assert {"datasets_cbi_watkins", "trained_cbi_watkins", "fine_tune_cbi_watkins"} <= {*drawn}

    scores = json.loads((published / "metrics.json").read_text())["metrics_sorted_tiebreak"]
    theirs = [scores[f"watkins/{name}"] for name in ("common", "scientific", "combined")]
    (axes,) = drawn["fine_tune_cbi_watkins"].draw().axes
    bars = [
        bar.get_height() for container in axes.containers if hasattr(container, "patches") for bar in container.patches
    ]
    assert bars == pytest.approx([of_name["1.0"]["accuracy"] for of_name in theirs] * 2)
    (axes,) = drawn["trained_cbi_watkins"].draw().axes
    x, y = axes.lines[0].get_data()
    common, scientific, combined = ([of_name[alpha]["accuracy"] for alpha in ("0.5", "1.0")] for of_name in theirs)
    assert list(y) == pytest.approx(combined) and list(x) == pytest.approx(np.mean([common, scientific], axis=0))


def test_the_share_of_answers_in_the_set_is_the_papers(published):
    cells = read_runs([published / "closed_set_classification_2"])
    (sweep,) = build_report(cells).sweeps
    (figure,) = [figure for figure in figures.figures_of(Report(sweeps=(sweep,))) if figure.kind == "in_set"]
    (axes,) = figure.draw().axes
    scores = json.loads((published / "metrics.json").read_text())["metrics"]["closed_set_classification_2"]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([1 - cell["out_of_set_rate"] for cell in scores.values()])


def test_runs_over_the_same_clips_are_laid_over_one_another(make_run):
    assert "runs_frogs" in figure_names(read_runs([make_run(name="k0"), make_run(name="k5")]))


def test_a_sweep_that_is_0_everywhere_has_no_best_and_no_plateau(make_run):
    cells = [
        replace(cell, predictions=tuple(replace(row, prediction="no idea") for row in cell.predictions))
        for cell in read_runs([make_run()])
    ]
    report = build_report(cells)
    (sweep,) = report.sweeps
    assert [comparison.plateau for comparison in sweep.comparisons] == [None] * 3
    assert sentences(sweep) == ["Accuracy: 0 everywhere", "F1 weighted: 0 everywhere", "F1 macro: 0 everywhere"]
    console = Console(width=100, record=True, file=io.StringIO())
    print_report(report, console)
    assert not re.search(r"\][*=]", console.export_text())
    (canvas,) = (figure.draw() for figure in figures.figures_of(report) if figure.kind == "sweep")
    for axes in canvas.axes:
        assert not axes.patches and "0 at every alpha" in [text.get_text() for text in axes.texts]


def test_shares_have_one_y_axis_in_all_figures_of_a_report(make_run):
    weak = [
        replace(cell, run="weak", predictions=tuple(replace(row, label="Coruro") for row in cell.predictions))
        for cell in read_runs([make_run()])
    ]
    drawn = [
        figure.draw()
        for figure in figures.figures_of(build_report(read_runs([make_run()]) + weak))
        if figure.kind == "sweep"
    ]
    limits = {axes.get_ylim() for canvas in drawn for axes in canvas.axes}
    highest = max(max(line.get_ydata()) for canvas in drawn for axes in canvas.axes for line in axes.lines)
    assert len(drawn) == 2 and len(limits) == 1 and limits.pop()[1] >= highest


TARGETS = ("label", "scientific", "combined")


def asked(cells: list[Cell], *queries: tuple[int, str]) -> list[Cell]:
    """The cells once for each query and its target, as if all had been asked."""
    names = {row.label: f"Genus {row.label}" for cell in cells for row in cell.predictions}
    return [
        replace(cell, query=query, target=target, names=names)
        for _, run in groupby(cells, key=lambda cell: cell.run)
        for several in [list(run)]
        for query, target in queries
        for cell in several
    ]


def figure_names(cells: list[Cell]) -> list[str]:
    return figures.file_names(figures.figures_of(build_report(cells, scorer="exact")))


@pytest.fixture
def few_figures(monkeypatch):
    """Reports draw two kinds of figures only: drawing takes a third of a second each."""
    all_kinds = figures.FIGURES

    def few(report):
        return (figure for kind in all_kinds for figure in kind(report) if figure.kind in ("errors", "runs"))

    monkeypatch.setattr(figures, "FIGURES", (few,))


def test_the_files_listed_are_those_on_the_disk_with_two_runs_of_two_targets(make_run, tmp_path, few_figures):
    runs = [make_run(name=name, alphas=(0.5, 1.0)) for name in ("k0", "k5")]
    cells = asked(read_runs(runs), (0, "label"), (1, "scientific"))
    files = write_report(build_report(cells, scorer="exact"), tmp_path, progress=no_progress)
    assert sorted(files) == sorted(file for file in tmp_path.rglob("*") if file.is_file())
    assert {"runs_frogs", "runs_frogs_scientific_name"} <= {file.stem for file in files}


@pytest.mark.parametrize(
    ("runs", "alphas", "queries", "among"),
    [
        (
            ["k0"],
            (0.5, 1.0),
            [*enumerate(TARGETS * 2)],
            {"names_k0_frogs_queries_0_1_2", "names_k0_frogs_queries_3_4_5"},
        ),
        (["frogs"], (0.5,), [*enumerate(TARGETS[:2] * 2)], {"wordings_frogs", "wordings_frogs_scientific_name"}),
        (["a b", "a_b", "A b"], (0.5, 1.0), [(0, "label")], {"sweep_a_b_frogs_query_0", "sweep_a_b_frogs_query_0-2"}),
    ],
)
def test_no_figure_takes_the_name_of_another(make_run, runs, alphas, queries, among):
    cells = asked(read_runs([make_run(name=name, alphas=alphas) for name in runs]), *queries)
    names = figure_names(cells)
    assert len({name.casefold() for name in names}) == len(names)
    assert among <= {*names}


def test_runs_in_folders_with_long_names_have_figures_all_the_same(make_run, tmp_path, few_figures):
    paths = [tmp_path / ("a long name " * 18) / part / "frogs" for part in ("one", "two")]
    for path in paths:
        shutil.copytree(make_run(), path)
    files = write_report(build_report(read_runs(paths)), tmp_path / "out", progress=no_progress)
    assert sorted(files) == sorted(file for file in (tmp_path / "out").rglob("*") if file.is_file())
    assert len(files) == 8 + 2 * (1 + 1 + 1) and max(len(file.name) for file in files) < 143


def test_several_experiments_take_the_names_beside_their_folder_and_several_maps(published, tmp_path):
    for name in ("watkins", "cbi"):
        (tmp_path / "all" / name).mkdir(parents=True)
        file = f"beans_zero_eval_{name}_query1_lora100.jsonl.gz"
        shutil.copy(published / name / file, tmp_path / "all" / name)
    shutil.copy(published / "cbi_names_published.jsonl", tmp_path / "all")
    (tmp_path / "all/watkins_vernacular_scientific_mapping.jsonl").write_bytes(
        (published / "watkins/names.jsonl").read_bytes()
    )
    expected = {}
    for file in (published / "cbi_names_published.jsonl", published / "watkins/names.jsonl"):
        for line in file.read_text().splitlines():
            expected |= {json.loads(line)["label"]: json.loads(line)["scientific_name"]}
    for cell in read_runs([tmp_path / "all"]):
        assert cell.notes == () and len(cell.names) > 30
        assert all(expected[label] == name for label, name in cell.names.items())
    maps = [find_label_map(Path(f"{name}_corrected.csv")) for name in ("watkins", "cbi")]
    both = {cell.dataset: cell.names for cell in read_runs([tmp_path / "all"], maps)}
    assert both["watkins"]["Narwhal"] == "Monodon monoceros" and both["cbi"]["Song Sparrow"] == "Melospiza melodia"
    one = {cell.dataset: cell.names for cell in read_runs([tmp_path / "all"], maps[:1])}
    assert one["watkins"]["Narwhal"] == "Monodon monoceros" and one["cbi"]["Song Sparrow"] == "Fringilla melodia"


def test_two_maps_that_name_a_label_differently_are_refused(make_run, tmp_path):
    for name in ("Coruro", "Spalacopus cyanus"):
        (tmp_path / f"{name}.csv").write_text(f"label,scientific\nCoruro,{name}\n")
    with pytest.raises(RecipeError, match=r"the label 'Coruro' is 'Coruro' here and 'Spalacopus cyanus' in .*give one"):
        read_runs([make_run()], [tmp_path / "Spalacopus cyanus.csv", tmp_path / "Coruro.csv"])


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run):
    first, second = make_run(), make_run()
    runs = {cell.run for cell in read_runs([first, second, first])}
    assert runs == {str(first), str(second)}
    assert len(build_report(read_runs([first, second])).sweeps) == 2


def test_the_runs_of_an_array_over_alphas_are_one_sweep_unless_more_than_the_alpha_differs(make_run):
    runs = [make_run(alphas=(alpha,)) for alpha in (1.0, 0.0, 0.5)]
    (sweep,) = build_report(read_runs(runs)).sweeps
    assert [item.cell.alpha for item in sweep.scores] == [0.0, 0.5, 1.0] and sweep.cell.run == "frogs"
    record = json.loads((runs[1] / "run.json").read_text())
    record["cells"][0]["identity"]["seed"] = 1
    (runs[1] / "run.json").write_text(json.dumps(record))
    assert {cell.run for cell in read_runs(runs)} == {str(run) for run in runs}


def test_a_run_that_several_paths_lead_to_is_counted_once(make_run, tmp_path):
    shutil.copytree(make_run(), tmp_path / "all/frogs")
    (tmp_path / "again").symlink_to(tmp_path / "all/frogs")
    paths = [tmp_path / "all", tmp_path / "all/frogs", tmp_path / "again"]
    (sweep,) = build_report(read_runs(paths)).sweeps
    assert [item.cell.alpha for item in sweep.scores] == [0.0, 0.5, 1.0]


def test_a_run_without_answers_is_a_note_beside_others_and_an_error_alone(make_run):
    begun, waiting = make_run(name="begun"), make_run(name="waiting")
    for file in waiting.glob("*.jsonl"):
        file.unlink()
    for paths in ([begun, waiting], [waiting, begun]):
        report = build_report(read_runs(paths))
        assert [sweep.cell.run for sweep in report.sweeps] == ["begun"]
        assert [note.partition(" (")[0] for note in report.notes] == ["waiting: 3 of 3 cells have no answer yet"]
    with pytest.raises(RunError, match=r"waiting: no prediction yet; let `mergekit-bio eval` go on"):
        read_runs([waiting])


def test_a_published_file_that_stands_there_zipped_too_is_an_error(published, tmp_path):
    name = "beans_zero_eval_unseen-family-cmn_query0_lora100.jsonl.gz"
    shutil.copy(published / "closed_set_classification_2" / name, tmp_path)
    (tmp_path / name.removesuffix(".gz")).write_bytes(gzip.decompress((tmp_path / name).read_bytes()))
    with pytest.raises(RunError, match=r"lora100.jsonl: stands there zipped too; keep one"):
        read_runs([tmp_path])


def test_a_checkpoint_that_a_run_asked_twice_is_called_by_its_files_too(make_run):
    path = make_run()
    record = json.loads((path / "run.json").read_text())
    for cell in record["cells"][:2]:
        cell |= {"checkpoint": "half", "alpha": 0.5}
    (path / "run.json").write_text(json.dumps(record))
    (sweep,) = build_report(read_runs([path])).sweeps
    names = [f"half (beans_zero_eval_frogs_query0_lora{alpha}.jsonl)" for alpha in ("000", "050")]
    assert [item.cell.checkpoint for item in sweep.scores] == [*names, "alpha 1.0"]
    assert sweep.best("accuracy").cell.checkpoint == names[1]


def test_checkpoints_without_an_alpha_are_compared_by_name(make_run):
    path = make_run()
    record = json.loads((path / "run.json").read_text())
    for cell, name in zip(record["cells"], ("acme/base", "acme/better", "acme/tuned"), strict=True):
        cell |= {"alpha": None, "checkpoint": name}
    (path / "run.json").write_text(json.dumps(record))
    (sweep,) = build_report(read_runs([path])).sweeps
    assert not sweep.by_alpha and sweep.comparison("accuracy").plateau is None
    assert sweep.comparison("accuracy").best == "acme/better"
    assert [row.checkpoint for row in sweep.comparison("accuracy").against] == ["acme/base", "acme/tuned"]
    assert "best at acme/better" in sentences(sweep)[0] and sweep.improvement("accuracy") is None
    assert [figure.kind for figure in figures.figures_of(Report(sweeps=(sweep,)))] == ["errors", "confusion"]


def test_the_report_of_one_run_of_ours_goes_into_it(make_run, tmp_path):
    path = make_run()
    assert default_folder([path]) == path / "report"
    assert str(default_folder([path, path])) == str(default_folder([tmp_path])) == "report"


def test_a_folder_without_a_run_is_said_so(tmp_path):
    with pytest.raises(RunError, match="no run in it"):
        read_runs([tmp_path])
    with pytest.raises(RunError, match="no such run"):
        read_runs([tmp_path / "missing"])


def test_a_report_that_cannot_be_written_says_where(report, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*taken"):
        write_report(report, tmp_path / "taken", progress=no_progress)

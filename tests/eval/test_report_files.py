import base64
import csv
import http.server
import io
import json
import queue
import re
import shutil
import subprocess
import threading
from contextlib import nullcontext
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
from rich.console import Console

import mergekit_bio.eval.report.page as report_page
from mergekit_bio.errors import OutputError, RunError
from mergekit_bio.eval.records.cells import read_runs
from mergekit_bio.eval.report import figures
from mergekit_bio.eval.report.files import default_folder, write_report
from mergekit_bio.eval.report.page import render_page
from mergekit_bio.eval.report.report import Report, build_report, to_document
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


def test_the_files_of_a_report(report, written):
    folder, files = written
    assert files[0] == folder / "report.html"
    assert sorted(str(file.relative_to(folder)) for file in files) == sorted(
        ["report.html", "scores.json", "scores.csv", "comparisons.csv", "predictions.csv"]
        + [
            f"figures/{name}.{suffix}"
            for name in ("sweep_frogs_query_0", "errors_frogs_query_0", "confusion_frogs_query_0_alpha_0.5")
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


def test_the_same_report_is_written_the_same(report, written, tmp_path):
    again = write_report(report, tmp_path, progress=no_progress)
    for ours, theirs in zip(written[1], again, strict=True):
        assert ours.read_bytes() == theirs.read_bytes(), ours


def page_data(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_needs_nothing_beside_it_and_holds_every_answer(written):
    page = written[1][0].read_text()
    assert not re.search(r'(src|href|srcset)="(?!data:|#)', page)
    for caption in ("Against alpha", "Error breakdown", "Confusion: alpha 0.5"):
        assert page.count(f"<figcaption>{caption}</figcaption>") == 1
    data = page_data(page)
    assert len(data["rows"]) == 180 and len(data["prompts"]) == 60
    assert data["prompts"][0] == "<|user|>What? </script> 0"
    # Labels are text, never markup.
    assert "<b>Grig" not in page


def test_recordings_are_in_the_page_once_each_while_they_exist(make_run, tmp_path):
    tone = np.sin(np.arange(4000) / 5)
    tone[3999] = np.nan
    soundfile.write(tmp_path / "clip.wav", tone, 8000, subtype="DOUBLE")
    recording = (tmp_path / "clip.wav").rename(tmp_path / "clip.raw")  # its content counts, not its name
    report = build_report(read_runs([make_run(audio=str(recording))]))
    data = page_data(render_page(report, [], folder=tmp_path))
    assert len(data["audio"]) == 1 and {row[-1] for row in data["rows"]} == {0}
    kind, _, content = data["audio"][0].partition(",")
    samples, rate = soundfile.read(io.BytesIO(base64.b64decode(content)))
    assert kind == "data:audio/flac;base64" and (len(samples), rate) == (4000, 8000)
    recording.unlink()
    data = page_data(render_page(report, [], folder=tmp_path))
    assert data["audio"] == [] and {row[-1] for row in data["rows"]} == {-1}


def test_recordings_too_many_for_the_page_are_linked(make_run, tmp_path, monkeypatch):
    recording = tmp_path / "a clip.wav"
    soundfile.write(recording, np.zeros(400), 8000)
    monkeypatch.setattr(report_page, "AUDIO_BUDGET", 0)
    report = build_report(read_runs([make_run(audio=str(recording))]))
    assert page_data(render_page(report, [], folder=tmp_path / "report"))["audio"] == ["../a%20clip.wav"]


needs_chromium = pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")


def chromium(profile, *arguments) -> list[str]:
    """A command line for a browser that shows nothing, keeps to itself and may play sound without being clicked."""
    return [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--autoplay-policy=no-user-gesture-required", f"--user-data-dir={profile}", *arguments,
    ]  # fmt: skip


@needs_chromium
def test_the_table_can_be_searched_and_the_figures_are_seen_in_a_browser(written, tmp_path):
    page = tmp_path / "report.html"
    script = """
        field('search').value = 'GRIG clip1'; search(); document.querySelector('tbody tr.row').click();
        for (const image of document.images) image.alt = `seen ${image.naturalWidth > 200}`;"""
    page.write_text(
        written[1][0].read_text().replace("</body>", f"<script>onload = () => {{{script}}}</script></body>")
    )
    command = chromium(tmp_path / "profile", "--dump-dom", page.as_uri())
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    rows = re.findall(r'<tr class="row">(.*?)</tr>', found)
    assert 0 < len(rows) < 50
    assert all("Grig" in row and "clip1" in row for row in rows)
    assert "What? &lt;/script&gt;" in found
    assert found.count('alt="seen true"') == found.count("<img ") == 3


PLAY = """
const player = document.querySelector('#predictions audio');
const tell = text => fetch('/told?' + encodeURIComponent(text), {method: 'POST'});
player.addEventListener('timeupdate', () => { if (player.currentTime > 0.2) tell(`played of ${player.duration}`); });
player.play().catch(error => tell(String(error)));
"""


@needs_chromium
def test_a_recording_plays_in_a_browser(make_run, tmp_path):
    soundfile.write(tmp_path / "clip.wav", 0.3 * np.sin(np.arange(16000) / 5), 8000)
    report = build_report(read_runs([make_run(audio=str(tmp_path / "clip.wav"))]))
    page = render_page(report, [], folder=tmp_path).replace("</body>", f"<script>{PLAY}</script></body>").encode()
    told: queue.Queue[str] = queue.Queue()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page)

        def do_POST(self):
            told.put(unquote(self.path.partition("?")[2]))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = chromium(tmp_path / "profile", "--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}")
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert told.get(timeout=60) == "played of 2"
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()


@pytest.mark.slow
def test_published_runs_together_have_the_papers_figures(published, tmp_path):
    report = build_report(read_runs([published / name for name in ("watkins", "zf-indiv")]))
    files = write_report(report, tmp_path, progress=no_progress)
    names = {file.stem for file in files}
    assert {"names_watkins", "wordings_zf-indiv", "errors_watkins_query_2_combined_name"} <= names


def test_runs_over_the_same_clips_are_laid_over_one_another(make_run, tmp_path):
    report = build_report(read_runs([make_run(name="k0"), make_run(name="k5")]))
    assert "runs_frogs" in {file.stem for file in write_report(report, tmp_path / "out", progress=no_progress)}


def test_runs_of_one_name_are_told_apart_by_their_folders(make_run):
    first, second = make_run(), make_run()
    runs = {cell.run for cell in read_runs([first, second, first])}
    assert runs == {str(first), str(second)}
    assert len(build_report(read_runs([first, second])).sweeps) == 2


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
    assert [plan.kind for plan in figures._plans(Report(sweeps=(sweep,)))] == ["errors", "confusion"]


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

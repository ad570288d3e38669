"""The page in a browser: spectrograms, tables that sort, downloads, a phone, paper, and the dark."""

import base64
import csv
import io
import json
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import soundfile
from eval.browser import needs_chromium, told_by_page
from PIL import Image

from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.eval.report.build import build_report
from mergekit_bio.eval.report.files import write_report

STYLE = Path(__file__).parents[2] / "mergekit_bio/eval/report/assets/page.css"
TONE, RATE = 3000, 44100


@pytest.fixture(scope="module")
def folder(make_run, tmp_path_factory) -> Path:
    """A report whose clips all have one recording: a second of a tone, then a second of next to nothing."""
    root = tmp_path_factory.mktemp("page")
    time = np.arange(RATE) / RATE
    sound = np.concatenate([0.5 * np.sin(2 * np.pi * TONE * time), np.zeros(RATE)])
    soundfile.write(root / "tone.wav", sound, RATE)
    report = build_report(read_runs([make_run(audio=str(root / "tone.wav"))]))
    write_report(report, root / "report", progress=lambda description, total: nullcontext(lambda step: None))
    return root / "report"


def ask_the_page(folder: Path, tmp_path: Path, script: str) -> dict:
    """What a script that sees the page's functions puts into ``said``; it may wait."""
    tell = "await fetch('/said', {method: 'POST', body: JSON.stringify(said)})"
    fail = "catch (error) { await fetch('/said', {method: 'POST', body: JSON.stringify({error: String(error)})}); }"
    asking = f"<script>(async () => {{ const said = {{}}; try {{ {script}; {tell}; }} {fail} }})();</script></body>"
    page = (folder / "report.html").read_text()
    pages = {"/report.html": page.encode(), "/": page.replace("</body>", asking).encode()}
    _, body = told_by_page(pages, tmp_path / "profile")
    answer = json.loads(body)
    assert "error" not in answer, answer
    return answer


SPECTROGRAM = """
document.querySelector('#predictions .open').click();
const canvas = document.querySelector('.spectrogram canvas');
while (!canvas.dataset.seconds) await new Promise(done => setTimeout(done, 20));
said.seconds = Number(canvas.dataset.seconds);
const {width, height} = canvas;
const pixels = canvas.getContext('2d').getImageData(0, 0, width, height).data;
const light = (x, y) => pixels[4 * (y * width + x)] + pixels[4 * (y * width + x) + 1] + pixels[4 * (y * width + x) + 2];
const column = x => Array.from({length: height}, (_, y) => light(x, y));
said.height = height;
said.early = column(Math.round(width / 4));
said.late = column(Math.round(3 * width / 4));
said.prompt = document.querySelector('tr.prompt pre').textContent;
said.expanded = document.querySelector('#predictions .open').getAttribute('aria-expanded');
document.querySelector('#predictions .open').click();
said.closed = !document.querySelector('tr.prompt');
"""


@needs_chromium
def test_a_row_opens_on_its_prompt_and_on_a_spectrogram_of_what_was_heard(folder, tmp_path):
    said = ask_the_page(folder, tmp_path, SPECTROGRAM)
    assert abs(said["seconds"] - 2) < 0.15
    # From 8 kHz at the top to 0 at the bottom: the tone is the lightest, where it sounds.
    early, late = np.array(said["early"]), np.array(said["late"])
    assert abs((1 - (early.argmax() + 0.5) / said["height"]) * 8000 - TONE) < 2 * 8000 / said["height"]
    assert late.max() < early.max() / 2
    assert said["prompt"] == "<|user|>What? </script> 0" and said["expanded"] == "true" and said["closed"]


DOWNLOADS = """
const kept = {};
download = (name, content) => { kept[name] = content; };
document.querySelectorAll('button.table').forEach(button => button.click());
said.tables = {...kept};
field('model').value = '0.5'; field('sweep').value = '0'; search();
field('found').click();
said.found = kept['predictions.csv'];
const figure = document.querySelector('.sweep figure');
said.pdf = figure.querySelector('a[download]').href.split(',')[1];
said.name = figure.querySelector('a[download]').download;
const png = await pictureOf(figure);
const reader = new FileReader();
reader.readAsDataURL(png);
await new Promise(done => { reader.onload = done; });
said.png = reader.result.split(',')[1];
figure.querySelector('[data-name$=".svg"]').click();
said.svg = kept[figure.querySelector('[data-name$=".svg"]').dataset.name];
"""


def number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


@needs_chromium
def test_what_the_page_gives_to_download_is_what_lies_in_the_folder(folder, tmp_path):
    said = ask_the_page(folder, tmp_path, DOWNLOADS)
    files = sorted(file.name for file in folder.glob("*.csv"))
    assert sorted(said["tables"]) == files and "labels.csv" in files
    for name in files:
        theirs = [*csv.reader(io.StringIO((folder / name).read_bytes().decode(), newline=""))]
        ours = [*csv.reader(io.StringIO(said["tables"][name], newline=""))]
        assert [[number(cell) for cell in row] for row in ours] == [
            [pytest.approx(cell, abs=1e-6) if isinstance(cell, float) else cell for cell in map(number, row)]
            for row in theirs
        ], name
    some = [*csv.DictReader(io.StringIO(said["found"]))]
    assert len(some) == 60 and {row["alpha"] for row in some} == {"0.5"}
    assert base64.b64decode(said["pdf"]) == (folder / "figures" / said["name"]).read_bytes()
    # The picture is the figure in the light scheme.
    theirs = Image.open(folder / "figures" / Path(said["name"]).with_suffix(".png"))
    ours = Image.open(io.BytesIO(base64.b64decode(said["png"])))
    assert ours.width >= theirs.width and abs(ours.width / ours.height - theirs.width / theirs.height) < 0.02
    small = [np.asarray(image.convert("RGB").resize((60, 30)), dtype=float) for image in (ours, theirs)]
    assert ours.convert("RGB").getpixel((1, 1)) == (255, 255, 255) and np.abs(small[0] - small[1]).mean() < 6
    assert said["svg"].startswith("<svg") and "frogs, query 0" in said["svg"]


LABELS = """
const place = document.querySelector('.by-label');
const state = () => ({
  sorted: Object.fromEntries([...place.querySelectorAll('th[aria-sort]:not([aria-sort="none"])')]
    .map(th => [th.textContent, th.getAttribute('aria-sort')])),
  labels: [...place.querySelectorAll('tbody th')].map(th => th.textContent),
  f1: [...place.querySelectorAll('tbody tr')].map(tr => tr.querySelector('td:nth-child(7)').textContent),
});
const sort = key => place.querySelector(`[data-key="${key}"]`).click();
sort('label'); said.by_label = state();
sort('f1'); said.by_f1 = state(); said.focus = document.activeElement.dataset.key;
sort('f1'); said.reversed = state();
const [model] = place.querySelectorAll('select');
model.value = '0'; model.dispatchEvent(new Event('change')); said.other = state();
"""


@needs_chromium
def test_the_labels_of_a_sweep_are_sorted_by_any_column_and_shown_for_any_alpha(folder, tmp_path):
    said = ask_the_page(folder, tmp_path, LABELS)
    with (folder / "labels.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] == "frogs"]

    def expected(alpha: str, reverse: bool | None = None) -> tuple[list[str], list[str]]:
        of_alpha = sorted((row for row in rows if row["alpha"] == alpha), key=lambda row: row["label"])
        if reverse is not None:
            of_alpha.sort(key=lambda row: float(row["f1"]), reverse=reverse)
        return [row["label"] for row in of_alpha], [
            [float(row[name]) for name in ("f1", "low", "high")] for row in of_alpha
        ]

    for state, alpha, reverse, sorts in (
        ("by_label", "0.5", None, {"Label": "ascending"}),
        ("by_f1", "0.5", True, {"F1 at 0.5": "descending"}),
        ("reversed", "0.5", False, {"F1 at 0.5": "ascending"}),
        ("other", "0.0", False, {"F1 at 0": "ascending"}),
    ):
        labels, values = expected(alpha, reverse)
        assert said[state]["labels"] == labels, state
        shown = [[float(value) for value in re.findall(r"[\d.]+", text)] for text in said[state]["f1"]]
        assert shown == [pytest.approx(row, abs=0.00051) for row in values]
        assert said[state]["sorted"] == sorts
    assert said["focus"] == "f1"


FITS = """
const frame = make('iframe', {width: 390, height: 800, src: 'report.html', style: 'border: 0'});
document.body.replaceChildren(frame);
await new Promise(done => { frame.onload = done; });
const inside = frame.contentDocument;
said.width = frame.contentWindow.innerWidth;
said.needs = inside.documentElement.scrollWidth;
inside.querySelector('#predictions .open').click();
said.opened = inside.documentElement.scrollWidth;
said.columns = [...inside.querySelectorAll('tr.row:first-child td')].map(td => td.dataset.column);
said.shown = frame.contentWindow.getComputedStyle(inside.querySelector('tr.row td'), '::before').display !== 'none';
const detail = inside.querySelector('.sweep > details:not([open])');
said.before = detail.open;
frame.contentWindow.dispatchEvent(new Event('beforeprint'));
said.paper = [...inside.querySelectorAll('details')].every(element => element.open);
frame.contentWindow.dispatchEvent(new Event('afterprint'));
said.after = detail.open;
said.nameless = [...inside.querySelectorAll('button, a, input, select, audio, canvas')].filter(element =>
  !(element.textContent.trim() || element.getAttribute('aria-label') || element.closest('label'))
).map(element => element.outerHTML);
said.order = [...inside.querySelectorAll('[tabindex]')].filter(element => element.tabIndex > 0).length;
"""


@needs_chromium
def test_the_page_fits_a_phone_opens_for_paper_and_names_what_can_be_reached(folder, tmp_path):
    said = ask_the_page(folder, tmp_path, FITS)
    assert said["width"] == 390 and said["needs"] <= 390 and said["opened"] <= 390
    assert said["columns"][2:5] == ["attr(data-column)"] * 3 or "Prediction" in said["columns"][2]
    assert (said["before"], said["paper"], said["after"]) == (False, True, False)
    assert said["nameless"] == [] and said["order"] == 0


def luminance(colour: str) -> float:
    """Relative luminance, after WCAG 2.2."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_and_curves_stand_out_from_what_is_behind_them_in_both_schemes(scheme):
    blocks = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", blocks[scheme]))

    def contrast(front: str, behind: str) -> float:
        lighter, darker = sorted((luminance(colours[front]), luminance(colours[behind])), reverse=True)
        return (lighter + 0.05) / (darker + 0.05)

    for text in ("ink", "soft", "link", "right", "wrong"):
        assert contrast(text, "paper") >= 4.5 and contrast(text, "tint") >= 4.5, text
    assert contrast("ink", "best") >= 4.5 and contrast("ink", "tied") >= 4.5
    for curve in ("blue", "vermilion", "green", "edge"):
        assert contrast(curve, "paper") >= 3, curve


def test_every_figure_says_dataset_query_and_number_of_clips_and_has_the_pages_colours(folder):
    page = (folder / "report.html").read_text()
    figures = re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
    assert len(figures) == 5
    for figure in figures:
        text = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", figure))
        assert "frogs, query 0" in text and "60 clips, 3 labels, scorer exact" in text and "What is it?" in text
        assert "var(--ink, #1c1c1c)" in figure
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))

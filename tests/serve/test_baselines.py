"""Another model beside a sweep: a running server asked over OpenAI's API, as whoever else serves a model that hears."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from serve.conftest import NAMED
from serve.requests_to_server import KEY
from typer.testing import CliRunner

from mergekit_bio.cli.app import app
from mergekit_bio.errors import EngineError, RecipeError
from mergekit_bio.eval.records.predictions import read_predictions
from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.eval.report.build import build_report
from mergekit_bio.eval.run.evaluate import evaluate

#: Asked over OpenAI's API, this strength is a model like any other.
OTHER = NAMED[0]
FILE = f"beans_zero_eval_recordings_query0_model-{OTHER}.jsonl"


@pytest.fixture(scope="module")
def recipe(sweep, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("baselines")
    recordings = folder / "recordings"
    recordings.mkdir()
    rows = ["file_name,label"]
    for number in range(4):
        tone = (0.5 * np.sin(np.arange(16_000) * (0.1 + 0.1 * number)) * 2**15).astype(np.int16)
        soundfile.write(recordings / f"{number}.wav", tone, 16_000)
        rows.append(f"{number}.wav,{('Coruro', 'Walrus')[number % 2]}")
    (recordings / "metadata.csv").write_text("\n".join(rows))
    content = {
        "checkpoints": [str(sweep["alpha-0.00"]), str(sweep["alpha-1.00"])],
        "datasets": [{"path": "recordings"}],
        "queries": ["Which species is it?"],
        "generate": {"max_new_tokens": 6, "num_beams": 2},
        "scorer": "exact",
    }
    (folder / "tones.yaml").write_text(yaml.safe_dump(content))
    return folder / "tones.yaml"


def ask_other(server, recipe: Path, out: Path):
    words = ["eval", recipe, "--out", out, "--engine", "http", "--server", server.url, "--api-key", KEY]
    words += ["--api", "openai", "--model-name", OTHER, "--no-report"]
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def other(server, recipe, tmp_path_factory) -> Path:
    """The run of the other model, in a folder of its own."""
    out = tmp_path_factory.mktemp("other") / "run"
    done = ask_other(server, recipe, out)
    assert done.exit_code == 0, done.output
    assert "answers are greedy, where the recipe searches with 2 beams" in done.stderr
    return out


@pytest.fixture(scope="module")
def ours(recipe, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ours") / "run"
    options = {"device": "cpu", "dtype": "float32"}
    return evaluate(recipe=recipe, out=out, engine="transformers", engine_options=options).path


def test_it_answers_the_same_prompts_as_its_checkpoint_does(other, recipe, sweep, tmp_path):
    content = yaml.safe_load(recipe.read_text())
    content["generate"]["num_beams"] = 1
    greedy = recipe.with_name("greedy.yaml")
    greedy.write_text(yaml.safe_dump(content))
    options = {"device": "cpu", "dtype": "float32"}
    run = evaluate(
        recipe=greedy, out=tmp_path / "run", models=[sweep[OTHER]], engine="transformers", engine_options=options
    )
    (file,) = run.path.glob("*.jsonl")
    wanted = {row.id: (row.prediction.rstrip("\ufffd "), row.label) for row in read_predictions(file)}
    found = {row.id: (row.prediction.rstrip("\ufffd "), row.label) for row in read_predictions(other / FILE)}
    assert found == wanted and len(found) == 4


def test_what_was_asked_of_whom_is_recorded(other, server):
    record = json.loads((other / "run.json").read_text())
    (cell,) = record["cells"]
    assert cell["checkpoint"] == OTHER and cell["alpha"] is None and cell["identity"]["baseline"] is True
    assert cell["identity"]["checkpoint"] == {"served": OTHER} and cell["identity"]["generate"]["num_beams"] == 1
    assert record["environment"]["engine"]["servers"] == [server.url] and KEY not in json.dumps(record)
    row = read_predictions(other / FILE)[0]
    assert row.prompt == "<Audio><AudioHere></Audio> Which species is it?" and row.logprob is None


def test_it_stands_beside_the_sweep_from_a_folder_of_its_own(other, ours, tmp_path):
    from mergekit_bio.eval.report.figures import draw_figures
    from mergekit_bio.eval.report.tables import model

    report = build_report(read_runs([ours, other]))
    (sweep,) = report.sweeps
    assert [item.cell.alpha for item in sweep.scores] == [0.0, 1.0] and sweep.by_alpha
    (item,) = sweep.other_models
    assert item.cell.checkpoint == model(sweep, item) == OTHER
    assert all(OTHER not in comparison.values for comparison in sweep.comparisons)
    from contextlib import nullcontext

    figures = draw_figures(report, tmp_path, progress=lambda text, total: nullcontext(lambda step: None))
    (drawn,) = [figure for figure in figures if figure.kind == "sweep"]
    for axes, metric in zip(drawn.draw().axes, sweep.main_metrics, strict=True):
        (line,) = [line for line in axes.lines if line.get_label() == OTHER]
        assert list(line.get_ydata()) == [item.metrics[metric]] * 2


def test_it_stands_beside_the_sweep_in_one_folder_and_is_asked_once(server, recipe, ours):
    before = {file.name: file.read_text() for file in ours.glob("*.jsonl")}
    for _ in range(2):
        assert ask_other(server, recipe, ours).exit_code == 0
        rows = [line for file in ours.glob("*.jsonl") for line in file.read_text().splitlines()]
        assert (
            len(rows) == 4 * 3
            and before.items() <= {file.name: file.read_text() for file in ours.glob("*.jsonl")}.items()
        )
    (sweep,) = build_report(read_runs([ours])).sweeps
    assert [item.cell.checkpoint for item in sweep.other_models] == [OTHER] and len(sweep.scores) == 2


def test_other_models_alone_are_compared_with_each_other(other):
    (sweep,) = build_report(read_runs([other])).sweeps
    assert [item.cell.checkpoint for item in sweep.scores] == [OTHER] and sweep.other_models == ()


def test_what_does_not_go_together_is_one_line(recipe, tmp_path):
    asked = {"recipe": recipe, "out": tmp_path / "run", "servers": ["http://127.0.0.1:9"]}
    for settings, message in (
        ({"api": "openai"}, "name the model that is asked with --model-name"),
        ({"api": "openai", "model_name": "m", "models": ["x"]}, "leave --model and --alpha out"),
        ({"api": "openai", "model_name": "m", "engine": "vllm"}, "goes with --engine http, not vllm"),
    ):
        with pytest.raises((RecipeError, EngineError), match=message):
            evaluate(**asked, **settings)
    with pytest.raises(EngineError, match="name them with --server"):
        evaluate(recipe=recipe, out=tmp_path / "run", model_name="m", engine="transformers")
    assert not (tmp_path / "run").exists()

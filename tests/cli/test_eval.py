"""``mergekit-bio eval`` as it is typed."""

import json
import os
import subprocess
import sys

import pytest
import typer
import yaml
from hub.server import File, running_hub
from typer.testing import CliRunner

from mergekit_bio.cli.eval import evaluate
from mergekit_bio.cli.run_progress import pace
from mergekit_bio.errors import EngineError, RecipeError

app = typer.Typer()
app.command("eval")(evaluate)

ON_CPU = ("--engine", "transformers", "--engine-option", "device=cpu")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def recipe(merged, tmp_path_factory):
    """Two clips of each of two species, one query, one checkpoint; everything is self-made."""
    import numpy as np
    import soundfile

    folder = tmp_path_factory.mktemp("recipe")
    lines = ["file_name,label"]
    for number in range(4):
        soundfile.write(folder / f"{number}.wav", 0.5 * np.sin(np.arange(8000) * (0.1 + 0.2 * number)), 8000)
        lines.append(f"{number}.wav,{('Coruro', 'Great <b>Grig</b>')[number % 2]}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    file = folder / "tones.yaml"
    data = {
        "checkpoints": [str(merged)],
        "datasets": [{"path": ".", "name": "tones"}],
        "top_k_species": 5,
        "queries": ["Which is it?{randomize} One of: {species_list}"],
        "generate": {"max_new_tokens": 4, "num_beams": 2},
        "scorer": "exact",
    }
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tones"
    done = run(recipe, "--out", out, *ON_CPU)
    assert done.exit_code == 0, done.output
    return out, done


def test_predictions_tables_and_files(finished):
    out, done = finished
    rows = (out / "beans_zero_eval_tones_query0_lora050.jsonl").read_text().splitlines()
    assert sorted(json.loads(row)["id"] for row in rows) == [f"{number}.wav" for number in range(4)]
    assert "F1 weighted" in done.stdout and "scorer exact" in done.stdout
    assert (out / "report/report.html").is_file() and (out / "report/scores.json").is_file()
    assert "tones, query 0: 4 of 4; run 4 of 4" in done.stderr
    assert str(out) in done.stderr


def test_json_is_one_document_on_stdout(finished, recipe):
    out, _ = finished
    document = json.loads(run(recipe, "--out", out, "--json", *ON_CPU).stdout)
    assert document["run"] == str(out) and document["cells"][0]["answered"] == 4
    assert document["report"]["sweeps"][0]["cells"][0]["alpha"] == 0.5
    assert document["files"][0].endswith("report.html")


def test_without_a_report_only_predictions_are_made(recipe, tmp_path):
    done = run(recipe, "--out", tmp_path / "run", "--limit", "1", "--no-report", "--quiet", *ON_CPU)
    assert done.stdout == f"{tmp_path / 'run'}\n" and done.stderr == ""
    assert not (tmp_path / "run/report").exists()


def test_a_dry_run_prints_the_cells_and_writes_nothing(recipe, tmp_path):
    done = run(recipe, "--out", tmp_path / "run", "--dry-run", "--limit", "3", *ON_CPU)
    assert done.exit_code == 0, done.output
    assert "3 answers of 1 checkpoint to 1 query by the transformers engine" in done.stdout.replace("\n", " ")
    document = json.loads(run(recipe, "--out", tmp_path / "run", "--dry-run", "--json", *ON_CPU).stdout)
    assert document["answers"] == 4 and document["to_merge"] == []
    assert not (tmp_path / "run").exists()


def test_prompts_are_shown_before_anything_is_loaded(recipe, tmp_path):
    done = run(recipe, "--show-prompts", "2", "--out", tmp_path / "run")
    assert done.stdout.count("--- tones, query 0, clip") == 2
    assert done.stdout.count("<Audio><AudioHere></Audio> Which is it? One of: ") == 2
    assert "Great <b>Grig</b>" in done.stdout
    shown = json.loads(run(recipe, "--show-prompts", "1", "--json").stdout)["prompts"]
    assert shown[0]["id"] == "0.wav" and shown[0]["audios"] == ["0.wav"]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_sweep_says_what_would_be_merged(recipe, tmp_path):
    data = yaml.safe_load(recipe.read_text())
    del data["checkpoints"]
    sweep = recipe.with_name("sweep.yaml")
    sweep.write_text(yaml.safe_dump(data | {"merge": {"base": "a/b", "adapter": "c/d", "alphas": [0.0]}}))
    done = run(sweep, "--dry-run", "--json", "--alpha", "0:1:0.5", "--out", tmp_path / "run", *ON_CPU)
    assert json.loads(done.stdout)["to_merge"] == ["alpha 0.00", "alpha 0.50", "alpha 1.00"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["no_such_recipe"], RecipeError),
        (["closed_set", "--engine", "vlm"], EngineError),
        (["closed_set", "--engine-option", "dtype"], EngineError),
    ],
)
def test_mistakes_are_the_users_errors(arguments, error):
    assert isinstance(run(*arguments).exception, error)


def test_a_data_type_that_does_not_exist_is_refused_and_the_corrected_command_runs(recipe, tmp_path):
    command = [recipe, "--out", tmp_path / "run", *ON_CPU, "--limit", 1, "--no-report"]
    done = run(*command, "--engine-option", "dtype=float17")
    assert isinstance(done.exception, EngineError) and "dtype=float17: no such data type" in str(done.exception)
    assert run(*command).exit_code == 0


@pytest.mark.parametrize("option", ["dtype=16", "dtype=[1]", "dtype=", "dtype=int8", "device=meta", "device={a: 1}"])
def test_an_engine_option_of_another_kind_is_one_line(recipe, tmp_path, option):
    done = run(recipe, "--out", tmp_path / "run", "--engine", "transformers", "--engine-option", option)
    assert isinstance(done.exception, EngineError) and "\n" not in str(done.exception)
    assert "no such data type" in str(done.exception) or "no such device" in str(done.exception)


def refused(folder, *arguments, **environment) -> str:
    """The one line that a shipped recipe ends with on a machine that has neither the data nor the models."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from mergekit_bio.cli.app import main; main()",
            "eval",
            "recipes/closed_set.yaml",
            *arguments,
        ],
        env={**os.environ, "HF_HOME": str(folder / "hf"), "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == "", done.stderr
    (line,) = done.stderr.splitlines()
    assert [path.name for path in folder.iterdir()] in ([], ["hf"])
    return line


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def test_without_network_one_line_says_what_to_give_instead(tmp_path):
    line = refused(tmp_path, "--engine", "transformers", **OFFLINE)
    assert line.startswith("error: meta-llama/Llama-3.1-8B-Instruct: not a directory")
    assert "connect, or give the path of a copy" in line and "--model DIR" in line


def test_without_a_token_one_line_says_what_to_accept_and_where_to_log_in(tmp_path):
    with running_hub() as hub:
        repo = hub.create("meta-llama/Llama-3.1-8B-Instruct", gated=True)
        repo.commit({"config.json": File.regular(b"{}")})
        line = refused(tmp_path, "--engine", "transformers", HF_ENDPOINT=hub.url, HF_TOKEN="")
        assert not any("BEANS" in request for request in hub.requests)
    assert "accept its licence at https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct" in line
    assert "`hf auth login`" in line and "--model DIR" in line


def test_without_the_data_one_line_says_where_a_copy_goes(tmp_path, merged):
    line = refused(tmp_path, "--engine", "transformers", "--model", str(merged), **OFFLINE)
    assert line.startswith("error: EarthSpeciesProject/BEANS-Zero") and "hf auth login" in line
    assert "--data FOLDER" in line


def test_pace_is_said_in_words():
    assert pace(None, None) == ""
    assert pace(3.21, 3725) == "3.2/s, 1:02:05 left"
    assert pace(0.05, 59.6) == "3.0/min, 0:01:00 left"

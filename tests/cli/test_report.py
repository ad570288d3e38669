import json

import pytest
import typer
from typer.testing import CliRunner

from mergekit_bio.cli.report import report
from mergekit_bio.errors import RunError

app = typer.Typer()
app.command()(report)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_tables_on_the_terminal_and_files_in_the_run(make_run):
    path = make_run()
    done = run(path)
    assert done.exit_code == 0, done.output
    assert "F1 weighted" in done.stdout and "F1 macro" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert (path / "report" / "report.html").exists()
    assert str(path / "report" / "report.html") in done.stderr


def test_a_name_in_brackets_is_printed_as_it_is(make_run):
    assert "frogs [x] [bold], frogs, query 0" in run(make_run(name="frogs [x] [bold]"), "--tables-only").stdout


def test_json_is_one_document_on_stdout(make_run):
    done = run(make_run(rows=70), "--json", "--tables-only", "--scorer", "beans-zero")
    document = json.loads(done.stdout)
    assert list(document["scorers"]) == ["beans-zero"] and document["files"] == []
    assert [cell["alpha"] for cell in document["sweeps"][0]["cells"]] == [0.0, 0.5, 1.0]
    assert "incomplete, 60 of 70 clips" in done.stderr


def test_quiet_prints_the_files_and_nothing_else(make_run, tmp_path):
    done = run(make_run(), "--quiet", "--out", tmp_path / "out")
    assert done.stdout.splitlines()[0] == str(tmp_path / "out" / "report.html")
    assert done.stderr == ""


@pytest.mark.parametrize("labels", [["ᎠᎡ", "アカゲラ", "𓅃"], ["wren"]])
def test_quiet_is_quiet_about_letters_that_no_font_has_and_about_a_single_label(tmp_path, recwarn, labels):
    for alpha in ("000", "100"):
        rows = [{"prediction": label, "label": label, "id": label, "dataset_name": "birds"} for label in labels]
        file = tmp_path / f"beans_zero_eval_birds_query0_lora{alpha}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(tmp_path, "--quiet", "--out", tmp_path / "out")
    assert done.exit_code == 0 and done.stderr == ""
    assert [str(warning.message) for warning in recwarn] == []


def test_a_missing_run_is_the_users_error(tmp_path):
    assert isinstance(run(tmp_path / "missing").exception, RunError)

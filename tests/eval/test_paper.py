import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "eval" / "paper.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_the_published_predictions_are_scored_as_published(published):
    done = run("--exact", published / "closed_set_classification_all")
    assert done.returncode == 0, done.stderr
    assert "F1 weighted 0.281 / 0.092 (+205.5%), F1 macro 0.109 / 0.063 (+72.7%)" in done.stdout


def test_another_scorer_is_not_as_published(published):
    done = run("--exact", "--scorer", "beans-zero", published / "closed_set_classification_2")
    assert done.returncode == 1 and "not as published" in done.stderr


def test_a_missing_run_is_one_line(tmp_path):
    done = run(tmp_path / "missing")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from eval.conftest import beans_zero_rows
from tiny_naturelm import make_base, make_naturelm

from mergekit_bio.merging.merge import merge

SCRIPT = Path(__file__).parents[2] / "eval" / "paper.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


def test_the_published_predictions_are_scored_as_published(published):
    done = run("--exact", published / "closed_set_classification_all")
    assert done.returncode == 0, done.stderr
    assert "F1 weighted 0.281 / 0.092 (+205.5%), F1 macro 0.109 / 0.063 (+72.7%)" in done.stdout


def test_the_scores_to_compare_with_are_the_published_ones(published):
    printed = {}
    for file in ("metrics.json", "metrics_cbi.json"):
        printed |= json.loads((published / file).read_text())["metrics_sorted_tiebreak"]
    named = {"closed_set_2": "closed_set_classification_2", "closed_set": "closed_set_classification_all"}
    wordings = ("Original (query0)", "Reversed (query1)", "No Classes (query2)")
    cells = json.loads(SCRIPT.with_name("paper_scores.json").read_text())["cells"]
    for cell in cells:
        recipe, query, alpha = cell["recipe"], cell["query"], f"{cell['alpha']:.1f}"
        if recipe in ("watkins", "cbi"):
            theirs = printed[f"{recipe}/{('common', 'scientific', 'combined')[query]}"][alpha]
        else:
            theirs = printed["zf-indiv"][wordings[query]] if recipe == "zf_indiv" else printed[named[recipe]][alpha]
        ours = [cell["accuracy"], cell["f1_weighted"], cell["f1_macro"]]
        assert ours == pytest.approx([theirs["accuracy"], theirs["f1"], theirs["f1_macro_sklearn"]], rel=0, abs=1e-12)
    assert len({(cell["recipe"], cell["query"], cell["alpha"]) for cell in cells}) == len(cells) == 91


def test_another_scorer_is_not_as_published(published):
    done = run("--exact", "--scorer", "beans-zero", published / "closed_set_classification_2")
    assert done.returncode == 1 and "not as published" in done.stderr


def test_a_missing_run_is_one_line(tmp_path):
    done = run(tmp_path / "missing")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_an_experiment_is_run_and_set_beside_the_paper(tmp_path):
    rows = beans_zero_rows({"zf-indiv": ["One", "More"]})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet")
    base, adapter = make_base(tmp_path / "base"), make_naturelm(tmp_path / "adapter")
    merge(base=base, adapter=adapter, alphas=[1.0], out=tmp_path / "sweep/alpha-1.00")
    options = ("--model", tmp_path / "sweep", "--data", tmp_path / "data.parquet", "--engine", "transformers")
    started = []
    for _ in range(2):
        done = run("--run", tmp_path / "paper", "--only", "zf_indiv", "--limit", "1", *options)
        assert done.returncode == 0, done.stderr
        tables = done.stdout.split("\n\n")[:3]
        assert [table.strip().splitlines()[0] for table in tables] == [
            f"zf_indiv, zf-indiv, query {query} (1 clip)" for query in range(3)
        ]
        assert tables[0].splitlines()[-1].startswith("1.0    0.6750  ")
        started.append(done.stderr.count("] alpha-1.00, zf-indiv, query"))
    assert started == [3, 0]  # the second time everything is there

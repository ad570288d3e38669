import json
import re

import yaml
from typer.testing import CliRunner

from mergekit_bio.cli.recipes import app
from mergekit_bio.eval.recipe.schema import load_recipe
from mergekit_bio.eval.recipe.shipped import shipped_recipes


def run(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


def test_the_list_names_them_all():
    shown = run("list").stdout
    assert "Which of all 40 species of unseen families is it?" in shown
    rows = json.loads(run("list", "--json").stdout)
    assert all(re.fullmatch("[A-Z].{10,100}", row["purpose"]) for row in rows)
    names = [row["name"] for row in rows]
    assert all(name in shown for name in names)
    assert names == run("list", "--quiet").stdout.split()
    assert {"closed_set", "in_context_5", "beans_zero"} <= set(names)


def test_show_prints_a_recipe_that_is_one(tmp_path):
    text = run("show", "watkins").stdout
    shown = yaml.safe_load(text)
    assert shown["queries"][0] == "What is the common name for the focal species in the audio?"
    assert json.loads(run("show", "watkins", "--json").stdout)["recipe"] == shown
    for name, file in shipped_recipes().items():
        (tmp_path / "mine.yaml").write_text(run("show", name).stdout)
        assert load_recipe(tmp_path / "mine.yaml").recipe == load_recipe(file).recipe


def test_copy_makes_the_files(tmp_path):
    run("copy", "cbi", tmp_path)
    assert (tmp_path / "cbi.yaml").exists() and (tmp_path / "labels" / "cbi.csv").exists()


def test_copy_makes_a_folder_of_a_name_with_a_slash_at_its_end(tmp_path):
    run("copy", "cbi", f"{tmp_path}/mine/")
    assert (tmp_path / "mine" / "cbi.yaml").exists() and (tmp_path / "mine" / "labels" / "cbi.csv").exists()

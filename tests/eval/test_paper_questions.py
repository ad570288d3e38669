"""watkins and cbi, asked for common names, scientific names and both: one scoring, whichever way predictions come."""

import gzip
import json
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from typer.testing import CliRunner

from mergekit_bio.cli.app import app
from mergekit_bio.eval.recipe.schema import load_recipe
from mergekit_bio.eval.recipe.shipped import shipped_recipes
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.eval.records.run_directory import RunDirectory, RunRecord
from mergekit_bio.eval.run.checkpoints import RunCheckpoint
from mergekit_bio.eval.run.evaluate import prepare_run
from mergekit_bio.eval.run.plan import identified_cells, plan_run
from mergekit_bio.eval.run.progress import SilentListener
from mergekit_bio.eval.scoring.score import score

COMMON = "What is the common name for the focal species in the audio?"
SCIENTIFIC = "What is the scientific name for the focal species in the audio?"
BOTH = "Identify the focal species in the audio and provide its taxonomic name followed by a colon and its common name."
#: In the order of the published files, with the keys of their scores.
QUESTIONS = {COMMON: "common", SCIENTIFIC: "scientific", BOTH: "combined"}
TARGETS = {COMMON: "label", SCIENTIFIC: "scientific", BOTH: "combined"}
SWEEP = tuple(number / 10 for number in range(11))
#: Of cbi, with its 3620 clips a cell, one strength at each end and the best between; test_scoring.py has them all.
ALPHAS = {"watkins": SWEEP, "cbi": (0.0, 0.7, 1.0)}


@pytest.fixture(scope="module")
def figures(published) -> dict[tuple[str, str, float], dict[str, float]]:
    """(component, question, alpha) -> what the paper's scripts give, ties by sorted label."""
    found = {}
    for file in ("metrics.json", "metrics_cbi.json"):
        printed = json.loads((published / file).read_text())["metrics_sorted_tiebreak"]
        for component in ("watkins", "cbi"):
            for question, key in QUESTIONS.items():
                for alpha, values in printed.get(f"{component}/{key}", {}).items():
                    found[component, question, float(alpha)] = values
    assert len(found) == 66
    return found


def predictions_file(published: Path, component: str, question: str, alpha: float) -> Path:
    number = list(QUESTIONS).index(question)
    return published / component / f"beans_zero_eval_{component}_query{number}_lora{round(alpha * 100):03d}.jsonl.gz"


def are_the_papers(cells: list[Cell], questions: list[str], figures: dict) -> int:
    """Whether the cells, with questions in the given order, have the paper's figures; the value is their number."""
    for cell in cells:
        scored = score(cell, scorer="paper")
        expected = figures[cell.dataset, questions[cell.query], cell.alpha]
        ours = {
            "accuracy": scored.metrics["accuracy"],
            "f1": scored.metrics["f1_weighted"],
            "precision": scored.metrics["precision_weighted"],
            "f1_macro_sklearn": scored.metrics["f1_macro"],
            "out_of_set_rate_cls": scored.metrics["out_of_set_matched"],
        }
        assert ours == pytest.approx({name: expected[name] for name in ours}, rel=0, abs=1e-9), cell
    return len(cells)


@pytest.fixture(scope="module")
def beans_zero_texts(published, tmp_path_factory) -> Path:
    """The rows of watkins and cbi in BEANS-Zero's schema, the recordings left out."""
    rows = []
    for component in ("watkins", "cbi"):
        for line in gzip.decompress(predictions_file(published, component, COMMON, 1.0).read_bytes()).splitlines():
            row = json.loads(line)
            rows.append(
                {
                    "id": row["id"],
                    "dataset_name": component,
                    "audio": [0.0],
                    "metadata": json.dumps({"sample_rate": 16000}),
                    "instruction": f"<Audio><AudioHere></Audio> {COMMON}",
                    "output": row["label"],
                }
            )
    folder = tmp_path_factory.mktemp("beans-zero-texts")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "shard-0.parquet")
    return folder


def answered(recipe_file: Path, *, data: Path, published: Path, out: Path) -> list[Cell]:
    """The cells of a recipe's run in which every checkpoint answered as the published ones did."""
    recipe = load_recipe(recipe_file, data=data).recipe
    alphas = [alpha for alpha in recipe.merge.alphas if alpha in ALPHAS[recipe.datasets[0].name]]
    checkpoints = [RunCheckpoint(name=f"alpha {alpha:.2f}", source="none", alpha=alpha) for alpha in alphas]
    plan = plan_run(recipe, checkpoints, out=out, engine="transformers")
    cells = identified_cells(plan, weights={checkpoint: {} for checkpoint in checkpoints}, dtype=None)
    record = RunRecord(name=recipe.name, recipe={}, scorer=recipe.scorer, cells=cells, label_map=recipe.label_map)
    with RunDirectory(out, record):
        for cell in plan.cells:
            question, alpha = recipe.queries[cell.query], cell.alpha
            file = predictions_file(published, cell.dataset, question, alpha)
            (out / cell.file).write_bytes(gzip.decompress(file.read_bytes()))
    return read_runs([out])


def reference_yaml(folder: Path, datasets: list[str], queries: list[str]) -> Path:
    """A configuration of the paper's, as its authors' code reads it."""
    file = folder / f"{'_'.join(datasets)}.yml"
    content = {
        "model": {
            "llama_path": "meta-llama/Meta-Llama-3.1-8B-Instruct",
            "ckpt": "EarthSpeciesProject/NatureLM-audio",
            "use_audio_Qformer": True,
        },
        "generate": {
            "max_new_tokens": 100,
            "num_beams": 2,
            "do_sample": False,
            "min_length": 1,
            "temperature": 0.1,
            "repetition_penalty": 1.0,
            "length_penalty": 1.0,
        },
        "extended": {"datasets": datasets, "queries": queries, "lora_scales": list(SWEEP)},
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.mark.parametrize("component", ["watkins", "cbi"])
def test_published_predictions_give_the_papers_figures_through_the_recipe(
    published, figures, beans_zero_texts, tmp_path, component
):
    file = shipped_recipes()[component]
    cells = answered(file, data=beans_zero_texts, published=published, out=tmp_path / "run")
    assert are_the_papers(cells, list(QUESTIONS), figures) == 3 * len(ALPHAS[component])


@pytest.mark.parametrize("component", ["watkins", "cbi"])
def test_published_predictions_give_the_papers_figures_through_a_label_map(published, figures, tmp_path, component):
    for question in QUESTIONS:
        for alpha in ALPHAS[component]:
            file = predictions_file(published, component, question, alpha)
            shutil.copy(file, tmp_path)
    cells = read_runs([tmp_path], [shipped_recipes()[component].parent / "labels" / f"{component}.csv"])
    assert are_the_papers(cells, list(QUESTIONS), figures) == 3 * len(ALPHAS[component])


@pytest.mark.parametrize(
    ("component", "questions"),
    [
        ("watkins", [COMMON, SCIENTIFIC, BOTH]),
        ("watkins", [BOTH, COMMON]),
        ("watkins", [SCIENTIFIC]),
        ("cbi", [COMMON, SCIENTIFIC, BOTH]),
    ],
)
def test_published_predictions_give_the_papers_figures_through_the_references_yaml(
    published, figures, beans_zero_texts, tmp_path, component, questions
):
    file = reference_yaml(tmp_path, [component], questions)
    cells = answered(file, data=beans_zero_texts, published=published, out=tmp_path / "run")
    assert are_the_papers(cells, questions, figures) == len(questions) * len(ALPHAS[component])


@pytest.mark.parametrize("component", ["watkins", "cbi"])
def test_the_references_yaml_is_the_shipped_recipe(tmp_path, component):
    loaded = load_recipe(reference_yaml(tmp_path, [component], list(QUESTIONS)))
    ours = load_recipe(shipped_recipes()[component]).recipe
    for key in ("datasets", "queries", "targets", "label_map", "generate", "species", "top_k_species", "scorer"):
        assert getattr(loaded.recipe, key) == getattr(ours, key), key
    assert loaded.recipe.merge.alphas == ours.merge.alphas
    assert loaded.notes[-1].endswith(
        f"{component}, scored as the paper scores its questions: query 0 against the label, query 1 against the "
        f'scientific name, query 2 against both ("scientific : label"); the names are labels/{component}.csv'
    )


def test_of_several_datasets_each_is_scored_as_it_is_in_the_paper(tmp_path):
    recipe = load_recipe(reference_yaml(tmp_path, ["cbi", "watkins"], [BOTH])).recipe
    assert recipe.targets == ("combined",)
    assert (
        recipe.label_map["Bearded Seal"] == "Erignathus barbatus"
        and recipe.label_map["Common Loon"] == "Colymbus immer"
    )
    loaded = load_recipe(reference_yaml(tmp_path, ["esc50", "watkins"], [SCIENTIFIC]))
    assert [loaded.recipe.target(0, name) for name in ("esc50", "watkins")] == ["label", "scientific"]
    assert loaded.recipe.label_map == load_recipe(shipped_recipes()["watkins"]).recipe.label_map
    assert loaded.notes[-2].endswith(
        "watkins, scored as the paper scores its questions: query 0 against the scientific name; the names are "
        "labels/watkins.csv"
    )
    assert loaded.notes[-1].endswith(": every answer about the other datasets is scored against the label")


@pytest.mark.parametrize(
    ("dataset", "query", "said"),
    [
        (
            "watkins",
            "Which is it?",
            "as the paper scores its questions: query 0 against the label (it is none of them)",
        ),
        (
            "cbi",
            f"{SCIENTIFIC} Or guess.",
            "as the paper scores its questions: query 0 against the label (it is none of them)",
        ),
        ("esc50", SCIENTIFIC, "every answer is scored against the label"),
    ],
)
def test_where_the_paper_does_not_say_it_the_right_answer_is_the_label_and_a_note_says_so(
    tmp_path, dataset, query, said
):
    loaded = load_recipe(reference_yaml(tmp_path, [dataset], [query]))
    assert loaded.recipe.target(0, dataset) == "label" and loaded.recipe.label_map == {}
    assert loaded.notes[-1].endswith(said)


def test_the_references_yaml_without_queries_is_scored_against_the_label(tmp_path):
    loaded = load_recipe(reference_yaml(tmp_path, ["watkins", "cbi"], []))
    assert [loaded.recipe.target(0, name) for name in ("watkins", "cbi")] == ["label", "label"]
    assert loaded.notes[-1].endswith(": every answer is scored against the label")


def test_flags_and_the_audio_slot_are_no_part_of_the_question(tmp_path):
    file = reference_yaml(tmp_path, ["watkins"], [f"<Audio><AudioHere></Audio>\n{SCIENTIFIC}", COMMON])
    assert load_recipe(file).recipe.targets == ("scientific", "label")


def test_a_recipe_of_ours_without_targets_is_scored_alike_and_one_with_targets_as_it_says(tmp_path):
    file = tmp_path / "mine.yaml"
    content = {"checkpoints": ["m"], "datasets": ["watkins"], "queries": [COMMON, SCIENTIFIC]}
    file.write_text(yaml.safe_dump(content))
    loaded = load_recipe(file)
    assert loaded.recipe.targets == ("label", "scientific") and "query 1 against the scientific name" in loaded.notes[0]
    file.write_text(yaml.safe_dump(content | {"targets": ["label", "label"]}))
    loaded = load_recipe(file)
    assert loaded.recipe.targets == ("label", "label") and loaded.notes == () and loaded.recipe.label_map == {}
    (tmp_path / "names.csv").write_text("label,scientific\nWalrus,Odobenus\n")
    file.write_text(yaml.safe_dump(content | {"label_map": "names.csv"}))
    loaded = load_recipe(file)
    assert loaded.recipe.target(1, "watkins") == "scientific" and loaded.recipe.label_map == {"Walrus": "Odobenus"}
    assert loaded.notes[0].endswith("the names are in label_map")


def test_a_folder_of_ones_own_is_no_component_whatever_its_name(tmp_path):
    file = tmp_path / "mine.yaml"
    content = {"checkpoints": ["m"], "datasets": [{"path": "watkins"}], "queries": [SCIENTIFIC]}
    file.write_text(yaml.safe_dump(content))
    loaded = load_recipe(file)
    assert loaded.recipe.target(0, "watkins") == "label" and loaded.notes == ()


def renumbered(file: Path, folder: Path, query: int, change=lambda row: row) -> Path:
    """A copy of a published file under the number of another query, its rows changed."""
    rows = [change(json.loads(line)) for line in gzip.decompress(file.read_bytes()).splitlines()]
    copy = folder / f"beans_zero_eval_watkins_query{query}_lora100.jsonl"
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return copy


def test_the_question_of_a_predictions_file_is_its_prompts_and_not_its_number(published, figures, tmp_path):
    renumbered(predictions_file(published, "watkins", BOTH, 1.0), tmp_path, 0)
    renumbered(predictions_file(published, "watkins", COMMON, 1.0), tmp_path, 7)
    cells = read_runs([tmp_path])
    assert [(cell.query, cell.target) for cell in cells] == [(0, "combined"), (7, "label")]
    assert are_the_papers(cells, [BOTH, *[""] * 6, COMMON], figures) == 2


def test_without_prompts_a_predictions_file_is_of_the_papers_question_with_its_number(published, figures, tmp_path):
    source = predictions_file(published, "watkins", SCIENTIFIC, 1.0)
    renumbered(source, tmp_path, 1, lambda row: row | {"prompt": None})
    renumbered(source, tmp_path, 3, lambda row: row | {"prompt": None})
    first, second = read_runs([tmp_path])
    assert are_the_papers([first], list(QUESTIONS), figures) == 1
    assert (first.target, second.target) == ("scientific", "label")
    run = tmp_path.name
    (note,) = first.notes
    used = "no list of scientific names beside the files; the paper's is used (labels/watkins.csv)"
    assert note == f"{run}, watkins, query 1: {used}"
    (note,) = second.notes
    said = "none of the paper's questions (the file has no prompts); scored against the label"
    assert note == f"{run}, watkins, query 3: {said}"


def test_a_question_that_is_not_the_papers_is_named_in_the_report(published, tmp_path):
    def asked_otherwise(row: dict) -> dict:
        return row | {"prompt": (row["prompt"] or "").replace(SCIENTIFIC, "What is its Latin name?") or None}

    file = renumbered(predictions_file(published, "watkins", SCIENTIFIC, 1.0), tmp_path, 1, asked_otherwise)
    done = CliRunner().invoke(app, ["report", str(file), "--tables-only"])
    assert done.exit_code == 0
    assert "none of the paper's questions ('What is its Latin name?'); scored against the label" in done.stderr


def test_a_label_that_cannot_be_chosen_is_named_before_anything_is_asked(beans_zero, tmp_path):
    (tmp_path / "names.csv").write_text("label,scientific\nWalrus,Odobenus rosmarus\n")
    content = {"checkpoints": ["someone/model"], "datasets": ["watkins"], "queries": [COMMON, SCIENTIFIC]}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(content | {"label_map": "names.csv", "decoding": "choice"}))
    heard = []
    listener = SilentListener()
    listener.note = heard.append
    prepare_run(
        recipe=file, data=beans_zero("parquet"), out=tmp_path, engine="transformers", listener=listener, fetch=False
    )
    (note,) = (text for text in heard if "no scientific name" in text)
    assert note.startswith("note: watkins, query 1: no scientific name for 1 of 2 labels (Fin, Finback Whale): every")

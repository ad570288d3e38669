"""Instructions from a folder of prompts to what was kept, with a real engine on a small model."""

import hashlib
import json
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from eval.evaluation import Evaluation, write_evaluation
from rich.console import Console

from mergekit_bio.errors import DatasetError, RecipeError, RunError
from mergekit_bio.eval.data.instructions import open_instructions
from mergekit_bio.eval.recipe.schema import load_recipe
from mergekit_bio.eval.recipe.shipped import copy_shipped, shipped_recipes
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.predictions import Prediction, read_predictions
from mergekit_bio.eval.report.build import build_report, to_document
from mergekit_bio.eval.report.page import render_page
from mergekit_bio.eval.report.tables import print_report
from mergekit_bio.eval.run.evaluate import evaluate

#: SHA-256 of the prompts and recordings of a version, which stays as it is: scores of two versions are of two things.
V1 = "3bf314d85660d40a6485f0ff1397c592aa6c66e4de142712161606e6ac6bb4de"
PROMPTS = [
    {"id": "a", "prompt": "Say no letter e.", "constraint": "without: e"},
    {"id": "b", "prompt": "Shout.", "constraint": "upper_case", "file_name": "0.wav"},
    {"id": "c", "prompt": "One word.", "constraint": "words: 1"},
    {
        "id": "d",
        "prompt": "What is in <Audio><AudioHere></Audio>? No e.",
        "constraint": "without: e",
        "file_name": "1.wav",
    },
]
#: The verdicts of these constraints, on their own.
KEEPS = {
    "without: e": lambda text: not re.search(r"\be\b", text, re.IGNORECASE),
    "upper_case": str.isupper,
    "words: 1": lambda text: len([word for word in text.split() if re.search(r"[^\W_]", word)]) == 1,
}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Evaluation:
    made = write_evaluation(tmp_path_factory.mktemp("evaluation"))
    (made.recordings / "metadata.csv").unlink()
    write_prompts(made.recordings, PROMPTS)
    return made


def write_prompts(folder: Path, rows: list[dict]) -> Path:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(evaluation: Evaluation, name: str = "instructed", **changes) -> Path:
    nothing = dict.fromkeys(("top_k_species", "n_examples", "queries"))
    dataset = {"path": str(evaluation.recordings), "task": "instructions"}
    return evaluation.variant(name, **(nothing | {"datasets": [dataset], "scorer": "constraint"} | changes))


@pytest.fixture(scope="module")
def run(evaluation, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    return evaluate(
        recipe=recipe(evaluation, generate={"max_new_tokens": 20, "num_beams": 1}),
        out=out,
        engine="transformers",
        engine_options={"device": "cpu"},
    )


def test_prompts_are_asked_with_and_without_audio(run, evaluation):
    for cell in run.record.cells:
        rows = {row.id: row for row in read_predictions(run.path / cell.file)}
        assert {key: row.label for key, row in rows.items()} == {row["id"]: row["constraint"] for row in PROMPTS}
        asked = {key: row.prompt.split("\n\n")[1].split("<|eot_id|>")[0] for key, row in rows.items()}
        assert asked == {
            "a": "Say no letter e.",
            "b": "<Audio><AudioHere></Audio> Shout.",
            "c": "One word.",
            "d": "What is in <Audio><AudioHere></Audio>? No e.",
        }
        heard = {key: row.audio and Path(row.audio).name for key, row in rows.items()}
        assert heard == {"a": None, "b": "0.wav", "c": None, "d": "1.wav"}
        # 29 tokens of the prefix of 10 s
        assert rows["b"].prompt_tokens - rows["c"].prompt_tokens >= 29
    assert len({row.prediction for row in rows.values()}) == 4


def test_what_was_kept_is_counted_over_all_prompts_and_by_kind(run):
    (sweep,) = run.report().sweeps
    assert [item.cell.alpha for item in sweep.scores] == [0.0, 1.0]
    for item in sweep.scores:
        kept = {row.id: KEEPS[row.label](row.prediction.strip()) for row in item.cell.predictions}
        assert item.metrics["strict"] == pytest.approx(np.mean([*kept.values()]))
        assert item.metrics["strict:text_only"] == pytest.approx(np.mean([kept["a"], kept["c"]]))
        assert item.metrics["strict:with_audio"] == pytest.approx(np.mean([kept["b"], kept["d"]]))
        assert item.metrics["strict:without"] == pytest.approx(np.mean([kept["a"], kept["d"]]))
        assert item.metrics["strict:upper_case"] == kept["b"] and item.metrics["strict:words"] == kept["c"]
        assert "strict:json" not in item.metrics
        assert item.scorer == "constraint" and item.correct == tuple(kept[key] for key in item.ids)


def test_the_same_command_asks_nothing_again_and_a_changed_prompt_alone(run, evaluation):
    changed = [PROMPTS[0] | {"prompt": "Say no e, please."}, *PROMPTS[1:]]
    try:
        for prompts, again in ((PROMPTS, 0), (changed, 2), (PROMPTS, 2)):
            write_prompts(evaluation.recordings, prompts)
            before = {file: file.read_text() for file in run.path.glob("*.jsonl")}
            evaluate(
                recipe=recipe(evaluation, generate={"max_new_tokens": 20, "num_beams": 1}),
                out=run.path,
                engine="transformers",
                engine_options={"device": "cpu"},
            )
            lines = [set(file.read_text().splitlines()) - set(text.splitlines()) for file, text in before.items()]
            assert sum(map(len, lines)) == again
    finally:
        write_prompts(evaluation.recordings, PROMPTS)


def cells(**answers: list[tuple[str, str]]) -> list[Cell]:
    """A sweep of instructions: ``a050=[(answer, constraint), ...]`` is alpha 0.5; every second prompt has audio."""
    return [
        Cell(
            file="f.jsonl", dataset="v1", task="instructions", query=0, rows=None, run="instructions",
            checkpoint=f"alpha {int(name[1:]) / 100:.2f}", alpha=int(name[1:]) / 100,
            predictions=tuple(
                Prediction(
                    prediction=text, label=constraint, id=f"{number:03d}", dataset_name="v1",
                    audio=None if number % 2 == 0 else "x.wav",
                )
                for number, (text, constraint) in enumerate(pairs)
            ),
        )
        for name, pairs in answers.items()
    ]  # fmt: skip


#: 12 prompts of one word, 8 in capitals: all kept at alpha 0, some loosely only at alpha 0.5, few at alpha 1.
WORDS, CAPITALS = "words: 1", "upper_case"
SWEEP = cells(
    a000=[("Wren", WORDS)] * 12 + [("WREN", CAPITALS)] * 8,
    a050=[("Wren", WORDS)] * 6 + [("It is\nWren", WORDS)] * 6 + [("WREN", CAPITALS)] * 8,
    a100=[("a wren", WORDS)] * 10 + [("Wren", WORDS)] * 2 + [("Wren", CAPITALS)] * 8,
)


def test_strict_and_loose_come_with_intervals_over_prompts():
    (sweep,) = build_report(SWEEP, scorer="exact").sweeps
    assert [item.metrics["strict"] for item in sweep.scores] == [1.0, 14 / 20, 2 / 20]
    assert [item.metrics["loose"] for item in sweep.scores] == [1.0, 1.0, 2 / 20]
    middle = sweep.scores[1]
    assert (middle.metrics["strict:words"], middle.metrics["loose:words"], middle.metrics["strict:upper_case"]) == (
        0.5,
        1,
        1,
    )
    # Of a kind the number of prompts varies too.
    for name, kept in (("strict", [1] * 14 + [0] * 6), ("strict:words", [1] * 6 + [0] * 6)):
        resampled = scipy.stats.bootstrap((kept,), np.mean, method="percentile", n_resamples=20_000, rng=0)
        assert middle.intervals[name] == pytest.approx(tuple(resampled.confidence_interval), abs=0.06)
    assert middle.answers.count("kept loosely") == 6 and middle.answers.count("kept") == 14


def test_alphas_are_compared_prompt_by_prompt():
    """6 prompts are kept strictly at alpha 0 only: the exact sign test."""
    (sweep,) = build_report(SWEEP).sweeps
    against = sweep.comparison("strict").of("alpha 0.50")
    assert against.p == pytest.approx(scipy.stats.binomtest(0, 6).pvalue) and against.difference == pytest.approx(-0.3)
    assert sweep.comparison("loose").of("alpha 0.50").p == 1


def test_a_kind_that_a_resample_lacks_has_an_interval_of_those_that_have_it():
    (one,) = cells(a000=[("Wren", WORDS)] * 2 + [("wren", CAPITALS)])
    ((item,),) = [sweep.scores for sweep in build_report([one]).sweeps]
    assert item.intervals["strict:upper_case"] == (0, 0) and item.intervals["strict:words"] == (1, 1)


def test_the_table_has_a_row_a_kind_and_fits_eighty_columns(tmp_path):
    eleven = [replace(SWEEP[1], alpha=n / 10, checkpoint=f"alpha {n / 10:.2f}") for n in range(11)]
    report = build_report(eleven)
    console = Console(record=True, width=80, file=(tmp_path / "shown").open("w"))
    print_report(report, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line.split() for line in lines]
    assert ["words", "12", *[".50"] * 11] in shown and ["words", "12", *["1.00"] * 11] in shown
    assert ["with_audio", "10", *[".70"] * 11] in shown and any("20 prompts" in line for line in lines)
    figures = {row["alpha"]: row["figures"] for row in to_document(report)["sweeps"][0]["cells"]}
    assert figures[0.3]["strict:words"] == 0.5


def test_the_scorer_is_for_instructions_and_they_for_no_other():
    labelled = replace(SWEEP[0], task="classification")
    with pytest.raises(RunError, match="the scorer constraint is for instructions, this is classification"):
        build_report([labelled], scorer="constraint")
    broken = replace(SWEEP[0], predictions=tuple(replace(row, label="word: 1") for row in SWEEP[0].predictions))
    with pytest.raises(RunError, match=r"f\.jsonl: unknown constraint 'word'; did you mean 'words'"):
        build_report([broken])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "x", "prompt": "?"}, r"jsonl:5: no column 'constraint'; it has id, prompt"),
        ({"id": "x", "prompt": "", "constraint": "upper_case"}, r"jsonl:5: 'prompt' must be a text"),
        (
            {"id": "x", "prompt": "?", "constraint": "words: many"},
            r"jsonl:5: constraint: 'words: many': write words: NUM",
        ),
        (
            {"id": "x", "prompt": "?", "constraint": "upper_case", "file_name": "no.wav"},
            r"jsonl:5: .*no\.wav.*not exist",
        ),
        (
            {"id": "x", "prompt": "?", "constraint": "upper_case", "file_name": 3},
            r"jsonl:5: 'file_name' must be a text",
        ),
        (PROMPTS[0], r"the id 'a' stands in 2 rows"),
    ],
)
def test_a_bad_row_is_named(evaluation, tmp_path, row, message):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in ("0.wav", "1.wav"):
        (folder / name).write_bytes((evaluation.recordings / name).read_bytes())
    write_prompts(folder, [*PROMPTS, row])
    with pytest.raises(DatasetError, match=message):
        open_instructions(folder, name="mine")


def test_a_folder_without_prompts_says_what_it_needs(tmp_path):
    with pytest.raises(DatasetError, match=r"has no metadata\.csv or metadata\.jsonl with id, prompt, constraint"):
        open_instructions(tmp_path, name="mine")


def test_a_csv_of_prompts_will_do(tmp_path):
    (tmp_path / "metadata.csv").write_text('id,prompt,constraint,file_name\nx,"Yes, or no?",one_of: Yes | No,\n')
    (row,) = open_instructions(tmp_path, name="mine").asked
    assert (row.instruction, row.label, row.path) == ("Yes, or no?", "one_of: Yes | No", None)


def test_a_prompt_is_asked_letter_by_letter(tmp_path):
    """What cannot be seen joins letters: in Persian, and in a picture of a woman who is a scientist."""
    prompt = "Say \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 and \U0001f469\u200d\U0001f52c."
    write_prompts(tmp_path, [{"id": "x", "prompt": f" {prompt}\n", "constraint": "upper_case"}])
    (row,) = open_instructions(tmp_path, name="mine").asked
    assert row.instruction == prompt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queries": ["What?"]}, "its own .task: instructions.; leave queries out"),
        ({"top_k_species": 2}, "leave top_k_species out"),
        ({"decoding": "choice"}, "instructions are answered freely"),
        ({"datasets": ["watkins"]}, "'constraint' is for task: instructions, and 'watkins' is classification"),
    ],
)
def test_what_does_not_go_with_instructions_is_refused(evaluation, changes, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe(evaluation, "refused", **changes))


def test_instructions_and_a_component_go_into_one_recipe(evaluation):
    both = recipe(
        evaluation, "both", datasets=["watkins", {"path": "recordings", "task": "instructions"}], scorer="paper"
    )
    assert [choice.task for choice in load_recipe(both).recipe.datasets] == [None, "instructions"]


def test_a_version_of_the_prompts_never_changes():
    folder = shipped_recipes()["instructions"].parent / "instructions" / "v1"
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    assert digest.hexdigest() == V1


def test_a_copied_recipe_has_its_prompts_and_recordings(tmp_path):
    copied = copy_shipped("instructions", tmp_path)
    (choice,) = load_recipe(copied[0]).recipe.datasets
    dataset = open_instructions(Path(choice.path), name="copy")
    assert Path(choice.path).is_relative_to(tmp_path) and len(dataset.asked) == 200
    samples, rate = dataset.audio(next(row.id for row in dataset.asked if row.path))
    assert len(samples) == 10 * rate and np.abs(samples).max() > 0.1


def test_other_models_stand_in_a_table_of_their_own_at_80_columns(tmp_path):
    eleven = [replace(SWEEP[1], alpha=n / 10, checkpoint=f"alpha {n / 10:.2f}") for n in range(11)]
    names = ("gpt-4o-audio-preview-2024-12-17", "Qwen2-Audio-7B-Instruct")
    others = [replace(SWEEP[2], alpha=None, checkpoint=name, identity={"baseline": True}) for name in names]
    console = Console(record=True, width=80, file=(tmp_path / "shown").open("w"))
    print_report(build_report([*eleven, *others]), console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines if line.split()[:1] == ["words"]]
    # Of both rules the alphas' row and the other models'.
    assert [len(row) for row in rows] == [2 + 11, 2 + 2] * 2 and rows[1][2:] == [".17", ".17"]


def test_the_page_filters_instructions_by_whether_they_were_kept(tmp_path):
    page = render_page(
        build_report(SWEEP), [], folder=tmp_path, tables={}, progress=lambda description, total: nullcontext(print)
    )
    outcomes = re.findall(r'<option value="(\d)">([^<]*)</option>', page)
    assert outcomes == [("0", "kept"), ("1", "kept loosely"), ("2", "not kept")]
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])
    found = Counter(zip(data["rows"]["cell"], data["rows"]["outcome"], strict=True))
    assert found == {(0, 0): 20, (1, 0): 14, (1, 1): 6, (2, 0): 2, (2, 2): 18}

"""The beans-zero library's own tools read our predictions files as they are."""

import random
import re
from pathlib import Path

import pytest

pytest.importorskip("pandas", reason="the eval extra is not installed")

from eval import beans_zero_tool
from mergekit_bio.eval.records.predictions import Prediction, PredictionWriter
from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.eval.scoring.score import score

#: Labels of which no answer below is equally near to two.
LABELS = {
    "watkins": ["Walrus", "Beluga, White Whale", "Sperm Whale"],
    "hiceas": ["Minke whale", "None"],
    "dcase": ["American Redstart, Jackdaw call", "Jackdaw call", "None"],
}
WORDS = [
    "Walrus",
    "Walruss",
    "Sperm Whale<|end_of_text|> .",
    "Beluga, White Whale",
    "Minke whale",
    "minke whale",
    "None",
    "Jackdaw call, American Redstart",
]
#: Texts that a reader might take for something else, or for several lines.
HARD = ["", " ", "null", "true", "17", "1e5", "2020-01-01", '"', "\\n", "a\nb\r\n\u2028\x85c", "\x00", "🐋", "{}"]


def write(path: Path, dataset: str, predictions: list[str], labels: list[str]) -> Path:
    """A file with everything that a run writes."""
    with PredictionWriter(path) as writer:
        for number, (text, label) in enumerate(zip(predictions, labels, strict=True)):
            writer.append(
                Prediction(
                    prediction=text,
                    label=label,
                    id=f"{number}",
                    dataset_name=dataset,
                    prompt="What?\n",
                    lora_scale=None if number % 2 else 0.4,
                    prompt_tokens=12,
                    generated_ids=(1, 2),
                    logprob=-0.5,
                    example_ids=("7", "8"),
                    choice_logprobs={"a": -1.0},
                    audio="a.wav",
                )
            )
    return path


def test_every_text_comes_through_as_it_was(tmp_path):
    path = write(tmp_path / "p.jsonl", "watkins", HARD, HARD)
    assert beans_zero_tool.read(path) == {"watkins": [(text, text) for text in HARD]}


NAMES = {
    "classification": {
        "Accuracy": "accuracy",
        "F1 Score": "f1_weighted",
        "Precision": "precision_weighted",
        "Recall": "recall_weighted",
        "Top-1 Accuracy": "top1",
    },
    "detection": {
        "F1": "f1_macro",
        "Precision": "precision_macro",
        "Recall": "recall_macro",
        "mAP": "map_beans_zero",
    },
}


def printed_by_the_library(path: Path) -> dict[str, dict[str, float]]:
    import pandas

    evaluate = pytest.importorskip("beans_zero.evaluate", reason="the beans-zero library is not installed")
    return evaluate.compute_metrics(pandas.read_json(path, orient="records", lines=True))


@pytest.mark.parametrize("printed", [beans_zero_tool.figures, printed_by_the_library])
@pytest.mark.parametrize("dataset", sorted(LABELS))
def test_its_figures_for_our_file_are_those_of_our_scorer(tmp_path, dataset, printed):
    generator = random.Random(0)
    labels = LABELS[dataset] + generator.choices(LABELS[dataset], k=80)
    path = tmp_path / f"beans_zero_eval_{dataset}_query0_lora040.jsonl"
    write(path, dataset, generator.choices(WORDS, k=len(labels)), labels)
    (cell,) = read_runs([path])
    ours = score(cell, scorer="beans-zero").metrics
    for name, figure in NAMES[cell.task].items():
        assert ours[figure] == pytest.approx(printed(path)[dataset][name], abs=1e-7 if name == "mAP" else 1e-9), name


def test_the_librarys_map_follows_the_order_of_the_file_and_ours_does_not(tmp_path):
    generator = random.Random(1)
    labels = LABELS["dcase"] + generator.choices(LABELS["dcase"], k=40)
    answers = generator.choices(WORDS, k=len(labels))
    path = write(tmp_path / "beans_zero_eval_dcase_query0_lora040.jsonl", "dcase", answers, labels)
    (first,) = read_runs([path])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))
    (second,) = read_runs([path])
    before, after = (score(cell, scorer="beans-zero").metrics for cell in (first, second))
    assert before["map"] == after["map"] and before["map_beans_zero"] != after["map_beans_zero"]
    assert after["map_beans_zero"] == pytest.approx(beans_zero_tool.figures(path)["dcase"]["mAP"])


def test_answers_that_are_digits_reach_the_library_by_the_way_in_the_docs(tmp_path):
    """pandas makes numbers of them, which the library refuses; the call in docs/recipes.md leaves them text."""
    import pandas

    path = write(tmp_path / "p.jsonl", "zf-indiv", ["1", "2"], ["One", "More"])
    with pytest.raises(AssertionError):
        beans_zero_tool.read(path)
    docs = (Path(__file__).parents[2] / "docs/recipes.md").read_text()
    (call,) = re.findall(r"pandas\.read_json\([^)]*\)", docs)
    table = eval(call.replace('"predictions.jsonl"', "path"), {"pandas": pandas, "path": path})
    assert table["prediction"].to_list() == ["1", "2"] and table["label"].to_list() == ["One", "More"]

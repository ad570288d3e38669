"""The beans-zero library's own tools read our predictions files as they are."""

import random

import pytest

from mergekit_bio.eval.cells import read_runs
from mergekit_bio.eval.predictions import Prediction, PredictionWriter
from mergekit_bio.eval.scoring import score

#: Labels of which no answer below is equally near to two.
LABELS = {"watkins": ["Walrus", "Beluga, White Whale", "Sperm Whale"], "hiceas": ["Minke whale", "None"]}
WORDS = [
    "Walrus",
    "Walruss",
    "Sperm Whale<|end_of_text|> .",
    "Beluga, White Whale",
    "Minke whale",
    "minke whale",
    "None",
]


@pytest.mark.parametrize("dataset", sorted(LABELS))
def test_compute_metrics_reads_our_file_and_agrees_with_our_scorer(tmp_path, dataset):
    evaluate = pytest.importorskip("beans_zero.evaluate", reason="the beans-zero library is not installed")
    pandas = pytest.importorskip("pandas")
    generator = random.Random(0)
    path = tmp_path / f"beans_zero_eval_{dataset}_query0_lora040.jsonl"
    with PredictionWriter(path) as writer:
        for number in range(80):
            writer.append(
                Prediction(
                    prediction=generator.choice(WORDS),
                    label=generator.choice(LABELS[dataset]),
                    id=f"{number}",
                    dataset_name=dataset,
                    prompt="What?\n",
                    lora_scale=0.4,
                    prompt_tokens=12,
                    generated_ids=(1, 2),
                    logprob=-0.5,
                )
            )
    # As its command line reads a .jsonl file.
    theirs = evaluate.compute_metrics(pandas.read_json(path, orient="records", lines=True))[dataset]
    ours = score(read_runs([path])[0], scorer="beans-zero").figures
    names = {
        "Accuracy": "accuracy",
        "F1 Score": "f1_weighted",
        "Precision": "precision_weighted",
        "Top-1 Accuracy": "top1",
    }
    if dataset == "hiceas":
        names = {"F1": "f1_macro", "Precision": "precision_macro", "Recall": "recall_macro"}
    for name, figure in names.items():
        assert ours[figure] == pytest.approx(theirs[name], abs=1e-9), name

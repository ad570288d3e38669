"""``eval --dry-run``: tokens as the engines count them, and with ``--probe`` the time of real answers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from eval.evaluation import CLIPS, SPECIES, Evaluation, write_evaluation

from mergekit_bio.eval.records.predictions import read_predictions
from mergekit_bio.eval.run import workload

ON_CPU = ("--engine", "transformers", "--engine-option", "device=cpu")
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return write_evaluation(tmp_path_factory.mktemp("evaluation"))


def dry_run(command_line: Command, recipe: Path, *options: object) -> dict:
    code, stdout, stderr = command_line("eval", recipe, "--dry-run", "--json", *ON_CPU, *options)
    assert code == 0, stderr
    return json.loads(stdout)


def prompt_tokens(document: dict) -> dict[str, int]:
    return {cell["file"]: cell["prompt_tokens"] for cell in document["cells"]}


def of_the_engine(out: Path) -> dict[str, int]:
    """What the engine says its prompts had, in the predictions."""
    return {file.name: sum(row.prompt_tokens for row in read_predictions(file)) for file in out.glob("*.jsonl")}


def test_prompt_tokens_are_those_that_the_engine_counts(
    evaluation: Evaluation, command_line: Command, tmp_path: Path
) -> None:
    """Two queries, the second with the audios of three examples; before anything is merged and after it."""
    out = tmp_path / "run"
    before = dry_run(command_line, evaluation.recipe, "--out", out)
    assert before["to_merge"] and before["tokens_are_exact"] and not out.exists()
    assert all(cell["answer_tokens_at_most"] == 6 * CLIPS for cell in before["cells"])
    assert command_line("eval", evaluation.recipe, "--out", out, "--no-report", *ON_CPU)[0] == 0
    engine = of_the_engine(out)
    assert len(engine) == 4 and prompt_tokens(before) == engine
    after = dry_run(command_line, evaluation.recipe, "--out", out)
    assert not after["to_merge"] and prompt_tokens(after) == engine


def test_a_clip_takes_as_many_tokens_as_its_component_is_long(
    evaluation: Evaluation, beans_zero: Callable[[str], Path], command_line: Command, tmp_path: Path
) -> None:
    recipe = evaluation.variant(
        "components",
        datasets=["watkins", "hiceas"],
        queries=None,
        top_k_species=None,
        n_examples=None,
        merge={"base": str(evaluation.base), "adapter": str(evaluation.adapter), "alphas": [1.0]},
    )
    options = ("--data", beans_zero("parquet"), "--out", tmp_path / "run")
    said = dry_run(command_line, recipe, *options)
    assert command_line("eval", recipe, "--no-report", *options, *ON_CPU)[0] == 0
    assert prompt_tokens(said) == of_the_engine(tmp_path / "run")


@pytest.mark.parametrize("decoding", ["choice", "loglikelihood"])
def test_labels_are_counted_where_they_are_the_answers(
    evaluation: Evaluation, command_line: Command, tmp_path: Path, decoding: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(evaluation.base)
    lengths = [len(tokenizer(label, add_special_tokens=False)["input_ids"]) for label in SPECIES]
    each = max(lengths) + 1 if decoding == "choice" else sum(lengths)
    recipe = evaluation.variant(decoding, decoding=decoding, queries=["Which? {species_list}"], n_examples=None)
    document = dry_run(command_line, recipe, "--out", tmp_path / "run")
    assert {cell["answer_tokens_at_most"] for cell in document["cells"]} == {each * CLIPS}


def test_of_many_questions_some_are_counted_and_the_total_is_about(
    evaluation: Evaluation, command_line: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = prompt_tokens(dry_run(command_line, evaluation.recipe, "--out", tmp_path / "run"))
    monkeypatch.setattr(workload, "QUESTIONS_COUNTED", 4)
    document = dry_run(command_line, evaluation.recipe, "--out", tmp_path / "run")
    assert not document["tokens_are_exact"]
    assert prompt_tokens(document) == {file: pytest.approx(tokens, rel=0.05) for file, tokens in exact.items()}
    _, stdout, _ = command_line("eval", evaluation.recipe, "--dry-run", "--out", tmp_path / "run", *ON_CPU)
    assert "of about " in stdout and "answers of at most 216" in stdout


def test_what_is_counted_of_many_lies_evenly_among_them() -> None:
    assert workload.evenly_spaced(range(10), 4) == [0, 2, 5, 7]
    assert workload.evenly_spaced(range(3), 4) == [0, 1, 2]


def test_no_recording_is_decoded(evaluation: Evaluation, command_line: Command, tmp_path: Path) -> None:
    recordings = shutil.copytree(evaluation.recordings, tmp_path / "recordings")
    recipe = evaluation.variant("damaged", datasets=[{"path": str(recordings)}])
    sound = prompt_tokens(dry_run(command_line, recipe, "--out", tmp_path / "run"))
    for file in recordings.glob("*.wav"):
        file.write_bytes(b"no recording")
    assert prompt_tokens(dry_run(command_line, recipe, "--out", tmp_path / "run")) == sound


def test_without_a_tokenizer_at_hand_that_is_said(
    evaluation: Evaluation, command_line: Command, tmp_path: Path, hub_cache: Path
) -> None:
    recipe = evaluation.variant("elsewhere", merge={"base": "a/b", "adapter": "c/d", "alphas": [1.0]})
    assert dry_run(command_line, recipe, "--out", tmp_path / "run")["tokens_are_exact"] is None
    code, stdout, _ = command_line("eval", recipe, "--dry-run", "--out", tmp_path / "run", *ON_CPU)
    assert code == 0 and "18 prompts; their tokens cannot be counted" in stdout


def test_a_base_in_the_cache_is_enough_to_count(
    evaluation: Evaluation, command_line: Command, tmp_path: Path, hub_cache: Path
) -> None:
    from hub_cache import put_in_cache

    put_in_cache(hub_cache, "a/b", "1" * 40, evaluation.base)
    put_in_cache(hub_cache, "c/d", "2" * 40, evaluation.adapter)
    recipe = evaluation.variant("cached", merge={"base": "a/b", "adapter": "c/d", "alphas": [0.0, 1.0]})
    document = dry_run(command_line, recipe, "--out", tmp_path / "run")
    assert prompt_tokens(document) == prompt_tokens(dry_run(command_line, evaluation.recipe, "--out", tmp_path / "run"))


# The probe


def probed(command_line: Command, recipe: Path, *options: object) -> dict:
    document = dry_run(command_line, recipe, *options)["probe"]
    for query in document["queries"]:
        assert query["seconds"] > 0
    answering = sum(query["open"] * query["seconds"] for query in document["queries"])
    encoding = document["clips"] * document["clip_seconds"]
    assert document["hours"] == pytest.approx((document["start_seconds"] + encoding + answering) / 3600)
    return document


def test_a_probe_asks_every_query_in_growing_batches_and_leaves_nothing_behind(
    evaluation: Evaluation, command_line: Command, tmp_path: Path
) -> None:
    """With time for all nine clips, batches of 1, 2, 4 and 2 are asked, and the largest one counts."""
    document = probed(command_line, evaluation.recipe, "--out", tmp_path / "runs/mine", "--probe", "1000")
    assert document["checkpoint"] == "alpha 0.00"
    assert [(query["query"], query["open"], query["asked"]) for query in document["queries"]] == [
        (0, 2 * CLIPS, 4),
        (1, 2 * CLIPS, 4),
    ]
    assert document["clips"] == CLIPS and document["clip_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_with_no_time_a_single_question_of_each_query_is_asked(
    evaluation: Evaluation, command_line: Command, tmp_path: Path
) -> None:
    code, stdout, stderr = command_line(
        "eval", evaluation.recipe, "--dry-run", "--probe", "0", "--out", tmp_path / "run", *ON_CPU
    )
    assert code == 0, stderr
    assert stdout.count("1 asked together; 18 open") == 2
    assert "for the run with one engine, merging not counted" in stdout


def test_a_probe_counts_what_is_still_open_and_uses_a_checkpoint_that_there_is(
    evaluation: Evaluation, command_line: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    begun = command_line("eval", evaluation.recipe, "--alpha", "1", "--out", out, "--no-report", *ON_CPU)
    assert begun[0] == 0, begun[2]
    files = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    document = probed(command_line, evaluation.recipe, "--out", out, "--probe", "0")
    assert document["checkpoint"] == "alpha 1.00"
    assert [query["open"] for query in document["queries"]] == [CLIPS, CLIPS]
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == files
    complete = command_line(
        "eval", evaluation.recipe, "--alpha", "1", "--out", out, "--dry-run", "--probe", "0", *ON_CPU
    )
    assert complete[0] == 1 and "the run is complete" in complete[2]


def test_a_probe_fetches_nothing(
    evaluation: Evaluation, command_line: Command, hub: object, merged: Path, tmp_path: Path
) -> None:
    repo = hub.create("owl/half")
    repo.commit({file.name: hub.keep(file.read_bytes()) for file in merged.iterdir()})
    recipe = evaluation.variant("of_the_hub", merge=None, checkpoints=["owl/half"])
    code, _, stderr = command_line("eval", recipe, "--dry-run", "--probe", "0", "--out", tmp_path / "run", *ON_CPU)
    assert code == 1 and "are not on this machine; fetch them first with --fetch-only" in stderr
    assert hub.sent_bytes == 0


def test_a_probe_is_a_dry_run(evaluation: Evaluation, command_line: Command) -> None:
    code, _, stderr = command_line("eval", evaluation.recipe, "--probe", "5", *ON_CPU)
    assert code == 1 and "--probe: give it with --dry-run" in stderr

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mergekit_bio.errors import RunError
from mergekit_bio.eval.records.cell import Cell
from mergekit_bio.eval.records.predictions import Prediction
from mergekit_bio.eval.records.read import read_runs
from mergekit_bio.eval.records.run_directory import RunDirectory, RunRecord, cell_file_name, read_record
from mergekit_bio.eval.report.build import build_report

IDENTITY = {"generate": {"num_beams": 2, "stop": ["a", "b"]}, "seed": 0, "checkpoint": "sha256:1"}


def cell(alpha: float, **changes) -> Cell:
    values = {
        "file": cell_file_name(dataset="watkins", query=0, checkpoint=f"alpha {alpha}", alpha=alpha),
        "dataset": "watkins",
        "task": "classification",
        "query": 0,
        "checkpoint": f"alpha {alpha}",
        "alpha": alpha,
        "rows": 2,
        "identity": IDENTITY,
    }
    return Cell(**(values | changes))


def record(*cells: Cell, **changes) -> RunRecord:
    return RunRecord(**({"name": "watkins", "recipe": {"seed": 0}, "scorer": "exact", "cells": cells} | changes))


def answer(number: int) -> Prediction:
    return Prediction(prediction="a", label="a", id=str(number), dataset_name="watkins")


def test_cells_are_named_as_the_published_files_where_alpha_allows():
    assert cell(0.4).file == "beans_zero_eval_watkins_query0_lora040.jsonl"
    assert cell_file_name(dataset="watkins", query=2, checkpoint="x", alpha=1.0).endswith("_query2_lora100.jsonl")


def test_different_checkpoints_and_datasets_never_share_a_file():
    names = {
        cell_file_name(dataset=dataset, query=0, checkpoint=checkpoint, alpha=alpha)
        for dataset in ("my birds", "my-birds", "my/birds")
        for checkpoint, alpha in [
            ("a/b", None),
            ("a-b", None),
            ("alpha 0.125", 0.125),
            ("alpha 0.12", 0.12),
            ("c", -0.1),
        ]
    }
    assert len(names) == 15
    assert not any(set(name) & set("/ ") for name in names)


def test_a_written_run_is_read_back(tmp_path):
    wanted = record(cell(0.0), cell(0.4), environment={"versions": {"torch": "2"}}, label_map={"a": "b"})
    with RunDirectory(tmp_path / "run", wanted) as run:
        with run.writer(wanted.cells[1]) as writer:
            for number in (2, 1):
                writer.append(answer(number))
        run.add_seconds(wanted.cells[1], 1.5)
        run.note({"engine": "vllm"})
    read = read_record(tmp_path / "run")
    assert read.cells == (wanted.cells[0], replace(wanted.cells[1], seconds=1.5))
    assert read.environment == {"versions": {"torch": "2"}, "engine": "vllm"}
    waiting, found = read_runs([tmp_path / "run"])
    assert (waiting.alpha, waiting.predictions) == (0.0, ())
    assert (found.run, found.alpha, found.scorer, found.rows) == ("watkins", 0.4, "exact", 2)
    assert [row.id for row in found.predictions] == ["1", "2"]


def test_a_run_goes_on_under_the_same_configuration_and_may_grow(tmp_path):
    with RunDirectory(tmp_path, record(cell(0.0))) as run, run.writer(cell(0.0)) as writer:
        writer.append(answer(1))
    with RunDirectory(tmp_path, record(cell(0.5))) as run:
        assert [known.alpha for known in run.record.cells] == [0.5, 0.0]
    with RunDirectory(tmp_path, record(cell(0.0))) as run, run.writer(cell(0.0)) as writer:
        assert writer.done == {"1"}


def named(query: int, **changes) -> Cell:
    file = cell_file_name(dataset="watkins", query=query, checkpoint="alpha 0.5", alpha=0.5)
    return cell(0.5, file=file, query=query, **changes)


def test_a_narrowed_recipe_keeps_the_names_that_earlier_answers_are_scored_with(tmp_path):
    names = {"a": "Genus a", "b": "Genus b"}
    whole = record(named(0), named(1, target="scientific"), label_map=names)
    with RunDirectory(tmp_path, whole) as run:
        for one in whole.cells:
            with run.writer(one) as writer:
                writer.append(answer(1))
    with RunDirectory(tmp_path, record(named(0))) as run:
        assert run.record.label_map == names
    with RunDirectory(tmp_path, record(named(0), label_map={"a": "Genus aa"})) as run:
        assert run.record.label_map == {"a": "Genus aa", "b": "Genus b"}
    report = build_report(read_runs([tmp_path]))
    assert [sweep.scores[0].targets for sweep in report.sweeps] == [("a",), ("Genus aa",)]
    with RunDirectory(tmp_path, record(named(0), named(1))) as run:
        assert run.record.label_map == {}


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        ({**IDENTITY, "generate": {"num_beams": 3, "stop": ["a", "b"]}}, "generate.num_beams was 2 and is now 3"),
        ({**IDENTITY, "seed": 1}, "seed was 0 and is now 1"),
        ({**IDENTITY, "generate": {"num_beams": 2, "stop": ["b", "c"]}}, 'stop now lacks ["a"] and has ["c"]'),
        ({**IDENTITY, "generate": {"num_beams": 2, "stop": ["b", "a"]}}, 'stop was ["a", "b"] and is now ["b", "a"]'),
        ({**IDENTITY, "query": "What?"}, 'query was null and is now "What?"'),
        ({"generate": IDENTITY["generate"], "seed": 0}, 'checkpoint was "sha256:1" and is now null'),
    ],
)
def test_a_changed_configuration_refuses_to_resume_and_names_the_key(tmp_path, identity, said):
    with RunDirectory(tmp_path, record(cell(0.0))) as run, run.writer(cell(0.0)) as writer:
        writer.append(answer(1))
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(RunError) as error:
        RunDirectory(tmp_path, record(cell(0.0, identity=identity)))
    assert said in str(error.value)
    assert (tmp_path / "run.json").read_bytes() == before
    with RunDirectory(tmp_path, record(cell(0.0))):
        pass


def test_a_start_that_answered_nothing_may_be_followed_by_another_configuration(tmp_path):
    with RunDirectory(tmp_path, record(cell(0.0), cell(0.5))) as run:
        with run.writer(cell(0.0)):  # opened and left empty, or with half a line
            pass
        (tmp_path / cell(0.5).file).write_bytes(b'{"prediction": "half a li')
    changed = [cell(alpha, identity={**IDENTITY, "seed": 1}) for alpha in (0.0, 0.5)]
    with RunDirectory(tmp_path, record(*changed)) as run, run.writer(changed[0]) as writer:
        writer.append(answer(1))
    assert read_record(tmp_path).cells == tuple(changed)
    with pytest.raises(RunError, match="seed was 1 and is now 0"):
        RunDirectory(tmp_path, record(cell(0.0)))


def test_a_tuple_in_the_identity_is_the_list_it_becomes_on_disk(tmp_path):
    known = cell(0.0, identity={"stop": ("a", "b")})
    for number in range(2):
        with RunDirectory(tmp_path, record(known)) as run, run.writer(known) as writer:
            writer.append(answer(number))


def test_two_processes_cannot_write_one_run(tmp_path):
    with RunDirectory(tmp_path, record(cell(0.0))), pytest.raises(RunError, match="another process"):
        RunDirectory(tmp_path, record(cell(0.0)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "run.json: format: input should be 1"),
        ({"namee": "x"}, "run.json: namee: unknown key; did you mean 'name'?"),
        ({"scorer": None}, "run.json: scorer: input should be a valid string"),
    ],
)
def test_a_damaged_record_is_said_in_one_line(tmp_path, change, said):
    with RunDirectory(tmp_path, record(cell(0.0))):
        pass
    path = tmp_path / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RunError) as error:
        read_record(tmp_path)
    assert said in str(error.value)


def test_a_record_cannot_point_outside_its_directory(tmp_path):
    with RunDirectory(tmp_path, record(cell(0.0, file="x.jsonl"))):
        pass
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace("x.jsonl", "../x.jsonl"))
    with pytest.raises(RunError, match="not in the run directory"):
        read_record(tmp_path)


@pytest.fixture
def run_of_before(tmp_path):
    """What the program left of a small run at the commit 8f37070: two of its four cells, answered."""
    return Path(shutil.copytree(Path(__file__).with_name("runs_of_before") / "tones", tmp_path / "tones"))


def test_a_run_of_before_is_read_and_goes_on_with_every_answer_it_has(run_of_before):
    kept = json.loads((run_of_before / "run.json").read_text())
    cells = read_runs([run_of_before])
    assert [(cell.alpha, cell.query, len(cell.predictions)) for cell in cells] == [
        (0.0, 0, 4), (1.0, 0, 4), (0.0, 1, 0), (1.0, 1, 0),
    ]  # fmt: skip
    assert [item.metrics["accuracy"] for item in build_report(cells).sweeps[0].scores] == [0.0, 0.0]
    wanted = read_record(run_of_before)
    with RunDirectory(run_of_before, wanted) as run:
        for known in run.record.cells:
            with run.writer(known) as writer:
                assert len(writer.done) == (4 if known.query == 0 else 0)
    assert json.loads((run_of_before / "run.json").read_text()) == kept


def test_a_run_of_before_under_another_configuration_says_which_key_changed(run_of_before):
    wanted = read_record(run_of_before)
    changed = [replace(known, identity=known.identity | {"dtype": "float32"}) for known in wanted.cells]
    with pytest.raises(RunError, match='dtype was null and is now "float32"'):
        RunDirectory(run_of_before, replace(wanted, cells=tuple(changed)))

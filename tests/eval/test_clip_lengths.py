"""BEANS-Zero as the reference hears it: a clip is cut and padded to its component's longest duration."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from tiny_naturelm import make_base, make_naturelm

from mergekit_bio.errors import RunError
from mergekit_bio.eval.components import components
from mergekit_bio.eval.records.predictions import read_predictions
from mergekit_bio.eval.run.evaluate import evaluate
from mergekit_bio.merging.merge import merge

#: Component -> prefix tokens of its clips in NatureLM-audio.
TOKENS = {"watkins": 8, "esc50": 14, "cbi": 29}
TRANSFORMERS = {"engine": "transformers", "engine_options": {"device": "cpu", "dtype": "float32"}}
VLLM = {"engine": "vllm", "engine_options": {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    base, adapter = make_base(folder / "base"), make_naturelm(folder / "adapter")
    merge(base=base, adapter=adapter, alphas=[1.0], out=folder / "alpha-1.00", dtype="float32", device="cpu")
    return folder / "alpha-1.00"


def write_recipe(folder: Path, checkpoint: Path, datasets=tuple(TOKENS)) -> Path:
    """The same two recordings, one short and one long, as clips of every component; the same question about each."""
    rng = np.random.default_rng(3)
    rows = []
    for seconds in (2, 12):
        samples = rng.uniform(-0.5, 0.5, seconds * 16_000).tolist()
        rows += [
            {
                "id": f"{name}-{seconds}",
                "dataset_name": name,
                "audio": samples,
                "metadata": json.dumps({"sample_rate": 16_000}),
                "instruction": "<Audio><AudioHere></Audio> What is it?",
                "output": components()[name].labels[0],
            }
            for name in datasets
        ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "beans.parquet")
    recipe = {
        "name": "lengths",
        "checkpoints": [str(checkpoint)],
        "data": str(folder / "beans.parquet"),
        "datasets": list(datasets),
        "queries": ["Which species is it?"],
        "generate": {"max_new_tokens": 8, "num_beams": 1},
        "scorer": "exact",
    }
    (folder / "lengths.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "lengths.yaml"


def answers(run) -> dict[str, dict[int, object]]:
    """Component -> seconds of the recording -> prediction."""
    found: dict = defaultdict(dict)
    for cell in run.record.cells:
        for row in read_predictions(run.path / cell.file):
            found[cell.dataset][int(row.id.rpartition("-")[2])] = row
    return dict(found)


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    return evaluate(recipe=write_recipe(folder, checkpoint), out=folder / "run", **TRANSFORMERS)


def test_the_components_are_as_long_as_published(published):
    for component in json.loads((published / "beans_zero_components.json").read_text()):
        assert components()[component["name"]].duration == (component["max_duration_s"] or 10)
    short = {name: component.duration for name, component in components().items() if component.duration != 10}
    assert short == {"watkins": 3, "humbugdb": 3, "esc50": 5}


def test_a_prompt_is_as_long_as_its_components_clips_make_it(run):
    lengths = {name: {row.prompt_tokens for row in rows.values()} for name, rows in answers(run).items()}
    (text,) = {length - 29 for length in lengths["cbi"]}
    assert lengths == {name: {text + tokens} for name, tokens in TOKENS.items()}


def test_one_recording_is_heard_otherwise_in_every_component(run):
    for seconds in (2, 12):
        assert len({rows[seconds].logprob for rows in answers(run).values()}) == 3


def test_both_engines_answer_alike(run, checkpoint, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    done = evaluate(recipe=write_recipe(tmp_path, checkpoint), out=tmp_path / "run", **VLLM)
    found, wanted = answers(done), answers(run)
    for name, rows in wanted.items():
        for seconds, row in rows.items():
            assert found[name][seconds].prompt_tokens == row.prompt_tokens
            assert found[name][seconds].generated_ids == row.generated_ids
            assert found[name][seconds].logprob == pytest.approx(row.logprob, abs=1e-3)


def before_lengths(run: Path) -> None:
    """Make a run one that was begun when every clip was 10 s long and no record said so."""
    record = json.loads((run / "run.json").read_text())
    for cell in record["cells"]:
        assert cell["identity"].pop("clip_seconds") == components()[cell["dataset"]].duration
    (run / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize(("name", "seconds"), [("watkins", 3), ("humbugdb", 3), ("esc50", 5)])
def test_a_run_begun_with_clips_of_ten_seconds_does_not_go_on_with_shorter_ones(checkpoint, tmp_path, name, seconds):
    recipe = write_recipe(tmp_path, checkpoint, datasets=[name])
    evaluate(recipe=recipe, out=tmp_path / "run", limit=1, **TRANSFORMERS)
    before_lengths(tmp_path / "run")
    with pytest.raises(RunError) as error:
        evaluate(recipe=recipe, out=tmp_path / "run", **TRANSFORMERS)
    assert f"clip_seconds was 10.0 and is now {seconds}.0" in str(error.value)
    assert "another --out" in str(error.value) and "\n" not in str(error.value)


def test_a_run_over_components_of_ten_seconds_goes_on(checkpoint, tmp_path):
    recipe = write_recipe(tmp_path, checkpoint, datasets=["cbi", "enabirds"])
    evaluate(recipe=recipe, out=tmp_path / "run", limit=1, **TRANSFORMERS)
    before_lengths(tmp_path / "run")
    done = evaluate(recipe=recipe, out=tmp_path / "run", **TRANSFORMERS)
    assert {name: len(rows) for name, rows in answers(done).items()} == {"cbi": 2, "enabirds": 2}
    again = evaluate(recipe=recipe, out=tmp_path / "run", **TRANSFORMERS)  # under its new record
    assert answers(again) == answers(done)

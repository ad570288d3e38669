"""The demo's model really hears and really follows: the whole way from recording to score, and every wire on it.

An end-to-end accuracy breaks when anything on the way breaks. That it does is shown by cutting the wires one by one.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="the eval extra is not installed")

from mergekit_bio.cli.app import app
from mergekit_bio.demo.recordings import write_recordings
from mergekit_bio.demo.run import CLOSED, COMBINED, IN_CONTEXT, MODEL, NAMED, write_sources
from mergekit_bio.demo.species import HEARD, UNHEARD
from mergekit_bio.errors import EngineError
from mergekit_bio.eval.recipe.shipped import copy_shipped
from mergekit_bio.eval.records.predictions import read_predictions
from mergekit_bio.eval.run.evaluate import Run, evaluate
from mergekit_bio.eval.run.progress import SilentListener
from mergekit_bio.eval.scoring.score import Score
from mergekit_bio.merging.merge import merge

MIDDLE = 0.6
ALPHAS = (0.0, MIDDLE, 1.0)
#: The right one of five species that fine-tuning never heard: well above what either end gets, and twice chance.
HEARS_AND_FOLLOWS = 0.45


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The demo's recipes, three strengths of its model, and a few recordings."""
    root = tmp_path_factory.mktemp("demo")
    merge(base=MODEL / "base", adapter=MODEL / "adapter", alphas=list(ALPHAS), out=root / "sweep")
    write_recordings(root / "recordings/heard", HEARD, each=3, seed=5)
    write_recordings(root / "recordings/unheard", UNHEARD, each=20, seed=6, label="scientific")
    return root


def strength(alpha: float) -> str:
    return f"sweep/alpha-{alpha:.2f}"


def ask(root: Path, out: Path, *, recipe: str, models: Sequence[Path], **changes) -> Run:
    """Run one of the demo's recipes about ``root``'s recordings."""
    (file, *_) = copy_shipped(recipe, out.parent)
    settings = yaml.safe_load(file.read_text()) | {"checkpoints": [str(model) for model in models]} | changes
    (choice,) = settings["datasets"]
    settings["datasets"] = [{"path": str(root / choice["path"])}]
    file.write_text(yaml.safe_dump(settings))
    return evaluate(recipe=file, out=out, engine="transformers", engine_options={"device": "cpu", "dtype": "float32"})


def scores(run: Run) -> tuple[Score, ...]:
    """One for each model."""
    (sweep,) = run.report().sweeps
    return sweep.scores


def accuracy(run: Run) -> float:
    (score,) = scores(run)
    return score.metrics["accuracy"]


@pytest.fixture(scope="module")
def curve(folder, tmp_path_factory) -> dict[float, Score]:
    """The closed set of species never heard in fine-tuning at three strengths, with nothing cut."""
    out = tmp_path_factory.mktemp("curve") / "run"
    run = ask(folder, out, recipe=CLOSED, models=[folder / strength(alpha) for alpha in ALPHAS])
    return {score.cell.alpha: score for score in scores(run)}


@pytest.fixture(scope="module")
def whole(curve) -> float:
    return curve[MIDDLE].metrics["accuracy"]


def test_a_middle_strength_beats_both_ends(curve):
    low, _ = curve[MIDDLE].intervals["accuracy"]
    assert all(curve[end].intervals["accuracy"][1] < low for end in (0.0, 1.0))


def test_the_base_keeps_to_the_list(curve):
    assert 1 - curve[0.0].metrics["out_of_set"] > 0.9


def test_what_was_kept_at_full_strength_is_less_than_half_of_the_bases(curve):
    base, tuned = (1 - curve[end].metrics["out_of_set"] for end in (0.0, 1.0))
    assert tuned < base / 2


def test_the_likeliest_of_the_list_is_right_at_least_as_often_as_free_text(folder, curve, tmp_path):
    models = [folder / strength(alpha) for alpha in ALPHAS]
    for score in scores(ask(folder, tmp_path / "run", recipe=CLOSED, models=models, decoding="loglikelihood")):
        assert score.metrics["accuracy"] >= curve[score.cell.alpha].metrics["accuracy"], score.cell.alpha
        assert score.metrics["out_of_set"] == 0


def test_the_fine_tune_names_what_it_was_tuned_on(folder, tmp_path):
    assert accuracy(ask(folder, tmp_path / "run", recipe=NAMED, models=[folder / strength(1.0)])) > 0.9


def test_a_middle_strength_gives_both_names_in_one_answer(folder, tmp_path):
    models = [folder / strength(alpha) for alpha in ALPHAS]
    base, middle, tuned = scores(ask(folder, tmp_path / "run", recipe=COMBINED, models=models))
    assert middle.metrics["accuracy"] > max(base.metrics["accuracy"], tuned.metrics["accuracy"])


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_strength_that_is_not_applied(curve, whole, alpha):
    assert curve[alpha].metrics["accuracy"] < HEARS_AND_FOLLOWS < whole


def test_silence_instead_of_the_recordings(folder, tmp_path, whole):
    root = tmp_path / "root"
    shutil.copytree(folder / "recordings/unheard", root / "recordings/unheard")
    for file in (root / "recordings/unheard").glob("*.wav"):
        soundfile.write(file, np.zeros(160_000, dtype=np.float32), 16_000)
    run = ask(root, tmp_path / "run", recipe=CLOSED, models=[folder / strength(MIDDLE)])
    assert accuracy(run) < HEARS_AND_FOLLOWS < whole


def test_the_lora_on_the_wrong_layers(folder, tmp_path, whole):
    adapter = tmp_path / "adapter"
    shutil.copytree(MODEL / "adapter", adapter)
    tensors = load_file(adapter / "model.safetensors")
    count = json.loads((MODEL / "base/config.json").read_text())["num_hidden_layers"]
    moved = {}
    for name, tensor in tensors.items():
        head, layers, rest = name.partition(".layers.")
        number, _, tail = rest.partition(".")
        if name.startswith("llama_model.") and layers:
            name = f"{head}{layers}{(int(number) + 1) % count}.{tail}"
        moved[name] = tensor
    save_file(moved, adapter / "model.safetensors")
    (wrong,) = merge(base=MODEL / "base", adapter=adapter, alphas=[MIDDLE], out=tmp_path / "wrong")
    run = ask(folder, tmp_path / "run", recipe=CLOSED, models=[wrong.path])
    assert accuracy(run) < HEARS_AND_FOLLOWS < whole


def test_a_list_that_is_not_in_the_prompt(folder, tmp_path, whole):
    changes = {"queries": ["What is the scientific name for the focal species in the audio?"]}
    run = ask(folder, tmp_path / "run", recipe=CLOSED, models=[folder / strength(MIDDLE)], **changes)
    assert accuracy(run) < HEARS_AND_FOLLOWS < whole


def test_swapped_recordings_of_the_examples_are_heard(folder, tmp_path):
    """Every answer's probability depends on what the examples sound like, not only on how many there are."""
    found = []
    for name, shift in (("as-they-are", 0), ("swapped", 1)):
        target = tmp_path / name / "recordings/unheard"
        shutil.copytree(folder / "recordings/unheard", target)
        header, *rows = (target / "metadata.csv").read_text().splitlines()
        examples = [row for row in rows if "-00.wav" in row]
        sounds = [(target / row.split(",")[0]).read_bytes() for row in examples]
        for number, row in enumerate(examples):
            (target / row.split(",")[0]).write_bytes(sounds[(number + shift) % len(sounds)])
        split = [f"{row},{'examples' if row in examples else 'test'}" for row in rows]
        (target / "metadata.csv").write_text("\n".join([f"{header},split", *split]) + "\n")
        run = ask(tmp_path / name, tmp_path / name / "run", recipe=IN_CONTEXT, models=[folder / strength(1.0)])
        found.append({row.id: row.logprob for file in run.path.glob("*.jsonl") for row in read_predictions(file)})
    as_they_are, swapped = found
    assert as_they_are.keys() == swapped.keys() and as_they_are
    assert all(abs(as_they_are[key] - swapped[key]) > 1e-4 for key in as_they_are)


def test_a_demo_that_is_interrupted_leaves_no_folder_in_the_way(tmp_path):
    class Interrupted(SilentListener):
        def progress(self, description, total, unit):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sources(tmp_path / "demo", Interrupted())
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_is_not_there_is_said_before_anything_is_written(tmp_path):
    done = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo"), "--engine", "vlm"])
    assert isinstance(done.exception, EngineError) and "did you mean 'vllm'?" in str(done.exception)
    assert list(tmp_path.iterdir()) == []

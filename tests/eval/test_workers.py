"""Runs by several workers on Ray: the predictions of one engine, whatever is killed."""

import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
from demo.terminal import COLUMNS, PROGRAM, off_a_terminal, on_a_terminal, users_environment
from eval.evaluation import CLIPS, Evaluation, write_evaluation
from eval.test_run_loop import CPU, FILES, Listening, answers_in, by_id, nearly
from listen import archive as listening_to_archives
from listen.deadly import DEADLY, Deadly
from listen.test_embeddings import embed, recordings_of
from safetensors.numpy import load_file

from mergekit_bio.engine.choice import engine_class
from mergekit_bio.engine.interface import EngineSettings
from mergekit_bio.engine.ray_pool import cluster_for
from mergekit_bio.errors import EngineError
from mergekit_bio.eval.records.run_directory import read_record
from mergekit_bio.eval.run.evaluate import Run, carry_out, evaluate, prepare_run

pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Evaluation:
    return write_evaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def one(evaluation, tmp_path_factory) -> Run:
    """A run by one engine in this process."""
    return evaluate(recipe=evaluation.recipe, out=tmp_path_factory.mktemp("one") / "run", **CPU)


@pytest.fixture(scope="module")
def ray():
    """Ray, once for the tests of this file that do not kill it."""
    tests = Path(__file__).parents[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tests}:{tests.parent / 'eval'}")  # what its processes unpickle is there
        with cluster_for(engine_class("transformers"), {}, workers=2, address=None, note=print):
            yield


def of_ray(driver: psutil.Process) -> dict[psutil.Process, str]:
    """The processes of a driver's Ray, and what they are."""
    found = {}
    for process in driver.children(recursive=True):
        with suppress(psutil.Error, IndexError):
            found[process] = process.cmdline()[0].rpartition("/")[2]
    return found


def workers_of(driver: psutil.Process) -> list[psutil.Process]:
    """The processes that hold a worker each."""
    return [process for process, what in of_ray(driver).items() if what.startswith("ray::_Actor")]


def all_gone(processes: list[psutil.Process]) -> bool:
    """Whether they end, given a while."""
    return not psutil.wait_procs(processes, timeout=60)[1]


def test_two_workers_give_the_predictions_of_one_engine(ray, one, evaluation, tmp_path):
    """A run that one engine has begun; greedy, with audio examples."""
    arguments = {"recipe": evaluation.recipe, "out": tmp_path / "run", "models": [one.path / "checkpoints"], **CPU}
    begun = evaluate(limit=3, **arguments)
    listening = Listening()
    done = evaluate(workers=2, listener=listening, **arguments)
    assert by_id(done.path) == nearly(by_id(one.path))
    assert answers_in(done.path) == len(FILES) * CLIPS
    assert done.record.environment["workers"] == 2
    encoded = [run.record.environment["clips_encoded"] for run in (begun, done)]
    assert encoded[1] - encoded[0] == CLIPS, "each once in the whole pool"
    assert {standing.workers for standing in listening.heard[2:]} == {2}
    assert listening.heard[-1].run_done == listening.heard[-1].run_rows == len(FILES) * CLIPS
    assert [cell.seconds > 0 for cell in done.record.cells] == [True] * len(FILES)
    assert read_record(one.path).cells[0].identity == done.record.cells[0].identity


def test_sampled_answers_do_not_depend_on_the_workers_nor_on_their_deaths(ray, one, evaluation, tmp_path):
    generate = {"max_new_tokens": 6, "num_beams": 1, "temperature": 1.0}
    recipe = evaluation.variant("sampled", generate=generate)
    arguments = {"recipe": recipe, "models": [one.path / "checkpoints"], **CPU}
    alone = evaluate(out=tmp_path / "alone", **arguments)

    class Killing(Listening):
        """Kills a worker when the first answers are there."""

        killed = 0

        def standing(self, standing):
            super().standing(standing)
            if standing.run_done and not self.killed:
                workers_of(psutil.Process())[0].kill()
                self.killed += 1

    killing = Killing()
    done = evaluate(out=tmp_path / "two", workers=2, listener=killing, **arguments)
    assert killing.killed == 1
    assert by_id(done.path) == nearly(by_id(alone.path))
    assert answers_in(done.path) == len(FILES) * CLIPS
    assert len({row.generated_ids for row in by_id(done.path)[FILES[0]].values()}) > 1


@pytest.mark.long
def test_recordings_that_are_no_use_are_left_out_and_said_as_by_one_engine(ray, one, evaluation, tmp_path):
    """One that is no recording, and one that only a worker finds out, when it hears it whole."""
    other = write_evaluation(tmp_path, base=evaluation.base, adapter=evaluation.adapter)
    (other.recordings / "4.wav").write_bytes(b"RIFF of nothing")
    soundfile.write(other.recordings / "5.wav", [0.1] * 2400 + [math.nan], 8000, subtype="DOUBLE")
    arguments = {"recipe": other.recipe, "models": [one.path / "checkpoints/alpha-1.00"], **CPU}
    said, answers = [], []
    for workers in (1, 2):
        listening = Listening()
        done = evaluate(out=tmp_path / "run", workers=workers, listener=listening, **arguments)
        said.append({note for note in listening.notes if "left out" in note or "missing" in note})
        answers.append(by_id(done.path, FILES[2:]))
        shutil.rmtree(done.path)
    assert said[0] == said[1] and len(said[0]) == 3
    assert all(any(name in note for note in said[0]) for name in ("4.wav", "5.wav", "because 2 recordings cannot be"))
    assert answers[0] == nearly(answers[1]) and {*answers[0][FILES[2]]} == {
        f"{n}.wav" for n in range(CLIPS) if n not in (4, 5)
    }


def deadly_recording(clip_id, note, *, recording, deadly):
    """A recording whose decoder crashes."""
    if clip_id == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return recording(clip_id, note)


@pytest.mark.long
def test_a_batch_that_kills_three_workers_is_named_and_skipped_and_asked_again(ray, one, evaluation, tmp_path):
    recipe = evaluation.variant("deadly", queries=["Which species is it?"], n_examples=None)
    arguments = {"recipe": recipe, "out": tmp_path / "run", "models": [one.path / "checkpoints/alpha-1.00"]}
    plan = prepare_run(**arguments, engine="transformers")
    (dataset,) = plan.datasets
    crashing = partial(deadly_recording, recording=dataset.recording, deadly="4.wav")
    deadly = replace(plan, datasets=(replace(dataset, recording=crashing),))
    listening = Listening()
    with pytest.raises(EngineError) as caught:
        carry_out(deadly, EngineSettings(options={"device": "cpu"}), listener=listening, workers=2)
    skipped = f"{FILES[2]}, clips 4.wav to 5.wav"
    assert f"2 of {CLIPS} answers are missing" in str(caught.value) and skipped in str(caught.value)
    assert "run the command again to ask what is missing" in str(caught.value)
    assert [note for note in listening.notes if "skipped" in note] == [f"note: 3 workers died; skipped: {skipped}"]
    assert sorted(by_id(plan.out, FILES[2:3])[FILES[2]]) == [f"{n}.wav" for n in range(CLIPS) if n not in (4, 5)]
    evaluate(**arguments, **CPU)
    assert answers_in(plan.out) == CLIPS


def test_workers_without_ray_are_refused_in_one_line_before_anything_is_merged(
    evaluation, tmp_path, monkeypatch, command_line
):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = command_line(
        "eval", evaluation.recipe, "--out", tmp_path / "run", "--engine", "transformers", "--workers", 2
    )
    assert code == 1 and not (tmp_path / "run").exists()
    assert err == "error: --workers 2 needs Ray; install it with: pip install 'mergekit-bio[cluster]'\n"


def command(evaluation: Evaluation, out: Path, *more: object) -> list[str]:
    words = ["eval", evaluation.recipe, "--out", out, "--engine", "transformers", "--engine-option", "device=cpu"]
    return [*map(str, [*words, "--workers", 2, "--no-report", *more])]


@pytest.mark.long
def test_a_terminal_of_80_columns_shows_workers_and_nothing_of_rays(one, evaluation, tmp_path):
    """With a worker's death, of which Ray would tell in ten lines."""
    models = ["--model", one.path / "checkpoints"]
    shown = on_a_terminal(PROGRAM, *command(evaluation, tmp_path / "run", *models), cwd=tmp_path)
    drawn = [line for line in shown.lines if line.strip()]
    assert any(re.search(r"run, 2 workers .* \d+/36 .*left", line) for line in drawn)
    assert all(len(line.rstrip()) <= COLUMNS for line in drawn)
    assert not [line for line in drawn if re.search(r"\bray\b|raylet|_Actor|WARN", line)]
    printed = off_a_terminal(*command(evaluation, tmp_path / "run-2", *models), cwd=tmp_path)
    assert printed.stdout == f"predictions: {tmp_path / 'run-2'}\n"
    assert "; run, 2 workers 36 of 36; " in printed.stderr
    assert len(printed.stderr.splitlines()) <= 2 * len(FILES) + 1


@pytest.mark.long
def test_an_interruption_ends_the_workers_too(one, evaluation, tmp_path):
    """While there is much to do: with the first answers, not all may have come already."""
    slow = replace(evaluation, recipe=evaluation.variant("slow", generate={"max_new_tokens": 400, "num_beams": 4}))
    words = command(slow, tmp_path / "run", "--model", one.path / "checkpoints")
    process = subprocess.Popen(
        [PROGRAM, *words], cwd=tmp_path, env=users_environment(), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    while process.poll() is None and not answers_in(tmp_path / "run"):
        time.sleep(0.01)
    started = of_ray(psutil.Process(process.pid))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and err.endswith("interrupted\n"), err
    assert "Traceback" not in err
    assert started and all_gone([*started])


@pytest.mark.long
@pytest.mark.repeated(1)
def test_runs_with_workers_and_drivers_killed_end_the_same(evaluation, one, tmp_path, count):
    """Each run loses a worker and its driver, at least, at random moments; two in three are sampled."""
    moments = random.Random(count)
    deaths: Counter[str] = Counter()
    for number in range(count):
        generate = {"max_new_tokens": 6, "num_beams": 1, "temperature": float(number % 3 > 0)}
        recipe = evaluation.variant("killed", generate=generate)
        models = {"recipe": recipe, "models": [one.path / "checkpoints"], **CPU}
        alone, out = evaluate(out=tmp_path / f"alone-{number}", **models), tmp_path / f"run-{number}"
        left = ["worker", "driver", *moments.choices(["worker", "driver"], k=1)]
        moments.shuffle(left)
        words = command(replace(evaluation, recipe=recipe), out, "--model", one.path / "checkpoints")
        while True:
            driver = subprocess.Popen(
                [PROGRAM, *words], cwd=tmp_path, env=users_environment(), stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
            while driver.poll() is None and left:
                there = answers_in(out)
                while driver.poll() is None and answers_in(out) == there:
                    time.sleep(0.005)
                time.sleep(moments.choice((0, 0.01, 0.05, 0.2)))
                victims = workers_of(psutil.Process(driver.pid)) if driver.poll() is None else []
                if not victims:
                    continue
                started = of_ray(psutil.Process(driver.pid))
                if (victim := left.pop()) == "worker":
                    moments.choice(victims).kill()
                else:
                    driver.kill()
                    driver.wait()
                    # Its agents, which compute nothing, wait a minute and more for a Ray that was killed.
                    assert all_gone([process for process, what in started.items() if not what.endswith("Agent")])
                deaths[victim] += 1
            said, _ = driver.communicate()
            if driver.returncode == 0:
                break
            assert driver.returncode == -signal.SIGKILL, said
        assert by_id(out) == nearly(by_id(alone.path)), (number, said)
        assert answers_in(out) == len(FILES) * CLIPS
    assert deaths.total() >= 2 * count


@pytest.mark.long
def test_two_workers_with_vllm_give_the_predictions_of_one_engine(one, evaluation, tmp_path, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    arguments = {"recipe": evaluation.recipe, "models": [one.path / "checkpoints"], "engine": "vllm"}
    arguments["engine_options"] = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
    alone = evaluate(out=tmp_path / "alone", **arguments)
    done = evaluate(out=tmp_path / "two", workers=2, **arguments)
    wanted, found = by_id(alone.path), by_id(done.path)
    for file in FILES:
        assert {key: row.generated_ids for key, row in found[file].items()} == {
            key: row.generated_ids for key, row in wanted[file].items()
        }
    assert answers_in(done.path) == len(FILES) * CLIPS


class KillingAWorker(listening_to_archives.Listening):
    """Kills a worker when the first windows are done."""

    killed = 0

    def standing(self, standing):
        super().standing(standing)
        if not self.killed:
            workers_of(psutil.Process())[0].kill()
            self.killed += 1


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    archive = listening_to_archives.write_archive(tmp_path_factory.mktemp("archive") / "recordings")
    for number in range(8):
        listening_to_archives.write_recording(archive / f"more/{number}.wav", 12 + number)
    return archive


@pytest.mark.long
def test_an_archive_asked_by_two_workers_has_the_table_of_one(ray, one, archive, tmp_path):
    model, killing = one.path / "checkpoints/alpha-1.00", KillingAWorker()
    listening_to_archives.ask(model, archive, tmp_path / "one.csv")
    listening_to_archives.ask(model, archive, tmp_path / "two.csv", workers=2, listener=killing)
    assert killing.killed == 1 and {standing.workers for standing in killing.heard} <= {0, 1, 2}
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()


@pytest.mark.long
def test_a_recording_that_workers_die_of_is_named_and_all_others_are_answered(ray, one, tmp_path, monkeypatch):
    monkeypatch.setattr("mergekit_bio.listen.answering.OwnEngine", Deadly)
    archive, listening = tmp_path / "archive", listening_to_archives.Listening()
    for name in ("a.wav", "b.wav", DEADLY, "e.wav"):
        listening_to_archives.write_recording(archive / name, 3)
    model = one.path / "checkpoints/alpha-1.00"
    outcome = listening_to_archives.ask(model, archive, tmp_path / "birds.csv", workers=2, listener=listening)
    said = f"{archive / DEADLY}: 3 workers died when they heard it"
    assert outcome.failed == {str(archive / DEADLY): said} and list(listening.failures.values()) == [said]
    assert outcome.windows == 3


def same_rows(found: Path, wanted: Path) -> bool:
    """Whether two files have the same rows in the same order, but for what batches of other sizes round."""
    arrays, expected = load_file(found), load_file(wanted)
    assert recordings_of(found) == recordings_of(wanted) and arrays.keys() == expected.keys()
    return all(np.allclose(arrays[key], expected[key], atol=1e-5) for key in expected)


def test_an_archive_embedded_by_two_workers_has_the_rows_of_one(ray, one, archive, tmp_path, monkeypatch):
    """In the order of the recordings; one of the two workers dies, and every batch is a part."""
    monkeypatch.setattr("mergekit_bio.listen.parts._PART_SECONDS", 0.0)
    model, killing = one.path / "checkpoints/alpha-1.00", KillingAWorker()
    embed(model, archive, tmp_path / "one.safetensors")
    done = embed(model, archive, tmp_path / "two.safetensors", workers=2, listener=killing)
    assert killing.killed == 1 and {standing.workers for standing in killing.heard} <= {0, 1, 2}
    assert same_rows(tmp_path / "two.safetensors", tmp_path / "one.safetensors")
    assert (done.recordings, done.failed, done.broken) == (12, {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


#: The command, with every batch a part of its own.
PARTS_AT_ONCE = (
    "import mergekit_bio.listen.parts as p; p._PART_SECONDS = 0; from mergekit_bio.cli.app import main; main()"
)


@pytest.mark.parametrize(
    "ends",
    [
        pytest.param([signal.SIGKILL], marks=pytest.mark.long),
        pytest.param([signal.SIGKILL, signal.SIGTERM, signal.SIGINT], marks=pytest.mark.soak),
    ],
    ids=["once", "three times"],
)
def test_embedding_is_gone_on_with_whatever_ends_its_driver(one, tmp_path, ends):
    """The workers end with it, and one process embeds what is left."""
    archive, model = tmp_path / "archive", one.path / "checkpoints/alpha-1.00"
    for number in range(12):
        listening_to_archives.write_recording(archive / f"{number:02d}.wav", 60, 8_000)
    out, folder = tmp_path / "birds.safetensors", tmp_path / "birds.safetensors.parts"
    words = ["embed", model, archive, "--out", out, "--hop", 4, "--device", "cpu", "--workers", 2]
    for number in ends:
        there, started = len([*folder.glob("*.safetensors")]), {}
        driver = subprocess.Popen(
            [sys.executable, "-c", PARTS_AT_ONCE, *map(str, words)], cwd=tmp_path, env=users_environment(),
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while driver.poll() is None and len([*folder.glob("*.safetensors")]) < there + 2:
            started = of_ray(psutil.Process(driver.pid))
            time.sleep(0.01)
        driver.send_signal(number)
        _, err = driver.communicate(timeout=120)
        assert driver.returncode == (-number if number == signal.SIGKILL else 130), err
        assert started and all_gone([process for process, what in started.items() if not what.endswith("Agent")])
    done = embed(model, archive, out, hop=4.0)
    whole = embed(model, archive, tmp_path / "whole.safetensors", hop=4.0)
    assert same_rows(out, tmp_path / "whole.safetensors") and done == whole
    assert not folder.exists()

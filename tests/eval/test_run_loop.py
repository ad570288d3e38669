"""Runs from recipe to predictions, with real merges and real engines on a small model."""

import http.server
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
from eval.evaluation import CLIPS, SPECIES, Evaluation, shipped_copy, write_evaluation
from tiny_naturelm import make_base

from eval import beans_zero_tool
from mergekit_bio.audio import waveform
from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
from mergekit_bio.audio.recording import read_clip
from mergekit_bio.demo import run as demo
from mergekit_bio.demo.recordings import write_recordings as write_demo_recordings
from mergekit_bio.demo.species import HEARD, UNHEARD
from mergekit_bio.engine import choice
from mergekit_bio.engine.choice import engine_class
from mergekit_bio.engine.interface import EngineSettings
from mergekit_bio.engine.slot import EngineSlot
from mergekit_bio.errors import AlphaError, DatasetError, EngineError, RecipeError, RunError
from mergekit_bio.eval.recipe.shipped import copy_shipped, shipped_recipes
from mergekit_bio.eval.records.predictions import read_predictions
from mergekit_bio.eval.records.run_directory import read_record
from mergekit_bio.eval.run.evaluate import Run, carry_out, evaluate, prepare_run
from mergekit_bio.eval.run.progress import SilentListener
from mergekit_bio.merging.merge import merge
from mergekit_bio.model.loading import load_model

CPU = {"engine": "transformers", "engine_options": {"device": "cpu"}}
FILES = [f"beans_zero_eval_recordings_query{query}_lora{alpha}.jsonl" for alpha in ("000", "100") for query in (0, 1)]


class Listening(SilentListener):
    """Remembers what it heard."""

    def __init__(self):
        self.notes, self.heard = [], []

    def note(self, text):
        self.notes.append(text)

    def standing(self, standing):
        self.heard.append(standing)


def by_id(path: Path, files=FILES) -> dict:
    """All that stands in the predictions files, whatever the order."""
    return {file: {row.id: row for row in read_predictions(path / file)} for file in files}


def nearly(rows: dict) -> dict:
    """The same rows, whose log-probabilities need not agree to the last bit: those depend on what shares a batch."""
    return {
        file: {key: replace(row, logprob=pytest.approx(row.logprob, abs=1e-4)) for key, row in of_file.items()}
        for file, of_file in rows.items()
    }


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Evaluation:
    return write_evaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def listening() -> Listening:
    return Listening()


@pytest.fixture(scope="module")
def run(evaluation, listening, tmp_path_factory) -> Run:
    """An undisturbed run of two alphas and two queries, the second with audio examples."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return evaluate(recipe=evaluation.recipe, out=out, listener=listening, **CPU)


def test_every_checkpoint_answers_every_query_about_every_clip(run):
    assert sorted(path.name for path in run.path.glob("*.jsonl")) == sorted(FILES)
    for file, rows in by_id(run.path).items():
        assert sorted(rows) == sorted(f"{number}.wav" for number in range(CLIPS))
        alpha = 0.0 if "lora000" in file else 1.0
        for row in rows.values():
            assert row.lora_scale == alpha and row.dataset_name == "recordings"
            assert row.label == SPECIES[int(row.id[0]) % 3]
            assert row.generated_ids and row.logprob < 0 and row.prompt_tokens > 29
            assert Path(row.audio).name == row.id


def test_alphas_and_queries_give_different_answers(run):
    rows = by_id(run.path)
    assert len({tuple(rows[file][f"{n}.wav"].generated_ids for n in range(CLIPS)) for file in FILES}) == 4


def test_examples_are_heard_where_the_prompt_says(run, evaluation):
    """The same question to Transformers itself, which runs the model's own tower and its own prompt."""
    head, tail = LLAMA3_TEMPLATE.split("{}")
    model, processor = load_model(run.path / "checkpoints/alpha-1.00", device="cpu")
    for row in list(read_predictions(run.path / FILES[3]))[:3]:
        assert len(row.example_ids) == 3 and row.id not in row.example_ids
        recordings = [evaluation.recordings / clip for clip in (*row.example_ids, row.id)]
        if any(recording.name == f"{CLIPS - 1}.wav" for recording in recordings):
            continue  # shorter than `ask` takes
        instruction = row.prompt.removeprefix(head).removesuffix(tail)
        prompt = processor.render(instruction, num_audios=len(recordings))
        inputs = processor([prompt], audio=[read_clip(recording) for recording in recordings])
        ids = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=6)
        answer = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        assert answer.strip() == row.prediction.strip()


def test_the_record_says_what_was_run(run, evaluation):
    record = read_record(run.path)
    assert [cell.file for cell in record.cells] == FILES
    assert all(cell.seconds > 0 and cell.rows == CLIPS for cell in record.cells)
    assert record.recipe["merge"]["base"] == str(evaluation.base)
    assert record.environment["engine"] == {"name": "transformers", "options": {"device": "cpu"}}
    assert record.environment["versions"]["torch"]


def test_audio_is_decoded_and_encoded_once_for_all_alphas_queries_and_examples(run):
    environment = run.record.environment
    assert (environment["clips_decoded"], environment["clips_encoded"]) == (CLIPS, CLIPS)
    assert not (run.path / "prefixes").exists()


class Stopping(Listening):
    """Stops a run when it has so many answers."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def standing(self, standing):
        if standing.run_done >= self.answers:
            raise KeyboardInterrupt


def test_a_run_that_goes_on_decodes_only_what_has_changed(run, evaluation, tmp_path, monkeypatch):
    recordings, decoded = shutil.copytree(evaluation.recordings, tmp_path / "recordings"), []
    prepare = waveform.prepare
    monkeypatch.setattr(waveform, "prepare", lambda *samples, **named: decoded.append(1) or prepare(*samples, **named))
    recipe = evaluation.variant("stopped", datasets=[{"path": str(recordings)}])
    arguments = {"recipe": recipe, "out": tmp_path / "run", "models": [run.path / "checkpoints"], **CPU}
    for answers in (CLIPS, 2 * CLIPS):
        with pytest.raises(KeyboardInterrupt):
            evaluate(**arguments, listener=Stopping(answers))
        assert len(decoded) == CLIPS
    os.utime(recordings / "0.wav", ns=(0, 0))
    done = evaluate(**arguments)
    assert len(decoded) == CLIPS + 1
    assert (done.record.environment["clips_decoded"], done.record.environment["clips_encoded"]) == (1, 0)
    assert by_id(done.path).keys() == set(FILES) and not (done.path / "prefixes").exists()


def test_a_run_whose_prefixes_cannot_be_written_says_so_once_and_goes_on(run, evaluation, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/prefixes").write_text("in the way")
    arguments = {"recipe": evaluation.recipe, "models": [run.path / "checkpoints"], **CPU}
    listening = Listening()
    done = evaluate(out=tmp_path / "run", listener=listening, **arguments)
    assert len(listening.notes) == 1 and "audio prefixes cannot be written" in listening.notes[0]
    assert by_id(done.path) == nearly(by_id(run.path))


def test_progress_tells_cell_and_run(run, listening):
    first, last = listening.heard[0], listening.heard[-1]
    assert (first.number, first.cells, first.done, first.run_done, first.rate) == (1, 4, 0, 0, None)
    assert (last.number, last.done, last.rows, last.run_done, last.run_rows) == (4, CLIPS, CLIPS, 4 * CLIPS, 4 * CLIPS)
    middle = listening.heard[1]
    assert middle.cell_seconds_left == pytest.approx((CLIPS - middle.done) / middle.rate)
    assert middle.run_seconds_left == pytest.approx((4 * CLIPS - middle.run_done) / middle.rate)
    assert listening.notes == ["merged: alpha 0.00, alpha 1.00"]


def test_the_report_reads_it(run):
    report = run.report()
    assert [sweep.cell.query for sweep in report.sweeps] == [0, 1]
    assert [[score.cell.alpha for score in sweep.scores] for sweep in report.sweeps] == [[0.0, 1.0]] * 2
    assert report.scorers == ["exact"] and report.notes == []


def test_a_finished_run_is_left_alone(run, evaluation):
    before = {file: (run.path / file).read_bytes() for file in FILES}
    listening = Listening()
    evaluate(recipe=evaluation.recipe, out=run.path, listener=listening, **CPU)
    assert before == {file: (run.path / file).read_bytes() for file in FILES}
    assert listening.heard == [] and listening.notes == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"generate": {"max_new_tokens": 7, "num_beams": 1}}, "generate.max_new_tokens was 6 and is now 7"),
        ({"queries": ["What?", "Where?"]}, "query was"),
        ({"decoding": "choice"}, "decoding was"),
        ({"n_examples": 2}, "n_examples was 1 and is now 2"),
    ],
)
def test_a_changed_recipe_does_not_go_on(run, evaluation, changes, key):
    changed = evaluation.variant("changed", **changes)
    with pytest.raises(RunError, match=r"another configuration") as caught:
        evaluate(recipe=changed, out=run.path, **CPU)
    assert key in str(caught.value) and "\n" not in str(caught.value)


def test_changed_data_or_sources_do_not_go_on(run, evaluation, tmp_path):
    other = write_evaluation(tmp_path, base=make_base(tmp_path / "other", seed=5))
    merge = {"base": str(other.base), "adapter": str(other.adapter), "alphas": [0.0, 1.0]}
    with pytest.raises(RunError, match="was merged from"):
        evaluate(recipe=evaluation.variant("elsewhere", merge=merge), out=run.path, **CPU)
    for number in range(CLIPS):
        soundfile.write(other.recordings / f"{number}.wav", [0.1 * number] * 8000, 8000)
    data = [{"path": str(other.recordings), "name": "recordings"}]
    with pytest.raises(RunError, match="data was"):
        evaluate(recipe=evaluation.variant("recorded", datasets=data), out=run.path, **CPU)


@pytest.mark.parametrize("adapter", ["made up", "naturelm-tiny", "naturelm-tiny-trained-only"])
def test_a_project_that_was_moved_goes_on(golden, tmp_path, adapter):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    if adapter == "made up":
        write_evaluation(old)
    else:
        base, adapter = (shutil.copytree(golden / name, old / name) for name in ("llama-tiny", adapter))
        write_evaluation(old, base=base, adapter=adapter)
    evaluate(recipe=old / "tones.yaml", out=old / "run", limit=1, alphas=[1.0], **CPU)
    old.rename(new)
    recipe = new / "tones.yaml"
    recipe.write_text(recipe.read_text().replace(str(old), str(new)))
    listening = Listening()
    done = evaluate(recipe=recipe, out=new / "run", limit=2, alphas=[1.0], listener=listening, **CPU)
    assert [len(rows) for rows in by_id(done.path, FILES[2:]).values()] == [2, 2]
    assert listening.notes == []


#: So many that a fast machine is not done before it is killed: every kill waits for new answers.
ALPHAS = ["0:1:0.05"]
#: Imported once, by the process that every run is forked from.
IMPORTED = [
    "mergekit_bio.eval.run.evaluate",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.generation.utils",
    "mergekit_bio.merging.merge",
    "mergekit_bio.audio.prefix",
]


def answers_in(out: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in out.glob("*.jsonl"))


@pytest.mark.repeated(4, 20)
def test_a_run_killed_many_times_ends_with_the_same_predictions(evaluation, tmp_path, count):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    arguments = {"recipe": evaluation.recipe, "alphas": ALPHAS, **CPU}
    whole = evaluate(out=tmp_path / "whole", **arguments)
    files = [cell.file for cell in whole.record.cells]
    assert answers_in(whole.path) == len(files) * CLIPS
    moments = random.Random(0)
    kills = runs = 0
    while kills < count:  # a run that is over before its time is followed by another
        out = tmp_path / f"run-{runs}"
        runs += 1
        while True:
            before = answers_in(out)
            process = context.Process(target=evaluate, kwargs={"out": out, **arguments})
            process.start()
            while process.is_alive() and (kills >= count or answers_in(out) == before):
                time.sleep(0.002)
            if not process.is_alive():
                break
            time.sleep(moments.choice((0, 0, 0.01, 0.03)))
            process.kill()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            # What a kill in the middle of a line leaves.
            with max(out.glob("*.jsonl"), key=lambda file: file.stat().st_mtime_ns).open("ab") as file:
                file.write(b'{"prediction": "half a li')
        process.join()
        assert process.exitcode == 0
        assert by_id(out, files) == nearly(by_id(whole.path, files))
        assert answers_in(out) == answers_in(whole.path)


def test_a_limit_is_the_beginning_of_the_whole_run(run, evaluation, tmp_path):
    evaluate(recipe=evaluation.recipe, out=tmp_path / "run", alphas=[1.0], limit=2, **CPU)
    assert [len(rows) for rows in by_id(tmp_path / "run", FILES[2:]).values()] == [2, 2]
    folder = tmp_path / "run/checkpoints/alpha-1.00"
    first = folder.stat().st_ino
    listening = Listening()
    (tmp_path / "run/.checkpoints.new.0123abcd.partial").mkdir()  # as a killed merge of other strengths leaves it
    evaluate(recipe=evaluation.recipe, out=tmp_path / "run", listener=listening, **CPU)
    assert by_id(tmp_path / "run") == nearly(by_id(run.path))
    cut_off, merged = listening.notes
    assert ".checkpoints.new.0123abcd.partial: holds 0 GB" in cut_off and merged == "merged: alpha 0.00"
    assert folder.stat().st_ino == first
    assert not (tmp_path / "run/checkpoints.new").exists()


def test_a_sweep_made_before_is_found_by_its_directory(run, evaluation, tmp_path):
    sweep = Path(shutil.copytree(run.path / "checkpoints", tmp_path / "sweep"))
    shutil.copytree(sweep / "alpha-1.00", sweep / ".alpha-0.50.0123abcd.partial")  # as a killed merge leaves it
    again = evaluate(recipe=evaluation.recipe, out=tmp_path / "run", models=[sweep], limit=2, **CPU)
    assert [cell.checkpoint for cell in again.record.cells] == ["alpha-0.00"] * 2 + ["alpha-1.00"] * 2
    whole = nearly(by_id(run.path))
    assert all(whole[file][key] == row for file, rows in by_id(again.path).items() for key, row in rows.items())
    assert not (tmp_path / "run/checkpoints").exists()


def test_checkpoints_of_one_alpha_do_not_share_a_file(run, evaluation, tmp_path):
    shutil.copytree(run.path / "checkpoints/alpha-1.00", tmp_path / "other")
    models = [run.path / "checkpoints/alpha-1.00", tmp_path / "other"]
    plan = prepare_run(recipe=evaluation.recipe, out=tmp_path / "run", models=models, engine="transformers")
    assert [cell.alpha for cell in plan.cells] == [1.0] * 4
    assert len({cell.file for cell in plan.cells}) == 4


@pytest.mark.parametrize("decoding", ["choice", "loglikelihood"])
def test_answers_from_the_list_of_species(run, evaluation, tmp_path, decoding):
    recipe = evaluation.variant(decoding, decoding=decoding, queries=["Which species is it?"], n_examples=None)
    done = evaluate(recipe=recipe, out=tmp_path / "run", models=[run.path / "checkpoints/alpha-1.00"], **CPU)
    for row in read_predictions(done.path / FILES[2]):
        assert row.prediction in SPECIES
        if decoding == "loglikelihood":
            assert sorted(row.choice_logprobs) == sorted(SPECIES)
            assert row.prediction == max(row.choice_logprobs, key=row.choice_logprobs.get)


def test_a_run_whose_labels_were_scored_without_their_ends_does_not_go_on_with_them(run, evaluation, tmp_path):
    recipe = evaluation.variant("scored", decoding="loglikelihood", queries=["Which species is it?"], n_examples=None)
    arguments = {"recipe": recipe, "out": tmp_path / "run", "models": [run.path / "checkpoints/alpha-1.00"], **CPU}
    evaluate(limit=1, **arguments)
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["cells"][0]["identity"].pop("ends_scored")
    (tmp_path / "run/run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="ends_scored was false and is now true"):
        evaluate(limit=2, **arguments)


def test_sampled_answers_do_not_depend_on_where_a_run_stopped(run, evaluation, tmp_path):
    generate = {"max_new_tokens": 6, "num_beams": 1, "temperature": 1.0}
    recipe = evaluation.variant("sampled", generate=generate, queries=["Which species is it?"], n_examples=None)
    arguments = {"recipe": recipe, "models": [run.path / "checkpoints/alpha-1.00"], **CPU}
    whole = evaluate(out=tmp_path / "whole", **arguments)
    evaluate(out=tmp_path / "parts", limit=3, **arguments)
    evaluate(out=tmp_path / "parts", **arguments)
    rows = by_id(whole.path, FILES[2:3])
    assert by_id(tmp_path / "parts", FILES[2:3]) == nearly(rows)
    assert len({row.generated_ids for row in rows[FILES[2]].values()}) > 1


def test_components_of_beans_zero_with_their_own_instructions(run, evaluation, beans_zero, tmp_path):
    changes = {"datasets": ["watkins", "hiceas", "captioning"], "data": str(beans_zero("parquet"))}
    recipe = evaluation.variant("beans", **changes, queries=None, top_k_species=None, n_examples=None)
    listening = Listening()
    models = [run.path / "checkpoints/alpha-1.00"]
    done = evaluate(recipe=recipe, out=tmp_path / "run", models=models, listener=listening, **CPU)
    counts = Counter({cell.dataset: cell.rows for cell in done.record.cells})
    assert counts == {"watkins": 3, "hiceas": 2, "captioning": 1}
    (row,) = read_predictions(done.path / "beans_zero_eval_captioning_query0_lora100.jsonl")
    assert "<Audio><AudioHere></Audio> What is it, captioning?" in row.prompt and row.label == "A wren sings."
    assert any("figures cannot be compared" in note for note in listening.notes)
    assert {sweep.cell.task for sweep in done.report().sweeps} == {"classification", "detection", "captioning"}


@pytest.mark.parametrize("name", sorted({name for name in shipped_recipes() if not name.startswith("demo")}))
def test_the_shipped_recipes_run(run, tmp_path, name):
    recipe = shipped_copy(shipped_recipes()[name], tmp_path, run.path / "checkpoints/alpha-1.00")
    done = evaluate(recipe=recipe, out=tmp_path / "run", limit=1, **CPU)
    for cell in done.record.cells:
        (row,) = read_predictions(done.path / cell.file)
        assert row.generated_ids and (cell.query_text is None or row.prompt_tokens > 29)
        if cell.task != "instructions":
            assert beans_zero_tool.read(done.path / cell.file) == {cell.dataset: [(row.prediction, row.label)]}
    assert done.report().sweeps


class Servers:
    """A server that offers two checkpoints, answers with the model's name, and stops answering after a while."""

    def __init__(self, answers: int, template: str | None = None, first_waits_for: int = 1):
        self.left = answers
        servers, lock, seen, enough = self, threading.Lock(), itertools.count(1), threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(
                    {
                        "data": [{"id": name} for name in ("alpha-0.00", "alpha-1.00")],
                        "model_revision": "r",
                        "prompt_template": template,
                    }
                )

            def do_POST(self):
                model = json.loads(self.rfile.read(int(self.headers["content-length"])))["model"]
                with lock:
                    servers.left -= 1
                    asked = next(seen)
                if asked == first_waits_for:
                    enough.set()
                if asked == 1:
                    enough.wait()
                if servers.left < 0:
                    self.close_connection = True
                    return
                choice = {"message": {"content": model}, "finish_reason": "stop", "token_ids": [1]}
                self.reply({"choices": [choice], "usage": {"prompt_tokens": 3}})

            def reply(self, document):
                data = json.dumps(document).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def test_a_server_that_dies_leaves_a_run_that_resumes(evaluation, tmp_path):
    pytest.importorskip("httpx", reason="httpx is not installed")
    servers = Servers(answers=CLIPS + 2)
    arguments = {"recipe": evaluation.recipe, "out": tmp_path / "run", "servers": [servers.url]}
    arguments["engine_options"] = {"concurrency": 1}  # two to a batch
    with pytest.raises(EngineError, match="resume the run"):
        evaluate(**arguments)
    kept = answers_in(tmp_path / "run")
    assert CLIPS - 2 <= kept <= CLIPS + 2  # all but those of the batches that were under way
    servers.left = 1000
    done = evaluate(**arguments)
    servers.server.shutdown()
    assert servers.left == 1000 - (4 * CLIPS - kept)
    for file, rows in by_id(done.path).items():
        assert {row.prediction for row in rows.values()} == {"alpha-0.00" if "lora000" in file else "alpha-1.00"}
    assert not (done.path / "checkpoints").exists()


def test_servers_are_asked_the_next_batch_while_the_last_answer_of_this_one_is_awaited(evaluation, tmp_path):
    pytest.importorskip("httpx", reason="httpx is not installed")
    servers = Servers(answers=1000, first_waits_for=6)
    arguments = {"servers": [servers.url], "engine_options": {"concurrency": 2}}  # four to a batch
    done = evaluate(recipe=evaluation.recipe, out=tmp_path / "run", **arguments)
    servers.server.shutdown()
    assert answers_in(done.path) == 4 * CLIPS


@pytest.mark.parametrize(("template", "before", "after"), [("[{}] So:", "[", "] So:"), (None, "", "")])
def test_a_servers_prompt_is_in_the_template_that_it_tells_or_as_it_was_sent(
    evaluation, tmp_path, template, before, after
):
    pytest.importorskip("httpx", reason="httpx is not installed")
    servers = Servers(answers=1000, template=template)
    recipe = evaluation.variant("served", queries=["Which species is it?"], n_examples=None)
    done = evaluate(recipe=recipe, out=tmp_path / "run", servers=[servers.url], limit=1)
    servers.server.shutdown()
    for file in done.path.glob("*.jsonl"):
        (row,) = read_predictions(file)
        assert row.prompt == f"{before}<Audio><AudioHere></Audio> Which species is it?{after}"


def test_labels_that_servers_do_not_score_are_refused_before_anything_is_written(evaluation, tmp_path):
    pytest.importorskip("httpx", reason="httpx is not installed")
    servers = Servers(answers=0)
    recipe = evaluation.variant("scored", decoding="loglikelihood", queries=["Which species is it?"], n_examples=None)
    with pytest.raises(EngineError, match=f"{servers.url} does not score choices"):
        evaluate(recipe=recipe, out=tmp_path / "run", servers=[servers.url])
    servers.server.shutdown()
    assert not (tmp_path / "run").exists()


def test_another_engine_is_a_class_and_a_line_of_the_table(evaluation, tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "ENGINES", {**choice.ENGINES, "parrot": "eval.parrot:Parrot"})
    arguments = {"engine": "parrot", "servers": ["http://x"], "engine_options": {"volume": 11}}
    done = evaluate(recipe=evaluation.recipe, out=tmp_path / "run", **arguments)
    for file, rows in by_id(done.path).items():
        checkpoint = "alpha-0.00" if "lora000" in file else "alpha-1.00"
        assert {row.prediction for row in rows.values()} == {f"{checkpoint} of http://x"} and len(rows) == CLIPS
        assert all(row.prompt.startswith("Parrot, say: ") for row in rows.values())
    assert {cell.identity["checkpoint"]["served"] for cell in done.record.cells} == {
        "feathers of alpha-0.00",
        "feathers of alpha-1.00",
    }


def test_what_cannot_be_asked_is_refused_before_anything_is_merged(evaluation, tmp_path):
    out = tmp_path / "run"
    penalty = evaluation.variant("penalty", generate={"repetition_penalty": 1.2})
    given = evaluation.variant("given", merge=None, checkpoints=["a/b"])
    for error, match, arguments in [
        (EngineError, "did you mean 'transformers'", {"engine": "transformer"}),
        (EngineError, "needs --server", {"engine": "http"}),
        (EngineError, "takes no --server", {"engine": "vllm", "servers": ["http://x"]}),
        (RecipeError, "--model and --alpha", {"models": ["a/b"], "alphas": [1]}),
        (RecipeError, "merges nothing", {"recipe": given, "alphas": [1]}),
        (RecipeError, "repetition_penalty", {"recipe": penalty, "engine": "transformers"}),
        (AlphaError, "numbers", {"alphas": ["q_proj=0.3"]}),
    ]:
        with pytest.raises(error, match=match):
            evaluate(**{"recipe": evaluation.recipe, "out": out} | arguments)
    with pytest.raises(EngineError, match="did you mean 'device'"):
        evaluate(recipe=evaluation.recipe, out=tmp_path / "x", engine="transformers", engine_options={"devise": "cpu"})
    assert not out.exists()


@pytest.mark.parametrize(
    ("rows", "examples", "n_examples", "limit", "said"),
    [
        (8, 0, 2, None, "2 example(s) of 'Spotted Elachura' are asked for, there are 1 beside a clip"),
        (8, 0, 2, 2, None),
        (9, 0, 2, None, None),
        (9, 6, 3, None, "3 example(s) of 'Coruro' are asked for, there are 2; lower n_examples"),
        (9, 6, 2, None, None),
    ],
)
def test_too_few_examples_are_found_before_anything_is_merged(tmp_path, rows, examples, n_examples, limit, said):
    """Of every species, though the first clip's question would do."""
    evaluation = write_evaluation(tmp_path)
    metadata = evaluation.recordings / "metadata.csv"
    header, *lines = metadata.read_text().splitlines()
    lines = [f"{line},{'examples' if n < examples else 'test'}" for n, line in enumerate(lines[:rows])]
    metadata.write_text("\n".join([f"{header},split", *lines]) + "\n")
    recipe = evaluation.variant("few", n_examples=n_examples)
    arguments = {"recipe": recipe, "out": tmp_path / "run", "limit": limit, "engine": "transformers"}
    if said is None:
        assert prepare_run(**arguments).max_audios == 3 * n_examples + 1
    else:
        with pytest.raises(DatasetError, match=re.escape(said)):
            prepare_run(**arguments)
    assert not (tmp_path / "run").exists()


def test_an_adapter_without_ears_is_refused_before_it_is_merged(evaluation, golden, tmp_path):
    merge = {"base": str(golden / "llama-tiny"), "adapter": str(golden / "peft-adapter-tiny"), "alphas": [0.0, 1.0]}
    with pytest.raises(RecipeError, match="no audio tower"):
        evaluate(recipe=evaluation.variant("deaf", merge=merge), out=tmp_path / "run", **CPU)
    assert not (tmp_path / "run").exists()


def test_the_reference_models_run_too(golden, tmp_path):
    evaluation = write_evaluation(tmp_path, base=golden / "llama-tiny", adapter=golden / "naturelm-tiny-trained-only")
    done = evaluate(recipe=evaluation.recipe, out=tmp_path / "run", alphas=["0:1:1"], limit=3, **CPU)
    assert all(len(rows) == 3 for rows in by_id(done.path).values())


def test_vllm_gives_the_greedy_predictions_of_transformers(run, evaluation, tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    arguments = {"recipe": evaluation.recipe, "models": [run.path / "checkpoints"]}
    single = {"dtype": "float32"}
    expected = evaluate(
        out=tmp_path / "a", engine="transformers", engine_options={"device": "cpu"} | single, **arguments
    )
    options = single | {"enforce_eager": True, "max_model_len": 1024}
    done = evaluate(out=tmp_path / "b", engine="vllm", engine_options=options, **arguments)
    wanted, found = by_id(expected.path), by_id(done.path)
    for file in FILES:
        assert {key: row.generated_ids for key, row in found[file].items()} == {
            key: row.generated_ids for key, row in wanted[file].items()
        }


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_checkpoint_is_asked_in_its_own_template_and_its_predictions_say_so(evaluation, tmp_path, engine):
    """What stands in a prediction, given to the model as a whole, gets the answer that stands beside it."""
    if engine == "vllm":
        pytest.importorskip("vllm", reason="vLLM is not installed")
    template = "<|start_header_id|>system<|end_header_id|>\n\nGray wolf.<|eot_id|>Question: {}\nAnswer:"
    adapter = tmp_path / "adapter"
    shutil.copytree(evaluation.adapter, adapter)
    config = json.loads((adapter / "config.json").read_text()) | {"prompt_template": template}
    (adapter / "config.json").write_text(json.dumps(config))
    merge = {"base": str(evaluation.base), "adapter": str(adapter), "alphas": [1.0]}
    recipe = evaluation.variant("template", merge=merge, queries=["Which species is it?"], n_examples=None)
    options = {"device": "cpu"} if engine == "transformers" else {"enforce_eager": True, "max_model_len": 1024}
    done = evaluate(
        recipe=recipe, out=tmp_path / "run", limit=4, engine=engine, engine_options=options | {"dtype": "float32"}
    )
    model, processor = load_model(tmp_path / "run/checkpoints/alpha-1.00", device="cpu")

    def answer(prompt: str, recording: Path) -> tuple[list[int], int]:
        samples, rate = soundfile.read(recording)
        inputs = processor(prompt, audio=samples, sampling_rate=rate)
        length = inputs["input_ids"].shape[1]
        return model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, length:].tolist(), length

    (file,) = done.path.glob("*.jsonl")
    rows = list(read_predictions(file))
    in_llamas = []
    instruction = "<Audio><AudioHere></Audio> Which species is it?"
    for row in rows:
        assert row.prompt == template.replace("{}", instruction)
        assert (list(row.generated_ids), row.prompt_tokens) == answer(row.prompt, Path(row.audio))
        in_llamas.append(
            answer(LLAMA3_TEMPLATE.replace("{}", "<Audio><AudioHere></Audio> Which species is it?"), Path(row.audio))
        )
    assert in_llamas != [(list(row.generated_ids), row.prompt_tokens) for row in rows]


@pytest.fixture(scope="module")
def vllm_slot(tmp_path_factory):
    """One vLLM for all shipped recipes."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096}
    settings = EngineSettings(options=options, max_audios=16, prefixes=tmp_path_factory.mktemp("prefixes"))
    with EngineSlot(engine_class("vllm"), settings) as slot:
        yield slot


@pytest.mark.parametrize("name", sorted({name for name in shipped_recipes() if not name.startswith("demo")}))
def test_the_shipped_recipes_give_the_same_predictions_with_vllm(run, vllm_slot, tmp_path, name):
    recipe = shipped_copy(shipped_recipes()[name], tmp_path, run.path / "checkpoints/alpha-1.00")
    options = {"device": "cpu", "dtype": "float32"}
    limit = 2 if name == "instructions" else 1  # one prompt without audio, one with it
    expected = evaluate(recipe=recipe, out=tmp_path / "a", limit=limit, engine="transformers", engine_options=options)
    plan = prepare_run(recipe=recipe, out=tmp_path / "b", limit=limit, engine="vllm")
    record = carry_out(plan, EngineSettings(), listener=SilentListener(), slot=vllm_slot)
    for cell in record.cells:
        assert cell.identity["dtype"] == "float32" == record.environment["engine"]["options"]["dtype"]
        found, wanted = read_predictions(plan.out / cell.file), read_predictions(expected.path / cell.file)
        assert [row.generated_ids for row in found] == [row.generated_ids for row in wanted]
        assert [row.prompt_tokens for row in found] == [row.prompt_tokens for row in wanted]


def test_the_demos_recipes_give_the_same_predictions_with_vllm(tmp_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folders = {engine: tmp_path / engine for engine in ("transformers", "vllm")}
    first = folders["transformers"]
    merge(base=demo.MODEL / "base", adapter=demo.MODEL / "adapter", alphas=[0.6], out=first / "sweep/alpha-0.60")
    write_demo_recordings(first / "recordings/heard", HEARD, each=1, seed=5)
    write_demo_recordings(first / "recordings/unheard", UNHEARD[:3], each=3, seed=6)
    for recipe in demo.RECIPES:
        copy_shipped(recipe, first)
    shutil.copytree(first, folders["vllm"])
    for engine, folder in folders.items():
        with demo.shared_engine(engine, folder, SilentListener()) as slot:
            for recipe in demo.RECIPES:
                demo.ask(recipe, folder, slot, SilentListener())
    for recipe in demo.RECIPES:
        (file,) = (first / "runs" / recipe).glob("*.jsonl")
        wanted, found = (
            {row.id: row.generated_ids for row in read_predictions(folder / "runs" / recipe / file.name)}
            for folder in folders.values()
        )
        assert len(wanted) >= 9 and found == wanted, recipe

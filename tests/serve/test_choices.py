"""Closed lists with their probabilities over HTTP: by ``/predict``, by the http engine, by ``ask`` and by ``eval``."""

import csv
import json
import math
import select
import time

import pytest
import yaml
from eval.evaluation import write_recordings
from listen.archive import write_archive
from serve.requests_to_server import KEY
from serve.test_server import NAME, QUESTION, A, B, clip, connection, item, logged, predict, wav

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.http import HttpEngine
from mergekit_bio.engine.interface import Prompt
from mergekit_bio.errors import EngineError, PromptError
from mergekit_bio.eval.records.predictions import read_predictions
from mergekit_bio.eval.run.evaluate import evaluate

#: Some begin alike, some are the beginning of others.
CHOICES = ["marsh wren", "marsh", "marsh warbler", "gray wolf", "gray", "tree frog"]
#: More than a client waits for, each with some tokens that no other has.
MANY = [f"{n * 7919 % 2000} {n}th species, of {n * 104_729 % 2000}" for n in range(2000)]
#: float32: prompts are computed in other batches.
NEAR = {"abs": 1e-4}


def test_predict_scores_choices_as_transformers_does(http, engines, sounds):
    """At every strength, about clips of several lengths, without a recording, and with one choice alone."""
    asked = [
        (A, CHOICES, [sounds[3]], 10.0), (B, CHOICES, [sounds[3]], 10.0), (A, CHOICES[::-1], [sounds[3]], 3.0),
        (A, CHOICES, [sounds[1], sounds[2]], 5.0), (A, CHOICES, [], 10.0), (A, ["gray wolf"], [sounds[0]], 10.0),
    ]  # fmt: skip
    for model, choices, heard, seconds in asked:
        config = {"choices": choices, "max_length_seconds": seconds, "temperature": 0.7}
        (entry,) = predict(http, item(audios=map(wav, heard), **config), path=f"/{model}/predict").json()["responses"]
        clips = [Clip.from_samples(samples / 2**15, sampling_rate=16_000, seconds=seconds) for samples in heard]
        prompt = Prompt("<Audio><AudioHere></Audio> " * len(heard) + QUESTION, clips)
        (wanted,) = engines[model].loglikelihood([prompt], choices)
        assert list(entry["choice_logprobs"]) == choices and entry["choice_logprobs"] == pytest.approx(wanted, **NEAR)
        assert entry["predictions"] == [max(wanted, key=wanted.get)]
        assert (entry["error"], entry["finish_reason"]) == (None, "stop") and entry["latency_sec"] > 0
        (free,) = predict(http, item(audios=map(wav, heard), max_length_seconds=seconds)).json()["responses"]
        assert entry["usage"] == {"prompt_tokens": free["usage"]["prompt_tokens"], "completion_tokens": 0}
        assert "choice_logprobs" not in free


def test_choices_that_are_negligible_together_need_not_be_scored(http, engines, sounds):
    choices = [*CHOICES, *MANY[:60]]
    (entry,) = predict(http, item(audios=[wav(sounds[2])], choices=choices, negligible_choices=0.05)).json()[
        "responses"
    ]
    (exact,) = engines[A].loglikelihood([Prompt(QUESTION, [clip(sounds[2])])], choices)
    scored = {choice: score for choice, score in entry["choice_logprobs"].items() if score is not None}
    assert scored == pytest.approx({choice: exact[choice] for choice in scored}, **NEAR)
    left_out = sum(math.exp(score) for choice, score in exact.items() if choice not in scored)
    assert len(scored) < len(choices) and 0 < left_out < 0.05 * sum(map(math.exp, exact.values()))


def test_a_choice_that_no_answer_can_be_is_its_items_error(http):
    """And what is wrong with lists as such is in test_predictions.py."""
    bad = {"<|reserved_special_token_0|>": "placeholder", "wren " * 2000: "tokens long", "a\n" * 40_000: "50000 tokens"}
    items = [item(str(n), choices=["wren", choice]) for n, choice in enumerate(bad)]
    response = predict(http, *items, item("good", choices=["wren", "owl"]))
    *refused, good = response.json()["responses"]
    assert response.status_code == 200 and good["error"] is None and good["predictions"][0] in ("wren", "owl")
    for entry, said in zip(refused, bad.values(), strict=True):
        assert said in entry["error"] and entry["predictions"] == []


def answered(http) -> float:
    """Requests that the engine has answered so far, those of lists among them."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total{"))


def until(reached) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_idle(http) -> bool:
    before = answered(http)
    time.sleep(0.5)
    return answered(http) == before


def test_a_long_list_holds_nobody_up_and_ends_when_its_client_leaves(server, http, sounds):
    items = [item(str(n), audios=[wav(sounds[n])], choices=MANY) for n in range(4)]
    body = json.dumps({"schema_version": "predictions_v1", "requests": items}).encode()
    start, before = server.request_log.stat().st_size, answered(http)
    link = connection(server, "/predict", length=len(body), sent=body)
    until(lambda: answered(http) > before + 20)
    # 1. Others are answered meanwhile: freely, and from lists of their own.
    for asked in (item("a"), item("a", choices=CHOICES), item("a", audios=[wav(sounds[5])], choices=CHOICES)):
        (entry,) = predict(http, asked).json()["responses"]
        assert entry["error"] is None
    assert http.get("/health").status_code == 200
    assert select.select([link], [], [], 0) == ([], [], [])  # the long lists are not answered yet
    # 2. Its client leaves.
    link.close()
    until(lambda: is_idle(http))

    def left() -> list[dict]:
        lines = map(json.loads, server.request_log.read_text()[start:].splitlines())
        return [line for line in lines if line["status"] == 499]

    until(left)
    (entry,) = left()
    assert (entry["path"], entry["audio_seconds"], entry["complete"]) == ("/predict", 1 + 2 + 3 + 4, False)


def test_lists_are_logged_and_counted(server, http, sounds):
    with logged(server, wanted=2) as found:
        before = answered(http)
        items = [item(str(n), audios=[wav(sounds[n])], choices=CHOICES) for n in range(2)]
        responses = predict(http, *items, path=f"/{B}/predict").json()["responses"]
    (entry,) = (one for one in found if one["path"] != "/metrics")
    assert entry["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in responses)
    assert (entry["completion_tokens"], entry["audio_seconds"], entry["model"]) == (0, 3, f"{NAME}@1")
    assert answered(http) >= before + 2 * len(CHOICES)


LABELS = (*CHOICES, "none of these")


def test_the_http_engine_scores_as_transformers_does_over_several_servers(server, engines, sounds):
    servers = [server.url, server.url.replace("127.0.0.1", "localhost")]
    engine = HttpEngine(servers, api_key=KEY, concurrency=4)
    clips = [
        Clip.from_samples(samples / 2**15, sampling_rate=16_000, seconds=seconds)
        for samples in sounds[:3]
        for seconds in (3.0, 10.0)
    ]
    prompts = [Prompt(QUESTION), *(Prompt(QUESTION, [one]) for one in clips)]
    for model in (A, B):
        engine.load(model)
        for ours, wanted in zip(
            engine.loglikelihood(prompts, LABELS), engines[model].loglikelihood(prompts, LABELS), strict=True
        ):
            assert list(ours) == list(LABELS) and ours == pytest.approx(wanted, **NEAR)
    for ours in engine.loglikelihood(prompts, LABELS, negligible=0.2):
        assert -math.inf in ours.values()
    with pytest.raises(PromptError, match="one length"):
        engine.loglikelihood([Prompt("<AudioHere> or <AudioHere>?", clips[:2])], LABELS)
    with pytest.raises(EngineError, match="takes 2000 with 100000 at most"):
        engine.loglikelihood(prompts, [*MANY, "one more"])


def test_ask_answers_from_a_list_by_a_server_as_with_an_engine_of_its_own(server, command_line, tmp_path):
    archive = write_archive(tmp_path / "archive")
    (tmp_path / "species.txt").write_text("\n".join(CHOICES))

    def ask(model, *engine, folder):
        options = ["-p", "Which of {species_list}?", "--choices", tmp_path / "species.txt", "--none"]
        options += ["--out", folder / "birds.csv", "--clips", 1, folder / "clips", "--min-probability", 0.001]
        folder.mkdir()
        code, _, err = command_line("ask", model, archive, *options, *engine)
        assert code == 0, err
        with (folder / "birds.csv").open(newline="") as birds, (folder / "clips/clips.csv").open(newline="") as cut:
            return list(csv.DictReader(birds)), list(csv.DictReader(cut))

    own = ("--engine", "transformers", "--device", "cpu")
    asked = ("--engine", "http", "--server", server.url, "--api-key", KEY)
    wanted, wanted_clips = ask(server.sweep[A], *own, folder=tmp_path / "own")
    found, found_clips = ask(A, *asked, folder=tmp_path / "http")
    assert len(found) == len(wanted) and {row["answer"] for row in found} <= set(LABELS)
    for ours, row in zip(found, wanted, strict=True):
        for column in ("recording", "start", "end", "answer", "second", "third"):
            assert ours[column] == row[column]
        for column in ("probability", "second_probability", "third_probability"):
            assert float(ours[column]) == pytest.approx(float(row[column]), **NEAR)
    assert [row["file"] for row in found_clips] == [row["file"] for row in wanted_clips] != []


def test_a_run_scores_its_labels_by_a_server_as_with_an_engine_of_its_own(server, tmp_path):
    recipe = {
        "name": "tones", "checkpoints": [str(server.sweep[B])], "decoding": "loglikelihood", "scorer": "exact",
        "datasets": [{"path": str(write_recordings(tmp_path / "recordings"))}], "queries": ["Which species is it?"],
    }  # fmt: skip
    (tmp_path / "tones.yaml").write_text(yaml.safe_dump(recipe))
    options = {"recipe": tmp_path / "tones.yaml"}
    own = evaluate(out=tmp_path / "own", engine="transformers", engine_options={"device": "cpu"}, **options)
    asked = evaluate(out=tmp_path / "http", engine="http", servers=[server.url], api_key=KEY, **options)
    wanted, found = (
        {row.id: row for cell in run.record.cells for row in read_predictions(run.path / cell.file)}
        for run in (own, asked)
    )
    assert found.keys() == wanted.keys() and len(found) > 5
    for clip_id, row in wanted.items():
        assert found[clip_id].prediction == row.prediction and found[clip_id].prompt == row.prompt
        # What is resampled travels as float32, which is heard where a pure tone leaves bands silent.
        assert found[clip_id].choice_logprobs == pytest.approx(row.choice_logprobs, rel=1e-4)

"""The http engine against servers that answer, stumble, refuse and die."""

import base64
import http.server
import io
import json
import math
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from listen.archive import QUESTION, ask, write_recording

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.http import HttpEngine, Retries
from mergekit_bio.engine.http_questions import audio_url as url_of
from mergekit_bio.engine.interface import Decoding, EngineSettings, Prompt
from mergekit_bio.errors import EngineError, PromptError

QUICK = Retries(attempts=6, first_wait=0.01, longest_wait=0.05, given_up_after=3)


def scores_of(choices, negligible_choices):
    return {choice: None if negligible_choices and len(choice) >= 10 else -len(choice) for choice in choices}


class Echo:
    """A server that answers a prompt with its own words, after what its script says for each request.

    A script's entries are statuses, or ``"drop"`` to close the connection without an answer. What ``info`` has is told
    too. A choice is as likely as it is short, and one of ten letters or more is negligible where some may be.
    """

    def __init__(
        self, script=(), *, dies_after=None, models=("m",), delay=0.0, held: threading.Event | None = None, **info
    ):
        self.answered, self.busiest = [], 0
        script, echo, lock, state = list(script), self, threading.Lock(), {"now": 0, "seen": 0}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(200, {"data": [{"id": name} for name in models], "model_revision": "r"} | info)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    state["now"] += 1
                    state["seen"] += 1
                    echo.busiest = max(echo.busiest, state["now"])
                    step = script.pop(0) if script else 200
                    dead = dies_after is not None and state["seen"] > dies_after
                time.sleep(delay)
                if held is not None:
                    held.wait()
                with lock:
                    state["now"] -= 1
                item = body["requests"][0] if "requests" in body else body
                text = item["messages"][0]["content"]
                if dead or step == "drop":
                    self.close_connection = True
                elif step != 200:
                    self.reply(step, {"error": {"message": "because"}})
                else:
                    echo.answered.append(text)
                    if item is body:
                        message = {"message": {"content": text}, "finish_reason": "stop", "token_ids": [1]}
                        self.reply(200, {"choices": [message], "usage": {"prompt_tokens": 3}})
                    else:
                        scores = scores_of(**item["generation_config"])
                        self.reply(200, {"responses": [{"choice_logprobs": scores}]})

            def reply(self, status, document):
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 64  # every prompt of a test may come at once

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"


PROMPTS = [Prompt(f"prompt {n}") for n in range(40)]
TEXTS = [prompt.text for prompt in PROMPTS]


def texts(generations):
    return [generation.text for generation in generations]


def test_answers_come_in_the_prompts_order_and_the_load_is_shared():
    servers = [Echo(delay=0.01), Echo(delay=0.01)]
    engine = HttpEngine([server.url for server in servers], concurrency=3)
    assert texts(engine.generate(PROMPTS, Decoding())) == TEXTS
    assert all(len(server.answered) >= 10 and server.busiest <= 3 for server in servers)
    assert sorted(servers[0].answered + servers[1].answered) == sorted(TEXTS)


def test_stumbling_servers_are_tried_again():
    server = Echo([503, "drop", 429, 200, 500, "drop", 200, 502])
    engine = HttpEngine([server.url], retries=Retries(attempts=8, first_wait=0.01, longest_wait=0.02, given_up_after=9))
    assert texts(engine.generate(PROMPTS, Decoding())) == TEXTS


def test_a_burst_of_failures_is_one():
    """A server that restarts fails all requests under way at once, and is not given up for that."""
    server = Echo([503] * len(PROMPTS), delay=0.2)
    engine = HttpEngine([server.url], concurrency=len(PROMPTS), retries=QUICK)
    assert texts(engine.generate(PROMPTS, Decoding())) == TEXTS


def test_a_server_that_dies_in_the_middle_loses_nothing():
    dying, other = Echo(dies_after=7), Echo()
    engine = HttpEngine([dying.url, other.url], concurrency=4, retries=QUICK)
    assert texts(engine.generate(PROMPTS, Decoding())) == TEXTS
    assert len(dying.answered) == 7 and len(other.answered) == len(PROMPTS) - 7


def test_a_server_that_never_answers_holds_nobody_up():
    end = threading.Event()
    hanging, other = Echo(held=end), Echo()
    engine = HttpEngine([hanging.url, other.url], concurrency=4, retries=QUICK)
    assert texts(engine.generate(PROMPTS, Decoding())) == TEXTS
    assert hanging.answered == [] and len(other.answered) == len(PROMPTS)
    end.set()


def test_calls_of_several_threads_share_the_servers_room():
    server = Echo(delay=0.01)
    engine = HttpEngine([server.url], concurrency=3)
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(engine.generate, PROMPTS[start::4], Decoding()) for start in range(4)]
    assert [texts(call.result()) for call in calls] == [TEXTS[start::4] for start in range(4)]
    assert server.busiest <= 3


@pytest.mark.parametrize(("bits", "bytes_a_sample"), [(16, 2), (24, 4)])
def test_a_clip_travels_as_it_is_heard(bits, bytes_a_sample):
    """Samples of 16 bits, a file's at 16 kHz, arrive to the bit; others as float32."""
    whole = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (48_000,), generator=torch.manual_seed(0))
    clip = Clip.from_samples(whole.double() / 2 ** (bits - 1), sampling_rate=16_000, seconds=3.0)
    head, data = url_of(clip).split(",")
    assert head == "data:audio/wav;seconds=3.0;base64"
    file = base64.b64decode(data)
    assert len(file) < 48_000 * bytes_a_sample + 200
    arrived, rate = soundfile.read(io.BytesIO(file))
    assert Clip.from_samples(arrived, sampling_rate=rate, seconds=3.0).digest == clip.digest


def test_what_no_16_bits_hold_arrives_as_float32():
    loud = Clip.from_samples(torch.full((16_000,), 1.5).double(), sampling_rate=16_000, seconds=1.0)
    odd = Clip.from_samples(
        torch.rand(16_000, generator=torch.manual_seed(0)).double(), sampling_rate=16_000, seconds=1.0
    )
    for clip in (loud, odd):
        arrived, _ = soundfile.read(io.BytesIO(base64.b64decode(url_of(clip).split(",")[1])))
        assert (torch.from_numpy(arrived) - clip.waveform).abs().max() <= 2**-25


def test_when_all_die_it_says_so():
    engine = HttpEngine([Echo(dies_after=2).url, Echo(dies_after=2).url], retries=QUICK)
    with pytest.raises(EngineError, match=r"every server has stopped answering|not answered in 6 tries"):
        engine.generate(PROMPTS, Decoding())


def test_a_refused_prompt_is_not_tried_again():
    server = Echo([400])
    with pytest.raises(PromptError, match="because"):
        HttpEngine([server.url], concurrency=1).generate(PROMPTS[:1], Decoding())
    assert server.answered == []
    with pytest.raises(EngineError, match="status 403: because"):
        HttpEngine([Echo([403]).url]).generate(PROMPTS[:1], Decoding())


def test_servers_must_be_there_and_have_the_model():
    both = Echo(models=("a", "b"))
    with pytest.raises(EngineError, match="cannot be reached"):
        HttpEngine(["http://127.0.0.1:9"])
    with pytest.raises(EngineError, match="no model in common"):
        HttpEngine([both.url, Echo().url])
    with pytest.raises(EngineError, match="in common are: a"):
        HttpEngine([both.url, Echo(models=("a",)).url], model="b")
    with pytest.raises(EngineError, match="--server"):
        HttpEngine([])
    engine = HttpEngine([both.url])
    assert engine.load("sweep/b") == "r"
    with pytest.raises(EngineError, match=r"do not offer c; they offer a, b\. Ask for one of these"):
        engine.load("sweep/c")
    dial = HttpEngine([Echo(models=("owl", "half", "owl@0", "owl@0.1", "owl@0.2")).url])
    with pytest.raises(EngineError, match=r"they offer owl, half, owl@0 to owl@0\.2\."):
        dial.load("wren")


@pytest.mark.parametrize("behind", ["", "/", "/v1"])
def test_an_address_needs_no_scheme(behind):
    address = Echo().url.removeprefix("http://") + behind
    assert HttpEngine([address]).load("m") == "r"
    with pytest.raises(EngineError, match=r"http://127\.0\.0\.1:9/v1/models cannot be reached"):
        HttpEngine(["127.0.0.1:9"])


@pytest.mark.parametrize("option", [{"concurrency": "x"}, {"concurrency": 0}, {"timeout": "x"}, {"timeout": -1}])
def test_an_option_of_another_kind_is_refused(option):
    with pytest.raises(EngineError, match="write a"):
        HttpEngine([Echo().url], **option)


def test_what_the_api_cannot_do_is_refused():
    engine = HttpEngine([Echo().url])
    with pytest.raises(EngineError, match="beams"):
        engine.generate(PROMPTS, Decoding(num_beams=2))
    with pytest.raises(EngineError, match="end tokens"):
        engine.generate(PROMPTS, Decoding(eos_token_ids=(1,)))


#: What servers say that score choices.
SCORES = {"max_choices": 3, "max_choice_characters": 40}


def test_choices_are_scored_over_all_servers_whatever_becomes_of_one():
    servers = [Echo(["drop", 503], **SCORES), Echo([500], dies_after=9, **SCORES)]
    engine = HttpEngine([server.url for server in servers], concurrency=3, retries=QUICK)
    engine.load("m")
    scores = engine.loglikelihood(PROMPTS, ["wren", "marsh wren", "owl"])
    assert scores == [{"wren": -4.0, "marsh wren": -10.0, "owl": -3.0}] * len(PROMPTS)
    assert sorted(servers[0].answered + servers[1].answered) == sorted(TEXTS)
    (scores,) = engine.loglikelihood(PROMPTS[:1], ["wren", "marsh wren"], negligible=1e-6)
    assert scores == {"wren": -4.0, "marsh wren": -math.inf}


@pytest.mark.parametrize(
    ("told", "choices", "said"),
    [
        ({}, ["wren", "owl"], "does not score choices: its /info has no max_choices"),
        (SCORES, ["a", "b", "c", "d"], "the list has 4 choices with 4 characters, and .* takes 3 with 40 at most"),
        (SCORES, ["wren", "w" * 37], "the list has 2 choices with 41 characters"),
    ],
)
def test_a_list_that_one_of_the_servers_does_not_take_is_refused_before_anything_is_written(
    tmp_path, told, choices, said
):
    other, server = Echo(max_choices=9, max_choice_characters=99), Echo(**told)
    settings = EngineSettings(servers=(other.url, server.url))
    question = replace(QUESTION, choices=tuple(choices))
    write_recording(tmp_path / "recordings/a.wav", 1)
    with pytest.raises(EngineError, match=f"{server.url} does not|{server.url} takes") as refused:
        ask(
            Path("m"),
            tmp_path / "recordings",
            tmp_path / "a.csv",
            engine="http",
            question=question,
            settings=settings,
        )
    assert re.search(said, str(refused.value))
    assert not other.answered and [file.name for file in tmp_path.iterdir()] == ["recordings"]

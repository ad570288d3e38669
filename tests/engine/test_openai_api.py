"""Other people's models over OpenAI's API: what is sent is what its own types say, what comes back is kept."""

import base64
import http.server
import io
import json
import threading
import time
from email.utils import formatdate
from itertools import pairwise

import openai
import pytest
import soundfile
import torch
from openai.types.chat import ChatCompletion, CompletionCreateParams
from pydantic import TypeAdapter

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.choice import choose_engine, engine_of_api
from mergekit_bio.engine.http import Retries
from mergekit_bio.engine.interface import Decoding, EngineSettings, Prompt
from mergekit_bio.engine.openai_api import OpenAiEngine, _read
from mergekit_bio.errors import EngineError, PromptError

QUICK = Retries(attempts=4, first_wait=0.01, longest_wait=0.4, given_up_after=2)


class Model:
    """A server that answers every request alike, after what its script says: a status, and its headers."""

    def __init__(
        self, *script: tuple[int, dict], answer: object = "A wren.", usage: bool = True, code: str | None = None
    ):
        self.bodies, self.paths, self.keys, self.times = [], [], [], []
        steps, model = list(script), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                model.bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
                model.paths.append(self.path)
                model.keys.append(self.headers["authorization"])
                model.times.append(time.monotonic())
                status, headers = steps.pop(0) if steps else (200, {})
                document = {"error": {"message": "because", "code": code}}
                if status == 200:
                    message = {"role": "assistant", "content": answer, "refusal": None if answer else "I cannot."}
                    tokens = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
                    document = ChatCompletion.model_validate(
                        {
                            "id": "1", "created": 0, "model": "m", "object": "chat.completion",
                            "choices": [{"index": 0, "finish_reason": "length", "logprobs": None, "message": message}],
                            "usage": tokens if usage else None,
                        }
                    ).model_dump()  # fmt: skip
                data = json.dumps(document).encode()
                self.send_response(status)
                for name, value in (headers | {"content-length": str(len(data))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"


def clip(seconds: float = 1.0, level: float = 0.5) -> Clip:
    samples = torch.rand(round(16_000 * seconds), generator=torch.manual_seed(round(seconds * 10))).double() * 2 - 1
    return Clip.from_samples(samples * level, sampling_rate=16_000, seconds=seconds)


def engine(model: Model, **settings) -> OpenAiEngine:
    return OpenAiEngine([model.url], model="some/model", **({"retries": QUICK} | settings))


def heard(part: dict) -> torch.Tensor:
    """The samples of an audio part, by another library."""
    assert part["type"] == "input_audio" and part["input_audio"]["format"] == "wav"
    file = io.BytesIO(base64.b64decode(part["input_audio"]["data"]))
    assert soundfile.info(file).subtype == "PCM_16"
    file.seek(0)
    samples, rate = soundfile.read(file)
    assert rate == 16_000
    return torch.from_numpy(samples)


def test_a_request_is_what_openais_own_types_say_and_no_more():
    model = Model()
    prompts = [Prompt("Which is it?", (clip(),)), Prompt("Only text.")]
    engine(model, concurrency=1).generate(prompts, Decoding(max_new_tokens=9))
    for body in model.bodies:
        TypeAdapter(CompletionCreateParams).validate_python(body)
        assert body.keys() == {"model", "messages", "max_tokens", "temperature"}
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("some/model", 9, 0.0)
    assert model.paths == ["/v1/chat/completions"] * 2
    ((with_audio,), (text_only,)) = (body["messages"] for body in model.bodies)
    assert [part["type"] for part in with_audio["content"]] == ["input_audio", "text"]
    assert with_audio["content"][1]["text"] == "Which is it?" and text_only["content"] == "Only text."


def test_sampling_says_its_seed_and_share():
    model = Model()
    engine(model, concurrency=1).generate([Prompt("a"), Prompt("b")], Decoding(temperature=0.7, top_p=0.9, seed=5))
    said = sorted((body["seed"], body["top_p"], body["temperature"]) for body in model.bodies)
    assert said == [(5, 0.9, 0.7), (6, 0.9, 0.7)]


def test_audios_stand_where_the_prompt_has_them_without_the_words_of_natureLM_around():
    model, clips = Model(), (clip(1.0), clip(2.0))
    text = "Audio: <Audio><AudioHere></Audio>\nLabel: wren\n\nAudio: <AudioHere>\nLabel:"
    engine(model).generate([Prompt(text, clips)], Decoding())
    parts = model.bodies[0]["messages"][0]["content"]
    assert [part.get("text") for part in parts] == ["Audio:", None, "Label: wren\n\nAudio:", None, "Label:"]
    for part, sent in zip((parts[1], parts[3]), clips, strict=True):
        assert (heard(part) - sent.waveform).abs().max() <= 2**-16


def test_what_is_louder_than_16_bits_is_clipped_not_wrapped():
    loud = Clip.from_samples(torch.tensor([1.5, -1.5] * 8000).double(), sampling_rate=16_000, seconds=1.0)
    model = Model()
    engine(model).generate([Prompt("Loud?", (loud,))], Decoding())
    samples = heard(model.bodies[0]["messages"][0]["content"][0])
    assert samples[0] > 0.99 and samples[1] < -0.99


@pytest.mark.parametrize(
    ("behind", "path"),
    [("", "/v1/chat/completions"), ("/v1/", "/v1/chat/completions"), ("/beta/openai", "/beta/openai/chat/completions")],
)
def test_an_address_is_what_openais_own_client_takes(behind, path):
    ours, theirs = Model(), Model()
    for address in (ours.url, ours.url.removeprefix("http://")):
        OpenAiEngine([address + behind], model="m").generate([Prompt("a")], Decoding())
    base = theirs.url + (behind or "/v1")
    openai.OpenAI(base_url=base, api_key="k").chat.completions.create(
        model="m", messages=[{"role": "user", "content": "a"}]
    )
    assert theirs.paths == [path] and ours.paths == [path, path]


def test_the_key_is_the_one_given_else_openais(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "of openai")
    model = Model()
    for settings in ({}, {"api_key": "given"}):
        engine(model, **settings).generate([Prompt("a")], Decoding())
    assert model.keys == ["Bearer of openai", "Bearer given"]


@pytest.mark.parametrize(
    ("answer", "usage", "kept"), [("A wren.", True, ("A wren.", 7)), (None, False, ("I cannot.", 0))]
)
def test_an_answer_is_kept_with_what_the_server_says_of_it(answer, usage, kept):
    (generation,) = engine(Model(answer=answer, usage=usage)).generate([Prompt("a")], Decoding())
    assert (generation.text, generation.prompt_tokens, generation.finish_reason) == (*kept, "length")


def test_a_server_that_asks_for_patience_is_waited_for_as_long_as_it_asks_and_not_given_up():
    date = formatdate(time.time() + 2, usegmt=True)  # in whole seconds: it may be a second less
    model = Model((429, {"retry-after": date}), (429, {"retry-after-ms": "300"}), (429, {"retry-after": "0.3"}))
    (generation,) = engine(model).generate([Prompt("a")], Decoding())
    assert generation.text == "A wren." and len(model.times) == 4
    waits = [after - before for before, after in pairwise(model.times)]
    assert all(wait >= asked for wait, asked in zip(waits, (0.5, 0.3, 0.3), strict=True))


def test_no_credit_is_not_waited_for_and_said():
    model = Model((429, {}), code="insufficient_quota")
    with pytest.raises(EngineError, match="status 429: because"):
        engine(model).generate([Prompt("a")], Decoding())
    assert len(model.bodies) == 1


def test_the_last_reason_of_a_server_that_never_answers_is_said():
    with pytest.raises(EngineError, match=r"not answered in 4 tries; the last one: .* status 429: because"):
        engine(Model(*[(429, {})] * 9)).generate([Prompt("a")], Decoding())


def test_an_answer_in_parts_is_one_text():
    document = {
        "choices": [{"message": {"content": [{"type": "text", "text": "A "}, {"type": "text", "text": "wren."}]}}]
    }
    assert _read(document, "server", 0.0).text == "A wren."
    document["choices"][0]["message"]["content"] = 5
    with pytest.raises(ValueError, match="no text"):
        _read(document, "server", 0.0)


def test_what_the_api_does_not_have_is_refused():
    asked = engine(Model())
    with pytest.raises(EngineError, match="beams"):
        asked.generate([Prompt("a")], Decoding(num_beams=2))
    with pytest.raises(EngineError, match="no closed list"):
        asked.choose([Prompt("a")], ["b", "c"])
    with pytest.raises(EngineError, match="no label scores"):
        asked.loglikelihood([Prompt("a")], ["b", "c"])


def test_a_refusal_is_told_in_the_servers_words():
    with pytest.raises(PromptError, match="refuses the prompt: because"):
        engine(Model((400, {}))).generate([Prompt("a")], Decoding())
    with pytest.raises(EngineError, match="status 404: because"):
        engine(Model((404, {}))).generate([Prompt("a")], Decoding())


def test_the_api_names_the_engine():
    assert engine_of_api("http", "openai") == engine_of_api(None, "openai") == "openai"
    assert engine_of_api("http", "mergekit-bio") == "http" and engine_of_api("vllm", None) == "vllm"
    with pytest.raises(EngineError, match="--api openia: no such API; did you mean 'openai'"):
        engine_of_api("http", "openia")
    with pytest.raises(EngineError, match="--api openai: goes with --engine http, not vllm"):
        engine_of_api("vllm", "openai")
    with pytest.raises(EngineError, match="needs --server"):
        choose_engine("openai")
    model = Model()
    started = OpenAiEngine.start("org/name", EngineSettings(servers=(model.url,), options={"concurrency": 2}))
    assert started.load("org/other") == "org/other" and started.baseline

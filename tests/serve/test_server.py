"""The server as its clients see it: OpenAI's own package, and the predictions_v1 contract point by point."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.requests_to_server import KEY, MAX_AUDIOS, encoded

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.interface import Decoding, Prompt

A, B = "alpha-0.50", "alpha-1.00"
QUESTION = "What is the common name for the focal species in the audio?"
GREEDY = Decoding(max_new_tokens=8)


def clip(samples) -> Clip:
    return Clip.from_samples(samples / 2**15, sampling_rate=16000)


def part(samples, kind="wav"):
    return {"type": "input_audio", "input_audio": {"data": encoded(samples, kind), "format": kind}}


def chat(client, content, *, model=A, **options):
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=8,
        extra_body={"return_token_ids": True},
        **options,
    )


def answered(completion) -> tuple[int, ...]:
    return tuple(completion.choices[0].token_ids)


def expected(engine, prompt) -> tuple[int, ...]:
    (generation,) = engine.generate([prompt], GREEDY)
    return generation.token_ids


def test_text_alone_is_answered_as_transformers_does(client, engines):
    assert answered(chat(client, QUESTION)) == expected(engines[A], Prompt(QUESTION))


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3"])
def test_audio_in_chat_is_answered_as_transformers_does(client, engines, sounds, kind):
    import base64
    import io

    import soundfile

    data = encoded(sounds[2], kind)
    heard, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    prompt = Prompt(QUESTION, [Clip.from_samples(heard, sampling_rate=rate)])
    content = [part(sounds[2], kind), {"type": "text", "text": QUESTION}]
    assert answered(chat(client, content)) == expected(engines[A], prompt)


def test_six_audios_go_into_the_slots_of_the_text(client, engines, sounds):
    text = "".join(f"Audio: <Audio><AudioHere></Audio>\nLabel: {n}\n" for n in range(6)) + QUESTION
    content = [{"type": "text", "text": text}, *map(part, sounds)]
    wanted = expected(engines[A], Prompt(text, list(map(clip, sounds))))
    assert answered(chat(client, content)) == wanted
    assert answered(chat(client, [*map(part, sounds), {"type": "text", "text": text}])) == wanted
    assert wanted != expected(engines[A], Prompt(text, list(map(clip, sounds[::-1]))))


def test_a_data_url_is_an_audio_too(client, engines, sounds):
    url = {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{encoded(sounds[0])}"}}
    content = [url, {"type": "text", "text": QUESTION}]
    assert answered(chat(client, content)) == expected(engines[A], Prompt(QUESTION, [clip(sounds[0])]))


def test_streaming_gives_the_same_tokens(client, sounds):
    content = [part(sounds[1]), {"type": "text", "text": QUESTION}]
    whole = answered(chat(client, content))
    pieces = [
        getattr(chunk.choices[0], "token_ids", None) or []
        for chunk in chat(client, content, stream=True)
        if chunk.choices
    ]
    assert tuple(token for piece in pieces for token in piece) == whole
    assert len(pieces) > 2


def test_a_choice_stays_in_its_list(client, sounds):
    completion = client.chat.completions.create(
        model=A,
        messages=[{"role": "user", "content": [part(sounds[0]), {"type": "text", "text": QUESTION}]}],
        temperature=0,
        max_tokens=30,
        extra_body={"structured_outputs": {"choice": ["marsh wren", "tree frog"]}},
    )
    assert completion.choices[0].message.content in ("marsh wren", "tree frog")


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "input_audio", "input_audio": {"data": "bm8gYXVkaW8=", "format": "wav"}}],
        [{"type": "input_audio", "input_audio": {"data": "%%%", "format": "wav"}}],
        [{"type": "text", "text": "two <AudioHere> slots <AudioHere>"}, part(np.zeros(16000, np.int16))],
        [part(np.zeros(100, np.int16))],
        [part(np.zeros(16000 * 61, np.int16))],
        [{"type": "audio_url", "audio_url": {"url": "http://localhost:1/private.wav"}}],
        [{"type": "audio_url", "audio_url": {"url": "http://169.254.169.254/latest/meta-data"}}],
        [{"type": "audio_url", "audio_url": {"url": "http://example.org/clip.wav"}}],
        [{"type": "audio_url", "audio_url": {"url": "file:///etc/passwd"}}],
        [{"type": "image_url", "image_url": {"url": "http://localhost:1/image.png"}}],
        [part(np.zeros(16000, np.int16))] * (MAX_AUDIOS + 1),
    ],
    ids=[
        "garbage",
        "no base64",
        "slots",
        "short",
        "long",
        "private host",
        "metadata",
        "host",
        "file",
        "image",
        "seven",
    ],
)
def test_bad_audio_is_the_clients_error(client, content):
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, [*content, {"type": "text", "text": QUESTION}])
    assert "Traceback" not in str(refused.value)


def test_parallel_requests_for_two_models_get_their_own_models_answers(client, engines, sounds):
    questions = [f"{QUESTION} {n}" for n in range(4)]
    wanted = {
        (model, n): expected(engines[model], Prompt(question, [clip(sounds[n])]))
        for model in (A, B)
        for n, question in enumerate(questions)
    }
    assert any(wanted[A, n] != wanted[B, n] for n in range(4))

    def ask(job):
        model, n = job
        return answered(chat(client, [part(sounds[n]), {"type": "text", "text": questions[n]}], model=model))

    jobs = [((A, B)[k // 8 % 2], k % 4) for k in range(64)]
    with ThreadPoolExecutor(64) as pool:
        for job, tokens in zip(jobs, pool.map(ask, jobs), strict=True):
            assert tokens == wanted[job], job


def test_every_kind_of_answer_names_the_model_that_was_asked(client, http):
    for model in (B, A, B):
        assert chat(client, QUESTION, model=model).model == model
        assert {chunk.model for chunk in chat(client, QUESTION, model=model, stream=True)} == {model}
        assert client.completions.create(model=model, prompt="frog", max_tokens=2).model == model
        assert client.responses.create(model=model, input="frog", max_output_tokens=2).model == model
        events = client.responses.create(model=model, input="frog", max_output_tokens=2, stream=True)
        named = {event.response.model for event in events if hasattr(event, "response")}
        assert named == {model}
        assert [known.id for known in client.models.list()] == [A, B]
    assert http.post("/v1/completions", json={"prompt": "frog", "max_tokens": 2}).json()["model"] == A


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (["<AudioHere> What?"], "audio slots (<AudioHere>) in the prompt: 1, audios given: 0"),
        (["<AudioHere>", "What?"], "in the prompt: 1, audios given: 0"),
        ([["<AudioHere>", None, None]], "in the prompt: 1, audios given: 2"),
        ([[None, "What?"], "<AudioHere>"], "in the prompt: 2, audios given: 1"),
        (
            ["<|reserved_special_token_0|> What?"],
            "writes the audio placeholder token itself; write <AudioHere> instead",
        ),
        ([[None, "<|reserved_special_token_0|>"]], "writes the audio placeholder token itself"),
    ],
)
def test_slots_and_audios_that_differ_are_refused_in_chat(client, sounds, messages, said):
    """Each message a text or a list of parts, of which None is an audio."""

    def content(parts):
        if isinstance(parts, str):
            return parts
        return [part(sounds[0]) if text is None else {"type": "text", "text": text} for text in parts]

    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model=A, messages=[{"role": "user", "content": content(message)} for message in messages], max_tokens=2
        )
    assert said in str(refused.value)


def test_numbers_that_no_machine_holds_are_the_clients_error(client, http):
    for number in (2**64, -(2**70)):
        with pytest.raises(openai.BadRequestError, match="integer of more than 64 bits"):
            client.chat.completions.create(
                model=A, messages=[{"role": "user", "content": QUESTION}], extra_body={"top_k": number}
            )
    sampled = [item(str(k), do_sample=True, top_k=2**k) for k in (30, 31, 70)]
    good, *bad = predict(http, *sampled).json()["responses"]
    assert good["error"] is None
    assert all("generation_config.top_k" in entry["error"] for entry in bad)


def test_the_models_are_listed_and_another_is_not_found(client):
    assert [model.id for model in client.models.list()] == [A, B]
    with pytest.raises(openai.NotFoundError):
        chat(client, "hello", model="alpha-0.70")


def predict(http, *requests, path="/predict", **more):
    return http.post(path, json={"schema_version": "predictions_v1", "requests": list(requests), **more})


def item(sample_id="a", text=QUESTION, audios=(), **config):
    return {
        "sample_id": sample_id,
        "messages": [{"role": "user", "content": text}],
        "audio_inputs": list(audios),
        "generation_config": {"max_new_tokens": 8, "unknown": 1, **config},
    }


def wav(samples):
    return {"payload_type": "base64_wav", "data": encoded(samples), "sample_rate": 16000}


def test_predict_answers_as_transformers_does_beams_included(http, engines, sounds):
    icl = "".join(f"Audio: <Audio><AudioHere></Audio>\nLabel: {n}\n" for n in range(3)) + QUESTION
    one, three = list(map(clip, sounds[:1])), list(map(clip, sounds[:3]))
    response = predict(
        http,
        item("one", audios=map(wav, sounds[:1])),
        item("three", icl, audios=map(wav, sounds[:3])),
        item("beams", icl, audios=map(wav, sounds[:3]), num_beams=2),
        item("text"),
    )
    assert response.status_code == 200
    body = response.json()
    assert body.keys() == {"schema_version", "responses"} and body["schema_version"] == "predictions_v1"
    wanted = [
        engines[A].generate([prompt], decoding)[0]
        for prompt, decoding in [
            (Prompt(QUESTION, one), GREEDY),
            (Prompt(icl, three), GREEDY),
            (Prompt(icl, three), Decoding(max_new_tokens=8, num_beams=2)),
            (Prompt(QUESTION), GREEDY),
        ]
    ]
    assert [entry["sample_id"] for entry in body["responses"]] == ["one", "three", "beams", "text"]
    for entry, generation in zip(body["responses"], wanted, strict=True):
        assert entry["error"] is None
        assert entry["predictions"] == [generation.text]
        assert entry["finish_reason"] == generation.finish_reason
        usage = {"prompt_tokens": generation.prompt_tokens, "completion_tokens": len(generation.token_ids)}
        assert entry["usage"] == usage
        assert entry["latency_sec"] > 0


def test_predict_reaches_every_model_by_its_path(http, engines, sounds):
    for model in (A, B):
        prompt = Prompt(QUESTION, [clip(sounds[3])])
        (entry,) = predict(http, item(audios=[wav(sounds[3])]), path=f"/{model}/predict").json()["responses"]
        assert entry["predictions"] == [engines[model].generate([prompt], GREEDY)[0].text]
        assert http.get(f"/{model}/info").json()["model"] == model
        assert http.get(f"/{model}/health").status_code == 200


def test_predict_reads_allowed_files_only(http, server, sounds):
    import soundfile

    soundfile.write(server.folder / "clip.wav", sounds[0], 16000)
    (server.folder.parent / "outside.wav").write_bytes((server.folder / "clip.wav").read_bytes())
    (server.folder / "link.wav").symlink_to(server.folder.parent / "outside.wav")
    names = ["clip.wav", str(server.folder / "clip.wav"), "../outside.wav", "link.wav", "/etc/passwd", "none.wav"]
    items = [item(str(n), audios=[{"payload_type": "file_path", "data": name}]) for n, name in enumerate(names)]
    responses = predict(http, *items).json()["responses"]
    assert [entry["error"] is None for entry in responses] == [True, True, False, False, False, False]


def test_predict_gives_a_bad_item_its_own_error(http, sounds):
    good = wav(sounds[0])
    items = [
        item("good", audios=[good]),
        item("garbage", audios=[{"payload_type": "base64_wav", "data": "AAAA"}]),
        item("url", audios=[{"payload_type": "file_url", "data": "http://localhost:1/x.wav"}]),
        item("metadata", audios=[{"payload_type": "file_url", "data": "http://169.254.169.254/"}]),
        item("payload", audios=[{"payload_type": "pickle", "data": ""}]),
        item("slots", "<AudioHere> <AudioHere>", audios=[good]),
        item("many", audios=[good] * (MAX_AUDIOS + 1)),
        {"sample_id": "nothing"},
    ]
    response = predict(http, *items)
    assert response.status_code == 200
    by_id = {entry["sample_id"]: entry for entry in response.json()["responses"]}
    assert list(by_id) == [entry["sample_id"] for entry in items]
    assert by_id["good"]["predictions"] and by_id["good"]["error"] is None
    for name, entry in by_id.items():
        if name != "good":
            assert isinstance(entry["error"], str) and entry["error"], name
            assert not entry["predictions"]


def test_predict_refuses_what_is_no_batch(http):
    assert predict(http, item("a"), item("a")).status_code == 400
    assert predict(http, *(item(str(n)) for n in range(9))).status_code == 413
    assert http.post("/predict", json={"schema_version": "predictions_v2", "requests": []}).status_code in (400, 422)
    assert http.post("/predict", content=b"{").status_code in (400, 422)
    for body in ([], {}, {"schema_version": "predictions_v1"}, {"schema_version": "predictions_v1", "requests": [1]}):
        assert http.post("/predict", json=body).status_code in (400, 422)


def test_beans_nexts_own_check_of_a_server_passes(http):
    """Its clips are a millisecond long, its settings have beans-next's names, its bad item has no messages."""

    def probe(sample_id, messages):
        return {
            "sample_id": sample_id,
            "messages": messages,
            "audio_inputs": [wav(np.zeros(16, np.int16))],
            "generation_config": {"max_tokens": 3, "temperature": 0.0, "max_length_seconds": None},
        }

    words = [{"role": "system", "content": "Listen."}, {"role": "user", "content": "<Audio><AudioHere></Audio>\nWhat?"}]
    plain = [{"role": "user", "content": "x"}]
    one, two, bad = predict(http, probe("one", words), probe("two", plain), probe("bad", [])).json()["responses"]
    for entry in (one, two):
        assert entry["error"] is None and len(entry["predictions"]) == 1
        assert entry["finish_reason"] == "stop" or entry["usage"]["completion_tokens"] == 3
    assert bad["error"] and bad["predictions"] == []


def test_who_leaves_is_not_answered_to_the_end(http):
    with pytest.raises(httpx.ReadTimeout):
        beams = item("a", max_new_tokens=900, num_beams=16, early_stopping="never", length_penalty=2)
        http.post("/predict", json={"schema_version": "predictions_v1", "requests": [beams]}, timeout=2)
    deadline = time.monotonic() + 10
    running = "?"
    while running != "0.0" and time.monotonic() < deadline:
        time.sleep(0.2)
        lines = http.get("/metrics").text.splitlines()
        (running,) = [line.split()[-1] for line in lines if line.startswith("vllm:num_requests_running{")]
    assert running == "0.0"


def test_a_checkpoint_that_has_changed_on_disk_is_not_served(http, server, sounds):
    manifest = server.sweep[B] / "merge.json"
    sound = manifest.read_text()
    document = json.loads(sound)
    tensor = next(name for name in document["tensors"] if "q_proj" in name)
    document["tensors"][tensor]["sha256"] = "0" * 64
    before = predict(http, item(audios=[wav(sounds[0])])).json()["responses"][0]["predictions"]
    try:
        manifest.unlink()  # the base's files may share it
        manifest.write_text(json.dumps(document))
        refused = predict(http, item(), path=f"/{B}/predict")
    finally:
        manifest.write_text(sound)
    assert refused.status_code == 503 and "merge.json records" in refused.json()["error"]["message"]
    assert predict(http, item(audios=[wav(sounds[0])])).json()["responses"][0]["predictions"] == before
    assert predict(http, item(), path=f"/{B}/predict").json()["responses"][0]["predictions"]


def test_the_http_engine_gets_the_same_answers(server, engines, sounds):
    from mergekit_bio.engine.http import HttpEngine

    client = HttpEngine([server.url], api_key=KEY, model=A)
    labels = ["marsh wren", "tree frog", "gray wolf"]
    text = "Audio: <Audio><AudioHere></Audio>\nLabel: marsh wren\n<Audio><AudioHere></Audio> Which?"
    prompts = [Prompt(text, [clip(sounds[n]), clip(sounds[n + 1])]) for n in range(4)] + [Prompt("Hello?")]
    for model in (B, A):
        client.load(server.sweep[model])
        assert [*map(client.render, prompts)] == [*map(engines[model].render, prompts)]
        ours, wanted = client.generate(prompts, GREEDY), engines[model].generate(prompts, GREEDY)
        for one, other in zip(ours, wanted, strict=True):
            assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
            # Half a character at the end is left out of the server's text.
            assert (one.text, one.prompt_tokens) == (other.text.rstrip("\ufffd"), other.prompt_tokens)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert {answer.text for answer in client.choose(prompts, labels)} <= set(labels)
        beams = Decoding(max_new_tokens=8, num_beams=2, length_penalty=0.5)
        for one, other in zip(client.generate(prompts, beams), engines[model].generate(prompts, beams), strict=True):
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            assert one.prompt_tokens == other.prompt_tokens


def test_info_tells_what_the_chat_template_makes_of_one_turn(http):
    def tokens(**body) -> list[int]:
        return http.post("/tokenize", json=body).raise_for_status().json()["tokens"]

    rendered = http.get("/info").json()["prompt_template"].replace("{}", "Who calls?")
    _bos, *asked = tokens(messages=[{"role": "user", "content": "Who calls?"}])
    assert asked == tokens(prompt=rendered, add_special_tokens=False)


def test_info_and_health_are_what_the_contract_asks_for(http):
    assert http.get("/health").status_code == 200
    info = http.get("/info").json()
    assert all(isinstance(info[key], str) for key in ("name", "model", "model_revision"))
    assert info["audio_payload_types"] == ["base64_wav", "file_path", "file_url"]
    assert (info["max_batch_size"], info["supports_batching"]) == (8, True)
    assert info["schema_versions"] == ["predictions_v1"]


def test_the_key_guards_everything_but_health(server):
    paths = [("POST", "/predict"), ("GET", "/info"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions")]
    paths += [("POST", "/tokenize"), ("POST", "/invocations"), ("POST", f"/{B}/predict")]
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}):
        for method, path in paths:
            assert httpx.request(method, server.url + path, headers=headers).status_code == 401, (path, headers)
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_oversized_body_is_refused_declared_or_not(http):
    large = b" " * (9 << 20)
    assert http.post("/predict", content=large).status_code == 413

    def drip():
        for _ in range(9):
            yield b" " * (1 << 20)

    assert http.post("/v1/chat/completions", content=drip()).status_code == 413


text = st.text(st.characters(exclude_categories=()), max_size=12)  # with halves of surrogate pairs, as JSON allows
scalars = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | text
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
#: What vLLM takes beside messages, each with a value that is fine.
CHAT_OPTIONS = {
    "n": 2,
    "stop": ["a"],
    "seed": 1,
    "top_p": 0.5,
    "top_k": 3,
    "min_p": 0.1,
    "logprobs": True,
    "top_logprobs": 2,
    "prompt_logprobs": 1,
    "logit_bias": {"5": 1.0},
    "min_tokens": 1,
    "stop_token_ids": [5],
    "allowed_token_ids": [5, 6],
    "bad_words": ["frog"],
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "structured_outputs": {"choice": ["frog", "wren"]},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
    "chat_template_kwargs": {"a": 1},
    "mm_processor_kwargs": {"a": 1},
    "add_generation_prompt": True,
    "truncate_prompt_tokens": 20,
    "cache_salt": "a",
    "priority": 0,
    "user": "me",
}


def mangled(document, draw):
    """A valid document with some of its values replaced."""
    if draw(st.integers(0, 5)) == 0:
        return draw(json_values)
    if isinstance(document, dict):
        return {key: mangled(value, draw) for key, value in document.items()}
    if isinstance(document, list):
        return [mangled(value, draw) for value in document]
    return document


@st.composite
def predict_bodies(draw):
    items = [item(draw(text), draw(text), num_beams=2, temperature=0.0, audios=[wav(np.ones(9000, np.int16))])]
    return mangled({"schema_version": "predictions_v1", "requests": items}, draw)


@st.composite
def chat_bodies(draw):
    content = [{"type": "text", "text": draw(text)}, part(np.ones(9000, np.int16))]
    options = {name: CHAT_OPTIONS[name] for name in draw(st.sets(st.sampled_from(sorted(CHAT_OPTIONS)), max_size=3))}
    body = {"model": A, "messages": [{"role": "user", "content": content}], "max_tokens": 2, "temperature": 0.5}
    return mangled(body | options, draw)


def send(bodies, post, *, count):
    """Call ``post`` with as many made-up bodies."""
    settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))(given(bodies)(post))()


@pytest.mark.repeated(40, 300)
def test_no_body_makes_predict_fail(http, count):
    def post(body):
        assert http.post("/predict", content=json.dumps(body)).status_code < 500

    send(predict_bodies(), post, count=count)


@pytest.mark.repeated(40, 300)
def test_no_body_makes_chat_fail(http, count):
    def post(body):
        response = http.post("/v1/chat/completions", content=json.dumps(body))
        assert response.status_code < 500, response.text

    send(chat_bodies(), post, count=count)


@pytest.mark.repeated(40, 300)
def test_no_bytes_make_the_server_fail(http, count):
    def post(request):
        path, body = request
        assert 400 <= http.post(path, content=body).status_code < 500

    send(st.tuples(st.sampled_from(["/predict", "/v1/chat/completions"]), st.binary(max_size=40)), post, count=count)


def test_sigterm_in_the_middle_ends_cleanly(server, http):
    """The last test: it stops the server."""
    outcome = []

    def ask():
        try:
            outcome.append(predict(http, item(max_new_tokens=900, text="frog")).status_code)
        except httpx.HTTPError as error:
            outcome.append(error)

    request = threading.Thread(target=ask)
    request.start()
    assert server.process.poll() is None
    assert server.stop() == 0
    request.join(30)
    assert len(outcome) == 1
    assert "Traceback" not in server.log.read_text()

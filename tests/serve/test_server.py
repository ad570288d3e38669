"""The server as its clients see it: OpenAI's own package, and the predictions_v1 contract point by point."""

import base64
import contextlib
import io
import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import httpx
import numpy as np
import openai
import psutil
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serve.requests_to_server import KEY, KEYS, MAX_AUDIOS, MAX_NEW_TOKENS, encoded

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.http import HttpEngine
from mergekit_bio.engine.interface import Decoding, Prompt
from mergekit_bio.errors import EngineError

#: Merges that the server was told of, and the strengths that their names stand for.
A, B = "alpha-0.50", "alpha-1.00"
NAME = "naturelm"
STRENGTH = {A: f"{NAME}@0.5", B: f"{NAME}@1", NAME: f"{NAME}@0.5"}
LISTED = [NAME, A, B, *(f"{NAME}@{n / 10:g}" for n in range(11))]
QUESTION = "What is the common name for the focal species in the audio?"
GREEDY = Decoding(max_new_tokens=8)


def clip(samples) -> Clip:
    return Clip.from_samples(samples / 2**15, sampling_rate=16000)


def part(samples, kind="wav"):
    return {"type": "input_audio", "input_audio": {"data": encoded(samples, kind), "format": kind}}


def chat(client, content, *, model=A, extra=None, **options):
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=8,
        extra_body={"return_token_ids": True, **(extra or {})},
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


def test_32_clients_at_eleven_strengths_get_each_merges_answers(client, http, engines, sounds):
    """In random order, by chat and with two beams by /predict; there are fewer slots than strengths."""
    beams = Decoding(max_new_tokens=8, num_beams=2)
    wanted = {}
    for n, engine in enumerate(engines.values()):
        questions = [(f"{QUESTION} {text}", sounds[(n + text) % 6]) for text in range(2)]
        prompts = [Prompt(question, [clip(samples)]) for question, samples in questions]
        for decoding in (GREEDY, beams):
            for (question, samples), answer in zip(questions, engine.generate(prompts, decoding), strict=True):
                wanted[n, question, decoding.num_beams] = samples, answer

    def ask(job):
        (n, question, num_beams), (samples, _) = job
        model = f"{NAME}@{n / 10:.3f}"
        if num_beams == 1:
            return answered(chat(client, [part(samples), {"type": "text", "text": question}], model=model))
        asked = item(question, question, [wav(samples)], num_beams=num_beams)
        return predict(http, asked, path=f"/{model}/predict").json()["responses"][0]["predictions"]

    jobs = 3 * list(wanted.items())
    random.Random(5).shuffle(jobs)
    with ThreadPoolExecutor(32) as pool:
        for ((*_, num_beams), (_, answer)), found in zip(jobs, pool.map(ask, jobs), strict=True):
            assert found == (answer.token_ids if num_beams == 1 else [answer.text])
    assert len({answer.text for _, answer in wanted.values()}) > 11


def test_every_kind_of_answer_names_the_strength_that_was_asked(client, http):
    for model in (B, A, NAME, f"{NAME}@.350"):
        strength = STRENGTH.get(model, f"{NAME}@0.35")
        assert chat(client, QUESTION, model=model).model == strength
        assert {chunk.model for chunk in chat(client, QUESTION, model=model, stream=True)} == {strength}
        assert client.completions.create(model=model, prompt="frog", max_tokens=2).model == strength
        assert client.responses.create(model=model, input="frog", max_output_tokens=2).model == strength
        events = client.responses.create(model=model, input="frog", max_output_tokens=2, stream=True)
        assert {event.response.model for event in events if hasattr(event, "response")} == {strength}
    assert http.post("/v1/completions", json={"prompt": "frog", "max_tokens": 2}).json()["model"] == STRENGTH[NAME]


def test_no_way_to_the_engine_leaves_the_strength_out(client, http, engines):
    """What comes without a name is asked at the default strength."""
    ids = http.post("/tokenize", json={"messages": [{"role": "user", "content": QUESTION}]}).json()["tokens"]
    wanted = {name: expected(engines[name], Prompt(QUESTION)) for name in (A, B)}
    assert wanted[A] != wanted[B]

    def tokens(path, **body):
        document = http.post(path, json=body).raise_for_status().json()
        return tuple(document["choices"][0]["token_ids"])

    greedy = {"max_tokens": 8, "temperature": 0}
    for name, fields in ((A, {}), (A, {"model": NAME}), (A, {"model": A}), (B, {"model": f"{NAME}@1"})):
        asked = {**greedy, **fields}
        assert tokens("/v1/completions", prompt=ids, return_token_ids=True, **asked) == wanted[name]
    message = {"max_tokens": 8, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    texts = [
        http.post("/v1/messages", json=message | {"model": name}).json()["content"] for name in (A, f"{NAME}@0.5", B)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_the_placeholder_for_audio_is_never_generated(client, http):
    (placeholder,) = http.post(
        "/tokenize", json={"prompt": "<|reserved_special_token_0|>", "add_special_tokens": False}
    ).json()["tokens"]
    liked = chat(client, QUESTION, logit_bias={str(placeholder): 100})
    assert placeholder not in answered(liked) and answered(liked) == answered(chat(client, QUESTION))


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


def test_a_server_that_listens_says_once_where_it_is_and_what_to_ask_for(server, http):
    assert http.get("/").status_code == (307 if find_spec("gradio") else 404)
    page = f"; page: {server.url}/page" if find_spec("gradio") else ""
    wanted = f"ready: {server.url}/v1, models {NAME}@0 to {NAME}@2, alpha-0.50, alpha-1.00{page}"
    deadline = time.monotonic() + 30
    while "ready: " not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    said = [line for line in server.log.read_text().splitlines() if line.startswith(("ready", "note: anybody"))]
    assert said == [wanted]


def test_the_models_are_listed_and_another_is_not_found(client):
    assert [model.id for model in client.models.list()] == LISTED
    with pytest.raises(openai.NotFoundError):
        chat(client, "hello", model="alpha-0.70")
    with pytest.raises(openai.NotFoundError, match=r"'2\.5' is no strength from 0 to 2 .* such as naturelm@0\.35"):
        chat(client, "hello", model=f"{NAME}@2.5")


def predict(http, *requests, path="/predict", **more):
    return http.post(path, json={"schema_version": "predictions_v1", "requests": list(requests), **more})


def item(sample_id="a", text=QUESTION, audios=(), **config):
    return {
        "sample_id": sample_id,
        "messages": [{"role": "user", "content": text}],
        "audio_inputs": list(audios),
        "generation_config": {"max_new_tokens": 8, "num_beams": 1, "unknown": 1, **config},
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
    for model in (A, B, f"{NAME}%401.0"):
        prompt = Prompt(QUESTION, [clip(sounds[3])])
        (entry,) = predict(http, item(audios=[wav(sounds[3])]), path=f"/{model}/predict").json()["responses"]
        assert entry["predictions"] == [engines[A if model == A else B].generate([prompt], GREEDY)[0].text]
        assert http.get(f"/{model}/info").json()["model"] == STRENGTH.get(model, STRENGTH[B])
        assert http.get(f"/{model}/health").status_code == 200
    assert http.get(f"/{NAME}@3/info").status_code == 404


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


def poisoned(**fields) -> list[dict]:
    """An audio part with more fields, or with others in the place of its audio."""
    return [{"type": "input_audio", **fields}, {"type": "text", "text": QUESTION}]


def test_a_client_cannot_choose_what_an_audio_is_known_by(client, http, engines, sounds):
    """Neither an id of its own, nor the public digest of a clip, nor an id that its audio was sent with before."""
    one, other = sounds[1], sounds[4]
    wanted = expected(engines[A], Prompt(QUESTION, [clip(one)]))
    assert wanted != expected(engines[A], Prompt(QUESTION, [clip(other)]))
    for key in ("mine", clip(one).digest):
        for samples in (other, one):
            audio = {"data": encoded(samples), "format": "wav"}
            chat(client, poisoned(input_audio=audio, uuid=key))
            url = {"url": f"data:audio/wav;base64,{encoded(samples)}"}
            chat(client, [{"type": "audio_url", "audio_url": url, "uuid": key}, {"type": "text", "text": QUESTION}])
        assert answered(chat(client, poisoned(input_audio={"data": encoded(one), "format": "wav"}, uuid=key))) == wanted
    assert answered(chat(client, [part(one), {"type": "text", "text": QUESTION}])) == wanted
    (entry,) = predict(http, item(audios=[wav(one) | {"uuid": "mine"}])).json()["responses"]
    assert entry["predictions"] == [engines[A].generate([Prompt(QUESTION, [clip(one)])], GREEDY)[0].text]


@pytest.mark.parametrize(
    "content",
    [
        poisoned(input_audio=None, uuid="mine"),
        poisoned(input_audio={"data": "", "format": "wav"}, uuid="mine"),
        poisoned(input_audio={"data": "", "format": "wav"}),
        [{"type": "audio_url", "audio_url": {"url": ""}, "uuid": "mine"}],
        [{"type": "audio_url", "audio_url": None, "uuid": "mine"}],
        [{"audio_url": None, "uuid": "mine"}],
    ],
)
def test_an_audio_without_data_is_refused(client, sounds, content):
    sent = [{"type": "input_audio", "input_audio": {"data": encoded(sounds[0]), "format": "wav"}, "uuid": "mine"}]
    chat(client, [*sent, {"type": "text", "text": QUESTION}])
    with pytest.raises(openai.BadRequestError):
        chat(client, content)


def test_audio_that_a_client_has_computed_itself_is_refused(http, sounds):
    """Its key would be the client's to choose."""
    messages = [{"role": "user", "content": [part(sounds[0]), {"type": "text", "text": QUESTION}]}]
    rendered = http.post("/v1/chat/completions/render", json={"model": A, "messages": messages}).json()
    assert clip(sounds[0]).digest not in json.dumps(rendered)
    body = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 1}, "features": rendered.get("features") or {}}
    refused = http.post("/inference/v1/generate", json=body)
    assert refused.status_code == 400 and "features" in refused.text


@pytest.mark.parametrize(
    "grammar",
    [
        {"regex": "(a{1000}){1000}"},
        {"regex": "((a{100}){100}){100}"},
        {"regex": "("},
        {"choice": [f"species {n}" for n in range(3000)]},
    ],
    ids=["regex", "nested", "broken", "choices"],
)
def test_a_grammar_that_is_too_much_work_is_the_clients_error(client, grammar):
    with pytest.raises(openai.BadRequestError, match=r"[Gg]rammar"):
        chat(client, QUESTION, extra={"structured_outputs": grammar})


def without_length(samples, kind) -> bytes:
    """As a program writes it that sends it on at once: its header says nothing of its length."""
    data = bytearray(base64.b64decode(encoded(samples, kind)))
    if kind == "flac":  # 36 bits of STREAMINFO (RFC 9639, section 8.2)
        data[21] &= 0xF0
        data[22:26] = bytes(4)
    else:
        place = data.index(b"data")
        data[4:8] = data[place + 4 : place + 8] = bytes(4)
    return bytes(data)


def test_audio_is_taken_as_programs_send_it(client, http, engines, sounds):
    """Without a length in its header, in base64 with line breaks, as a data URL where bare base64 belongs."""
    prompt = Prompt(QUESTION, [clip(sounds[2])])
    (wanted,) = engines[A].generate([prompt], GREEDY)
    streams = [base64.encodebytes(without_length(sounds[2], kind)).decode() for kind in ("flac", "wav")]
    for data in [*streams, f"data:audio/wav;base64,{encoded(sounds[2])}"]:
        content = [{"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]
        assert answered(chat(client, [*content, {"type": "text", "text": QUESTION}])) == wanted.token_ids
        (entry,) = predict(http, item(audios=[{"payload_type": "base64_wav", "data": data}])).json()["responses"]
        assert entry["predictions"] == [wanted.text]


def test_predict_searches_with_two_beams_and_drops_system_turns_unless_told_otherwise(http, engines, sounds):
    """As beans-next's own launcher of NatureLM-audio does."""
    prompt = Prompt(QUESTION, [clip(sounds[3])])
    (wanted,) = engines[A].generate([prompt], Decoding(max_new_tokens=8, num_beams=2))
    asked = item(audios=[wav(sounds[3])], num_beams=None)
    asked["messages"].insert(0, {"role": "system", "content": "You are an expert."})
    (entry,) = predict(http, asked).json()["responses"]
    assert entry["predictions"] == [wanted.text] and entry["usage"]["prompt_tokens"] == wanted.prompt_tokens
    info = http.get("/info").json()
    assert (info["num_beams"], info["max_new_tokens"], info["system_turns"]) == (2, MAX_NEW_TOKENS, "drop")


def test_a_prompt_that_can_never_fit_is_refused_before_it_is_read(http):
    (entry,) = predict(http, item(text="frog " * 200_000)).json()["responses"]
    assert entry["error"].endswith("never fit") and entry["predictions"] == []
    for path, body in (("/v1/chat/completions", {"messages": [{"role": "user", "content": "frog " * 200_000}]}),):
        assert http.post(path, json=body).status_code == 400


def test_the_http_engine_gets_the_same_answers(server, engines, sounds):
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


def test_the_http_engine_asks_for_any_strength(server, engines, sounds):
    client = HttpEngine([server.url], api_key=KEY, model=f"{NAME}@0.3")
    prompt = Prompt(QUESTION, [clip(sounds[2])])
    for name, merge in ((f"{NAME}@0.3", "alpha-0.30"), (f"{NAME}@0.8", "alpha-0.80")):
        assert client.load(name).endswith(name.rpartition("@")[2])
        assert client.generate([prompt], GREEDY)[0].token_ids == expected(engines[merge], prompt)
    with pytest.raises(EngineError, match="status 404"):
        client.load(f"{NAME}@7")


def test_info_tells_what_the_chat_template_makes_of_one_turn(http):
    def tokens(**body) -> list[int]:
        return http.post("/tokenize", json=body).raise_for_status().json()["tokens"]

    rendered = http.get("/info").json()["prompt_template"].replace("{}", "Who calls?")
    _bos, *asked = tokens(messages=[{"role": "user", "content": "Who calls?"}])
    assert asked == tokens(prompt=rendered, add_special_tokens=False)


#: What Llama 3.1's own template makes of a conversation with functions, but for its dates.
CALLING = """\
<|begin_of_text|><|start_header_id|>system<|end_header_id|>

Environment: ipython

Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

Given the following functions, please respond with a JSON for a function call with its proper arguments that best \
answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\
Do not use variables.

{
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "What is known of a species.",
        "parameters": {
            "type": "object",
            "properties": {
                "species": {
                    "type": "string",
                    "maxLength": 5
                }
            },
            "required": [
                "species"
            ]
        }
    }
}

How large is a wren?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{"name": "look_up", "parameters": {"species": "wren"}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>

10 cm<|eot_id|><|start_header_id|>assistant<|end_header_id|>

"""


def test_functions_are_told_as_llama_knows_it(http):
    species = {"type": "string", "maxLength": 5}
    parameters = {"type": "object", "properties": {"species": species}, "required": ["species"]}
    about = {"name": "look_up", "description": "What is known of a species.", "parameters": parameters}
    called = {"id": "a", "type": "function", "function": {"name": "look_up", "arguments": '{"species": "wren"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How large is a wren?"},
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "a", "content": "10 cm"},
    ]
    asked = {"messages": messages, "tools": [{"type": "function", "function": about}]}
    conversation = http.post("/tokenize", json=asked).raise_for_status().json()
    wanted = http.post("/tokenize", json={"prompt": CALLING, "add_special_tokens": False}).json()
    assert conversation["tokens"] == wanted["tokens"]


def test_info_and_health_are_what_the_contract_asks_for(http):
    assert http.get("/health").status_code == 200
    info = http.get("/info").json()
    assert all(isinstance(info[key], str) for key in ("name", "model", "model_revision"))
    assert info["audio_payload_types"] == ["base64_wav", "file_path", "file_url"]
    assert (info["max_batch_size"], info["supports_batching"]) == (8, True)
    assert info["schema_versions"] == ["predictions_v1"]
    assert (info["max_num_beams"], info["max_choices"], info["max_choice_characters"]) == (16, 2000, 100_000)


def test_the_key_guards_everything_but_health(server):
    paths = [("POST", "/predict"), ("GET", "/info"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions")]
    paths += [("POST", "/tokenize"), ("POST", "/invocations"), ("POST", f"/{B}/predict")]
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}):
        for method, path in paths:
            assert httpx.request(method, server.url + path, headers=headers).status_code == 401, (path, headers)
    assert httpx.get(f"{server.url}/health").status_code == 200


@contextlib.contextmanager
def logged(server, *, wanted):
    """The entries of what is asked meanwhile, in the order in which it ended; a line follows its answer."""
    found: list[dict] = []
    start = server.request_log.stat().st_size
    yield found
    deadline = time.monotonic() + 20
    while len(found) < wanted and time.monotonic() < deadline:
        found[:] = [json.loads(line) for line in server.request_log.read_text()[start:].splitlines()]
        time.sleep(0.02)
    assert len(found) == wanted


def test_a_key_of_the_file_opens_every_route_and_its_name_is_logged(server, sounds):
    """vLLM has a key of its own, and asks for it on its routes."""
    asked = [("GET", "/v1/models", None), ("GET", "/info", None), ("GET", "/metrics", None)]
    asked += [("POST", "/v1/completions", {"prompt": "frog", "max_tokens": 1}), ("POST", "/tokenize", {"prompt": "a"})]
    with logged(server, wanted=3 * len(asked)) as found:
        for key in (*KEYS.values(), "another"):
            for method, path, body in asked:
                headers = {"authorization": f"Bearer {key}"}
                answer = httpx.request(method, server.url + path, json=body, headers=headers, timeout=60)
                assert answer.status_code == (401 if key == "another" else 200), path
    assert [entry["key"] for entry in found] == [name for name in ("ana", "ben", None) for _ in asked]
    assert {entry["status"] for entry in found[-len(asked) :]} == {401}


def test_what_is_logged_of_a_request_is_what_its_usage_says(server, client, http, sounds):
    """Whichever way it came: whole, streamed, several answers at once, several prompts, beams."""

    def ask(**options):
        content = [part(sounds[5]), part(sounds[1]), {"type": "text", "text": QUESTION}]
        return chat(client, content, model=f"{NAME}@.35", **options)

    with logged(server, wanted=7) as found:
        usages = [ask().usage, ask(n=2, extra={"temperature": 1.0}).usage]
        usages += [chunk.usage for chunk in ask(stream=True, stream_options={"include_usage": True}) if chunk.usage]
        usages.append(client.completions.create(model=B, prompt=["a frog", "wren"], max_tokens=3).usage)
        beams = {"use_beam_search": True}
        usages.append(client.completions.create(model=B, prompt="frog", n=2, max_tokens=3, extra_body=beams).usage)
        response = client.responses.create(model=A, input="frog", max_output_tokens=2)
        items = [
            item("a", audios=[wav(sounds[5])], num_beams=3, max_length_seconds=3),
            item("b", audios=[wav(sounds[0])]),
        ]
        predicted = [entry["usage"] for entry in predict(http, *items, path=f"/{B}/predict").json()["responses"]]
    wanted = [(usage.prompt_tokens, usage.completion_tokens) for usage in usages]
    wanted.append((response.usage.input_tokens, response.usage.output_tokens))
    wanted.append(tuple(sum(one[kind] for one in predicted) for kind in ("prompt_tokens", "completion_tokens")))
    assert [(entry["prompt_tokens"], entry["completion_tokens"]) for entry in found] == wanted
    # 12 s of which 10 are heard, and 2 s; of two clips of 3 s and 10 s 3 and 1.
    assert [entry["audio_seconds"] for entry in found] == [12, 12, 12, 0, 0, 0, 4]
    others = [STRENGTH[name] for name in (B, B, A, B)]
    assert [entry["model"] for entry in found] == [f"{NAME}@0.35"] * 3 + others
    assert all(entry["status"] == 200 and entry["complete"] for entry in found)
    text = server.request_log.read_text()
    assert not any(secret in text for secret in (QUESTION, KEY, *KEYS.values()))


def test_a_stream_that_is_left_is_logged_with_the_tokens_that_it_had_then(server, http):
    body = {"model": A, "prompt": "frog", "max_tokens": 900, "stream": True, "ignore_eos": True}
    with logged(server, wanted=1) as found, http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        got = sum(next(lines).startswith("data: ") for _ in range(20))
    (entry,) = found
    assert (entry["status"], entry["complete"]) == (200, False)
    assert got <= entry["completion_tokens"] < 900


def test_no_key_is_told(server, http):
    """Neither of the file, nor in the environment that vLLM's processes have, nor in what they print."""
    seen = [http.get(path).text for path in ("/info", "/metrics", "/v1/models", "/version", "/openapi.json")]
    seen += [server.log.read_text(), server.request_log.read_text()]
    process = psutil.Process(server.process.pid)
    for one in [process, *process.children(recursive=True)]:
        seen += [" ".join(one.cmdline()), one.name(), str(one.environ())]
    assert not any(key in text for key in KEYS.values() for text in seen)


def test_an_oversized_body_is_refused_declared_or_not(http):
    large = b" " * (12 << 20)
    assert http.post("/predict", content=large).status_code == 413

    def drip():
        for _ in range(12):
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
    config = draw(st.sampled_from([{"num_beams": 2}, {"choices": ["a", draw(text)], "negligible_choices": 0.1}]))
    items = [item(draw(text), draw(text), temperature=0.0, audios=[wav(np.ones(9000, np.int16))], **config)]
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


def connection(server, path, *, length, sent=b"") -> socket.socket:
    """A request that is begun by hand."""
    host, port = server.url.removeprefix("http://").split(":")
    link = socket.create_connection((host, int(port)))
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    link.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + sent)
    return link


def resident(server) -> int:
    """Bytes of the server's processes together."""
    process = psutil.Process(server.process.pid)
    return sum(one.memory_info().rss for one in [process, *process.children(recursive=True)])


@pytest.mark.soak
@pytest.mark.repeated(2000)
def test_many_strengths_leave_the_server_as_large_as_it_was(client, http, server, sounds, count):
    """Every fifth client leaves before it is answered. Sizes are printed; at the end they must not have grown."""
    rng = random.Random(9)

    def ask(number):
        model = f"{NAME}@{rng.randrange(500) / 500:.3f}"
        if number % 5:
            content = [part(sounds[number % 6]), {"type": "text", "text": f"{QUESTION} {number % 50}"}]
            assert chat(client, content, model=model).model
        else:
            body = {"model": model, "prompt": "frog", "max_tokens": 200}
            with contextlib.suppress(httpx.ReadTimeout):
                http.post("/v1/completions", json=body, timeout=0.05)

    sizes = []
    with ThreadPoolExecutor(16) as pool:
        for tenth in range(10):
            list(pool.map(ask, range(tenth * count // 10, (tenth + 1) * count // 10)))
            sizes.append(resident(server) >> 20)
            print(f"{(tenth + 1) * count // 10} requests: {sizes[-1]} MiB")
    # What a process keeps for itself, it has after half of them: buffers, the caches of prefixes and of recordings.
    assert sizes[-1] < 1.03 * max(sizes[3:6]), sizes
    assert len(http.get("/metrics").text) < 2**20


def test_ctrl_c_in_the_middle_ends_cleanly(server, http):
    """The last test: it stops the server. Some have not sent their request whole, one does not read its answer."""
    outcome = []

    def ask():
        try:
            outcome.append(predict(http, item(max_new_tokens=900, text="frog")).status_code)
        except httpx.HTTPError as error:
            outcome.append(error)

    body = {"model": A, "stream": True, "max_tokens": 900, "messages": [{"role": "user", "content": QUESTION}]}
    whole = json.dumps(body | {"logprobs": True, "top_logprobs": 20, "ignore_eos": True}).encode()
    links = [
        connection(server, path, length=1000, sent=b"{") for path in ("/predict", "/v1/completions") for _ in "123"
    ]
    links.append(connection(server, "/v1/chat/completions", length=len(whole), sent=whole))
    request = threading.Thread(target=ask)
    request.start()
    assert server.process.poll() is None
    assert server.interrupt() == 0
    request.join(30)
    for link in links:
        link.close()
    assert len(outcome) == 1
    said = server.log.read_text()
    assert "Traceback" not in said and "leaked" not in said
    assert not any(file.exists() for file in server.uploads)

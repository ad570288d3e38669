"""The page as its visitors see it, in a browser that reaches nothing else, and as somebody who is no visitor does."""

import base64
import json
import math
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile
from serve.requests_to_server import KEYS, encoded

from mergekit_bio.audio.clip import Clip
from mergekit_bio.engine.interface import Prompt

pytest.importorskip("gradio", reason="Gradio is not installed")

NAME = "naturelm"
OWNER, KEY = next(iter(KEYS.items()))
QUESTION = "What is the common name for the focal species in the audio?"
CHOICES = ("marsh wren", "tree frog", "gray wolf")


@contextmanager
def visitor(server, key: str | None = KEY):
    """Somebody who has opened the page, with a key or without."""
    with httpx.Client(base_url=server.url, timeout=60, follow_redirects=True) as client:
        if key is not None:
            assert client.post("/page/login", data={"key": key}).status_code == 200
        yield client


def upload(client: httpx.Client, data: bytes = b"RIFF", name: str = "a.wav") -> httpx.Response:
    return client.post("/page/gradio_api/upload", files={"files": (name, data)})


def event(client: httpx.Client, path: str) -> httpx.Response:
    """What a browser sends when a recording has changed, with whichever file."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {"data": [file], "fn_index": 0, "session_hash": "abc", "event_data": None}
    return client.post("/page/gradio_api/queue/join", json=body)


def test_nothing_of_the_page_is_there_without_a_key(server):
    with visitor(server, None) as nobody:
        form = nobody.get("/page")
        assert form.url.path == "/page/" and 'type="password"' in form.text and "gradio" not in form.text
        for path in ("config", "gradio_api/info", "gradio_api/heartbeat/a", "gradio_api/file=/etc/passwd", "assets/a"):
            assert nobody.get(f"/page/{path}").status_code == 401
        assert upload(nobody).status_code == event(nobody, "/etc/passwd").status_code == 401
        assert nobody.post("/page/login", data={"key": "wrong"}).status_code == 401
        assert not nobody.cookies
        entered = nobody.post("/page/login", data={"key": KEY}, follow_redirects=False)
        (cookie,) = entered.headers.get_list("set-cookie")
        assert entered.status_code == 303 and "HttpOnly" in cookie and "SameSite=lax" in cookie and KEY not in cookie
        assert "gradio_config" in nobody.get("/page/").text
        # The cookie is for the page, the key for programs.
        assert nobody.get("/info").status_code == 401
        assert nobody.get("/page/logout").status_code == 200
        assert nobody.get("/page/config").status_code == 401


def test_a_visitor_reaches_own_uploads_and_no_other_file(server, tmp_path):
    with visitor(server) as one, visitor(server) as other:
        (path,) = upload(one, b"mine").json()
        server.uploads.append(Path(path))
        assert one.get(f"/page/gradio_api/file={path}").content == b"mine"
        assert event(one, path).status_code == 200
        (tmp_path / "secret").write_text("outside")
        outside = [str(tmp_path / "secret"), "/etc/passwd", "http://127.0.0.1:1/a", f"{Path(path).parent}/../b", ""]
        for name in outside:
            assert one.get(f"/page/gradio_api/file={name}").status_code == 403, name
            assert event(one, name).status_code == 403, name
        assert other.get(f"/page/gradio_api/file={path}").status_code == 403
        assert event(other, path).status_code == 403


def test_gradio_answers_what_the_page_needs_and_nothing_else(server):
    with visitor(server) as client:
        for path in (
            "proxy=http://a.hf.space/",
            "call/ask",
            "run/predict",
            "component_server",
            "vibe-edit",
            "deep_link",
        ):
            for method in ("GET", "POST"):
                assert client.request(method, f"/page/gradio_api/{path}").status_code == 404, path
        assert client.get("/page/monitoring").status_code == client.put("/page/config").status_code == 404
        join = "/page/gradio_api/queue/join"
        for body in (b"[" * 100_000, b"\xff", b"{"):
            assert client.post(join, content=body).status_code == 400
        assert client.post(join, content=b" " * (2 << 20)).status_code == 413
        assert upload(client, b" " * (12 << 20)).status_code == 413
        assert client.post(join, json={}, headers={"sec-fetch-site": "cross-site"}).status_code == 403


def words(text: str) -> str:
    """A text as a browser lays it out."""
    return " ".join(text.split())


def test_recordings_are_asked_about_at_two_strengths_in_a_browser(server, http, engines, sounds, browser, tmp_path):
    soundfile.write(tmp_path / "wren.wav", sounds[2], 16000)
    asked: list[str] = []
    page = browser.new_context(permissions=["microphone"]).new_page()
    page.set_default_timeout(30_000)
    page.on("request", lambda request: asked.append(request.url))

    def answer(side: str, strength: str) -> str:
        """The last answer of a side, once it is one at this strength."""
        said = page.locator(f"#chat-{side} [data-testid=bot]")
        said.last.get_by_text(f"{NAME}@{strength} ·").wait_for()
        return words(said.nth(-2).inner_text())

    def wanted(strength: str, *turns: str, audios: list[str]) -> str:
        """What /predict answers to the same."""
        roles = ("user", "assistant")
        item = {
            "sample_id": "a",
            "messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)],
            "audio_inputs": [{"payload_type": "base64_wav", "data": data} for data in audios],
        }
        body = {"schema_version": "predictions_v1", "requests": [item]}
        (response,) = http.post(f"/{NAME}@{strength}/predict", json=body).json()["responses"]
        assert response["error"] is None
        return response["predictions"][0]

    # 1. A key, and a recording.
    page.goto(f"{server.url}/page")
    page.fill("#key", KEY)
    page.click("button")
    page.set_input_files("#recording-1 input[type=file]", tmp_path / "wren.wav")
    page.get_by_alt_text("Spectrogram of wren.wav").wait_for()
    assert page.locator("#recording-1").get_by_label("Play", exact=True).count() == 1
    # 2. A question, at one strength and beside it at another.
    wren = encoded(sounds[2])
    page.locator("#examples").get_by_text(QUESTION).click()
    page.wait_for_function("text => document.querySelector('#question textarea').value === text", arg=QUESTION)
    page.get_by_role("button", name="Ask", exact=True).click()
    first = wanted("0.5", QUESTION, audios=[wren])
    assert answer("a", "0.5") == words(first)
    page.locator("#compare input").check()
    assert answer("b", "1") == words(wanted("1", QUESTION, audios=[wren])) != words(first)
    # 3. The dial is turned: the question is asked again.
    page.locator("#alpha-b input[type=range]").fill("0.35")
    second = wanted("0.35", QUESTION, audios=[wren])
    assert answer("b", "0.35") == words(second)
    # 4. A second turn, with a recording from the microphone.
    record = page.locator("#recording-2")
    record.get_by_label("Record audio").click()
    record.locator(".record-button").click()
    stop = record.locator(".stop-button")
    stop.wait_for()
    page.wait_for_timeout(1500)
    with page.expect_response(lambda answer: answer.url.partition("?")[0].endswith("/upload")) as sent:
        stop.click()
    recorded = Path(sent.value.json()[0])
    page.get_by_alt_text("Spectrogram of audio.wav").wait_for()
    samples, rate = soundfile.read(recorded)
    assert len(samples) > rate / 2 and np.abs(samples).max() > 0.1
    page.fill("#question textarea", "And this?")
    page.get_by_role("button", name="Ask", exact=True).click()
    sound = base64.b64encode(recorded.read_bytes()).decode()
    lead = "<Audio><AudioHere></Audio> "
    for side, strength, said in (("a", "0.5", first), ("b", "0.35", second)):
        turns = [lead + QUESTION, said, f"{lead}And this?"]
        page.locator(f"#chat-{side} [data-testid=bot]").nth(3).wait_for()
        assert answer(side, strength) == words(wanted(strength, *turns, audios=[wren, sound]))
        page.get_by_role("button", name="Prompt as sent").nth("ab".index(side)).click()
        prompt = page.locator(f"#prompt-{side} textarea").input_value()
        assert f"{lead}{QUESTION}<|eot_id|>" in prompt and f"{lead}And this?<|eot_id|>" in prompt
        assert words(said) in words(prompt)
    # 5. A new conversation, with an answer from a list.
    page.get_by_role("button", name="New conversation").click()
    page.locator("#recording-2").get_by_label("Clear").click()
    page.get_by_text("Answer from a list").click()
    page.fill("#choices textarea", "\n".join(CHOICES))
    page.fill("#question textarea", "Which of {species_list}?")
    page.get_by_role("button", name="Ask", exact=True).click()
    shown = page.locator("#choices-a")
    shown.get_by_text("%").first.wait_for()
    heard = Clip.from_samples(sounds[2] / 2**15, sampling_rate=16000)
    prompt = Prompt(f"Which of {', '.join(CHOICES)}?", [heard])
    (scores,) = engines["alpha-0.50"].loglikelihood([prompt], CHOICES)
    total = sum(map(math.exp, scores.values()))
    for choice, score in scores.items():
        assert shown.get_by_text(f"{100 * math.exp(score) / total:.0f}%").count(), (choice, shown.inner_text())
    assert answer("a", "0.5") == max(scores, key=scores.__getitem__)
    # 6. What is wrong is said, and the question stays.
    page.fill("#question textarea", "One <AudioHere>, two <AudioHere>?")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("the prompt has 2 audio slots (<AudioHere>), but 0 audios were given").wait_for()
    assert page.locator("#question textarea").input_value().startswith("One")
    # 7. All of it from this server, and in its log by the key's name.
    assert {url for url in asked if not url.startswith((f"{server.url}/", "data:", "blob:"))} == set()
    lines = [json.loads(line) for line in server.request_log.read_text().splitlines()]
    answers = [line for line in lines if line["path"] == "/page" and line["model"]]
    assert {line["model"] for line in answers} == {f"{NAME}@{strength}" for strength in ("0.5", "1", "0.35")}
    assert {line["key"] for line in answers} == {OWNER}
    assert answers[0]["audio_seconds"] == 3 and answers[0]["completion_tokens"] > 0
    server.uploads.append(recorded)
    assert all(file.is_file() for file in server.uploads)


def test_the_page_fits_a_telephone(server, browser):
    page = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True).new_page()
    page.goto(f"{server.url}/page")
    page.fill("#key", KEY)
    page.click("button")
    page.locator("#compare input").check()
    page.locator("#alpha-b input[type=range]").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    left, right = (page.locator(f"#alpha-{side}").bounding_box() for side in "ab")
    assert right["y"] > left["y"] + left["height"]  # one below the other

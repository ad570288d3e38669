"""The page without an engine: its way through the guard, and what the request log says of it."""

import asyncio
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from serve.guarded_app import KEY, PATHS, SETTINGS, Served, echo
from starlette.routing import Route

from mergekit_bio.errors import PromptError
from mergekit_bio.serve.page import login


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "requests.jsonl"
    for name, value in replace(SETTINGS, page=str(tmp_path), request_log=file).to_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return file


def entries(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize("root_path", ["", "/models/bio"])
def test_a_browser_comes_in_by_its_form_behind_a_proxy_too(log, root_path):
    """What the page polls for is not logged; who was refused is. A proxy that ends TLS gets a cookie for HTTPS."""
    polled = Route("/page/config", echo)
    with (
        Served(*login.ROUTES, polled, root_path=root_path, key=KEY) as served,
        httpx.Client(base_url=served.url + root_path, headers={"x-forwarded-proto": "https"}) as browser,
    ):
        for address in ("/", "/page"):
            assert browser.get(address).headers["location"] == f"{root_path}/page/"
        assert f'action="{root_path}/page/login"' in browser.get("/page/").text
        assert browser.get("/page/config").status_code == 401
        assert browser.post("/page/login", data={"key": "wrong"}).status_code == 401
        entered = browser.post("/page/login", data={"key": KEY})
        (cookie,) = entered.headers.get_list("set-cookie")
        assert entered.headers["location"] == f"{root_path}/page/"
        assert {"HttpOnly", "Secure", f"Path={root_path}/page"} <= set(cookie.split("; "))
        held = {"cookie": cookie.partition(";")[0]}
        assert browser.get("/page/config", headers=held).status_code == 200
        for path in PATHS[:2]:
            assert browser.get(path, headers=held).status_code == 401
        browser.get("/page/logout", headers=held)
        assert browser.get("/page/config", headers=held).status_code == 401
    paths = [(entry["path"], entry["status"]) for entry in entries(log)]
    refused = [("/page/config", 401), ("/page/login", 401), *((path, 401) for path in PATHS[:2]), ("/page/config", 401)]
    assert [entry for entry in paths if entry[0] not in ("/", "/page")] == refused


def test_a_cookie_is_good_as_long_as_its_key_and_twelve_hours_at_most(monkeypatch):
    visitors = login.Visitors()
    token = visitors.admit(b"key")
    assert visitors.key_of(token) == b"key" and visitors.key_of("") is None
    start = time.monotonic()
    monkeypatch.setattr(login.time, "monotonic", lambda: start + 12 * 3600 + 1)
    assert visitors.key_of(token) is None


def test_an_answer_is_logged_with_how_it_ended(log, tmp_path):
    pytest.importorskip("gradio", reason="Gradio is not installed")
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from mergekit_bio.serve.page.asking import Question
    from mergekit_bio.serve.page.layout import Page

    settings = replace(SETTINGS, page=str(tmp_path), request_log=log)
    state = SimpleNamespace(args=SimpleNamespace(api_key=None), mergekit_bio_max_characters=5)
    page = Page(SimpleNamespace(state=state), settings)
    request = SimpleNamespace(request=SimpleNamespace(scope={login.KEY_NAME: "ana"}))
    for strength, error in ((0.35, PromptError), (math.nan, PromptError), (None, PromptError)):
        with pytest.raises(error):
            asyncio.run(page._answer(request, (), Question("What?"), strength))
    del state.mergekit_bio_max_characters  # as a bug would have it
    with pytest.raises(AttributeError):
        asyncio.run(page._answer(request, (), Question("What?"), 0.35))
    logged = entries(log)
    assert [(line["key"], line["path"], line["status"]) for line in logged] == [("ana", "/page", 400)] * 3 + [
        ("ana", "/page", 500)
    ]
    assert logged[0]["model"] == "lm@0.35"


# The last: from the browser on this thread has a running loop.
@pytest.mark.parametrize("root_path", ["", "/models/bio"])
def test_where_no_key_is_asked_for_a_browser_sees_the_page_at_once(log, tmp_path, browser, root_path):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    settings = replace(SETTINGS, page=str(tmp_path / "uploads"))
    refused: list[str] = []
    with Served(root_path=root_path, page=settings) as served:
        page = browser.new_context().new_page()
        page.on("response", lambda response: response.status >= 400 and refused.append(response.url))
        page.goto(f"{served.url}{root_path}/page")
        page.locator(".head h1").wait_for(timeout=30_000)
        page.context.close()
    assert refused == []

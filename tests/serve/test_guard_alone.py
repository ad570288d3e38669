"""The guard in front of a small application: real sockets, and clients that do not behave. No engine is needed."""

import json
import socket
import time
from dataclasses import replace

import pytest
from serve.guarded_app import KEY, LIMIT, SETTINGS, Served

from mergekit_bio.serve import guard


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    for name, value in SETTINGS.to_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.mark.parametrize("root_path", ["", "/models/bio"])
@pytest.mark.parametrize("stripped", [True, False], ids=["the proxy strips the prefix", "the proxy leaves the prefix"])
def test_a_path_names_a_model_behind_a_proxy_too(root_path, stripped):
    prefix = "" if stripped else root_path
    with Served(root_path=root_path, key=KEY) as served:
        key = {"Authorization": f"Bearer {KEY}"}
        for path, wanted in [
            ("/predict", ["/predict", None]),
            ("/lm/predict", ["/predict", "lm"]),
            ("/lm@.350/predict", ["/predict", "lm@.350"]),
            ("/lm%400.35/info", ["/info", "lm@0.35"]),
            ("/health", ["/health", None]),
            ("/lm@1/health", ["/health", "lm@1"]),
        ]:
            status, (where, model, _) = served.ask(prefix + path, **key)
            assert (status, where.removeprefix(root_path), model) == (200, *wanted), path
        assert served.ask(f"{prefix}/health")[0] == 200  # without a key
        for path in ("/info", "/lm/info", "/predict", "/v1/completions"):
            assert served.ask(prefix + path)[0] == 401


def test_a_refusal_is_read_by_a_client_that_has_sent_far_too_much():
    far_too_much = b" " * (32 << 20)
    with Served(key=KEY) as served:
        code, message = served.ask("/predict", far_too_much)
        assert code == 401 and "API key" in message
        code, message = served.ask("/predict", far_too_much, Authorization=f"Bearer {KEY}")
        assert code == 413 and message == f"the request is larger than {LIMIT} bytes"
        assert served.ask("/predict", b"{}", Authorization=f"Bearer {KEY}") == (200, ["/predict", None, 2])


def test_a_body_that_does_not_arrive_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(guard, "_BODY_SECONDS", 0.3)
    with Served() as served:
        links = [served.begin("/predict", length=1000) for _ in range(20)]
        answers = [link.recv(1000) for link in links]
        assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers)
        assert served.ask("/health")[0] == 200


def test_requests_together_hold_a_bounded_number_of_bytes(monkeypatch):
    monkeypatch.setattr(guard, "_BODIES_HELD", 2)
    half = b" " * (LIMIT // 2)
    with Served() as served:
        links: list[socket.socket] = []
        deadline = time.monotonic() + 20
        while served.ask("/predict", half)[0] != 503:  # one of these may be refused beside such a request
            links.append(served.begin("/predict", length=LIMIT, sent=half))
            assert time.monotonic() < deadline
        for link in links:
            link.close()
        while served.ask("/predict", half)[0] != 200:  # what the clients that left held is free again
            assert time.monotonic() < deadline


def test_bodies_of_those_who_have_no_key_count_for_nothing(monkeypatch):
    monkeypatch.setattr(guard, "_BODIES_HELD", 1)
    with Served(key=KEY) as served:
        links = [served.begin("/health", length=LIMIT, sent=b" " * (LIMIT - 10)) for _ in range(4)]
        assert served.ask("/predict", b" " * LIMIT, Authorization=f"Bearer {KEY}")[0] == 200
        assert all(link.recv(1000).startswith(b"HTTP/1.1 200") for link in links)


def test_a_body_of_a_million_values_is_refused_before_it_is_read(monkeypatch):
    monkeypatch.setattr(guard, "_MAX_VALUES", 1000)
    with Served() as served:
        code, message = served.ask("/v1/completions", json.dumps([1] * 1001).encode())
        assert code == 413 and message == "the request holds more than 1,000 values"
        assert served.ask("/v1/completions", json.dumps([1] * 999).encode())[0] == 200
        assert served.ask("/v1/completions", json.dumps(", " * 400).encode())[0] == 200


@pytest.mark.parametrize("path", ["/predict", "/v1/completions"])
def test_when_the_engine_stops_nobody_is_waited_for(path, monkeypatch):
    monkeypatch.setattr(guard, "_WATCH_SECONDS", 0.05)
    with Served() as served:
        link = served.begin(path, length=1000)
        served.engine.is_running = False
        assert link.recv(1000).startswith(b"HTTP/1.1 503")


def test_what_runs_when_the_server_stops_is_answered_until_shortly_before_the_engine_is_killed(monkeypatch):
    monkeypatch.setattr(guard, "_WATCH_SECONDS", 0.05)
    with Served() as served:
        links = [served.begin("/predict", length=2) for _ in range(2)]
        assert served.ask("/health")[0] == 200
        served.engine.shutdown(timeout=1000)
        time.sleep(0.3)
        links[0].sendall(b"}")
        assert links[0].recv(1000).startswith(b"HTTP/1.1 200")
        served.engine.shutdown(timeout=0.5)
        assert links[1].recv(1000).startswith(b"HTTP/1.1 503")


def test_a_strength_that_there_is_not_is_named():
    with Served() as served:
        for name in ("lm@3", "lm@half", "lm@"):
            code, message = served.ask("/v1/completions", json.dumps({"model": name}).encode())
            assert code == 404 and message.startswith(f"the model {name} does not exist: ")
        for name in ("lm", "lm@0.35", "other", None, 3):  # vLLM itself answers for the others
            assert served.ask("/v1/completions", json.dumps({"model": name}).encode())[0] == 200


def test_what_a_client_computed_of_an_audio_is_refused(monkeypatch):
    for name, value in replace(SETTINGS, dial=None).to_environment().items():
        monkeypatch.setenv(name, value)
    with Served() as served:
        code, message = served.ask("/v1/completions", json.dumps({"features": {"mm_hashes": {}}}).encode())
        assert code == 400 and "features" in message
        assert served.ask("/v1/completions", json.dumps({"features": None}).encode())[0] == 200

"""The request log: who asked, how much, and what came of it, whatever becomes of the client, the file and the disk."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from serve.guarded_app import KEY, LIMIT, SETTINGS, Served
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from mergekit_bio.serve.request_log import count

ANA = "ana-key"
FIELDS = [
    *("time", "key", "method", "path", "model", "audio_seconds"),
    *("prompt_tokens", "completion_tokens", "status", "complete", "seconds"),
]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file, keys = tmp_path / "requests.jsonl", tmp_path / "keys"
    keys.write_text(f"ana: {ANA}\n")
    for name, value in replace(SETTINGS, api_keys=keys, request_log=file).to_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    return file


def entries(log: Path, *, wanted: int) -> list[dict]:
    """What is logged; a line is written when its client has its answer already."""
    deadline = time.monotonic() + 20
    while len(lines := log.read_text().splitlines() if log.exists() else []) < wanted:
        assert time.monotonic() < deadline, lines
        time.sleep(0.01)
    assert len(lines) == wanted
    return [json.loads(line) for line in lines]


def ask(served: Served, path: str, body: object = None, key: str = ANA) -> int:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    return served.ask(path, data, Authorization=f"Bearer {key}")[0]


def test_a_request_has_a_line_with_who_asked_for_which_model_and_what_came_of_it(log):
    with Served(key=KEY) as served:
        before = time.time()
        asked: list[tuple[str, object, str]] = [
            ("/v1/completions", {"model": "lm@.350", "prompt": "SECRET"}, ANA),
            ("/v1/completions", {"prompt": "SECRET"}, KEY),
            ("/v1/completions", {"model": "SECRET"}, ANA),
            ("/v1/completions", {"model": ["SECRET"]}, ANA),
            ("/v1/completions", {"model": "lm@3"}, ANA),
            ("/v1/completions?q=SECRET", b"SECRET", ANA),
            ("/lm@0.4/predict", {"requests": "SECRET"}, ANA),
            ("/predict", b" " * (LIMIT + 1), ANA),
            ("/info", None, "SECRET"),
            ("/none", None, ANA),
            ("/health", None, ANA),
            ("/lm@0.4/health", None, ANA),
        ]
        for path, body, key in asked:
            if path != "/none":
                ask(served, path, body, key)
            else:
                with pytest.raises(KeyError):  # FastAPI's own 404 says "detail", not "error"
                    ask(served, path, body, key)
        found = entries(log, wanted=10)
    at, half = "/v1/completions", "lm@0.5"
    assert [tuple(entry[name] for name in ("key", "method", "path", "model", "status")) for entry in found] == [
        ("ana", "POST", at, "lm@0.35", 200),
        ("--api-key", "POST", at, half, 200),
        ("ana", "POST", at, None, 200),
        ("ana", "POST", at, None, 200),
        ("ana", "POST", at, None, 404),
        ("ana", "POST", at, None, 200),
        ("ana", "POST", "/predict", "lm@0.4", 200),
        ("ana", "POST", "/predict", half, 413),
        (None, "GET", "/info", half, 401),
        ("ana", "GET", "/none", None, 404),
    ]
    for entry in found:
        assert list(entry) == FIELDS and entry["complete"]
        assert before - 1 < time.mktime(time.strptime(entry["time"][:19], "%Y-%m-%dT%H:%M:%S")) - time.timezone
        assert 0 <= entry["seconds"] < 60 and entry["time"].endswith("Z")
    assert not any(word in log.read_text() for word in ("SECRET", KEY, ANA))


def test_without_keys_nobody_has_a_name(log, monkeypatch):
    for name, value in replace(SETTINGS, request_log=log).to_environment().items():
        monkeypatch.setenv(name, value)
    with Served() as served:
        assert ask(served, "/info") == 200
        (entry,) = entries(log, wanted=1)
    assert (entry["key"], entry["status"]) == (None, 200)


async def trickle(request: Request) -> StreamingResponse:
    """Tokens for as long as somebody listens."""

    async def tokens():
        while True:
            count(completion_tokens=1)
            yield b"token\n" * 100
            await asyncio.sleep(0.005)

    count(prompt_tokens=7)
    return StreamingResponse(tokens())


async def wait(request: Request) -> Response:
    """What vLLM's routes do with a client that leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    return Response(b"null")


async def fail(request: Request) -> Response:
    raise RuntimeError("a bug")


def test_a_client_that_leaves_is_logged_with_what_it_got(log):
    with Served(Route("/trickle", trickle), Route("/wait", wait)) as served:
        for path in ("/trickle", "/wait"):
            link = served.begin(path, length=0, sent=b"", method="GET", Authorization=f"Bearer {ANA}")
            if path == "/trickle":
                assert link.recv(5) == b"HTTP/"
                time.sleep(0.1)
            link.close()
        # A body that does not come to its end either.
        served.begin("/predict", length=100, Authorization=f"Bearer {ANA}").close()
        by_path = {entry["path"]: entry for entry in entries(log, wanted=3)}
    assert {path: (entry["status"], entry["complete"]) for path, entry in by_path.items()} == {
        "/trickle": (200, False),
        "/wait": (499, False),
        "/predict": (499, False),
    }
    assert by_path["/trickle"]["prompt_tokens"] == 7 and by_path["/trickle"]["completion_tokens"] > 0
    assert {entry["key"] for entry in by_path.values()} == {"ana"}


def test_a_failure_of_the_servers_own_is_logged_as_one(log):
    with Served(Route("/fail", fail)) as served:
        with pytest.raises(json.JSONDecodeError):
            ask(served, "/fail")
        (entry,) = entries(log, wanted=1)
    assert (entry["status"], entry["complete"]) == (500, False)


def test_a_file_that_is_moved_away_or_removed_is_begun_again(log):
    with Served() as served:
        ask(served, "/info")
        entries(log, wanted=1)
        old = log.rename(log.with_suffix(".1"))
        ask(served, "/predict", {})
        ask(served, "/predict", {})
        entries(log, wanted=2)
        log.unlink()
        ask(served, "/v1/completions", {})
        (last,) = entries(log, wanted=1)
    assert entries(old, wanted=1)[0]["path"] == "/info" and last["path"] == "/v1/completions"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_breaks_no_answer_and_is_said_once(log, capfd):
    log.symlink_to("/dev/full")
    with Served() as served:
        assert [ask(served, "/info") for _ in range(3)] == [200] * 3
        log.unlink()
        assert ask(served, "/info") == 200
        deadline = time.monotonic() + 20
        while not log.exists():
            assert time.monotonic() < deadline
    full, again = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note:")]
    assert full == f"note: {log}: requests are not logged (No space left on device)"
    assert re.fullmatch(rf"note: {log}: requests are logged again; [23] are missing", again)  # the third, or not yet


#: Writes 100 lines, with room for a few, and then with room for all.
CUT_OFF = """
import resource, sys
from pathlib import Path
from mergekit_bio.serve.request_log import Entry, RequestLog
log = RequestLog(Path(sys.argv[1]))
for number in range(100):
    most = 1000 if 5 <= number < 90 else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    log.write(Entry(str(number), None, "GET", "/"))
"""


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    """The system writes as much of a line as there is room for."""
    log = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", CUT_OFF, log], check=True, capture_output=True, text=True)
    whole, torn = [], []
    for line in log.read_text().splitlines():
        try:
            whole.append(int(json.loads(line)["time"]))
        except json.JSONDecodeError:
            torn.append(line)
    assert whole == [*range(5), *range(90, 100)] and len(torn) == 1
    assert "; 85 are missing" in done.stderr and done.stderr.count("\n") == 2


def test_several_processes_write_whole_lines_to_one_file(tmp_path):
    """As several of vLLM's servers do (--api-server-count)."""
    log = tmp_path / "log"
    program = (
        "import sys; from pathlib import Path; from mergekit_bio.serve.request_log import Entry, RequestLog\n"
        "log = RequestLog(Path(sys.argv[1]))\n"
        "for n in range(2000): log.write(Entry(sys.argv[2], None, 'GET', '/' * 150))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, log, str(n)]) for n in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    times = [entry["time"] for entry in entries(log, wanted=4000)]
    assert times.count("0") == times.count("1") == 2000


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda file: file.mkdir(), "Is a directory"),
        (lambda file: os.mkfifo(file), "No such device or address"),
        (lambda file: file.with_name("no").symlink_to(file), "No such file or directory"),
    ],
    ids=["folder", "pipe without a reader", "no folder"],
)
def test_a_log_that_cannot_be_written_is_said_before_anything_is_started(
    tmp_path, command_line, make: Callable[[Path], object], said
):
    file = tmp_path / "log"
    make(file)
    named = file / "deeper/log" if said.startswith("No such file") else file
    code, _, err = command_line("serve", tmp_path / "no-model", "--request-log", named)
    assert code == 1 and err == f"error: {named}: the request log cannot be written ({said})\n"


def test_the_log_may_go_to_standard_output(tmp_path):
    program = "from pathlib import Path; from mergekit_bio.serve.request_log import Entry, RequestLog\n"
    program += "log = RequestLog(Path('-')); log.write(Entry('now', 'ana', 'GET', '/')); log.close(); print('more')"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    line, more = done.stdout.splitlines()
    assert json.loads(line)["key"] == "ana" and more == "more"

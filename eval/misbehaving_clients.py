"""What clients that misbehave do to the others, and how long the server takes to stop while they do it.

    python eval/misbehaving_clients.py           # puts its section into eval/results/serving.md

A server of its own for every case. One client asks for four tokens again and again, at random strengths, another one
from a list of five, a third one looks at /health: how long the slowest of these took, first with nobody else, then
beside the others. Then eight clients ask for an answer of 64 tokens each, and SIGTERM is sent: how many of them are
answered, and when the last of the server's processes is gone.
"""

import argparse
import json
import multiprocessing
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

import httpx
import machine
from results_page import put_section
from served import Served, chat, served, wav
from tiny_naturelm import make_base, make_naturelm

RESULT = Path(__file__).parent / "results" / "serving.md"
NAME = "naturelm"
NAMES = [("marsh", "wren"), ("house", "wren"), ("tree", "frog"), ("gray", "wolf"), ("great", "tit"), ("sea", "lion"),
         ("field", "cricket"), ("barn", "owl")]  # fmt: skip
#: Seconds of each look, and how many answers are running when SIGTERM comes.
LOOK, RUNNING = 8.0, 8


def begin(url: str, body: bytes, *, sent: int | None = None, path: str = "/v1/chat/completions") -> socket.socket:
    """A request of which so many bytes are sent, or all."""
    host, port = url.removeprefix("http://").split(":")
    link = socket.create_connection((host, int(port)), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    link.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:sent])
    return link


def asking(number: int, *, tokens: int, **more: object) -> bytes:
    """A question about a recording of a second, at one of eleven strengths."""
    model, text = f"{NAME}@{number % 11 / 10:g}", f"Which species is it? {number}"
    return json.dumps(chat(model, text, wav(number, seconds=1), tokens=tokens, **more)).encode()


def listing(number: int, choices: list[str], **config: object) -> dict:
    """An item that asks which of some choices a recording of a second is."""
    return {
        "sample_id": str(number),
        "messages": [{"role": "user", "content": "Which species is it?"}],
        "audio_inputs": [{"payload_type": "base64_wav", "data": wav(number, seconds=1)}],
        "generation_config": {"choices": choices, **config},
    }


@contextmanager
def score_lists(url: str) -> Iterator[None]:
    """32 lists of a thousand species, as an archive or a run with loglikelihood has them: every choice is scored."""
    species = [f"{first}{number % 83} {second}{number % 97}" for number, (first, second) in enumerate(NAMES * 125)]
    with ExitStack() as stack:
        for batch in range(4):
            items = [listing(8 * batch + number, species) for number in range(8)]
            body = json.dumps({"schema_version": "predictions_v1", "requests": items}).encode()
            stack.enter_context(begin(url, body, path="/predict"))
        yield


@contextmanager
def send_and_close(url: str) -> Iterator[None]:
    """300 sockets, each with a whole request, that are closed at once; again every four seconds."""
    bodies, ended = [asking(number, tokens=200) for number in range(300)], threading.Event()

    def send() -> None:
        while not ended.is_set():
            links = [begin(url, body) for body in bodies]
            for link in links:
                link.close()
            ended.wait(4)

    with _thread(send, ended):
        yield


@contextmanager
def stop_reading(url: str) -> Iterator[None]:
    """A stream of 900 tokens, with the likeliest twenty at each, that nobody reads."""
    with begin(url, asking(0, tokens=900, stream=True, logprobs=True, top_logprobs=20)):
        yield


@contextmanager
def send_slowly(url: str) -> Iterator[None]:
    """200 requests of which a byte comes every second."""
    body, ended = asking(0, tokens=1), threading.Event()
    with ExitStack() as stack:
        links = [stack.enter_context(begin(url, body, sent=100)) for _ in range(200)]

        def drip() -> None:
            place = 100
            while not ended.wait(1):
                for link in links:
                    try:
                        link.sendall(body[place : place + 1])
                    except OSError:  # the server has had enough
                        continue
                place += 1

        with _thread(drip, ended):
            yield


@contextmanager
def everything(url: str) -> Iterator[None]:
    """All of these at once."""
    with send_slowly(url), stop_reading(url), send_and_close(url):
        yield


@contextmanager
def nothing(url: str) -> Iterator[None]:
    """Nobody else."""
    yield


@contextmanager
def _thread(target: Callable[[], None], ended: threading.Event) -> Iterator[None]:
    def run() -> None:
        try:
            target()
        except OSError:  # the server has stopped
            ended.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(60)


def misbehave(case: str, url: str, begun: Event, ended: Event) -> None:
    """A case, in a process of its own: it does not slow down the clients that wait."""
    with CASES[case](url):
        begun.set()
        ended.wait()


@contextmanager
def misbehaving(case: str, url: str) -> Iterator[None]:
    """Have a process do it while the block runs."""
    spawn = multiprocessing.get_context("spawn")
    begun, ended = spawn.Event(), spawn.Event()
    process = spawn.Process(target=misbehave, args=(case, url, begun, ended))
    process.start()
    begun.wait(60)
    try:
        yield
    finally:
        ended.set()
        process.join()


CASES = {
    "nobody": nothing,
    "300 send and close": send_and_close,
    "one stops reading": stop_reading,
    "200 send a byte a second": send_slowly,
    "32 lists of 1,000": score_lists,
    "all of these": everything,
}


@dataclass(frozen=True)
class Measured:
    """One case.

    Attributes:
        answers: How many the client that asks again and again had.
        slowest: Seconds that the slowest of these took.
        short_list: Seconds that the slowest answer from a list of five took.
        health: Seconds that the slowest look at /health took.
        answered: Of the requests that were running when SIGTERM came.
        stopping: Seconds from SIGTERM until the last process was gone.
    """

    answers: int
    slowest: float
    short_list: float
    health: float
    answered: int
    stopping: float


def slowest(server: Served, ask: Callable[[httpx.Client], httpx.Response]) -> tuple[int, float]:
    """Ask one after the other for some seconds: how many times, and how long the slowest took."""
    taken = []
    with httpx.Client(base_url=server.url, timeout=60) as client:
        until = time.perf_counter() + LOOK
        while (start := time.perf_counter()) < until:
            ask(client).raise_for_status()
            taken.append(time.perf_counter() - start)
    return len(taken), max(taken)


def measure(case: str, arguments: list[Path | str], folder: Path) -> Measured:
    """One case, on a server of its own."""
    draw = random.Random(1)

    def question(client: httpx.Client) -> httpx.Response:
        body = chat(f"{NAME}@{draw.randrange(11) / 10:g}", f"Which? {draw.random()}", tokens=4)
        return client.post("/v1/chat/completions", json=body)

    def short_list(client: httpx.Client) -> httpx.Response:
        item = listing(draw.randrange(10_000), [" ".join(name) for name in NAMES[:5]], negligible_choices=1e-6)
        return client.post("/predict", json={"schema_version": "predictions_v1", "requests": [item]})

    def health(client: httpx.Client) -> httpx.Response:
        time.sleep(0.02)
        return client.get("/health")

    def running(number: int) -> bool:
        try:
            body = chat(f"{NAME}@{number / 10:g}", f"Which? {number}", tokens=64)
            return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).status_code == 200
        except httpx.HTTPError:
            return False

    with served(arguments, folder / "log") as server, ThreadPoolExecutor(RUNNING + 3) as pool:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for _ in range(20):
                question(client).raise_for_status()
                short_list(client).raise_for_status()
        with misbehaving(case, server.url):
            time.sleep(1)
            looks = [pool.submit(slowest, server, ask) for ask in (question, short_list, health)]
            (answers, slowest_answer), (_, slowest_list), (_, slowest_health) = (look.result() for look in looks)
            asked = [pool.submit(running, number) for number in range(RUNNING)]
            time.sleep(0.3)
            stopping = server.stop()
            answered = sum(one.result() for one in asked)
    return Measured(answers, slowest_answer, slowest_list, slowest_health - 0.02, answered, stopping)


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--results", type=Path, default=RESULT)
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        base = make_base(folder / "base")
        arguments = ["--base", base, "--adapter", make_naturelm(folder / "naturelm")]
        for case in given.case:
            found = measure(case, arguments, folder)
            times = (found.slowest, found.short_list, found.health)
            cells = [case, str(found.answers), *(f"{seconds:.2f}" for seconds in times)]
            cells += [f"{found.answered} of {RUNNING}", f"{found.stopping:.1f}"]
            rows.append(f"| {' | '.join(cells)} |")
            print(rows[-1], flush=True)
        described = machine.describe(folder)
    section = f"""## Clients that misbehave

A dial of a tiny random model. For {LOOK:g} s one client asks for four tokens again and again, at random strengths,
another one from a list of five, and a third one looks at /health, beside others that misbehave or ask for much. Then
{RUNNING} clients ask for 64 tokens each, and SIGTERM comes while they are answered and the others go on: how many are
answered whole, and after how many seconds the last of the server's processes is gone. Made by
`python eval/misbehaving_clients.py`. Machine: {described}.

| beside | answers | slowest, s | slowest of a list, s | slowest /health, s | answered at SIGTERM | stopped after, s |
|---|---:|---:|---:|---:|---:|---:|
{chr(10).join(rows)}
"""
    put_section(given.results, section)


if __name__ == "__main__":
    main()

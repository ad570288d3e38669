"""The request log: a line of JSON for each request, with who asked and how much, never what.

    {"time": "2026-03-01T05:12:44.031Z", "key": "ana", "method": "POST", "path": "/v1/chat/completions",
     "model": "NatureLM-audio@0.35", "audio_seconds": 10.0, "prompt_tokens": 61, "completion_tokens": 8, "status": 200,
     "complete": true, "seconds": 0.412}

A request's entry is a context variable: it is filled in where its audio is decoded and its tokens come out, also on the
threads and in the tasks that work for it.
"""

import json
import os
import sys
import time
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mergekit_bio.errors import OutputError
from mergekit_bio.serve.settings import OPEN_PATHS, PAGE, ServeSettings

#: Instead of a file: standard output.
STANDARD_OUTPUT = Path("-")
#: The client was gone before it was answered; nginx's status for that.
CLIENT_LEFT = 499
#: A path is a client's, and may be long.
_LONGEST_PATH = 200


@dataclass
class Entry:
    """A line of the log.

    Attributes:
        time: When the request came, UTC.
        key: The name of the key that let it in; None where none was asked for or it was refused.
        method: HTTP's.
        path: Without the model, and without what follows a ``?``.
        model: The name that answers have; None for a request that is about none, or about one that there is not.
        audio_seconds: What was heard of its recordings, cut to their clips; silence that fills a clip does not count.
        prompt_tokens: As the answer's ``usage`` counts them, of all its prompts.
        completion_tokens: Likewise, as far as they were handed on when the client left.
        status: HTTP's; 499 for a client that left before it was answered.
        complete: Whether the answer was sent to its end.
        seconds: From the request's first line to the answer's end.
    """

    time: str
    key: str | None
    method: str
    path: str
    model: str | None = None
    audio_seconds: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    status: int | None = None
    complete: bool = False
    seconds: float = 0.0


#: Of the request that is being worked for; None where there is no log.
CURRENT: ContextVar[Entry | None] = ContextVar("mergekit_bio_request", default=None)


def note(**facts: Any) -> None:
    """Put down something about the request that is being worked for, if there is a log."""
    if (entry := CURRENT.get()) is not None:
        for name, value in facts.items():
            setattr(entry, name, value)


def count(**amounts: float) -> None:
    """Add to what is counted of the request that is being worked for, if there is a log."""
    if (entry := CURRENT.get()) is not None:
        for name, amount in amounts.items():
            setattr(entry, name, getattr(entry, name) + amount)


def now() -> str:
    """The time as entries have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class RequestLogger:
    """ASGI middleware, outermost: an entry for every request but those that need no key. vLLM makes it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        file = ServeSettings.from_environment().request_log
        assert file is not None
        self._log = RequestLog(file)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request, and log it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        entry = Entry(now(), None, scope.get("method", "WEBSOCKET"), scope["path"])
        CURRENT.set(entry)
        start = time.monotonic()
        scope.setdefault("state", {})  # which the application's copies of the scope share
        left = False

        async def heard() -> Message:
            nonlocal left
            message = await receive()
            left |= message["type"] == "http.disconnect"
            return message

        async def said(message: Message) -> None:
            await send(message)
            kind = message["type"]
            if kind == "http.response.start":
                entry.status = CLIENT_LEFT if left else message["status"]
            elif kind == "http.response.body":
                entry.complete = not left and not message.get("more_body", False)
            elif kind == "websocket.accept":
                entry.status = 101
            elif kind == "websocket.close":
                entry.status, entry.complete = entry.status or 403, True

        try:
            await self._app(scope, heard, said)
        finally:
            # What vLLM tells in an answer counts: for a beam search it asks the engine once a token of each beam.
            if (usage := getattr(scope["state"].get("request_metadata"), "final_usage_info", None)) is not None:
                entry.prompt_tokens, entry.completion_tokens = usage.prompt_tokens, usage.completion_tokens or 0
            if entry.status is None:
                entry.status = CLIENT_LEFT if left else 500
            # Open paths may have had a model or a proxy's prefix in front. What the page asks for is mostly no answer,
            # and its answers have entries of their own.
            uneventful = entry.path.startswith(f"{PAGE}/") and entry.status < 400
            if entry.path not in OPEN_PATHS and not uneventful:
                entry.path = entry.path[:_LONGEST_PATH]
                entry.audio_seconds = round(entry.audio_seconds, 3)
                entry.seconds = round(time.monotonic() - start, 3)
                self._log.write(entry)


class RequestLog:
    """Appends lines to a file, which may be moved away at any time: a new one is then begun.

    Several processes may write to the same file. A line that cannot be written is counted and let go: a full disk is
    no reason not to answer.

    Args:
        file: Or :data:`STANDARD_OUTPUT`.

    Raises:
        OutputError: It cannot be written.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lost = 0
        self._torn = False  # whether the last line lacks its end
        try:
            self._open()
        except OSError as error:
            raise OutputError(f"{file}: the request log cannot be written ({error.strerror})") from error

    def write(self, entry: Entry) -> None:
        """Append an entry."""
        line = f"{json.dumps(asdict(entry))}\n".encode()
        try:
            self._follow()
            line = b"\n" + line if self._torn else line
            written = os.write(self._descriptor, line)
            self._torn = written < len(line)
            if self._torn:
                raise OSError(0, "the line was cut off")
        except OSError as error:
            if not self._lost:
                print(f"note: {self._file}: requests are not logged ({error.strerror})", file=sys.stderr)
            self._lost += 1
        else:
            if self._lost:
                print(f"note: {self._file}: requests are logged again; {self._lost} are missing", file=sys.stderr)
            self._lost = 0

    def close(self) -> None:
        """Let go of the file."""
        if self._file != STANDARD_OUTPUT:
            os.close(self._descriptor)

    def _open(self) -> None:
        if self._file == STANDARD_OUTPUT:
            self._descriptor = 1
            return
        # Whoever waits for a reader of a pipe keeps everybody waiting.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK
        self._descriptor = os.open(self._file, flags, 0o640)
        self._opened = os.fstat(self._descriptor)

    def _follow(self) -> None:
        """Begin a new file if the one that is open has been moved away."""
        if self._file == STANDARD_OUTPUT:
            return
        try:
            if os.path.samestat(self._file.stat(), self._opened):
                return
        except FileNotFoundError:
            pass
        before = self._descriptor
        self._open()
        os.close(before)
        self._torn = False


def count_tokens(engine: Any) -> None:
    """Have the tokens of every request counted in its entry, whichever of vLLM's routes it came by.

    ``/predict`` counts its own: a beam search asks the engine for more than it answers.

    Args:
        engine: vLLM's ``EngineClient``, which all routes ask.
    """
    from vllm.sampling_params import RequestOutputKind

    generate = engine.generate

    async def counted(prompt: Any, params: Any, *args: Any, **named: Any) -> Any:
        entry = CURRENT.get()
        counts = entry is not None and entry.path != "/predict"
        streams = params.output_kind == RequestOutputKind.DELTA
        so_far: dict[int, int] = {}
        async with aclosing(generate(prompt, params, *args, **named)) as outputs:
            async for output in outputs:
                if counts:
                    if not so_far:
                        count(prompt_tokens=len(output.prompt_token_ids or ()))
                    for answer in output.outputs:
                        before = so_far.get(answer.index, 0)
                        # A stream's outputs hold new tokens, others all of them so far.
                        new = len(answer.token_ids) - (0 if streams else before)
                        so_far[answer.index] = before + new
                        count(completion_tokens=new)
                yield output

    engine.generate = counted

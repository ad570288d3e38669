"""What a browser may ask of the page: Gradio's routes that it needs, and nobody's recordings but its visitor's own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mergekit_bio.serve.page.login import UPLOAD, VISITORS, set_cookie, token_of

_FILE, _EVENT = "/gradio_api/file=", "/gradio_api/queue/join"

#: Gradio has more: it fetches addresses, hands out files of the server's, calls language models, shows who is there.
_READ = frozenset(
    {
        *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/theme.css", "/gradio_api/info"),
        *("/gradio_api/app_id", "/gradio_api/startup-events", "/gradio_api/queue/data", "/gradio_api/upload_progress"),
    }
)
_READ_BELOW = ("/assets/", "/static/", "/svelte/", "/gradio_api/heartbeat/", _FILE)
_WRITTEN = frozenset({UPLOAD, _EVENT, "/gradio_api/cancel", "/gradio_api/reset"})

#: The visitor's browser loads nothing from elsewhere, whatever an answer or a file's name holds.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)


class Uploads:
    """ASGI application around Gradio's.

    Args:
        app: Gradio's.
        folder: Where Gradio keeps uploads, and nothing else.
        most_bytes: What all visitors' uploads together may hold.
    """

    def __init__(self, app: ASGIApp, folder: Path, *, most_bytes: int) -> None:
        self._app, self._folder, self._most_bytes = app, folder, most_bytes
        self._visitors_of: dict[str, set[str]] = {}  # a file -> who has uploaded it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        path, visitor = get_route_path(scope), token_of(request)
        if not _is_needed(scope["method"], path):
            await _refusal(404, "the page has no such address")(scope, receive, send)
        elif request.headers.get("sec-fetch-site") in ("cross-site", "same-site") and scope["method"] == "POST":
            await _refusal(403, "another site's page may not ask here")(scope, receive, send)
        elif path == "/":
            await self._app(scope, receive, self._welcoming(request, send))
        elif path not in _READ and getattr(request.app.state, VISITORS).key_of(visitor) is None:
            await _refusal(401, "open the page first")(scope, receive, send)
        elif path == UPLOAD:
            await self._upload(request, send, visitor)
        elif path.startswith(_FILE) and not self._owns(visitor, path.removeprefix(_FILE)):
            await _refusal(403, "this is no recording of yours")(scope, receive, send)
        elif path == _EVENT:
            await self._event(request, send, visitor)
        else:
            await self._app(scope, receive, send)

    def _welcoming(self, request: Request, send: Send) -> Send:
        """With the policy for the browser; and where no key is asked for, a cookie that tells visitors apart."""
        visitors = getattr(request.app.state, VISITORS)
        response = Response(headers={"content-security-policy": _POLICY, "referrer-policy": "no-referrer"})
        if visitors.key_of(token_of(request)) is None:
            set_cookie(response, request, visitors.admit(b""))
        added = [(name, value) for name, value in response.raw_headers if name != b"content-length"]

        async def welcome(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *added]
            await send(message)

        return welcome

    async def _upload(self, request: Request, send: Send, visitor: str) -> None:
        """Note whose the files are that Gradio says it has kept."""
        self._forget_deleted()
        held = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        if held + int(request.headers.get("content-length", 0)) > self._most_bytes:
            refusal = _refusal(503, "the server holds as many recordings as it can; try again later")
            await refusal(request.scope, request.receive, send)
            return
        del MutableHeaders(scope=request.scope)["accept-encoding"]  # the answer is to be read here
        answer = bytearray()

        async def note(message: Message) -> None:
            answer.extend(message.get("body", b""))
            await send(message)

        await self._app(request.scope, request.receive, note)
        try:
            kept = json.loads(answer)
        except ValueError:  # an error of Gradio's
            return
        for path in kept if isinstance(kept, list) else ():
            self._visitors_of.setdefault(str(path), set()).add(visitor)

    async def _event(self, request: Request, send: Send, visitor: str) -> None:
        """Refuse an event that is about a file that its visitor has not uploaded: Gradio takes any path."""
        body = await request.body()
        try:
            paths = list(_paths_in(json.loads(body)))
        except (ValueError, RecursionError):
            await _refusal(400, "the body is not JSON")(request.scope, request.receive, send)
            return
        if not all(self._owns(visitor, path) for path in paths):
            await _refusal(403, "this is no recording of yours, or it has been deleted; add it again")(
                request.scope, request.receive, send
            )
            return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await request.receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(request.scope, replay, send)

    def _owns(self, visitor: str, path: Any) -> bool:
        return isinstance(path, str) and visitor in self._visitors_of.get(path, ()) and Path(path).is_file()

    def _forget_deleted(self) -> None:
        for path in [path for path in self._visitors_of if not Path(path).exists()]:
            del self._visitors_of[path]


def _is_needed(method: str, path: str) -> bool:
    if method == "POST":
        return path in _WRITTEN
    return method in ("GET", "HEAD") and (path in _READ or path.startswith(_READ_BELOW))


def _paths_in(document: Any) -> Iterator[Any]:
    """Everything in a JSON document that Gradio might take for a file."""
    waiting = [document]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "path" in value:
                yield value["path"]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _refusal(status: int, message: str) -> JSONResponse:
    return JSONResponse({"detail": message}, status)

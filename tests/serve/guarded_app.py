"""The guard in front of a small application, on a real socket."""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import uvicorn
from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from mergekit_bio.serve import guard
from mergekit_bio.serve.page import login
from mergekit_bio.serve.request_log import RequestLogger
from mergekit_bio.serve.settings import DialSettings, ServeSettings

KEY = "the-key"
LIMIT = 1 << 20
SETTINGS = ServeSettings("/none", ("lm",), DialSettings("/none", 500, {}, "r", "w"), max_body_bytes=LIMIT)


async def echo(request: Request) -> JSONResponse:
    """Where a request came out, for which model, and how much of it."""
    body = await request.body()
    return JSONResponse([request.url.path, request.scope[guard.MODEL_KEY], len(body)])


PATHS = ["/predict", "/info", "/health", "/v1/completions"]


class Served:
    """The application and its uvicorn, on a thread."""

    def __init__(
        self, *more: Route, root_path: str = "", key: str | None = None, page: ServeSettings | None = None
    ) -> None:
        routes = [*(Route(path, echo, methods=["GET", "POST"]) for path in PATHS), *more]
        middleware = [Middleware(guard.Guard)]
        if ServeSettings.from_environment().request_log is not None:
            middleware.insert(0, Middleware(RequestLogger))
        app = FastAPI(routes=routes, middleware=middleware)
        app.state.engine_client = self.engine = SimpleNamespace(is_running=True, shutdown=lambda timeout: None)
        setattr(app.state, login.VISITORS, login.Visitors())
        app.state.args = SimpleNamespace(api_key=[key] if key else None)
        if page is not None:
            from mergekit_bio.serve.page.mount import attach_page

            attach_page(app, page)

        async def below_root(scope, receive, send) -> None:
            await app({**scope, "root_path": root_path}, receive, send)  # as FastAPI does

        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(below_root, log_level="error", lifespan="on"))
        app.state.server = self.server
        self.thread = threading.Thread(target=asyncio.run, args=(self.server.serve([self.socket]),), daemon=True)

    def __enter__(self) -> "Served":
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, object]:
        """With the standard library's own client, which reads nothing before it has sent everything."""
        request = urllib.request.Request(self.url + path, data=body, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["message"]

    def text(self, path: str, **headers: str) -> str:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=60) as response:
            return response.read().decode()

    def begin(
        self, path: str, *, length: int, sent: bytes = b"{", method: str = "POST", **headers: str
    ) -> socket.socket:
        """A request that is not ended."""
        link = socket.create_connection(self.socket.getsockname(), timeout=30)
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        link.sendall("\r\n".join([*lines, "", ""]).encode() + sent)
        return link

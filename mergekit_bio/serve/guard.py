"""What every request passes before vLLM sees it: its key, its body, and the model that it names."""

import asyncio
import json
import math
import re
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mergekit_bio.engine.vllm.dial import LARGEST
from mergekit_bio.engine.vllm.log import leave_out_the_usual_at_the_end
from mergekit_bio.outside_data import is_text
from mergekit_bio.serve.keys import Keys, vllms_keys
from mergekit_bio.serve.page.login import HOME, KEY_NAME, KEYS, LOGIN, LOGOUT, UPLOAD, is_of_page, key_of_visitor
from mergekit_bio.serve.request_log import note
from mergekit_bio.serve.settings import OPEN_PATHS, PAGE, ServeSettings

T = TypeVar("T")

#: Where the model that a request is for stands in its scope; None for the default.
MODEL_KEY = "mergekit_bio.model"
#: Where the JSON of a body for ``/predict`` stands; None where it is none.
DOCUMENT_KEY = "mergekit_bio.document"

#: How often a waiting request looks whether the engine still runs.
_WATCH_SECONDS = 1.0
#: What Python says to who asks for a thread of a pool that is shut down.
_NO_MORE_THREADS = "cannot schedule new futures after shutdown"
#: So many seconds before vLLM would kill its engine requests are let go, so that it can end by itself.
_ENDING_SECONDS = 2.0
#: What uvicorn waits, once the engine has stopped, for connections whose other side neither reads nor writes.
_CLOSING_SECONDS = 2

#: A body must be complete after so many seconds, and one more for so many bytes.
_BODY_SECONDS, _BODY_BYTES_A_SECOND = 20.0, 64 << 10
#: Bodies of so many times the largest are held at once, all requests together.
_BODIES_HELD = 16
#: The largest body of the page's that is no recording.
_SMALL_BYTES = 1 << 20
#: Of a body that is not wanted so much is read, for so long, that its sender comes to read why.
_UNWANTED_BYTES, _UNWANTED_SECONDS = 512 << 20, 20.0

#: Numbers, texts, lists and so on in a body at most. A prompt of token ids has one for each.
_MAX_VALUES = 1_000_000
#: A larger body is read on a thread; one such at a time, for JSON is read in one go and holds up all others.
_READ_AT_ONCE = 64 << 10
_reader = ThreadPoolExecutor(1, "body")

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_PER_MODEL = ("/predict", "/info", "/health")
_WITH_BODY = ("POST", "PUT", "PATCH", "DELETE")


class _Refused(Exception):
    """A request that vLLM never sees, or does not answer any more."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Guard:
    """ASGI middleware around vLLM's own; vLLM makes it.

    ``/NAME/predict`` and its kin choose a model by path, for clients of a contract that has no field for it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._settings = ServeSettings.from_environment()
        self._dial = self._settings.make_dial()
        self._keys: Keys | None = None
        self._held_bytes = 0
        self._lets_go_at = math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] == "lifespan":
            scope["app"].state.server.config.timeout_graceful_shutdown = _CLOSING_SECONDS  # vLLM's uvicorn has none
            self._note_shutdown(scope["app"].state.engine_client)
            self._keys = Keys(vllms_keys(scope["app"].state.args.api_key), self._settings.api_keys)
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        scope = self._route(scope)
        body = _Body(receive)
        started = False

        async def tell(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._while_running(scope["app"].state.engine_client, self._answer(scope, body, tell))
        except _Refused as refused:
            # A request that is half answered is left as it is: uvicorn closes its connection.
            if not started:
                await _refuse(scope, body, send, refused)
        finally:
            self._held_bytes -= body.held

    def _note_shutdown(self, engine: Any) -> None:
        """Know when vLLM stops its engine: running requests are answered until shortly before it would be killed."""
        shutdown = engine.shutdown

        def noted(timeout: float | None = None) -> None:
            seconds = timeout or 0.0
            self._lets_go_at = time.monotonic() + max(seconds / 2, seconds - _ENDING_SECONDS)
            leave_out_the_usual_at_the_end()
            shutdown(timeout=timeout)

        engine.shutdown = noted

    async def _while_running(self, engine: Any, work: Coroutine[Any, Any, None]) -> None:
        """Do something, and let go of it when the engine stops: it would wait for tokens, or for a body, for ever.

        Raises:
            _Refused: The engine has stopped, or will soon; or whatever ``work`` raises while it runs.
        """
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=min(_WATCH_SECONDS, self._seconds_left())))[0]:
                if not engine.is_running or not self._seconds_left():
                    break
        finally:
            task.cancel()  # does nothing to one that is done
        failure = task.exception() if task.done() and not task.cancelled() else None
        # Whatever goes wrong in a request while the engine stops is the stopping. vLLM's threads go first.
        stopping = not engine.is_running or _NO_MORE_THREADS in str(failure)
        if not task.done() or (failure is not None and stopping):
            raise _Refused(503, "the server is stopping")
        await task

    def _seconds_left(self) -> float:
        return max(0.0, self._lets_go_at - time.monotonic())

    async def _answer(self, scope: Scope, body: "_Body", send: Send) -> None:
        # 1. Whether the client may ask. What has no body needs no more.
        of_page = self._settings.page is not None and is_of_page(scope["path"])
        self._let_in(scope, of_page=of_page)
        if of_page:  # what is mounted looks for its path behind a proxy's prefix
            scope["path"] = scope.get("root_path", "").rstrip("/") + scope["path"]
        if scope["type"] == "websocket" or scope["method"] not in _WITH_BODY:
            await self._app(scope, body.receive, send)
            return
        if scope["path"] in OPEN_PATHS:  # whoever it is: nothing is read, and nothing held
            await self._app(scope, body.replay, send)
            return
        # 2. The whole body, within its limits, and nothing in it that would harm vLLM.
        await self._read(scope, body, small=of_page and not scope["path"].endswith(UPLOAD))
        if body.gone:
            return
        if of_page:
            await self._app(scope, body.replay, send)
            return
        read = _parsed if scope["path"] == "/predict" else _parsed_for_vllm
        if len(body.data) > _READ_AT_ONCE:
            document = await asyncio.get_running_loop().run_in_executor(_reader, read, body.data)
        else:
            document = read(body.data)
        # 3. A model that there is, and no audio as a client has computed it. /predict has neither, and answers for
        # what is wrong with its items one by one.
        if scope["path"] == "/predict":
            scope[DOCUMENT_KEY] = document
        elif isinstance(document, dict):
            note(model=self._canonical(document.get("model")))
            self._check_model(document.get("model"))
            if document.get("features") is not None:  # with keys of vLLM's caches
                raise _Refused(400, "features: audio is computed by this server alone; send it in content_parts")
        await self._app(scope, body.replay, send)

    def _route(self, scope: Scope) -> Scope:
        """Take the model out of a path, and the prefix that a proxy has left there."""
        path = scope["path"]
        root = scope.get("root_path", "").rstrip("/")
        if root and path.startswith(f"{root}/"):
            path = path.removeprefix(root)
        name, _, rest = path.removeprefix("/").partition("/")
        if f"/{rest}" in _PER_MODEL and self._knows(name):
            path = f"/{rest}"
        else:
            name = None
        note(path=path, model=self._canonical(name) if path in ("/predict", "/info") else None)
        return {**scope, "path": path, "raw_path": path.encode(), MODEL_KEY: name, KEY_NAME: None}

    def _let_in(self, scope: Scope, *, of_page: bool) -> None:
        """Refuse a client that needs a key and has none; note whose key another one has.

        vLLM itself asks again for a key of its own, if it has one, and is given that.
        """
        assert self._keys is not None  # since the application started
        scope[KEYS] = self._keys
        if not self._keys.asked_for or scope["path"] in OPEN_PATHS or _is_preflight(scope):
            return
        if of_page:
            self._let_into_page(scope, self._keys)
            return
        scope[KEY_NAME] = self._keys.name_of(_bearer(scope))
        if scope[KEY_NAME] is None:
            raise _Refused(401, "a valid API key is needed: Authorization: Bearer KEY")
        note(key=scope[KEY_NAME])
        own = vllms_keys(scope["app"].state.args.api_key)
        others = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
        scope["headers"] = [*others, *((b"authorization", f"Bearer {key}".encode()) for key in [*own][:1])]

    def _let_into_page(self, scope: Scope, keys: Keys) -> None:
        """The same for a browser, whose cookie stands for a key. Without one it gets the form instead of the page."""
        key = key_of_visitor(scope)
        scope[KEY_NAME] = None if key is None else keys.name_of(key)
        note(key=scope[KEY_NAME])
        if scope[KEY_NAME] is not None or scope["path"] in (HOME, PAGE, LOGIN, LOGOUT):
            return
        if scope["type"] != "http" or (scope["method"], scope["path"]) != ("GET", f"{PAGE}/"):
            raise _Refused(401, f"log in at {PAGE}")
        scope["path"] = LOGIN

    def _knows(self, name: str) -> bool:
        return bool(name) and (name in self._settings.names if self._dial is None else name in self._dial)

    def _canonical(self, name: Any) -> str | None:
        """The name that answers have; None for a model that there is not."""
        if self._dial is None:
            return self._settings.names[0] if name is None or name in self._settings.names else None
        strength = self._dial.strength(name) if name is None or isinstance(name, str) else None
        return None if strength is None else self._dial.canonical(strength)

    def _check_model(self, name: Any) -> None:
        """vLLM itself refuses other names; of a strength that there is not, we know what is wrong with it."""
        if self._dial is None or not isinstance(name, str) or name in self._dial:
            return
        model, at, strength = name.rpartition("@")
        if at and model in self._settings.names:
            raise _Refused(
                404,
                f"the model {name} does not exist: {strength!r} is no strength from 0 to {LARGEST // 1000} with up to "
                f"three digits behind the point, such as {model}@0.35",
            )

    async def _read(self, scope: Scope, body: "_Body", *, small: bool = False) -> None:
        limit = min(self._settings.max_body_bytes, _SMALL_BYTES) if small else self._settings.max_body_bytes
        too_large = _Refused(413, f"the request is larger than {limit} bytes")
        if body.declared(scope) > limit:
            raise too_large
        loop = asyncio.get_running_loop()
        start = loop.time()
        while not body.complete:
            seconds = start + _BODY_SECONDS + len(body.data) / _BODY_BYTES_A_SECOND - loop.time()
            try:
                async with asyncio.timeout(seconds):
                    chunk = await body.chunk()
            except TimeoutError:
                raise _Refused(408, "the request's body did not arrive in time") from None
            if len(body.data) + len(chunk) > limit:
                raise too_large
            if self._held_bytes + len(chunk) > _BODIES_HELD * self._settings.max_body_bytes:
                raise _Refused(503, "the server holds as many requests as it can; try again later")
            body.data += chunk
            body.held += len(chunk)
            self._held_bytes += len(chunk)


class _Body:
    """A request's body as it comes in.

    Attributes:
        data: What was kept of it, until vLLM has it.
        held: Its bytes, as long as the request runs.
        complete: Whether nothing more comes.
        gone: Whether the client has left before it was complete.
    """

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.data, self.held = bytearray(), 0
        self.complete = self.gone = False
        self._replayed = False

    @staticmethod
    def declared(scope: Scope) -> int:
        """The length that the client has announced; 0 where it has not."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        return int(length) if length.isdigit() else 0

    async def chunk(self) -> bytes:
        """What comes next."""
        message = await self.receive()
        self.gone = message["type"] == "http.disconnect"
        self.complete = self.gone or not message.get("more_body", False)
        data: bytes = message.get("body", b"")
        return data

    async def replay(self) -> Message:
        """The whole body for vLLM, and afterwards whether the client leaves."""
        if self._replayed:
            return await self.receive()
        self._replayed = True
        data, self.data = bytes(self.data), bytearray()
        return {"type": "http.request", "body": data, "more_body": False}

    async def drop(self, scope: Scope) -> None:
        """Read on for a while without keeping anything: a client that still sends does not read an answer."""
        if dict(scope["headers"]).get(b"expect", b"").lower() == b"100-continue":
            return  # it waits for leave to send
        dropped = 0
        try:
            async with asyncio.timeout(_UNWANTED_SECONDS):
                while not self.complete and dropped < _UNWANTED_BYTES:
                    dropped += len(await self.chunk())
        except TimeoutError:
            pass


def _parsed(body: bytes | bytearray, parse_int: Callable[[str], int] = int) -> Any:
    """A body's JSON; None where it is none.

    Raises:
        _Refused: It holds too many values.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES:
        raise _Refused(413, f"the request holds more than {_MAX_VALUES:,} values")
    try:
        return json.loads(body, parse_int=parse_int)
    except (ValueError, RecursionError):
        return None


def _parsed_for_vllm(body: bytes | bytearray) -> Any:
    """The same; of what is no JSON vLLM will say so.

    Raises:
        _Refused: It holds what vLLM can neither tokenize, nor hand to its other processes, nor send back.
    """
    longest = 0

    def integer(digits: str) -> int:
        nonlocal longest
        value = int(digits)
        longest = max(longest, value.bit_length() + 1)
        return value

    document = _parsed(body, integer)
    if longest > 64:
        raise _Refused(400, "the request holds an integer of more than 64 bits")
    if _SURROGATE.search(body) and not is_text(json.dumps(document, ensure_ascii=False)):
        raise _Refused(400, "the request holds half of a surrogate pair, which is no text")
    return document


def _is_preflight(scope: Scope) -> bool:
    """Whether a browser asks what another site's page may ask, which vLLM's CORS middleware answers."""
    headers = dict(scope["headers"])
    return scope.get("method") == "OPTIONS" and b"origin" in headers and b"access-control-request-method" in headers


def _bearer(scope: Scope) -> bytes:
    """The key that a client sends, if it sends one."""
    scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    return key if scheme.lower() == b"bearer" else b""


async def _refuse(scope: Scope, body: _Body, send: Send, refused: _Refused) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    if refused.status < 500 and refused.status != 408:
        await body.drop(scope)
    if body.gone:
        return
    error = {"message": str(refused), "type": "invalid_request_error", "param": None, "code": refused.status}
    await JSONResponse({"error": error}, refused.status, headers={"connection": "close"})(scope, body.receive, send)

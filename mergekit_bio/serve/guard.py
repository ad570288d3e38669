"""What every request passes before vLLM sees it: keys, body size, and the weights that it needs."""

import asyncio
import hashlib
import hmac
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mergekit_bio.errors import EngineError, MergekitBioError
from mergekit_bio.outside_data import is_text
from mergekit_bio.serve.loaded_model import LoadedModel
from mergekit_bio.serve.settings import ServeSettings

#: Answered without a key: nothing here tells or does more than "the server is up".
OPEN_PATHS = frozenset({"/health", "/ping", "/version"})

#: Where the chosen model stands in a request's scope.
MODEL_KEY = "mergekit_bio.model"

#: How often a waiting request looks whether the engine still runs.
_WATCH_SECONDS = 1.0

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

_PER_MODEL = ("/predict", "/info", "/health")
_WITH_BODY = ("POST", "PUT", "PATCH", "DELETE")


class Guard:
    """ASGI middleware, outermost; vLLM makes it (``--middleware``).

    With several models, a request waits until the weights it names are loaded (see
    :class:`mergekit_bio.serve.loaded_model.LoadedModel`). ``/NAME/predict`` and its kin choose a model by path, for
    clients of a contract that has no field for it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._settings = ServeSettings.from_environment()
        self._loaded_from = self._settings.directory(self._settings.default_model)
        self._loaded_model: LoadedModel | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        # 1. Which model the path names, and whether the client may ask. What has no body needs no more.
        scope = self._route(scope)
        if not _has_key(scope):
            await _refuse(scope, receive, send, 401, "a valid API key is needed: Authorization: Bearer KEY")
            return
        if scope["type"] == "websocket" or scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        # 2. The whole body, within its limit, and nothing in it that would harm vLLM.
        body = await self._body(scope, receive)
        if body is None:
            message = f"the request is larger than {self._settings.max_body_bytes} bytes"
            await _refuse(scope, receive, send, 413, message)
            return
        # /predict answers item by item, and the model of such a path is known.
        document, flaw = (None, None) if scope["path"] == "/predict" else _read(body)
        if flaw is not None:
            await _refuse(scope, receive, send, 400, f"the request holds {flaw}")
            return
        # 3. On to vLLM, with several models once the weights of this one are loaded.
        replay = _replay(body, receive)
        if len(self._settings.models) == 1:
            await self._answer(scope, replay, send)
            return
        if self._loaded_model is None:
            state = scope["app"].state
            self._loaded_model = LoadedModel(self._settings.default_model, lambda model: self._switch(state, model))
        try:
            async with self._loaded_model.use(self._model(scope, document)):
                await self._answer(scope, replay, send)
        except MergekitBioError as error:  # of the switch: answering turns its own into answers
            await _refuse(scope, receive, send, 503, str(error))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and let go of it when the engine stops: it would wait for tokens for ever."""
        engine, started = scope["app"].state.engine_client, False

        async def tell(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        task = asyncio.ensure_future(self._app(scope, receive, tell))
        try:
            while not (await asyncio.wait({task}, timeout=_WATCH_SECONDS))[0]:
                if not engine.is_running:
                    break
        finally:
            task.cancel()  # does nothing to one that is done
        if task.done() and (engine.is_running or task.cancelled() or task.exception() is None):
            await task
        elif not started:  # whatever went wrong in a request while the engine stops is the stopping
            await _refuse(scope, receive, send, 503, "the server is stopping")

    def _route(self, scope: Scope) -> Scope:
        first, _, rest = scope["path"].removeprefix("/").partition("/")
        if first in self._settings.models and f"/{rest}" in _PER_MODEL:
            path = f"/{rest}"
            return {**scope, "path": path, "raw_path": path.encode(), MODEL_KEY: first}
        return {**scope, MODEL_KEY: self._settings.default_model}

    def _model(self, scope: Scope, document: Any) -> str:
        name = document.get("model") if isinstance(document, dict) and scope["path"] not in _PER_MODEL else None
        model: str = name if isinstance(name, str) and name in self._settings.models else scope[MODEL_KEY]
        return model

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None if it is too large."""
        limit = self._settings.max_body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            return None
        body = bytearray()
        with suppress(ClientDisconnect):
            async for chunk in Request(scope, receive).stream():
                body += chunk
                if len(body) > limit:
                    return None
        return bytes(body)

    async def _switch(self, state: Any, model: str) -> None:
        from mergekit_bio.engine.sweep import difference

        engine, served = state.engine_client, state.openai_serving_models
        target = Path(self._settings.models[model])
        change = difference(self._loaded_from, target)
        if change.names:
            try:
                for loaded in await _replace(engine, target, change.names):
                    change.check(*loaded)
            except EngineError:
                for _, failure in await _replace(engine, self._loaded_from, change.names):  # back to what was sound
                    if failure is not None:
                        raise EngineError(f"{failure}; the server holds a mix of two checkpoints: restart it") from None
                raise
        self._loaded_from = target
        # A prefix computed with other weights would be silently wrong.
        await engine.reset_mm_cache()
        await engine.reset_encoder_cache()
        if not await engine.reset_prefix_cache():
            raise EngineError(f"vLLM did not empty its prefix cache, so {model} cannot be served")
        # vLLM's answers say that they are from the first of its served names.
        served.base_model_paths = sorted(served.base_model_paths, key=lambda path: bool(path.name != model))


async def _replace(engine: Any, checkpoint: Path, names: Sequence[str]) -> Any:
    """Load these tensors of a checkpoint; returns what each worker then holds, and what went wrong."""
    return await engine.collective_rpc("reload_tensors", args=(str(checkpoint), list(names)))


def _read(body: bytes) -> tuple[Any, str | None]:
    """A body's JSON, and what in it vLLM can neither tokenize, nor hand to its other processes, nor send back."""
    longest = 0

    def integer(digits: str) -> int:
        nonlocal longest
        value = int(digits)
        longest = max(longest, value.bit_length() + 1)
        return value

    try:
        document = json.loads(body, parse_int=integer)
    except (ValueError, RecursionError):
        return None, None  # no JSON: vLLM will say so
    if longest > 64:
        return document, "an integer of more than 64 bits"
    if _SURROGATE.search(body) and not is_text(json.dumps(document, ensure_ascii=False)):
        return document, "half of a surrogate pair, which is no text"
    return document, None


def _has_key(scope: Scope) -> bool:
    keys = [key for key in scope["app"].state.args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
    if not keys or scope["path"] in OPEN_PATHS or scope.get("method") == "OPTIONS":
        return True
    scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
    # Digests are compared, so that the time taken tells neither a key's length nor its beginning.
    digest = hashlib.sha256(given).digest()
    matches = [hmac.compare_digest(digest, hashlib.sha256(key.encode()).digest()) for key in keys]
    return scheme.lower() == b"bearer" and any(matches)


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, message: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": status}
    await JSONResponse({"error": error}, status, headers={"connection": "close"})(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay

"""How vLLM's own endpoints get at audio that a client points to: by the rules of :mod:`mergekit_bio.serve.media`."""

import asyncio
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from mergekit_bio.errors import AudioError
from mergekit_bio.serve.media import decode, decode_base64, fetch, read_local
from mergekit_bio.serve.settings import ServeSettings

NAME = "mergekit_bio"


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class GuardedConnector(MediaConnector):
    """Reads ``data:``, ``file:`` and http(s) URLs; whatever is wrong with one is the client's error."""

    def load_from_url(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        return asyncio.run(self.load_from_url_async(url, media_io, fetch_timeout=fetch_timeout))

    async def load_from_url_async(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        settings = ServeSettings.from_environment()
        try:
            return await asyncio.to_thread(decode, await _bytes_of(url, settings), settings)
        except AudioError as error:
            raise VLLMValidationError(str(error), parameter="audio_url") from error


async def _bytes_of(url: str, settings: ServeSettings) -> bytes:
    from urllib.parse import unquote, urlsplit

    if url[:5].lower() == "data:":
        head, comma, data = url[5:].partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise AudioError("a data URL must hold base64")
        return decode_base64(data)
    if url[:5].lower() == "file:":
        return await asyncio.to_thread(read_local, unquote(urlsplit(url).path), settings)
    return await fetch(url, settings)

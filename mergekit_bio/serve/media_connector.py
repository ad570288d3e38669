"""How vLLM's own endpoints get at audio that a client points to: by the rules of :mod:`mergekit_bio.serve.media`.

A clip is 10 s long, unless a ``data:`` URL says otherwise: ``data:audio/wav;seconds=3;base64,...``. Parameters of the
media type are RFC 2397's own, and vLLM's server passes over those that it does not know.
"""

import asyncio
from typing import Any
from urllib.parse import unquote, urlsplit

from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from mergekit_bio.audio.clip import CLIP_SECONDS
from mergekit_bio.errors import AudioError
from mergekit_bio.serve.media import decode_base64, fetch, read_clip, read_local
from mergekit_bio.serve.settings import PLUGIN, ServeSettings


@MEDIA_CONNECTOR_REGISTRY.register(PLUGIN)
class GuardedConnector(MediaConnector):
    """Reads ``data:``, ``file:`` and http(s) URLs; whatever is wrong with one is the client's error."""

    def load_from_url(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        return asyncio.run(self.load_from_url_async(url, media_io, fetch_timeout=fetch_timeout))

    async def load_from_url_async(self, url: str, media_io: Any, *, fetch_timeout: int | None = None) -> Any:
        settings = ServeSettings.from_environment()
        try:
            if url[:5].lower() == "data:":
                data, seconds = await asyncio.to_thread(_decode_data_url, url, settings)
            else:
                data, seconds = await _read(url, settings), CLIP_SECONDS
            return await read_clip(data, settings, seconds=seconds)
        except AudioError as error:
            raise VLLMValidationError(str(error), parameter="audio_url") from error


def _decode_data_url(url: str, settings: ServeSettings) -> tuple[bytes, float]:
    """The audio file that a ``data:`` URL holds, and the length of the clip that it stands for."""
    head, comma, data = url[5:].partition(",")
    if data[:5].lower() == "data:":  # one inside another: what vLLM makes of a data URL in input_audio.data
        return _decode_data_url(data, settings)
    if not comma or not head.lower().endswith(";base64"):
        raise AudioError("a data URL must hold base64")
    seconds = CLIP_SECONDS
    for parameter in head.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "seconds":
            try:
                seconds = float(value)
            except ValueError:
                raise AudioError(f"seconds={value[:20]!r} of the data URL is no number of seconds") from None
    return decode_base64(data, settings), seconds


async def _read(url: str, settings: ServeSettings) -> bytes:
    if url[:5].lower() == "file:":
        return await asyncio.to_thread(read_local, unquote(urlsplit(url).path), settings)
    return await fetch(url, settings)

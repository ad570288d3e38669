"""Audio that a client points to: read and fetched only from where the server's owner allows."""

import asyncio
import binascii
import io
import ipaddress
import math
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import soundfile
from aiohttp.abc import AbstractResolver
from yarl import URL

from mergekit_bio.audio.clip import CLIP_SECONDS, Clip
from mergekit_bio.audio.waveform import check_channels, check_rate, pad_to_minimum
from mergekit_bio.errors import AudioError
from mergekit_bio.serve.request_log import count
from mergekit_bio.serve.settings import ServeSettings

#: What is decoded beyond a clip's end: further than the resampler reaches at any rate.
_MARGIN_SECONDS = 1.0

#: What libsndfile says of a length that it does not know is more.
_KNOWN_FRAMES = 1 << 62
#: The size that a WAV states where it does not know it.
_NO_SIZE = b"\xff\xff\xff\xff"

#: All of the IPv6 internet (RFC 4291, section 2.4), and IPv4 as seen from it (RFC 6052).
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


async def read_clip(data: bytes, settings: ServeSettings, *, seconds: float, shortest: bool = True) -> Clip:
    """An audio file as a clip; decoded and resampled on another thread.

    With ``shortest`` an audio of less than 0.5 s is refused, without it is heard with silence behind it.

    Raises:
        AudioError: As :func:`decode`, or there is no clip of this length.
    """

    def prepare() -> tuple[Clip, float]:
        samples, rate = decode(data, settings)
        recorded = len(samples) / rate
        if len(samples) and not shortest:
            samples = pad_to_minimum(samples, rate)
        return Clip.from_samples(samples, sampling_rate=rate, seconds=seconds), recorded

    clip, recorded = await asyncio.to_thread(prepare)
    count(audio_seconds=min(recorded, seconds))
    return clip


def decode(data: bytes, settings: ServeSettings) -> tuple[Any, int]:
    """Decode the beginning of an audio file: what a model hears of it, and a little more for the resampler.

    The rest stays encoded: a compressed file may hold a thousand times its size.

    Returns:
        float64 ``[samples, channels]`` and the sampling rate.

    Raises:
        AudioError: It is no audio, too large, too long, or of an impossible rate or number of channels.
    """
    if len(data) > settings.max_audio_bytes:
        raise AudioError(f"the audio file is larger than {settings.max_audio_bytes} bytes")
    try:
        with soundfile.SoundFile(io.BytesIO(_with_length(data))) as file:
            check_rate(file.samplerate)
            check_channels(file.channels)
            heard = math.ceil((CLIP_SECONDS + _MARGIN_SECONDS) * file.samplerate)
            if file.frames > _KNOWN_FRAMES:
                return _decode_flac(data, heard), file.samplerate
            if file.frames > settings.max_audio_seconds * file.samplerate:
                raise AudioError(
                    f"the audio is {file.frames / file.samplerate:.0f} s long; at most {settings.max_audio_seconds:g} s"
                )
            return file.read(min(heard, max(file.frames, 0)), dtype="float64", always_2d=True), file.samplerate
    except soundfile.SoundFileError as error:
        raise AudioError("the data cannot be decoded as audio") from error


def _with_length(data: bytes) -> bytes:
    """A WAV that was written to a pipe says that it has no samples; it is made to say that it goes on to its end."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return data
    place = 12
    while place + 8 < len(data):
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        if data[place : place + 4] == b"data":
            # A chunk behind it would mean that there are no samples indeed.
            following = int.from_bytes(data[place + 12 : place + 16], "little")
            if size == 0 and place + 16 + following > len(data):
                return b"".join((data[:4], _NO_SIZE, data[8 : place + 4], _NO_SIZE, data[place + 8 :]))
            return data
        place += 8 + size + size % 2
    return data


def _decode_flac(data: bytes, heard: int) -> Any:
    """The first frames of a FLAC whose header does not say how many there are, which libsndfile only streams.

    Returns:
        float64 ``[samples, channels]``.
    """
    import av
    import numpy as np

    blocks: list[Any] = []
    try:
        # The format is named, so that FFmpeg does not guess one that refers to other files.
        with av.open(io.BytesIO(data), mode="r", format="flac") as container:
            for frame in container.decode(audio=0):
                values = frame.to_ndarray()
                channels = frame.layout.nb_channels
                block = values.T if frame.format.is_planar else values.reshape(-1, channels)
                blocks.append(block / -float(np.iinfo(values.dtype).min))
                if sum(map(len, blocks)) >= heard:
                    break
    except av.error.FFmpegError as error:
        raise AudioError("the data cannot be decoded as audio") from error
    if not blocks:
        raise AudioError("the data holds no audio")
    return np.concatenate(blocks)[:heard]


def decode_base64(data: str, settings: ServeSettings) -> bytes:
    """Decode base64, strictly but for line breaks; a ``data:`` URL's is what follows its comma.

    Raises:
        AudioError: It is no base64, or of a file that is too large.
    """
    if data[:5].lower() == "data:":
        head, _, data = data.partition(",")
        if not head.lower().endswith(";base64"):
            raise AudioError("a data URL must hold base64")
    if len(data) > 2 * settings.max_audio_bytes:  # no line is that short
        raise AudioError(f"the audio file is larger than {settings.max_audio_bytes} bytes")
    try:
        return binascii.a2b_base64("".join(data.split()).encode("ascii"), strict_mode=True)
    except (ValueError, UnicodeEncodeError) as error:
        raise AudioError("the data is not base64") from error


def read_local(name: str, settings: ServeSettings) -> bytes:
    """Read a file under the allowed folder; links are followed first and judged by where they lead.

    Raises:
        AudioError: No folder is allowed, the file is outside, missing, not a plain file or too large.
    """
    if settings.allowed_local_media_path is None:
        raise AudioError("local files are not served; start the server with --allowed-local-media-path FOLDER")
    root = Path(settings.allowed_local_media_path).resolve()
    try:
        path = (root / name).resolve()
        allowed = path.is_relative_to(root) and path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL byte, a name too long
        raise AudioError("the file name cannot be used") from error
    if not allowed:
        raise AudioError("there is no such file under --allowed-local-media-path")
    if path.stat().st_size > settings.max_audio_bytes:
        raise AudioError(f"the file is larger than {settings.max_audio_bytes} bytes")
    try:
        return path.read_bytes()
    except OSError as error:
        raise AudioError(f"the file cannot be read ({error.strerror})") from error


async def fetch(url: str, settings: ServeSettings) -> bytes:
    """Fetch a file over http(s) from an allowed host.

    The host's addresses are looked up once, judged, and then connected to: an answer that changes in between is of no
    use to anybody. Redirects are not followed.

    Raises:
        AudioError: The address is not allowed, does not answer in time, or sends too much.
    """
    host = allowed_host(url, settings.allowed_media_domains)
    connector = aiohttp.TCPConnector(resolver=PublicResolver(), use_dns_cache=False)
    timeout = aiohttp.ClientTimeout(total=settings.fetch_seconds)
    try:
        target = URL(url)
        if (target.host or "").rstrip(".") != host:  # the client's parser must not see another host than ours
            raise AudioError("the URL cannot be read")
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, trust_env=False) as session,
            session.get(target, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise AudioError(f"{host} answered with status {response.status}")
            data = bytearray()
            async for chunk in response.content.iter_chunked(1 << 16):
                data += chunk
                if len(data) > settings.max_audio_bytes:
                    raise AudioError(f"the file at {host} is larger than {settings.max_audio_bytes} bytes")
            return bytes(data)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
        raise AudioError(f"{host} cannot be fetched from ({type(error).__name__})") from error


def allowed_host(url: str, domains: Sequence[str]) -> str:
    """The host of a URL, if files may be fetched from it.

    Raises:
        AudioError: It is no http(s) URL, holds a user name, or its host is not in the list or not public.
    """
    try:
        parts = urlsplit(url)
        host, _ = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:
        raise AudioError("the URL cannot be read") from error
    if parts.scheme not in ("http", "https") or not host:
        raise AudioError("only http and https URLs are fetched")
    if "@" in parts.netloc:
        raise AudioError("URLs with a user name are not fetched")
    if host not in {domain.lower().rstrip(".") for domain in domains}:
        raise AudioError("the URL's host is not allowed; start the server with --allowed-media-domains HOST")
    try:
        literal = ipaddress.ip_address(host)
    except ValueError:
        return host
    if not is_public(str(literal)):
        raise AudioError("private addresses are not fetched from")
    return host


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        # Forms that carry an IPv4 address are judged by it.
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if embedded is None and ip in _NAT64:
            embedded = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if embedded is not None:
            return is_public(str(embedded))
        # Python takes for global what no registry speaks of, old local forms among it.
        return ip in _UNICAST and ip.is_global
    return ip.is_global and not ip.is_multicast


class PublicResolver(AbstractResolver):
    """Looks up hosts and refuses the ones with any address that is not public."""

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_UNSPEC) -> list[Any]:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        addresses = [(entry[0], str(entry[4][0])) for entry in found]
        if not addresses or not all(is_public(address) for _, address in addresses):
            raise OSError("not a public address")
        known = {"hostname": host, "port": port, "proto": 0, "flags": socket.AI_NUMERICHOST}
        return [{**known, "host": address, "family": kind} for kind, address in addresses]

    async def close(self) -> None: ...

"""Where a server listens: why it cannot, and what is said once it does."""

import asyncio
import errno
import os
import socket
import ssl
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from mergekit_bio.engine.vllm.dial import LARGEST
from mergekit_bio.errors import EngineError
from mergekit_bio.serve.keys import vllms_keys
from mergekit_bio.serve.settings import PAGE, ServeSettings

#: How often a server that starts is asked whether it listens.
_LOOK_SECONDS = 0.05
#: What vLLM's arguments are given where another server has begun to listen at their address first.
_TAKEN = "mergekit_bio_address_is_taken"
#: Hosts that stand for every address of the machine, as vLLM reads them -> the address that is tried from itself.
_EVERYWHERE: Mapping[str | None, str] = {None: "127.0.0.1", "": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def check_certificate(args: Any) -> None:
    """Refuse a certificate that cannot be used. vLLM would read it only when its engine is up.

    Args:
        args: vLLM's arguments.

    Raises:
        EngineError: A file cannot be read, or key and certificate are none, or do not belong together.
    """
    certificate, key = args.ssl_certfile, args.ssl_keyfile
    if certificate is None:
        if key is not None:
            raise EngineError("--ssl-keyfile needs the certificate that the key belongs to: --ssl-certfile FILE")
        return
    for file in filter(None, (certificate, key, args.ssl_ca_certs)):
        try:
            Path(file).open("rb").close()
        except OSError as error:
            raise EngineError(f"{file}: cannot be read ({error.strerror})") from None
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        files = certificate if key is None else f"{certificate} and {key}"
        raise EngineError(f"{files}: no certificate in PEM with its key ({error.reason or error})") from None


@contextmanager
def address_errors(args: Any) -> Iterator[None]:
    """Say in one line why vLLM cannot have the address that a user wants.

    Args:
        args: vLLM's arguments.

    Raises:
        EngineError: What is wrong with it, and what to give instead.
    """
    try:
        yield
        if getattr(args, _TAKEN, False):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    except OverflowError as error:
        if not str(error).startswith("bind()"):
            raise
        raise EngineError(f"--port {args.port}: write a number from 1 to 65535") from None
    except OSError as error:
        if (reason := _refusal(error, args)) is None:
            raise
        raise EngineError(reason) from None


def _refusal(error: OSError, args: Any) -> str | None:
    """What an error says of the address; None where it is about something else."""
    if isinstance(error, socket.gaierror):
        return f"--host {args.host}: no address is known for this name ({error.strerror})"
    if error.errno == errno.EADDRINUSE:
        if args.uds:
            return f"--uds {args.uds}: there is a file of this name; give another one, or remove it"
        return f"port {args.port} of {args.host or 'this machine'} is in use; give another --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {args.host}: this machine has no such address; give one that it has, or 0.0.0.0 for all of them"
    if error.errno in (errno.EACCES, errno.EPERM) and error.filename is None:
        where = f"--uds {args.uds}" if args.uds else f"--port {args.port}"
        advice = "a folder that you may write to" if args.uds else "one above 1023"
        return f"{where}: {os.strerror(error.errno).lower()}; give {advice}"
    return None


def announcement(settings: ServeSettings, args: Any, *, port: int) -> str:
    """What is said when a server is ready: where it is, what to ask for, and who may.

    Args:
        settings: Of the server.
        args: vLLM's arguments.
        port: The one that it has.
    """
    first, *others = settings.names
    names = [first if settings.dial is None else f"{first}@0 to {first}@{LARGEST // 1000}", *others]
    one = settings.dial is None and not others
    address = f"unix:{args.uds}" if args.uds else _address(args, port)
    elsewhere = " and the machine's other addresses" if args.host in _EVERYWHERE and not args.uds else ""
    page = f"; page: {address}{PAGE}" if settings.page is not None and not args.uds else ""
    ready = (
        f"ready: {address}{'' if args.uds else '/v1'}{elsewhere}, model{'' if one else 's'} {', '.join(names)}{page}"
    )
    open_to_all = settings.api_keys is None and not vllms_keys(args.api_key)
    if args.uds or _is_loopback(args.host) or not open_to_all:
        return ready
    return f"{ready}\nnote: anybody who reaches this machine may ask; --api-keys FILE asks for keys"


def _address(args: Any, port: int) -> str:
    """The address that a user of this machine types."""
    host = _EVERYWHERE.get(args.host, args.host)
    return f"http{'s' if args.ssl_certfile else ''}://{f'[{host}]' if ':' in host else host}:{port}"


def _is_loopback(host: str | None) -> bool:
    """Whether a host is reached from this machine alone."""
    if host is None or host in _EVERYWHERE:
        return False
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")


async def announce_when_ready(state: Any, settings: ServeSettings, args: Any) -> None:
    """Say on stderr that a server is ready, as soon as it listens; stop it where it cannot.

    Two servers that start at the same time may both have bound one port. The second that listens is refused, which
    uvloop, the event loop, keeps to itself: it has no socket then.

    Args:
        state: Of vLLM's application, where it puts its ``uvicorn.Server``.
        settings: Of the server.
        args: vLLM's arguments.
    """
    while not ((server := getattr(state, "server", None)) and server.started):
        await asyncio.sleep(_LOOK_SECONDS)
    sockets = [listening for each in getattr(server, "servers", ()) for listening in each.sockets]
    if None in sockets:
        setattr(args, _TAKEN, True)
        server.should_exit = True
        return
    port = args.port if args.uds or not sockets else sockets[0].getsockname()[1]
    print(announcement(settings, args, port=port), file=sys.stderr, flush=True)

"""Where a server listens, and what it says of that. No engine is needed."""

import asyncio
import socket
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

from mergekit_bio.errors import EngineError
from mergekit_bio.serve.address import address_errors, announce_when_ready, announcement, check_certificate
from mergekit_bio.serve.settings import DialSettings, ServeSettings

DIAL = DialSettings("/none", 500, {}, "r", "w")
ANYBODY = "note: anybody who reaches this machine may ask; --api-keys FILE asks for keys"


def arguments(**given) -> Namespace:
    """vLLM's, as far as an address is concerned."""
    usual = {"host": "127.0.0.1", "port": 8000, "uds": None, "api_key": None}
    return Namespace(**{**usual, "ssl_certfile": None, "ssl_keyfile": None, "ssl_ca_certs": None, **given})


def said(names=("half",), dial=None, page=None, api_keys=None, **given) -> list[str]:
    settings = ServeSettings(names=names, dial=dial, page=page, api_keys=api_keys)
    return announcement(settings, arguments(**given), port=8765).splitlines()


@pytest.fixture(autouse=True)
def no_key_of_the_environment(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


def test_a_server_that_is_ready_says_where_it_is_and_what_to_ask_for():
    assert said() == ["ready: http://127.0.0.1:8765/v1, model half"]
    assert said(("owl", "half"), DIAL, page="/tmp") == [
        "ready: http://127.0.0.1:8765/v1, models owl@0 to owl@2, half; page: http://127.0.0.1:8765/page"
    ]
    assert said(ssl_certfile="c", host="::1") == ["ready: https://[::1]:8765/v1, model half"]
    assert said(uds="/run/owl.sock") == ["ready: unix:/run/owl.sock, model half"]


@pytest.mark.parametrize("host", [None, "", "0.0.0.0"])
def test_every_address_of_a_machine_has_one_to_type(host):
    (ready, _) = said(host=host)
    assert ready == "ready: http://127.0.0.1:8765/v1 and the machine's other addresses, model half"


@pytest.mark.parametrize("host", [None, "0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "owls.example"])
def test_a_server_that_others_reach_says_so_where_it_asks_for_no_key(host, tmp_path, monkeypatch):
    assert said(host=host)[1:] == [ANYBODY]
    assert said(host=host, api_key=["k"])[1:] == said(host=host, api_keys=tmp_path)[1:] == []
    assert said(host=host, uds="/run/owl.sock")[1:] == []
    monkeypatch.setenv("VLLM_API_KEY", "k")
    assert said(host=host)[1:] == []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_a_server_that_this_machine_alone_reaches_needs_no_key(host):
    assert said(host=host)[1:] == []


def test_what_is_wrong_with_an_address_is_told_by_its_flag(tmp_path):
    """By the system's own errors."""
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(tmp_path / "owl"))
        refused = [
            (socket.AF_UNIX, taken.getsockname(), f"--uds {tmp_path / 'owl'}: there is a file of this name"),
            (socket.AF_UNIX, f"{tmp_path}/none/owl", None),
            (socket.AF_INET, ("name.invalid", 8000), "--host name.invalid: no address is known for this name"),
        ]
        for family, address, message in refused:
            where = {"uds": address} if family == socket.AF_UNIX else {"host": address[0], "port": address[1]}
            error = OSError if message is None else EngineError
            with socket.socket(family) as refuses, pytest.raises(error, match=message):  # noqa: SIM117
                with address_errors(arguments(**where)):
                    refuses.bind(address)


def test_of_two_servers_that_bound_one_port_the_second_ends_and_says_why(capsys):
    uvloop, uvicorn = (pytest.importorskip(name, reason="it comes with vLLM") for name in ("uvloop", "uvicorn"))
    listeners = [socket.socket() for _ in "ab"]
    for listener in listeners:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as vLLM does
        listener.bind(("127.0.0.1", listeners[0].getsockname()[1]))
    args = arguments(port=listeners[0].getsockname()[1])
    servers = [uvicorn.Server(uvicorn.Config(nothing, log_level="error", lifespan="off")) for _ in "ab"]

    async def serve_both() -> None:
        first, second = (
            asyncio.create_task(server.serve([listener])) for server, listener in zip(servers, listeners, strict=True)
        )
        for server in servers:
            await announce_when_ready(Namespace(server=server), ServeSettings(names=("half",)), args)
        await second
        assert not first.done()
        servers[0].should_exit = True
        await first

    message = f"port {args.port} of 127.0.0.1 is in use; give another --port"
    with pytest.raises(EngineError, match=message), address_errors(args):
        uvloop.run(serve_both())
    assert capsys.readouterr().err == f"ready: http://127.0.0.1:{args.port}/v1, model half\n"


async def nothing(scope, receive, send) -> None:
    """An application."""


def test_other_errors_of_the_system_are_no_addresss():
    with pytest.raises(FileNotFoundError), address_errors(arguments()):
        Path("/no/such/file").read_text()
    with pytest.raises(OverflowError, match="too large"), address_errors(arguments()):
        raise OverflowError("too large")


def test_a_certificate_is_tried_before_anything_is_started(tmp_path):
    def make(name: str) -> dict[str, str]:
        files = {"ssl_keyfile": str(tmp_path / f"{name}.key"), "ssl_certfile": str(tmp_path / f"{name}.pem")}
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=owl", "-days", "2"]
        command += ["-keyout", files["ssl_keyfile"], "-out", files["ssl_certfile"]]
        subprocess.run(command, check=True, capture_output=True)
        return files

    one, other = make("one"), make("other")
    check_certificate(arguments())
    check_certificate(arguments(**one))
    wrong = [
        (one | {"ssl_keyfile": other["ssl_keyfile"]}, r"one\.pem and .*other\.key: .*KEY_VALUES_MISMATCH"),
        (one | {"ssl_certfile": __file__}, r"test_address\.py and .*one\.key: no certificate in PEM with its key"),
        (one | {"ssl_certfile": "none.pem"}, r"none\.pem: cannot be read \(No such file or directory\)"),
        ({"ssl_keyfile": one["ssl_keyfile"]}, "--ssl-keyfile needs the certificate"),
    ]
    for files, message in wrong:
        with pytest.raises(EngineError, match=message):
            check_certificate(arguments(**files))

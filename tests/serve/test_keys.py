"""Keys with names, from a file: what a file may be, and whom the server lets in."""

import os
import socket
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from serve.guarded_app import KEY, SETTINGS, Served
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from mergekit_bio.errors import EngineError
from mergekit_bio.serve import keys
from mergekit_bio.serve.keys import check_vllms_keys, read_keys

ANA, BEN = "a7-._~+/==", "0b" * 32


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two people's keys, which the guard is told of and looks at all the time."""
    file = tmp_path / "keys"
    file.write_text(f"# The lab's.\n\nana@lab.org: {ANA}\r\n  ben:{BEN}   # since May\n")
    for name, value in replace(SETTINGS, api_keys=file).to_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(keys, "_LOOK_SECONDS", 0)
    return file


def status(served: Served, key: str | None = None, path: str = "/info") -> int:
    return served.ask(path, **({} if key is None else {"Authorization": f"Bearer {key}"}))[0]


def test_a_file_has_a_key_and_a_name_a_line(file):
    assert read_keys(file) == {ANA: "ana@lab.org", BEN: "ben"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no keys"),
        ("# ana: secret\n", "has no keys"),
        ("ana secret\n", ":1: a line is NAME: KEY"),
        ("\n: secret\n", ":2: a line is NAME: KEY, the name of letters"),
        ("--api-key: secret\n", ":1: a line is NAME: KEY, the name of letters"),
        ("ana:\n", ":1: a line is NAME: KEY, the key of letters"),
        ("ana: 'secret'\n", ":1: a line is NAME: KEY, the key of letters"),
        ("ana: sec ret\n", ":1: a line is NAME: KEY, the key of letters"),
        ("ana: sécret\n", ":1: a line is NAME: KEY, the key of letters"),
        ("ana: secret#one\n", ":1: a line is NAME: KEY, the key of letters"),
        ("ana: secret\n\nben: secret\n", ":3: has the key of line 1"),
        ("secret: ana\nben: bens\nsecret: bob\n", ":3: has the name of line 1"),
    ],
)
def test_a_file_that_is_none_is_refused_by_its_line_without_a_word_of_a_key(tmp_path, text, said):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(EngineError) as refused:
        read_keys(file)
    assert str(refused.value).startswith(f"{file}:") and said in str(refused.value)
    assert "secret" not in str(refused.value)


def test_a_file_that_windows_has_written_is_read(tmp_path):
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbf# The lab's.\r\nana: secret\r\n")
    assert read_keys(tmp_path / "keys") == {"secret": "ana"}


def test_what_cannot_be_read_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(EngineError, match="is no regular file"):
            read_keys(place)
    with pytest.raises(EngineError, match="the keys cannot be read"):
        read_keys(tmp_path / "none")
    (tmp_path / "keys").write_bytes(b"ana: \xff\n")
    with pytest.raises(EngineError, match="is no text"):
        read_keys(tmp_path / "keys")


@pytest.mark.parametrize("own", [None, KEY])
def test_each_key_of_the_file_lets_in_and_so_does_vllms_own(file, own):
    with Served(key=own) as served:
        assert [status(served, key) for key in (ANA, BEN)] == [200, 200]
        assert status(served, KEY) == (401 if own is None else 200)
        for key in (None, "", "ana@lab.org", ANA[:-1], f"{ANA}=", BEN.upper(), f"{ANA} {BEN}"):
            assert status(served, key) == 401, key
        assert status(served, path="/health") == 200


def test_a_key_of_the_environment_lets_in_beside_the_file(file, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with Served() as served:
        assert [status(served, key) for key in (KEY, ANA, "other")] == [200, 200, 401]


def test_a_file_that_changes_is_read_again_and_one_that_breaks_changes_nothing(file, capfd):
    with Served() as served:
        assert [status(served, key) for key in (ANA, BEN, "new")] == [200, 200, 401]
        # 1. Replaced whole, as editors do.
        other = file.with_name("other")
        other.write_text(f"ana: {ANA}\ncy: new\n")
        other.replace(file)
        assert [status(served, key) for key in (ANA, BEN, "new")] == [200, 401, 200]
        # 2. Broken, then gone, then as it should be.
        file.write_text("ana\n")
        assert [status(served, key) for key in (ANA, BEN)] == [200, 401]
        file.unlink()
        assert [status(served, key) for key in (ANA, BEN)] == [200, 401]
        file.write_text(f"ben: {BEN}\n")
        assert [status(served, key) for key in (ANA, BEN)] == [401, 200]
    said = capfd.readouterr().err
    assert said.count("the keys stay as they were") == 2 and said.count("read again") == 2
    assert not any(key in said for key in (ANA, BEN, "new"))


def test_what_could_not_be_read_for_a_while_is_read_when_it_can_be(file, capfd, monkeypatch):
    """A user whose key is taken away is let in no longer than that."""
    with Served() as served:
        file.write_text(f"ben: {BEN}\n")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_text", lambda *_: (_ for _ in ()).throw(OSError(24, "Too many open files")))
            assert [status(served, key) for key in (ANA, BEN, None)] == [200, 200, 401]
        assert [status(served, key) for key in (ANA, BEN)] == [401, 200]
    assert capfd.readouterr().err.count("Too many open files") == 1


def test_a_server_that_is_up_needs_the_file_no_more(file):
    with Served() as served:
        file.unlink()
        assert [served.ask("/health")[0], status(served, ANA), status(served, "new")] == [200, 200, 401]


def test_only_what_a_browser_asks_beforehand_needs_no_key(file):
    asked = []

    async def options(request: Request) -> PlainTextResponse:
        asked.append(dict(request.headers))
        return PlainTextResponse("all of it")

    with Served(Route("/metrics", options, methods=["OPTIONS"])) as served:
        for headers, answer in (
            ("", b"HTTP/1.1 401"),
            ("Origin: http://x\r\n", b"HTTP/1.1 401"),
            ("Origin: http://x\r\nAccess-Control-Request-Method: GET\r\n", b"HTTP/1.1 200"),
        ):
            link = socket.create_connection(served.socket.getsockname(), timeout=30)
            link.sendall(f"OPTIONS /metrics HTTP/1.1\r\nHost: x\r\n{headers}\r\n".encode())
            assert link.recv(1000).startswith(answer), headers
    assert len(asked) == 1


@pytest.mark.parametrize("given", [[""], [KEY, ""], ["sécret"]])
def test_a_key_of_vllms_that_is_none_is_refused(given, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with pytest.raises(EngineError, match=r"^--api-key.*key") as refused:
        check_vllms_keys(given)
    assert "sécret" not in str(refused.value)
    check_vllms_keys([KEY])
    check_vllms_keys(None)


async def show(request: Request) -> PlainTextResponse:
    return PlainTextResponse(repr(request.headers.getlist("authorization")))


def test_vllm_is_given_a_key_of_its_own(file):
    """It asks again for one on its own routes, and knows nothing of the file."""
    for own, given in ((KEY, [f"Bearer {KEY}"]), (None, [])):
        with Served(Route("/shown", show), key=own) as served:
            for key in (ANA, BEN):
                assert served.text("/shown", Authorization=f"Bearer {key}") == repr(given)


def test_a_server_that_cannot_have_its_keys_does_not_start_and_says_why(tmp_path, command_line, monkeypatch):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    monkeypatch.setattr("os.environ", os.environ.copy())
    file = tmp_path / "keys"
    code, out, err = command_line("serve", tmp_path / "no-model", "--api-keys", file)
    assert code == 1 and err.splitlines()[-1] == f"error: {file}: the keys cannot be read (No such file or directory)"
    file.write_text(f"ana: {ANA}\n")
    file.chmod(0o644)
    code, out, err = command_line("serve", tmp_path / "no-model", "--api-keys", file)
    assert f"note: {file}: everybody on this machine can read it; chmod o-r it" in err.splitlines()
    file.chmod(stat.S_IRUSR | stat.S_IRGRP)
    code, out, err = command_line("serve", tmp_path / "no-model", "--api-keys", file)
    assert "everybody" not in err and ANA not in out + err

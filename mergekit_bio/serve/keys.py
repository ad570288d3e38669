"""The keys that let clients in, each with a name: vLLM's own, and those of a file."""

import hashlib
import hmac
import os
import re
import stat
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mergekit_bio.errors import EngineError

#: What a bearer token is made of (RFC 6750, section 2.1). It fits a header and a cookie as it is.
_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")
_NAME = re.compile(r"\w[\w.@-]*")
_COMMENT = re.compile(r"(^|\s)#.*")
#: How often a file of keys is looked at, in seconds.
_LOOK_SECONDS = 1.0


def read_keys(file: Path) -> dict[str, str]:
    """Read a file with ``NAME: KEY`` a line, and comments after ``#`` at a line's beginning or behind a space.

    No message names a key, nor what might be one.

    Returns:
        Key -> name.

    Raises:
        EngineError: The file cannot be read, has no keys, or a line is no key with a name of its own.
    """
    if file.exists() and not file.is_file():
        raise EngineError(f"{file}: is no regular file, and keys are read again whenever they change")
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except OSError as error:
        raise EngineError(f"{file}: the keys cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise EngineError(f"{file}: is no text") from error
    names: dict[str, str] = {}
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        line = _COMMENT.sub("", line).strip()
        if not line:
            continue
        name, key = (part.strip() for part in (line.partition(":")[0], line.partition(":")[2]))
        if not _NAME.fullmatch(name):
            raise EngineError(f"{file}:{number}: a line is NAME: KEY, the name of letters, digits and . _ @ -")
        if not _KEY.fullmatch(key):
            raise EngineError(
                f"{file}:{number}: a line is NAME: KEY, the key of letters, digits and - . _ ~ + /; "
                "openssl rand -hex 32 makes one"
            )
        if key in names:
            raise EngineError(f"{file}:{number}: has the key of line {line_of[names[key]]}; give each name its own")
        if name in line_of:
            raise EngineError(f"{file}:{number}: has the name of line {line_of[name]}; give each key its own")
        names[key], line_of[name] = name, number
    if not names:
        raise EngineError(f"{file}: has no keys; write NAME: KEY a line")
    return names


def is_open_to_all(file: Path) -> bool:
    """Whether every user of this machine can read a file."""
    return bool(file.stat().st_mode & stat.S_IROTH)


class Keys:
    """Who has a key, and what they are called.

    A file is read again when it has changed. While it cannot be read, who was let in is let in still, and stderr says
    so.

    Args:
        own: Keys of vLLM's, and what each is called.
        file: With more keys; None for none.

    Raises:
        EngineError: As :func:`read_keys`.
    """

    def __init__(self, own: Mapping[str, str], file: Path | None = None) -> None:
        self._own, self._file = own, file
        self._state = self._stated()
        self._looked = time.monotonic()
        self._told = ""
        self._names = self._read()

    @property
    def asked_for(self) -> bool:
        """Whether nobody is let in without a key."""
        return bool(self._names)

    def name_of(self, key: bytes) -> str | None:
        """Whose key this is; None where it is nobody's."""
        self._look()
        # Digests are compared, all of them, so that the time taken tells neither a key's length nor its beginning.
        digest = hashlib.sha256(key).digest()
        found = [name for known, name in self._names.items() if hmac.compare_digest(digest, known)]
        return found[0] if found else None

    def _look(self) -> None:
        """Read the file again if it is another one than it was."""
        if self._file is None or time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        if (state := self._stated()) == self._state:
            return
        # What failed is tried again at every look, and told once.
        try:
            self._names = self._read()
        except EngineError as error:
            if self._told != str(error):
                print(f"note: {error}; the keys stay as they were", file=sys.stderr)
            self._told = str(error)
        else:
            print(f"note: {self._file}: read again", file=sys.stderr)
            self._state, self._told = state, ""

    def _read(self) -> dict[bytes, str]:
        keys = {**self._own, **(read_keys(self._file) if self._file is not None else {})}
        return {hashlib.sha256(key.encode()).digest(): name for key, name in keys.items()}

    def _stated(self) -> tuple[int, ...] | None:
        """What changes with the file; None where it is gone."""
        if self._file is None:
            return None
        try:
            found = self._file.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def check_vllms_keys(api_key: Sequence[str] | None) -> None:
    """Refuse what vLLM would take for a key, and clients cannot send or need not.

    Raises:
        EngineError: A key is empty, or has letters beyond ASCII.
    """
    if any(not key for key in api_key or ()):
        raise EngineError("--api-key is empty, which lets everybody in; give a key, or leave the flag out")
    for key, name in vllms_keys(api_key).items():
        if not key.isascii():
            raise EngineError(f"{name}: a key is made of ASCII letters and digits; openssl rand -hex 32 makes one")


def vllms_keys(api_key: Sequence[str] | None) -> dict[str, str]:
    """vLLM's own: ``--api-key``, or else ``VLLM_API_KEY``. Their names cannot be those of a file."""
    given = [key for key in api_key or () if key]
    if api_key:
        return {key: "--api-key" if len(given) == 1 else f"--api-key {n}" for n, key in enumerate(given, start=1)}
    environment = os.environ.get("VLLM_API_KEY")
    return {environment: "$VLLM_API_KEY"} if environment else {}

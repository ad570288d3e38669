"""What was found when clips were decoded: their digests, on disk, so that none is decoded for its digest again."""

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from threading import Lock

from mergekit_bio.audio.recording import decoder

#: Key, digest and the beginning of the sha256 of both, so that a damaged line, or two written into each other, is none.
_LINE = re.compile(rb"^([0-9a-f]{64}) ([0-9a-f]{64}) ([0-9a-f]{16})$", re.MULTILINE)


def clip_key(*recording: object, start: float, end: float, seconds: float) -> str:
    """What decides the samples of a clip, as a sha256: whatever of it changes, the clip is decoded again.

    Args:
        *recording: What tells the recording's content from any other, as values of JSON.
        start: Where the clip begins in it, in seconds.
        end: Where it ends.
        seconds: What it is cut or padded to.
    """
    return hashlib.sha256(json.dumps([decoder(), recording, start, end, seconds]).encode()).hexdigest()


class ClipDigests:
    """Clips' keys -> their digests, for any number of threads and processes.

    Args:
        file: Where they are kept, a line for each; None keeps them in memory only.
    """

    def __init__(self, file: Path | None) -> None:
        self._file, self._read_to = file, 0
        self._digests: dict[str, str] = {}
        self._lock = Lock()

    def get(self, key: str) -> str | None:
        """The digest of a clip; None where nobody has decoded it yet."""
        if key not in self._digests:
            self._read_on()
        return self._digests.get(key)

    def add(self, key: str, digest: str) -> None:
        """Remember a digest."""
        self._digests[key] = digest
        if self._file is None:
            return
        # Appended at once, so that lines of several processes do not mix. It begins a line of its own, because a
        # process that was killed may have left half of one. A disk that is full is told of where prefixes are written.
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                os.write(handle, f"\n{key} {digest} {_checksum(key, digest)}\n".encode())
            finally:
                os.close(handle)

    def _read_on(self) -> None:
        """Read what other processes, or earlier ones, have added."""
        if self._file is None:
            return
        with self._lock, suppress(OSError), self._file.open("rb") as file:
            file.seek(self._read_to)
            text = file.read()
            whole = text.rfind(b"\n") + 1  # a line that is being written is read another time
            self._read_to += whole
            for line in _LINE.finditer(text[:whole]):
                key, digest, checksum = (part.decode() for part in line.groups())
                if checksum == _checksum(key, digest):
                    self._digests[key] = digest


def _checksum(key: str, digest: str) -> str:
    return hashlib.sha256(f"{key} {digest}".encode()).hexdigest()[:16]

"""Audio prefixes on disk: many in a file, for any number of processes."""

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import Lock, Thread
from typing import IO, TYPE_CHECKING

from mergekit_bio.checkpoint.digest import tensor_bytes

if TYPE_CHECKING:
    import torch

#: Whoever encodes a clip holds the lock of one byte of this file; the system frees it where its holder is killed.
_LOCKS = "locks"


class PrefixFolder:
    """Prefixes of one tower in one dtype, by the digests of their clips.

    What is encoded together is one safetensors file, which appears whole or not at all and does not change. The
    processes that share the folder find each other's files by looking; a file that is damaged is not there.

    Args:
        path: The folder; made when the first prefixes are written.

    Attributes:
        problem: Why prefixes could not be written; None where all were. They are encoded again when needed.
    """

    def __init__(self, path: Path) -> None:
        self.problem: str | None = None
        self._path = path
        self._files: dict[str, list[Path]] = {}
        self._seen: set[str] = set()
        self._looking = Lock()
        self._locks: IO[bytes] | None = None
        self._writing: Thread | None = None

    def known(self, digests: Iterable[str]) -> set[str]:
        """Those of which a file says that it has their prefix."""
        wanted = set(digests)
        if not wanted <= self._files.keys():
            self._look()
        return wanted & self._files.keys()

    def read(self, digests: Iterable[str]) -> "dict[str, torch.Tensor]":
        """The prefixes that are here and sound, on the CPU."""
        from safetensors import SafetensorError, safe_open

        known = self.known(digests)
        by_file: dict[Path, list[str]] = {}
        for digest in known:
            for file in self._files.get(digest, ()):
                by_file.setdefault(file, []).append(digest)
        found = {}
        for file, inside in by_file.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    checksums = opened.metadata() or {}
                    for digest in inside:
                        prefix = opened.get_tensor(digest).clone()
                        # safetensors has none of its own, and a flipped bit would poison every answer about the clip.
                        if checksums.get(digest) == _checksum(digest, prefix):
                            found[digest] = prefix
            except (OSError, SafetensorError):
                continue
        for digest in known - found.keys():
            self._files.pop(digest, None)
        return found

    def write(self, prefixes: "Mapping[str, torch.Tensor]", *, claimed: Iterable[str]) -> None:
        """Write prefixes beside the work, then give up the claims on their clips."""
        self.flush()
        # Not a daemon: a process that ends writes what it has.
        self._writing = Thread(target=self._write, args=(dict(prefixes), list(claimed)))
        self._writing.start()

    def flush(self) -> None:
        """Wait until all is written."""
        if (writing := self._writing) is not None:
            writing.join()

    def claim(self, digests: Iterable[str]) -> list[str]:
        """Those that no other process is encoding; from now on, none will."""
        return [digest for digest in digests if self._lock(digest, fcntl.LOCK_EX | fcntl.LOCK_NB)]

    def wait_for(self, digest: str) -> None:
        """Wait until no other process is encoding a clip.

        It must hold no claims: two that wait for each other would wait for ever.
        """
        self.flush()
        self._lock(digest, fcntl.LOCK_EX)
        self._lock(digest, fcntl.LOCK_UN)

    def _lock(self, digest: str, how: int) -> bool:
        """Whether the lock is had; yes where there are none (the disk is full, the file system has no locks)."""
        try:
            if self._locks is None:
                self._path.mkdir(parents=True, exist_ok=True)
                self._locks = (self._path / _LOCKS).open("ab")
            fcntl.lockf(self._locks, how, 1, int(digest[:15], 16))
        except OSError as error:
            return self._locks is None or error.errno not in (errno.EACCES, errno.EAGAIN)  # another process has it
        return True

    def _look(self) -> None:
        """Take note of the files that have come since the last look."""
        from safetensors import SafetensorError, safe_open

        with self._looking:
            for file in sorted(self._path.glob("*.safetensors")):
                if file.name in self._seen:
                    continue
                self._seen.add(file.name)
                try:
                    with safe_open(file, framework="pt") as opened:
                        digests = list(opened.keys())
                except (OSError, SafetensorError):
                    continue
                for digest in digests:
                    self._files.setdefault(digest, []).append(file)

    def _write(self, prefixes: "dict[str, torch.Tensor]", claimed: list[str]) -> None:
        try:
            if prefixes:
                self._save(prefixes)
        except OSError as error:
            self.problem = self.problem or (
                f"{self._path}: audio prefixes cannot be written ({error.strerror}); where one is missed, its "
                "clip is decoded and encoded again"
            )
        finally:
            for digest in claimed:
                self._lock(digest, fcntl.LOCK_UN)

    def _save(self, prefixes: "dict[str, torch.Tensor]") -> None:
        from safetensors.torch import save

        data = save(prefixes, metadata={digest: _checksum(digest, prefix) for digest, prefix in prefixes.items()})
        self._path.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=self._path, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(partial).replace(Path(partial).with_suffix(".safetensors"))
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise


def _checksum(digest: str, prefix: "torch.Tensor") -> str:
    seal = hashlib.sha256(f"{digest} {prefix.dtype} {tuple(prefix.shape)} ".encode())
    seal.update(tensor_bytes(prefix))
    return seal.hexdigest()

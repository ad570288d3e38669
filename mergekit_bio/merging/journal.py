"""What of a merge is finished, so that one that was killed goes on where it was.

The journal lies in the scratch directory, a line for every part that is written. A part is a file that was made, a
range that was copied, or a tensor that was folded; what is half done is done again. The scratch directory is named by
the plan's digest, so that no other plan goes on with it.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import mergekit_bio
from mergekit_bio.merging.plan import ARITHMETIC, Copy, MergePlan

if TYPE_CHECKING:
    from mergekit_bio.merging.fold import Folded

#: Its name in the scratch directory.
JOURNAL = "merge.journal"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def plan_digest(plan: MergePlan) -> str:
    """Tells two plans apart, and the sources that they were made of: eight hexadecimal digits."""
    request, deltas = plan.request, [delta for fold in plan.folds for delta in fold.deltas]
    # 1. What is computed, and from which files; a file that was changed has another time or size.
    sources = {copy.source for shard in plan.shards for copy in shard.copies} | {fold.base.file for fold in plan.folds}
    sources |= {tensor.file for delta in deltas for tensor in delta.stored}
    stamps = [
        (str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file in sorted(sources) for stat in [file.stat()]
    ]
    configs = [dict(planned.adapter.config) for planned in plan.adapters]
    computed = [mergekit_bio.__version__, ARITHMETIC, request.rounding, request.seed, request.dtype, stamps, configs]
    digest = hashlib.sha256(json.dumps(computed, sort_keys=True, default=str).encode())
    # 2. Where it goes.
    for shard in plan.shards:
        digest.update(shard.header)
        digest.update(repr((shard.file, shard.size, shard.copies, shard.links)).encode())
    for fold in plan.folds:
        # A target's strengths are of the deltas in their order; each delta's text says of which tensors and how scaled.
        digest.update(repr((fold.name, fold.base, fold.shape, fold.dtype, fold.deltas, fold.targets)).encode())
    return digest.hexdigest()[:8]


class Journal:
    """The finished parts of a merge, those of a process that was killed among them.

    Args:
        scratch: The scratch directory. What is in it without a journal that can be trusted is removed.
        parts: The files that a journal tells of, and their further names. All others are written at the end, quickly,
            so they are removed and written again: this merge may want other ones.
    """

    def __init__(self, scratch: Path, parts: Collection[str]) -> None:
        self._file = scratch / JOURNAL
        self._lock = Lock()
        self._made: set[str] = set()
        self._cloned: set[str] = set()
        self._copied: set[tuple[str, int]] = set()
        self._folded: dict[str, tuple[list[str], list[Any]]] = {}
        # What a killed process has written is in memory, if not on the disk, as long as the system has not restarted.
        boot = _BOOT.read_text().strip() if _BOOT.exists() else None
        entries = list(_entries(self._file))
        if not entries or boot is None or entries[0].get("boot") != boot:
            entries = []
        _clear(scratch, {scratch / part for part in (*parts, JOURNAL)} if entries else set())
        #: Whether a process that was killed has left something to go on with.
        self.goes_on = bool(entries)
        self._stream = self._file.open("ab", buffering=0)
        self._stream.write(b"\n" if entries else b"")  # ends a line that was being written
        self._write({"boot": boot})
        for entry in entries:
            self._read(entry)

    def _read(self, entry: dict[str, Any]) -> None:
        match entry:
            case {"made": file, "cloned": cloned}:
                self._made.add(file)
                self._cloned |= {file} if cloned else set()
            case {"copied": [file, offset]}:
                self._copied.add((file, offset))
            case {"folded": name, "sha256": hashes, "products": products}:
                self._folded[name] = hashes, products

    def is_made(self, file: str) -> bool:
        """Whether a file is there with its header and size."""
        return file in self._made

    def is_cloned(self, file: str) -> bool:
        """Whether a file shares the blocks of its source, so that nothing is to be copied."""
        return file in self._cloned

    def is_copied(self, file: str, copies: Sequence[Copy]) -> bool:
        """Whether these ranges are in the file."""
        return (file, copies[0].target_offset) in self._copied

    def folded(self, name: str) -> "Folded | None":
        """What became of a fold, if it is finished."""
        if name not in self._folded:
            return None
        import torch

        from mergekit_bio.merging.fold import Folded

        hashes, products = self._folded[name]
        return Folded(tuple(hashes), torch.tensor(products, dtype=torch.float64))

    def note_made(self, file: str, *, cloned: bool) -> None:
        self._write({"made": file, "cloned": cloned})

    def note_copied(self, file: str, copies: Sequence[Copy]) -> None:
        self._write({"copied": [file, copies[0].target_offset]})

    def note_folded(self, name: str, folded: "Folded") -> None:
        self._write({"folded": name, "sha256": folded.sha256, "products": folded.products.tolist()})

    def close(self) -> None:
        """Write no more."""
        self._stream.close()

    def _write(self, entry: dict[str, Any]) -> None:
        with self._lock:
            self._stream.write(json.dumps(entry).encode() + b"\n")


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal; one that was being written when the process was killed is none."""
    if file.is_file():
        for line in file.read_bytes().splitlines():
            with suppress(ValueError):
                if isinstance(entry := json.loads(line), dict):
                    yield entry


def _clear(scratch: Path, kept: set[Path]) -> None:
    for folder, _, files in os.walk(scratch, topdown=False):
        for file in {Path(folder, name) for name in files} - kept:
            file.unlink()
        if Path(folder) != scratch and not any(Path(folder).iterdir()):
            Path(folder).rmdir()

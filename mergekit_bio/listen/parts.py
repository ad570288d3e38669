"""The parts of a file of embeddings that is not complete, each of which appears whole; and the file made of them."""

import fcntl
import json
import shutil
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from mergekit_bio.audio.recording import decoder
from mergekit_bio.checkpoint.header import build_header
from mergekit_bio.errors import RunError
from mergekit_bio.listen.publishing import problems_with, whole_file
from mergekit_bio.listen.reading import Ended, OpenRecording, content_of, stamp_of
from mergekit_bio.outside_data import changes

FORMATS = (".safetensors", ".npz")
#: NumPy's names of the data types that are written, and safetensors'.
_SAFETENSORS_DTYPES = {"|u1": "U8", "<f2": "F16", "<f4": "F32", "<f8": "F64", "<i8": "I64"}

#: A part is written when it holds so many bytes, or has taken so many seconds.
_PART_BYTES, _PART_SECONDS = 64 << 20, 30.0
#: Where the names of all recordings take more bytes, they do not go into the header, which may have 100 MB.
_MOST_HEADER_BYTES = 16 << 20
#: The key of a part's metadata that holds what it says of recordings.
_NOTE = "part"

#: Gives the rows of a column, some at a time.
_Chunks = Callable[[str], "Iterator[np.ndarray]"]
_Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class EmbeddedWindow:
    """A row of the file: a window of a recording, from ``start`` to ``end`` seconds, and its vectors by column."""

    recording: str
    start: float
    end: float
    vectors: "Mapping[str, np.ndarray]"


class Parts:
    """The parts of a file that is not complete, each of which appears whole, with what they say of recordings.

    In a part, and in the file, the rows of a recording stand together, and the recordings in the order in which the
    user names them, whatever order they are heard in.

    Args:
        folder: Where they are; made when it is gone on with.

    Attributes:
        folder: As given.
        identity: What decided the embeddings in them; empty where there are none.
        rows: How many each recording has.
        failed: Recordings that are no use, or not to their end, each with its error.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts = [(file, _read_note(file)) for file in sorted(folder.glob("*.safetensors"))]
        self.identity: dict[str, Any] = self._parts[0][1]["identity"] if self._parts else {}
        self.rows: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        #: The recordings that are named, in order: the place of each, and what changes with its content.
        self._places: dict[str, int] = {}
        self._stamps: dict[str, str] = {}
        self._lock = ExitStack()
        self._begin_part()

    def go_on(self, identity: dict[str, Any], *, overwrite: bool) -> None:
        """Make sure that the parts are of these embeddings, and that nobody else writes them.

        Raises:
            RunError: They are of others, and are not to be overwritten; or another process is at it.
        """
        identity = json.loads(json.dumps(identity))
        with problems_with(self.folder):
            self.folder.mkdir(exist_ok=True)
            lock = self._lock.enter_context((self.folder / ".lock").open("wb"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"{self.folder}: another process is writing it; wait for it, or give another --out"
            ) from None
        if overwrite:
            for file, _ in self._parts:
                file.unlink()
            self._parts = []
        elif self.identity not in ({}, identity):
            raise RunError(
                f"{self.folder}: holds parts of other embeddings: {changes(self.identity, identity)}; go on with "
                "those, or give another --out (or --overwrite)"
            )
        self.identity = identity

    def open_recordings(self, recordings: Sequence[Path]) -> list[OpenRecording]:
        """What is not in the parts yet. A recording that has changed is heard anew, as is one whose decoder has."""
        found = {str(path): stamp_of(path) for path in recordings}
        self._places = {name: place for place, name in enumerate(found)}
        self._stamps = {name: stamp for name, (stamp, _) in found.items()}
        ended = set()
        for _, note in self._parts:
            for name, count in note["rows"].items():
                if self._is_current(name, note):
                    self.rows[name] += count
            for name, error in note["ended"].items():
                may_be_mended = note["decoder"] != decoder() or note["stamps"][name] != self._stamps.get(name)
                if self._is_current(name, note) and (error is None or not may_be_mended):
                    ended.add(name)
                    if error is not None:
                        self.failed[name] = error
        return [OpenRecording(name, self.rows[name], size) for name, (_, size) in found.items() if name not in ended]

    def add(self, windows: Sequence[EmbeddedWindow], ended: Sequence[Ended]) -> None:
        """Add rows, those of a recording in order, and recordings that have been heard."""
        for window in windows:
            # A copy: what another process has sent stands in Ray's memory, which is small, as long as anybody holds it.
            vectors = {name: values.copy() for name, values in window.vectors.items()}
            self._windows.setdefault(window.recording, []).append(replace(window, vectors=vectors))
            self._bytes += sum(values.nbytes for values in vectors.values())
            self.rows[window.recording] += 1
        for recording in ended:
            if recording.error is not None and (recording.deadly or not recording.passing):
                self.failed[recording.recording] = recording.error
            if not recording.passing:
                self._ended[recording.recording] = recording.error
        if self._bytes >= _PART_BYTES or time.perf_counter() - self._since >= _PART_SECONDS:
            self._flush()

    def close(self) -> None:
        """Publish what there is. A folder with nothing in it goes."""
        self._flush()
        if not self._parts:
            self.remove()

    def _flush(self) -> None:
        if not self._windows and not self._ended:
            return
        names = sorted(self._windows, key=self._places.__getitem__)
        windows = [window for name in names for window in self._windows[name]]
        rows = {name: len(self._windows[name]) for name in names}
        columns = {}
        if windows:
            columns = {name: np.stack([window.vectors[name] for window in windows]) for name in windows[0].vectors}
            columns["start"] = np.array([window.start for window in windows])
            columns["end"] = np.array([window.end for window in windows])
            columns["recording"] = np.repeat(np.arange(len(names)), list(rows.values()))
        note = {
            "identity": self.identity,
            "decoder": decoder(),
            "stamps": {name: self._stamps[name] for name in {*names, *self._ended}},
            "rows": rows,
            "ended": self._ended,
        }
        file = self.folder / f"{len(self._parts):06d}.safetensors"
        shapes = {name: (values.dtype, values.shape) for name, values in columns.items()}
        metadata = {"recordings": json.dumps(names), _NOTE: json.dumps(note)}
        with whole_file(file) as partial:
            _write_safetensors(partial, shapes, metadata, lambda name: iter([columns[name]]))
        self._parts.append((file, note))
        self._begin_part()

    def join(self, out: Path) -> None:
        """Write all rows into one file, in the format that its name says, no more than a part of them in memory."""
        names = [name for name in self._places if self.rows[name]]
        rows = [self.rows[name] for name in names]
        runs = self._runs(names)

        def chunks(column: str) -> "Iterator[np.ndarray]":
            if column == "recording":
                yield np.repeat(np.arange(len(names)), rows)
                return
            for file, begin, end in runs:
                with safe_open(file, "np") as part:
                    yield part.get_slice(column)[begin:end]

        opened = next(file for file, note in self._parts if note["rows"])
        shapes = {name: (values.dtype, (sum(rows), *values.shape[1:])) for name, values in load_file(opened).items()}
        with whole_file(out) as partial:
            if out.suffix == ".npz":
                _write_npz(partial, shapes, np.array(names), chunks)
                with np.load(partial) as written:  # it can be opened: only then the parts may go
                    assert len(written["recordings"]) == len(names)
                return
            listed = json.dumps(names)
            if len(listed) > _MOST_HEADER_BYTES:
                text = np.frombuffer(listed.encode(), np.uint8)
                shapes["recordings"] = (text.dtype, text.shape)
                with_names = lambda name: iter([text]) if name == "recordings" else chunks(name)  # noqa: E731
                _write_safetensors(partial, shapes, {}, with_names)
            else:
                _write_safetensors(partial, shapes, {"recordings": listed}, chunks)
            with safe_open(partial, "np") as written:
                assert set(written.keys()) == set(shapes)

    def remove(self) -> None:
        """Take the parts away."""
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._lock.close()

    def _begin_part(self) -> None:
        self._windows: dict[str, list[EmbeddedWindow]] = {}
        self._ended: dict[str, str | None] = {}
        self._bytes, self._since = 0, time.perf_counter()

    def _is_current(self, name: str, note: Mapping[str, Any]) -> bool:
        """Whether what a part says of a recording is about the file as it is."""
        return content_of(note["stamps"][name]) == content_of(self._stamps.get(name, ""))

    def _runs(self, names: Sequence[str]) -> list[tuple[Path, int, int]]:
        """Where the rows of recordings stand, in order: a part, the first row there, and the one after the last.

        Of several workers each is at a stretch of its own, so a part has a few runs, not one for every recording.
        """
        # 1. Recording by recording. The rows of one that was heard in several goes are in as many parts, in order.
        places: defaultdict[str, list[tuple[Path, int, int]]] = defaultdict(list)
        for file, note in self._parts:
            begin = 0
            for name, count in note["rows"].items():
                if self._is_current(name, note):
                    places[name].append((file, begin, begin + count))
                begin += count
        # 2. Those that stand one behind the other are read together.
        runs: list[tuple[Path, int, int]] = []
        for file, begin, end in (place for name in names for place in places[name]):
            if runs and runs[-1][0] == file and runs[-1][2] == begin:
                runs[-1] = file, runs[-1][1], end
            else:
                runs.append((file, begin, end))
        return runs


def _read_note(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, "np") as part:
            note: dict[str, Any] = json.loads((part.metadata() or {})[_NOTE])
            return note
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise RunError(
            f"{file}: is no part of embeddings ({error}); move its folder away, or give another --out"
        ) from None


def _write_safetensors(file: Path, shapes: _Shapes, metadata: Mapping[str, str], chunks: _Chunks) -> None:
    tensors = [(name, _SAFETENSORS_DTYPES[dtype.str], shape) for name, (dtype, shape) in shapes.items()]
    with file.open("wb") as out:
        out.write(build_header(tensors, metadata))
        for name in shapes:
            for values in chunks(name):
                np.ascontiguousarray(values).tofile(out)


def _write_npz(file: Path, shapes: _Shapes, recordings: "np.ndarray", chunks: _Chunks) -> None:
    """As ``numpy.savez`` writes it, an array in memory a chunk at a time."""
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        with archive.open("recordings.npy", "w") as member:
            np.lib.format.write_array(member, recordings)
        for name, (dtype, shape) in shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                for values in chunks(name):
                    member.write(np.ascontiguousarray(values).data)

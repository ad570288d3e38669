"""Embeddings of recordings, however many there are: written in parts as they come, and into one file at the end."""

import fcntl
import json
import shutil
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from mergekit_bio.audio.clip import CLIP_SECONDS, Clip, samples_of
from mergekit_bio.audio.decoding import stated_length
from mergekit_bio.audio.device import full_float32, pick_device
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.audio.recording import decoder
from mergekit_bio.checkpoint.header import build_header
from mergekit_bio.checkpoint.identity import weights_identity
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.errors import AudioError, OutputError, RunError
from mergekit_bio.listen.progress import Listener, RecordingCounter
from mergekit_bio.listen.publishing import problems_with, whole_file
from mergekit_bio.listen.reading import Ended, OpenRecording, Window, WindowReader, each_once, stamp_of, windows_of
from mergekit_bio.outside_data import changes

FORMATS = (".safetensors", ".npz")
Dtype = Literal["float32", "float16"]
#: NumPy's names of the data types that are written, and safetensors'.
_SAFETENSORS_DTYPES = {"|u1": "U8", "<f2": "F16", "<f4": "F32", "<f8": "F64", "<i8": "I64"}

#: Windows that are encoded at a time, on a CPU and on a GPU.
_BATCH, _BATCH_ON_GPU = 4, 32
#: Decoded windows that wait, at most: 1.3 MB each.
_AHEAD = 64
#: A part is written when it holds so many bytes, or has taken so many seconds.
_PART_BYTES, _PART_SECONDS = 64 << 20, 30.0
#: Where all prefixes would take more bytes than that, they are left out unless they are asked for.
_MOST_PREFIX_BYTES = 4e9
#: Where the names of all recordings take more bytes, they do not go into the header, which may have 100 MB.
_MOST_HEADER_BYTES = 16 << 20
#: Bytes a second of a recording, at least, where nothing tells how long it is: a phone's quietest.
_LEAST_RATE = 4000
#: Recordings whose headers are looked at to tell how long all of them are.
_LOOKED_AT = 100


@dataclass(frozen=True, kw_only=True)
class EmbedRequest:
    """What a user asks for.

    Attributes:
        model: A merged directory or the original checkpoint, or a hub id.
        out: The file.
        window: Seconds an embedding stands for.
        hop: Seconds between windows.
        channel: The channel that is heard, from 1; None for the mean of all.
        device: Where the tower runs.
        prefixes: Whether prefixes are written too; None: unless they would take gigabytes.
        dtype: Of the embeddings.
        overwrite: Replace ``out``.
    """

    model: str
    out: Path
    window: float
    hop: float
    channel: int | None = None
    device: str = "auto"
    prefixes: bool | None = None
    dtype: Dtype = "float32"
    overwrite: bool = False


@dataclass(frozen=True)
class Embedded:
    """What has come of it.

    Attributes:
        heard: Recordings, all of them.
        recordings: How many have rows in the file.
        clips: The rows.
        failed: Those that are no use, each with its error.
        broken: Those that were heard up to where they break.
        prefixes: Whether the file has them.
    """

    heard: int
    recordings: int
    clips: int
    failed: dict[str, str]
    broken: dict[str, str]
    prefixes: bool


def embed_archive(request: EmbedRequest, recordings: Sequence[Path], listener: Listener) -> Embedded:
    """Embed every window of every recording, or go on where that was stopped.

    The file holds, with a row for every window:

    - ``encoder`` ``[rows, encoder hidden]``: BEATs' output, averaged over the tokens of the recording (padding left
      out);
    - ``prefix`` ``[rows, n_prefix, hidden]``, where it is asked for: what Llama reads;
    - ``recording`` int64 ``[rows]``: which recording, an index into ``recordings``;
    - ``start`` and ``end`` float64 ``[rows]``: seconds.

    ``recordings`` are the file names: an array of strings in ``.npz``, a JSON list in the metadata of
    ``.safetensors``, or where that is longer than such a file's header should be, in a tensor ``recordings`` of its
    bytes. Until all of it is there, the parts stand in the folder ``OUT.parts``, each such a file.

    Raises:
        OutputError: The file exists already, or its name or folder will not do, or the disk.
        RunError: The parts hold other embeddings; what differs is named.
        MergekitBioError: The model is no use.
    """
    # 1. What is there already.
    out = request.out
    _check(out, overwrite=request.overwrite)
    device = pick_device(request.device)
    prefix = AudioPrefix.from_pretrained(request.model)
    recordings = each_once(recordings)
    parts = _Parts(out.with_name(f"{out.name}.parts"))
    with_prefix = request.prefixes
    if with_prefix is None:
        before = None if request.overwrite else parts.identity.get("prefixes")
        with_prefix = _small_enough(prefix, request, recordings, listener) if before is None else before
    identity = {
        "checkpoint": weights_identity(resolve(request.model).path),
        "window": request.window,
        "hop": request.hop,
        "channel": request.channel,
        "dtype": request.dtype,
        "prefixes": with_prefix,
    }
    parts.go_on(identity, overwrite=request.overwrite)
    still_open = parts.open_recordings(recordings)
    # 2. Embed the rest. A part holds whole batches, and says which recordings have ended in it.
    prefix = prefix.to(device)
    batch = _BATCH if prefix.audio_query_tokens.device.type == "cpu" else _BATCH_ON_GPU
    counter = RecordingCounter(
        len(recordings), still_open, failed=len(parts.failed), listener=listener, workers=lambda: 1
    )
    unread: list[str] = []
    cut = windows_of(window=request.window, hop=request.hop, channel=request.channel)
    with closing(WindowReader(still_open, cut, prepare=list, ahead=_AHEAD)) as reader, closing(parts):
        while heard := reader.take(batch):
            since = time.perf_counter()
            windows = [item for item in heard if isinstance(item, Window)]
            ended = [item for item in heard if isinstance(item, Ended)]
            rows = _embed(prefix, [window.clip for window in windows], with_prefix=with_prefix, dtype=request.dtype)
            parts.add([window.recording for window in windows], rows, ended)
            unread += [str(recording.error) for recording in ended if recording.passing]
            counter.add(len(windows), ended, seconds=time.perf_counter() - since)
    # 3. One file of all parts, which go.
    if unread:
        raise AudioError(
            f"{len(unread)} recordings could not be read, the last: {unread[-1]}; what is embedded stands in "
            f"{parts.folder}; run the command again to go on"
        )
    in_part = set(parts.recordings)
    embedded = Embedded(
        heard=len(recordings),
        recordings=len(parts.recordings),
        clips=parts.rows,
        failed={name: error for name, error in parts.failed.items() if name not in in_part},
        broken={name: error for name, error in parts.failed.items() if name in in_part},
        prefixes=with_prefix,
    )
    if embedded.clips:
        parts.join(out)
    parts.remove()
    return embedded


def _embed(prefix: AudioPrefix, clips: Sequence[Clip], *, with_prefix: bool, dtype: Dtype) -> "dict[str, np.ndarray]":
    """The rows of some windows, without the column ``recording``."""
    config = prefix.config
    if not clips:
        return {}
    device = prefix.audio_query_tokens.device
    with torch.inference_mode(), full_float32():
        encoded = prefix.encode(prefix.features(torch.stack([clip.waveform for clip in clips]).to(device)))
        embedded = prefix.project(encoded) if with_prefix else None
    lengths = [config.beats.num_tokens(round((clip.end - clip.start) * config.sampling_rate)) for clip in clips]
    pooled = torch.stack([row[:length].mean(0) for row, length in zip(encoded, lengths, strict=True)])
    vectors = {"encoder": pooled} | ({} if embedded is None else {"prefix": embedded})
    kept = {name: values.to(getattr(torch, dtype)).cpu().numpy() for name, values in vectors.items()}
    if not all(np.isfinite(values).all() for values in kept.values()):
        raise OutputError(f"--dtype {dtype}: a value is too large for it; take float32")
    return kept | {
        "start": np.array([clip.start for clip in clips]),
        "end": np.array([clip.end for clip in clips]),
    }


class _Parts:
    """The parts of a file that is not complete, each of which appears whole, with what they say of recordings.

    Args:
        folder: Where they are; made when it is gone on with.

    Attributes:
        folder: As given.
        identity: What decided the embeddings in them; empty where there are none.
        recordings: Those with rows, in the order of their rows.
        failed: Those that are no use, or not to their end, each with its error.
        rows: How many there are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts = [(file, _read_note(file)) for file in sorted(folder.glob("*.safetensors"))]
        self.identity: dict[str, Any] = self._parts[0][1]["identity"] if self._parts else {}
        self.recordings: list[str] = []
        self.failed: dict[str, str] = {}
        self.rows = 0
        self._stamps: dict[str, str] = {}
        self._numbers: dict[str, int] = {}
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
        self._stamps = {name: stamp for name, (stamp, _) in found.items()}
        rows: Counter[str] = Counter()
        ended = set()
        for _, note in self._parts:
            for name, count in note["rows"].items():
                if self._is_current(name, note):
                    rows[name] += count
                    self._count(name, count)
            for name, error in note["ended"].items():
                if self._is_current(name, note) and (error is None or note["decoder"] == decoder()):
                    ended.add(name)
                    if error is not None:
                        self.failed[name] = error
        return [OpenRecording(name, rows[name], size) for name, (_, size) in found.items() if name not in ended]

    def add(self, names: Sequence[str], columns: "Mapping[str, np.ndarray]", ended: Sequence[Ended]) -> None:
        """Add rows, each with the name of its recording, and recordings that have been heard."""
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values)
            self._bytes += values.nbytes
        for name in names:
            self._names[name] = self._names.get(name, 0) + 1
            self._count(name, 1)
        self._of_rows += names
        for recording in ended:
            if recording.passing:
                continue
            self._ended[recording.recording] = recording.error
            if recording.error is not None:
                self.failed[recording.recording] = recording.error
        if self._bytes >= _PART_BYTES or time.perf_counter() - self._since >= _PART_SECONDS:
            self._flush()

    def close(self) -> None:
        """Publish what there is."""
        self._flush()

    def _flush(self) -> None:
        if not self._names and not self._ended:
            return
        names = list(self._names)
        columns = {name: np.concatenate(values) for name, values in self._columns.items()}
        if columns:
            columns["recording"] = np.array([names.index(name) for name in self._of_rows])
        note = {
            "identity": self.identity,
            "decoder": decoder(),
            "stamps": {name: self._stamps[name] for name in {*names, *self._ended}},
            "rows": self._names,
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
        """Write all rows into one file, in the format that its name says, a part at a time."""
        opened = next(file for file, note in self._parts if note["rows"])
        shapes = {name: (values.dtype, (self.rows, *values.shape[1:])) for name, values in load_file(opened).items()}
        with whole_file(out) as partial:
            if out.suffix == ".npz":
                _write_npz(partial, shapes, np.array(self.recordings), self._chunks)
                with np.load(partial) as written:  # it can be opened: only then the parts may go
                    assert len(written["recordings"]) == len(self.recordings)
                return
            names = json.dumps(self.recordings)
            if len(names) > _MOST_HEADER_BYTES:
                text = np.frombuffer(names.encode(), np.uint8)
                shapes["recordings"] = (text.dtype, text.shape)
                chunks = lambda name: iter([text]) if name == "recordings" else self._chunks(name)  # noqa: E731
                _write_safetensors(partial, shapes, {}, chunks)
            else:
                _write_safetensors(partial, shapes, {"recordings": names}, self._chunks)
            with safe_open(partial, "np") as written:
                assert set(written.keys()) == set(shapes)

    def remove(self) -> None:
        """Take the parts away."""
        shutil.rmtree(self.folder)
        self._lock.close()

    def _begin_part(self) -> None:
        self._names: dict[str, int] = {}
        self._of_rows: list[str] = []
        self._columns: dict[str, list[np.ndarray]] = {}
        self._ended: dict[str, str | None] = {}
        self._bytes, self._since = 0, time.perf_counter()

    def _count(self, name: str, rows: int) -> None:
        if name not in self._numbers:
            self._numbers[name] = len(self.recordings)
            self.recordings.append(name)
        self.rows += rows

    def _is_current(self, name: str, note: Mapping[str, Any]) -> bool:
        """Whether what a part says of a recording is about the file as it is."""
        return bool(note["stamps"][name] == self._stamps.get(name))

    def _chunks(self, column: str) -> "Iterator[np.ndarray]":
        """A column of all parts, without the rows of recordings that have changed since."""
        for file, note in self._parts:
            if not note["rows"]:
                continue
            with safe_open(file, "np") as part:
                numbers = [self._numbers[name] if self._is_current(name, note) else -1 for name in note["rows"]]
                recording = np.array(numbers)[part.get_tensor("recording")]
                values = recording if column == "recording" else part.get_tensor(column)
                yield values if recording.min() >= 0 else values[recording >= 0]


#: The key of a part's metadata that holds what it says of recordings.
_NOTE = "part"
#: Gives the rows of a column, some at a time.
_Chunks = Callable[[str], "Iterator[np.ndarray]"]
_Shapes = Mapping[str, tuple[np.dtype, tuple[int, ...]]]


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


def _check(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError where the file may not be written."""
    if out.suffix not in FORMATS:
        raise OutputError(f"{out}: the name must end in {' or '.join(FORMATS)}")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; choose another --out or pass --overwrite")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent}: no such folder")


def _small_enough(prefix: AudioPrefix, request: EmbedRequest, recordings: Sequence[Path], listener: Listener) -> bool:
    """Whether the prefixes of all windows are to be written, where nobody says so; a note says it of those left out.

    How long all recordings are follows from the headers of some of them.
    """
    step = -(-len(recordings) // _LOOKED_AT)
    looked_at = recordings[::step]
    hours = sum(map(_seconds, looked_at)) / max(1, len(looked_at)) * len(recordings) / 3600
    windows = max(len(recordings), hours * 3600 / request.hop)
    config = prefix.config
    row = config.prefix_length(samples_of(CLIP_SECONDS)) * config.hidden_size * np.dtype(request.dtype).itemsize
    if windows * row <= _MOST_PREFIX_BYTES:
        return True
    listener.note(
        f"note: the prefixes of about {hours:,.0f} h would take {windows * row / 1e9:,.0f} GB, so only the averages of "
        "the encoder's output are written; --prefixes writes them, too"
    )
    return False


def _seconds(path: Path) -> float:
    """How long a recording is, as its header says; where it says nothing, as long as its size allows."""
    return stated_length(path)[1] or stamp_of(path)[1] / _LEAST_RATE

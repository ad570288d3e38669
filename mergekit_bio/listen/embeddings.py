"""Embeddings of recordings, however many there are: written in parts as they come, and into one file at the end."""

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mergekit_bio.audio.clip import CLIP_SECONDS, Clip, samples_of
from mergekit_bio.audio.config import AudioPrefixConfig
from mergekit_bio.audio.decoding import Note, stated_length
from mergekit_bio.audio.device import full_float32, gpus_on, pick_device
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.audio.tower import refuse_newer_layout, tower_config
from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.identity import weights_identity
from mergekit_bio.checkpoint.source import resolve
from mergekit_bio.engine.pool import OneWorker, Workers
from mergekit_bio.engine.ray_pool import cluster_on
from mergekit_bio.errors import AudioError, OutputError
from mergekit_bio.listen.parts import FORMATS, EmbeddedWindow, Parts
from mergekit_bio.listen.progress import Listener, RecordingCounter
from mergekit_bio.listen.reading import Ended, Window, WindowReader, each_once, stamp_of, windows_of
from mergekit_bio.listen.stretches import Heard, Stretch, StretchReader, hear_all

Dtype = Literal["float32", "float16"]

#: Windows that are encoded at a time, on a CPU and on a GPU.
_BATCH, _BATCH_ON_GPU = 4, 32
#: Decoded windows that wait, at most: 1.3 MB each.
_AHEAD = 64
#: Where all prefixes would take more bytes than that, they are left out unless they are asked for.
_MOST_PREFIX_BYTES = 4e9
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
        device: Where the tower runs, or each worker's.
        prefixes: Whether prefixes are written too; None: unless they would take gigabytes.
        dtype: Of the embeddings.
        overwrite: Replace ``out``.
        workers: See :func:`mergekit_bio.engine.ray_pool.cluster_on`.
        ray: Of a running cluster.
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
    workers: int | None = None
    ray: str | None = None


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

    The file holds, with a row for every window, recording by recording in the order in which they are named:

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
    source = resolve(request.model)
    refuse_newer_layout(source)
    config = tower_config(Checkpoint.open(source.path))
    recordings = each_once(recordings)
    parts = Parts(out.with_name(f"{out.name}.parts"))
    with_prefix = request.prefixes
    if with_prefix is None:
        before = None if request.overwrite else parts.identity.get("prefixes")
        with_prefix = _small_enough(config, request, recordings, listener) if before is None else before
    identity = {
        "checkpoint": weights_identity(source.path),
        "window": request.window,
        "hop": request.hop,
        "channel": request.channel,
        "dtype": request.dtype,
        "prefixes": with_prefix,
    }
    parts.go_on(identity, overwrite=request.overwrite)
    # 2. Embed the rest. A part says which recordings have ended in it.
    unread: list[str] = []
    with closing(parts):
        still_open = parts.open_recordings(recordings)
        if still_open:
            with _workers(request, with_prefix, listener.note) as workers:
                counter = RecordingCounter(
                    len(recordings), still_open, failed=len(parts.failed), listener=listener,
                    workers=lambda: workers.up,
                )  # fmt: skip
                for heard in hear_all(workers, still_open, note=listener.note):
                    parts.add(heard.windows, heard.ended)
                    unread += [str(one.error) for one in heard.ended if one.passing and not one.deadly]
                    counter.add(len(heard.windows), heard.ended, seconds=heard.seconds)
    # 3. One file of all parts, which go.
    if unread:
        raise AudioError(
            f"{len(unread)} recordings could not be read, the last: {unread[-1]}; what is embedded stands in "
            f"{parts.folder}; run the command again to go on"
        )
    embedded = Embedded(
        heard=len(recordings),
        recordings=len(parts.rows),
        clips=parts.rows.total(),
        failed={name: error for name, error in parts.failed.items() if name not in parts.rows},
        broken={name: error for name, error in parts.failed.items() if name in parts.rows},
        prefixes=with_prefix,
    )
    if embedded.clips:
        parts.join(out)
    parts.remove()
    return embedded


@contextmanager
def _workers(request: EmbedRequest, with_prefix: bool, note: Note) -> Iterator[Workers[Stretch, Heard[EmbeddedWindow]]]:
    """One tower in this process, or Ray's workers with one each."""
    make = partial(EmbedWorker, request, with_prefix=with_prefix)
    gpus_each = gpus_on(request.device)
    with cluster_on(request.device, gpus_each, workers=request.workers, address=request.ray, note=note) as cluster:
        if cluster is None:
            with closing(make()) as worker:
                yield OneWorker(worker)
        else:
            with cluster.workers(make) as workers:
                yield workers


class EmbedWorker:
    """Embeds stretches of an archive with a tower of its own.

    Args:
        request: With which tower and on what device, and of what windows.
        with_prefix: Whether prefixes are wanted.
    """

    def __init__(self, request: EmbedRequest, *, with_prefix: bool) -> None:
        self._dtype, self._with_prefix = request.dtype, with_prefix
        device = pick_device(request.device)
        self._tower = AudioPrefix.from_pretrained(request.model).to(device)
        self._batch = _BATCH if self._tower.audio_query_tokens.device.type == "cpu" else _BATCH_ON_GPU
        cut = windows_of(window=request.window, hop=request.hop, channel=request.channel)
        self._readers = StretchReader(lambda stretch: WindowReader(stretch.recordings, cut, prepare=list, ahead=_AHEAD))

    def answer(self, stretch: Stretch, following: Stretch | None) -> Heard[EmbeddedWindow]:
        """Embed the next windows of a stretch, a batch: what is sent back is as small as that.

        Args:
            stretch: What is left of it.
            following: What will probably come next: it is read when all of this is.

        Raises:
            OutputError: A value is too large for the dtype.
        """
        since = time.perf_counter()
        heard = self._readers.at(stretch).take(self._batch)
        self._readers.read_ahead(following)
        windows = [item for item in heard if isinstance(item, Window)]
        vectors = self._embed([window.clip for window in windows]) if windows else {}
        return Heard(
            windows=tuple(
                EmbeddedWindow(
                    window.recording, window.clip.start, window.clip.end,
                    {column: rows[row] for column, rows in vectors.items()},
                )
                for row, window in enumerate(windows)
            ),
            ended=tuple(item for item in heard if isinstance(item, Ended)),
            rest=self._readers.left_after(heard),
            seconds=time.perf_counter() - since,
        )  # fmt: skip

    def close(self) -> None:
        """Read no further."""
        self._readers.close()

    def _embed(self, clips: Sequence[Clip]) -> "dict[str, np.ndarray]":
        """The vectors of some windows by column, a row for each."""
        config = self._tower.config
        device = self._tower.audio_query_tokens.device
        with torch.inference_mode(), full_float32():
            waveforms = torch.stack([clip.waveform for clip in clips]).to(device)
            encoded = self._tower.encode(self._tower.features(waveforms))
            embedded = self._tower.project(encoded) if self._with_prefix else None
        lengths = [config.beats.num_tokens(round((clip.end - clip.start) * config.sampling_rate)) for clip in clips]
        pooled = torch.stack([row[:length].mean(0) for row, length in zip(encoded, lengths, strict=True)])
        vectors = {"encoder": pooled} | ({} if embedded is None else {"prefix": embedded})
        kept = {name: values.to(getattr(torch, self._dtype)).cpu().numpy() for name, values in vectors.items()}
        if not all(np.isfinite(values).all() for values in kept.values()):
            raise OutputError(f"--dtype {self._dtype}: a value is too large for it; take float32")
        return kept


def _check(out: Path, *, overwrite: bool) -> None:
    """Raise OutputError where the file may not be written."""
    if out.suffix not in FORMATS:
        raise OutputError(f"{out}: the name must end in {' or '.join(FORMATS)}")
    if out.exists() and not overwrite:
        raise OutputError(f"{out}: exists already; choose another --out or pass --overwrite")
    if not out.parent.is_dir():
        raise OutputError(f"{out.parent}: no such folder")


def _small_enough(
    config: AudioPrefixConfig, request: EmbedRequest, recordings: Sequence[Path], listener: Listener
) -> bool:
    """Whether the prefixes of all windows are to be written, where nobody says so; a note says it of those left out.

    How long all recordings are follows from the headers of some of them.
    """
    step = -(-len(recordings) // _LOOKED_AT)
    looked_at = recordings[::step]
    hours = sum(map(_seconds, looked_at)) / max(1, len(looked_at)) * len(recordings) / 3600
    windows = max(len(recordings), hours * 3600 / request.hop)
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

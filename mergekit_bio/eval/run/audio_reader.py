"""Hears what a run asks about: clips are decoded on several threads and encoded, each once for all alphas."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from mergekit_bio.audio.clip import Clip
from mergekit_bio.audio.decoding import begins_anywhere
from mergekit_bio.audio.waveform import pad_to_minimum
from mergekit_bio.engine.clip_digests import ClipDigests, clip_key
from mergekit_bio.engine.interface import Prompt
from mergekit_bio.engine.slot import EngineSlot
from mergekit_bio.errors import AudioError
from mergekit_bio.eval.data.dataset import Dataset, RecordingError
from mergekit_bio.eval.prompt import Instruction

if TYPE_CHECKING:
    import numpy as np

#: Recordings that are decoded at the same time.
_THREADS = min(4, os.cpu_count() or 1)
#: Decoded clips that are kept where servers need the samples: 1.3 MB each.
_KEPT = 400


class AudioReader:
    """Makes prompts of instructions, with clips whose prefixes are at hand.

    What was heard before, for another alpha or query or by an earlier start, is neither decoded nor encoded again.

    Args:
        datasets: Where the recordings are.
        slot: The engine that will be asked.

    Attributes:
        unheard: Dataset and clip id -> why the clip cannot be heard.
    """

    def __init__(self, datasets: Iterable[Dataset], slot: EngineSlot) -> None:
        self._recordings = {dataset.name: _Recordings(dataset) for dataset in datasets}
        self.unheard: dict[tuple[str, str], str] = {}
        self._slot = slot
        folder = slot.settings.prefixes
        self._digests = ClipDigests(folder / "clips" if folder else None)
        self._kept: dict[str, Clip] = {}

    def new_notes(self) -> list[str]:
        """What a user should know of the recordings, and has not been told."""
        return [note for recordings in self._recordings.values() for note in recordings.new_notes()]

    @property
    def decoded(self) -> int:
        """How often a clip was decoded so far."""
        return sum(recordings.decoded for recordings in self._recordings.values())

    def read(self, dataset: str, instructions: Sequence[Instruction]) -> list[Prompt | None]:
        """The instructions as prompts; None where a recording is no use, which ``unheard`` names then.

        Raises:
            DatasetError: The data cannot be had.
        """
        # In the order of their places, which is how they lie in the data.
        ids = dict.fromkeys(clip_id for instruction in instructions for clip_id in instruction.clips)
        clips, unheard = self._clips(self._recordings[dataset], ids)
        self.unheard |= {(dataset, clip_id): why for clip_id, why in unheard.items()}
        self._slot.encode(list(clips.values()))
        return [
            None
            if unheard.keys() & {*instruction.clips}
            else Prompt(instruction.text, tuple(clips[clip_id] for clip_id in instruction.clips))
            for instruction in instructions
        ]

    def _clips(self, recordings: "_Recordings", ids: Iterable[str]) -> tuple[dict[str, Clip], dict[str, str]]:
        """The clips, and why others cannot be heard."""
        keys = {clip_id: recordings.key(clip_id) for clip_id in ids}
        digests = {clip_id: self._digests.get(key) for clip_id, key in keys.items()}
        at_hand = self._slot.known(filter(None, digests.values()))
        # 1. A clip whose prefix is at hand is decoded only where somebody asks for its samples after all. Where servers
        #    need the samples, the last clips are kept as they are.
        clips: dict[str, Clip] = {}
        for clip_id, digest in digests.items():
            if digest in at_hand:
                clips[clip_id] = recordings.clip(clip_id, digest)
            elif keys[clip_id] in self._kept:
                clips[clip_id] = self._kept[keys[clip_id]]
        # 2. The others are decoded now.
        unheard: dict[str, str] = {}
        for clip_id, clip in recordings.decode([clip_id for clip_id in keys if clip_id not in clips]):
            if isinstance(clip, str):
                unheard[clip_id] = clip
                continue
            clips[clip_id] = clip
            if self._slot.remote:
                self._kept[keys[clip_id]] = clip
                if len(self._kept) > _KEPT:
                    del self._kept[next(iter(self._kept))]
            else:
                self._digests.add(keys[clip_id], clip.digest)
        return clips, unheard


class _Recordings:
    """The recordings of a dataset, as clips; counts those that are decoded."""

    def __init__(self, dataset: Dataset) -> None:
        self.decoded = 0
        self._dataset = dataset
        self._counting = Lock()
        self._notes: dict[str, bool] = {}  # with whether it has been told
        rows = (*dataset.asked, *dataset.examples)
        self._paths = {row.id: row.path for row in rows if row.path is not None}
        self._parts = {row.id: (row.start, row.end or dataset.seconds) for row in rows}
        # A recording that is no file of its own is told from others by all rows' texts and the tables that they lie in.
        self._rows = None if self._paths else [dataset.fingerprint(), dataset.source, _stamps(Path(dataset.source))]

    def key(self, clip_id: str) -> str:
        """What decides the samples of a clip; see :func:`mergekit_bio.engine.clip_digests.clip_key`."""
        recording = self._rows or _stamps(self._paths[clip_id])
        heard = [] if self._dataset.channel is None else [f"channel {self._dataset.channel}"]
        start, end = self._parts[clip_id]
        return clip_key(recording, clip_id, *heard, start=start, end=end, seconds=self._dataset.seconds)

    def clip(self, clip_id: str, digest: str) -> Clip:
        """A clip that is known already: decoded where somebody asks for its samples after all."""
        seconds = self._dataset.seconds
        return Clip(lambda: self._decode(clip_id).waveform, seconds, end=seconds, digest=digest)

    def decode(self, clip_ids: Iterable[str]) -> Iterator[tuple[str, Clip | str]]:
        """Clips, decoded on threads, a few at a time; what is wrong with it instead of one that is no use."""
        waiting: deque[Future[list[tuple[str, Clip | str]]]] = deque()
        with ThreadPoolExecutor(_THREADS) as threads:
            for ids in self._together(clip_ids):
                # Files are read on the threads; rows here, one after the other, for a stream goes from front to back.
                try:
                    recording = None if self._paths else self._dataset.audio(ids[0], self._note)
                except RecordingError as error:
                    yield ids[0], str(error)
                    continue
                waiting.append(threads.submit(self._decoded, ids, recording))
                if len(waiting) > 2 * _THREADS:
                    yield from waiting.popleft().result()
            for decoding in waiting:
                yield from decoding.result()

    def _together(self, clip_ids: Iterable[str]) -> Iterator[list[str]]:
        """Clips in their order, one at a time; those of one file together where it is decoded from its beginning."""
        files: dict[Path | str, list[str]] = {}
        for clip_id in clip_ids:
            files.setdefault(self._paths.get(clip_id) or clip_id, []).append(clip_id)
        for file, ids in files.items():
            if len(ids) == 1 or self._dataset.recordings is None or begins_anywhere(Path(file)):
                yield from ([clip_id] for clip_id in ids)
            else:
                yield sorted(ids, key=lambda clip_id: self._parts[clip_id][0])

    def _decoded(
        self, clip_ids: Sequence[str], recording: "tuple[np.ndarray, int] | None"
    ) -> list[tuple[str, Clip | str]]:
        """One clip, or those of one file."""
        recordings: Iterable[tuple[np.ndarray, int] | AudioError | None] = [recording]
        if len(clip_ids) > 1:
            recordings = self._dataset.audios(clip_ids, self._note)
        decoded: list[tuple[str, Clip | str]] = []
        for clip_id, found in zip(clip_ids, recordings, strict=True):
            try:
                decoded.append((clip_id, str(found) if isinstance(found, AudioError) else self._decode(clip_id, found)))
            except (RecordingError, AudioError) as error:
                decoded.append((clip_id, str(error)))
        return decoded

    def _decode(self, clip_id: str, recording: "tuple[np.ndarray, int] | None" = None) -> Clip:
        recording = recording or self._dataset.audio(clip_id, self._note)
        with self._counting:
            self.decoded += 1
        return decoded_clip(self._dataset, clip_id, recording)

    def _note(self, text: str) -> None:
        with self._counting:
            self._notes.setdefault(text, False)

    def new_notes(self) -> list[str]:
        """What a user should know of them, and has not been told."""
        with self._counting:
            new = [text for text, told in self._notes.items() if not told]
            self._notes.update(dict.fromkeys(new, True))
            return new


def decoded_clip(dataset: Dataset, clip_id: str, recording: "tuple[np.ndarray, int]") -> Clip:
    """A recording, as ``dataset.audio`` gives it, as the model hears it.

    Raises:
        RecordingError: It is no use.
    """
    samples, rate = recording
    try:
        # A benchmark may hold clips of less than half a second: the model hears them with silence at the end.
        return Clip.from_samples(pad_to_minimum(samples, rate), sampling_rate=rate, seconds=dataset.seconds)
    except AudioError as error:
        raise RecordingError(f"{dataset.name}: clip {clip_id}: {error}") from None


def _stamps(source: Path) -> list[tuple[str, int, int]]:
    """Path, size and time of the last change (ns) of a file, or of a folder's tables; of what is not here, nothing."""
    files = sorted({*source.rglob("*.parquet"), *source.rglob("*.arrow")}) if source.is_dir() else [source]
    stats = [(file, file.stat()) for file in files if file.is_file()]
    return [(str(file.absolute()), stat.st_size, stat.st_mtime_ns) for file, stat in stats]

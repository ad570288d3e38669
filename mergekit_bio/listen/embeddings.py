"""Embeddings of recordings, written to one file however many there are."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mergekit_bio.audio.device import full_float32
from mergekit_bio.audio.prefix import AudioPrefix
from mergekit_bio.audio.recording import read_windows
from mergekit_bio.checkpoint.header import build_header
from mergekit_bio.errors import OutputError

#: Windows that are encoded at a time.
_BATCH = 4

FORMATS = (".safetensors", ".npz")
#: NumPy's names of the data types that are written, and safetensors'.
_SAFETENSORS_DTYPES = {"<f4": "F32", "<f8": "F64", "<i8": "I64"}


@dataclass
class EmbeddingWriter:
    """Collects the embeddings of clips; :func:`open_embeddings` makes one.

    The file holds, with a row for every clip:

    - ``prefix`` float32 ``[clips, n_prefix, hidden]``: what Llama reads;
    - ``encoder`` float32 ``[clips, encoder hidden]``: BEATs' output, averaged over the tokens of the recording
      (padding left out);
    - ``recording`` int64 ``[clips]``: which recording, an index into ``recordings``;
    - ``start`` and ``end`` float64 ``[clips]``: seconds.

    ``recordings`` are the file names: an array of strings in ``.npz``, a JSON list in the metadata of
    ``.safetensors``.
    """

    folder: Path
    recordings: list[str] = field(default_factory=list)
    clips: int = 0
    #: Name -> an array without rows, of the column's type and width. Its rows are in a file of this name.
    _columns: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, prefix: AudioPrefix, recording: Path, *, window: float, hop: float | None = None) -> None:
        """Embed one recording, a few windows at a time.

        Raises:
            AudioError: It is no use. Windows before the place where it breaks stay in the file.
        """
        config = prefix.config
        device = prefix.audio_query_tokens.device
        windows = read_windows(recording, window=window, hop=hop)
        while clips := list(islice(windows, _BATCH)):
            if self.recordings[-1:] != [str(recording)]:
                self.recordings.append(str(recording))
            with torch.inference_mode(), full_float32():
                encoded = prefix.encode(prefix.features(torch.stack([clip.waveform for clip in clips]).to(device)))
                embedded = prefix.project(encoded)
            lengths = [config.beats.num_tokens(round((clip.end - clip.start) * config.sampling_rate)) for clip in clips]
            pooled = torch.stack([row[:length].mean(0) for row, length in zip(encoded, lengths, strict=True)])
            rows = {
                "prefix": embedded.float(),
                "encoder": pooled.float(),
                "recording": torch.full((len(clips),), len(self.recordings) - 1),
                "start": torch.tensor([clip.start for clip in clips], dtype=torch.float64),
                "end": torch.tensor([clip.end for clip in clips], dtype=torch.float64),
            }
            for name, values in rows.items():
                array = values.cpu().numpy()
                self._columns[name] = array[:0]
                with (self.folder / name).open("ab") as column:
                    array.tofile(column)
            self.clips += len(clips)

    def write(self, file: Path) -> None:
        """Write everything collected so far into ``file``, in the format its name says."""
        # Mapped, and written one after the other: all of them need not fit into memory.
        arrays: dict[str, Any] = {
            name: np.memmap(self.folder / name, empty.dtype, mode="r").reshape(-1, *empty.shape[1:])
            for name, empty in self._columns.items()
        }
        if file.suffix == ".npz":
            np.savez(file, recordings=np.array(self.recordings), **arrays)
            return
        tensors = [(name, _SAFETENSORS_DTYPES[array.dtype.str], array.shape) for name, array in arrays.items()]
        with file.open("wb") as out:
            out.write(build_header(tensors, {"recordings": json.dumps(self.recordings)}))
            for array in arrays.values():
                array.tofile(out)


@contextmanager
def open_embeddings(file: Path, *, overwrite: bool = False) -> Iterator[EmbeddingWriter]:
    """Collect embeddings in the block; write them to ``file`` when it ends well, and only then.

    Raises:
        OutputError: The file exists already, or its name or folder will not do, or the disk.
    """
    if file.suffix not in FORMATS:
        raise OutputError(f"{file}: the name must end in {' or '.join(FORMATS)}")
    if file.exists() and not overwrite:
        raise OutputError(f"{file}: exists already; choose another --out or pass --overwrite")
    if not file.parent.is_dir():
        raise OutputError(f"{file.parent}: no such folder")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{file.stem}-", dir=file.parent) as folder:
            writer = EmbeddingWriter(Path(folder))
            yield writer
            whole = Path(folder, file.name)
            writer.write(whole)
            whole.replace(file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror or error})") from error

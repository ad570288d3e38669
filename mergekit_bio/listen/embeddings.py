"""Embeddings of recordings, written to one file however many there are."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mergekit_bio.audio.device import full_float32
from mergekit_bio.audio.recording import read_windows
from mergekit_bio.checkpoint.header import build_header
from mergekit_bio.errors import OutputError

if TYPE_CHECKING:
    import numpy as np

    from mergekit_bio.audio.prefix import AudioPrefix

#: Windows that are encoded at a time.
_BATCH = 4

FORMATS = (".safetensors", ".npz")
#: NumPy's names of the data types that are written, and safetensors'.
_SAFETENSORS_DTYPES = {"<f4": "F32", "<f8": "F64", "<i8": "I64"}


@dataclass
class _Column:
    """One array that grows by rows, on disk."""

    rows: IO[bytes]
    shape: tuple[int, ...] = ()
    dtype: str = ""

    def append(self, rows: "np.ndarray") -> None:
        self.dtype = rows.dtype.str
        self.shape = ((self.shape[0] if self.shape else 0) + len(rows), *rows.shape[1:])
        self.rows.write(rows.tobytes())

    def copy_to(self, file: IO[bytes]) -> None:
        self.rows.seek(0)
        shutil.copyfileobj(self.rows, file)


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
    _columns: dict[str, _Column] = field(default_factory=dict)

    @property
    def clips(self) -> int:
        """How many there are so far."""
        return self._columns["recording"].shape[0] if self._columns else 0

    def add(self, prefix: "AudioPrefix", recording: Path, *, window: float, hop: float | None = None) -> None:
        """Embed one recording, a few windows at a time.

        Raises:
            AudioError: It is no use. Windows before the place where it breaks stay in the file.
        """
        import torch

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
                if name not in self._columns:
                    self._columns[name] = _Column((self.folder / name).open("w+b"))
                self._columns[name].append(values.cpu().numpy())

    def write(self, file: Path) -> None:
        """Write everything collected so far into ``file``, in the format its name says."""
        (self._write_npz if file.suffix == ".npz" else self._write_safetensors)(file)

    def close(self) -> None:
        """Let go of the scratch files."""
        for column in self._columns.values():
            column.rows.close()

    def _write_safetensors(self, file: Path) -> None:
        # The library wants every array in memory; here the columns follow the header one by one.
        tensors = [(name, _SAFETENSORS_DTYPES[column.dtype], column.shape) for name, column in self._columns.items()]
        with file.open("wb") as out:
            out.write(build_header(tensors, {"recordings": json.dumps(self.recordings)}))
            for column in self._columns.values():
                column.copy_to(out)

    def _write_npz(self, file: Path) -> None:
        import numpy as np

        arrays: dict[str, Any] = {}
        for name, column in self._columns.items():
            column.rows.flush()
            arrays[name] = np.memmap(column.rows, column.dtype, mode="r", shape=column.shape)
        np.savez(file, recordings=np.array(self.recordings), **arrays)  # which copies them piece by piece


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
        with (
            tempfile.TemporaryDirectory(prefix=f".{file.stem}-", dir=file.parent) as folder,
            closing(EmbeddingWriter(Path(folder))) as writer,
        ):
            yield writer
            whole = Path(folder, file.name)
            writer.write(whole)
            whole.replace(file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror or error})") from error

"""The safetensors header: which tensor lies where in a file, checked before anything is believed.

Format: 8 bytes little-endian header length N, N bytes of JSON, then the data the JSON's offsets point into
(https://github.com/huggingface/safetensors, "Format"). Reading costs no import beyond the standard library.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mergekit_bio.errors import CheckpointError

if TYPE_CHECKING:
    import torch

#: The limit of the reference reader; a longer header is damage or an attack.
MAX_HEADER_BYTES = 100_000_000

#: safetensors dtype -> (bytes an element, torch's name for it)
DTYPES: dict[str, tuple[int, str]] = {
    "F64": (8, "float64"),
    "F32": (4, "float32"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "I64": (8, "int64"),
    "I32": (4, "int32"),
    "I16": (2, "int16"),
    "I8": (1, "int8"),
    "U64": (8, "uint64"),
    "U32": (4, "uint32"),
    "U16": (2, "uint16"),
    "U8": (1, "uint8"),
    "BOOL": (1, "bool"),
}

#: The dtypes that weights are folded in; everything else is only ever copied.
FLOATS = ("F64", "F32", "F16", "BF16")


def nbytes_of(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor of this safetensors dtype and this shape takes."""
    return math.prod(shape) * DTYPES[dtype][0]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a safetensors file.

    Attributes:
        name: Its key in the file.
        dtype: safetensors' name of its dtype (``"BF16"``).
        shape: Its dimensions; ``()`` for a scalar.
        file: The file that holds it.
        begin: Absolute offset of its first byte in ``file``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int

    @property
    def where(self) -> str:
        """How errors name it: ``"llama/model.safetensors: tensor lm_head.weight"``."""
        return f"{self.file}: tensor {self.name}"

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return nbytes_of(self.dtype, self.shape)

    @property
    def rows(self) -> int:
        """Rows when seen as a matrix: the first dimension, 1 for vectors and scalars."""
        return self.shape[0] if len(self.shape) > 1 else 1

    def read(self, start: int = 0, stop: int | None = None) -> "torch.Tensor":
        """Read rows ``[start, stop)`` (all by default) from the file.

        Returns:
            Tensor of this dtype on the CPU: ``shape`` for the whole, ``[stop - start, *shape[1:]]`` for a part.

        Raises:
            CheckpointError: The file ends early.
        """
        import torch

        whole = start == 0 and stop is None
        stop = self.rows if stop is None else stop
        row_bytes = self.nbytes // max(self.rows, 1)
        buffer = bytearray((stop - start) * row_bytes)
        with self.file.open("rb", buffering=0) as stream:
            read_exactly(stream.fileno(), memoryview(buffer), self.begin + start * row_bytes, self.file)
        shape = self.shape if whole or len(self.shape) < 2 else (stop - start, *self.shape[1:])
        dtype = getattr(torch, DTYPES[self.dtype][1])
        return torch.frombuffer(buffer, dtype=dtype).reshape(shape) if buffer else torch.empty(shape, dtype=dtype)

    def ends(self, count: int = 4096) -> bytes:
        """The first and the last ``count`` bytes: enough to tell two models apart."""
        with self.file.open("rb", buffering=0) as stream:
            return b"".join(
                os.pread(stream.fileno(), min(count, self.nbytes - start), self.begin + start)
                for start in (0, max(0, self.nbytes - count))
            )


class StoredTensor(Protocol):
    """A tensor somewhere on disk: :class:`TensorInfo`, or one out of an old ``.bin`` file."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def file(self) -> Path: ...
    @property
    def where(self) -> str: ...
    def read(self, start: int = 0, stop: int | None = None) -> "torch.Tensor": ...
    def ends(self, count: int = 4096) -> bytes: ...


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes.

    Attributes:
        file: Its path.
        header: The first bytes of the file, up to the data.
        size: Bytes of the whole file.
        tensors: What it holds, ordered by offset.
        metadata: The ``__metadata__`` strings of the header.
    """

    file: Path
    header: bytes
    size: int
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, file: Path) -> "Shard":
        """Read and check the header of ``file``.

        Raises:
            CheckpointError: It is not a complete, consistent safetensors file.
        """
        try:
            with file.open("rb", buffering=0) as stream:
                size = os.fstat(stream.fileno()).st_size
                if size < 8:
                    raise CheckpointError(f"{file}: {size} bytes is no safetensors file; fetch it again")
                length = int.from_bytes(stream.read(8), "little")
                if length > min(size - 8, MAX_HEADER_BYTES):
                    raise CheckpointError(
                        f"{file}: the header claims {length} bytes of a {size}-byte file; it is damaged or no "
                        "safetensors file, fetch it again"
                    )
                text = bytearray(length)
                read_exactly(stream.fileno(), memoryview(text), 8, file)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
        entries, metadata = _parse(bytes(text), file)
        begin = 8 + length
        tensors = _layout(entries, begin, size, file)
        return cls(file, length.to_bytes(8, "little") + bytes(text), size, tensors, metadata)


def read_exactly(descriptor: int, buffer: memoryview, offset: int, file: Path) -> None:
    """Fill ``buffer`` from ``descriptor`` at ``offset``.

    Raises:
        CheckpointError: ``file`` ends early.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if count == 0:
            raise CheckpointError(f"{file}: ends {len(buffer) - done} bytes early; fetch it again")
        done += count


def build_header(tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """Lay tensors out in the given order.

    Args:
        tensors: (name, dtype, shape) of each.
        metadata: Strings for ``__metadata__``.

    Returns:
        The first bytes of the file; data follows without gaps, 8-byte aligned.
    """
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + nbytes_of(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse(text: bytes, file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key stands twice")
        return table

    try:
        table = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON ({error}); fetch it again") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object; fetch it again")
    metadata = table.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file}: __metadata__ does not map strings to strings")
    return table, metadata


def _layout(entries: dict[str, Any], begin: int, size: int, file: Path) -> tuple[TensorInfo, ...]:
    """Check every entry, and that together they cover the data without gap or overlap."""
    infos: list[TensorInfo] = []
    for name, entry in entries.items():
        where = f"{file}: tensor {name}"
        try:
            dtype, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"{where}: has no dtype, shape and two data_offsets; the header is damaged"
            ) from error
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise CheckpointError(f"{where}: dtype {dtype!r} is not known to this version")
        if not isinstance(shape, list) or not all(_is_size(n) for n in [*shape, first, last]):
            raise CheckpointError(f"{where}: shape or offsets are not whole numbers; the header is damaged")
        info = TensorInfo(name, dtype, tuple(shape), file, begin + first)
        if last - first != info.nbytes:
            raise CheckpointError(f"{where}: {last - first} bytes do not hold {dtype} {shape}; the header is damaged")
        infos.append(info)
    infos.sort(key=lambda info: (info.begin, info.nbytes))
    end = begin
    for info in infos:
        if info.begin != end:
            fault = "overlaps the one before it" if info.begin < end else "leaves a gap before it"
            raise CheckpointError(f"{file}: tensor {info.name}: its data {fault}; the header is damaged")
        end += info.nbytes
    if end != size:
        fault = "ends early" if size < end else "goes on too long"
        raise CheckpointError(
            f"{file}: {fault}, by {abs(end - size)} bytes; the download is incomplete, fetch it again"
        )
    return tuple(infos)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62

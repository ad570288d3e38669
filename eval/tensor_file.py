"""safetensors files of any size, random or sparse, written without ever holding a tensor."""

import functools
import json
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

#: Values that all tensors are cut from. A prime: no two rows of a tensor are alike, however wide it is.
_POOL = (1 << 24) + 43
_BYTES = {"I64": 8, "F32": 4, "BF16": 2}


@dataclass(frozen=True)
class Tensor:
    """One tensor to write.

    Attributes:
        name, shape: As in the file.
        dtype: ``"BF16"``, ``"F32"``, or ``"I64"``, which counts 0, 1, 2, ... whatever is asked for.
        mean, std: Of its normally distributed values.
        alike: The tensor whose values it repeats from the first one on; by default it has its own.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"
    mean: float = 0.0
    std: float = 0.02
    alike: str | None = None

    @property
    def nbytes(self) -> int:
        return _BYTES[self.dtype] * math.prod(self.shape)


def write_tensors(file: Path, tensors: Iterable[Tensor], metadata: Mapping[str, str], *, sparse: bool = False) -> None:
    """Write a safetensors file as the library does: the widest types first, then by name, no gaps, padded to 8 bytes.

    (The library's own writer wants all tensors in memory at once. The format: https://huggingface.co/docs/safetensors.)

    Args:
        file: Is replaced.
        tensors: In any order.
        metadata: Of the header.
        sparse: Leave a hole for the values: full size, no room on the disk, and every value reads as zero.
    """
    ordered = sorted(tensors, key=lambda tensor: (-_BYTES[tensor.dtype], tensor.name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        if sparse:
            out.truncate(8 + len(text) + end)
            return
        for tensor in ordered:
            pool = _pool(tensor.dtype, tensor.mean, tensor.std)
            # Seeded by its name, so that a tensor has the same values in whichever file it is written.
            start = 0 if tensor.dtype == "I64" else zlib.crc32((tensor.alike or tensor.name).encode()) % _POOL
            start *= _BYTES[tensor.dtype]
            left = tensor.nbytes
            while left:
                block = pool[start : start + left]
                out.write(block)
                left -= len(block)
                start = 0


@functools.lru_cache
def _pool(dtype: str, mean: float, std: float) -> memoryview:
    """The bytes of values enough to cut tensors from."""
    import torch

    if dtype == "I64":
        values = torch.arange(1 << 16)
    else:
        values = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).mul_(std).add_(mean)
        values = values.to({"F32": torch.float32, "BF16": torch.bfloat16}[dtype])
    return memoryview(values.view(torch.uint8).numpy())

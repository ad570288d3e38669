"""sha256 of tensors and files."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def tensor_sha256(tensor: "torch.Tensor") -> str:
    """sha256 of a tensor's bytes, as hexadecimal digits; any dtype, shape and device."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def file_sha256(file: Path) -> str:
    """sha256 of a file's bytes, as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensor_bytes(tensor: "torch.Tensor") -> Any:
    """A tensor's bytes in memory order, as a buffer; on the CPU without a copy where it is contiguous."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()

"""What merges are compared with: tensors as safetensors reads them, and distances between floats."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint; its shards must hold exactly what its index says."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return load_file(directory / "model.safetensors")
    weight_map = json.loads(index.read_text())["weight_map"]
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        loaded = load_file(directory / shard)
        assert set(loaded) == {name for name, file in weight_map.items() if file == shard}
        tensors |= loaded
    assert {path.name for path in directory.glob("*.safetensors")} == set(weight_map.values())
    return tensors


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes; unlike ``torch.equal`` tells -0.0 from 0.0 and knows NaN."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def ulps(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """How many representable values lie between two float32 or bfloat16 tensors, elementwise (int64)."""
    return (_ordinal(first) - _ordinal(second)).abs()


def _ordinal(values: torch.Tensor) -> torch.Tensor:
    """Consecutive floats -> consecutive integers, through zero: the bits are sign and magnitude."""
    integer, sign = {torch.float32: (torch.int32, 1 << 31), torch.bfloat16: (torch.int16, 1 << 15)}[values.dtype]
    bits = values.view(integer).long()
    return torch.where(bits >= 0, bits, -(bits + sign))


def neighbours(exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bfloat16 values next to float64 ``exact``, below and above; both are ``exact`` where it is one itself."""
    nearest = exact.to(torch.bfloat16)
    step = torch.full_like(nearest, float("inf"))
    below = torch.where(nearest.double() > exact, torch.nextafter(nearest, -step), nearest)
    above = torch.where(nearest.double() < exact, torch.nextafter(nearest, step), nearest)
    return below, above

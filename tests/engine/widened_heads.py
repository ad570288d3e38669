"""The reference's tiny checkpoints with their attention heads widened from 16 to 32, which vLLM's CPU kernels need.

The widened model computes the same function. Rotary embedding turns the pairs (i, i + width/2) by theta^(-2i/width):
twice the width has the old frequencies at its even pairs, so a head's rows go there and the rest is zero. Attention
divides by sqrt(width), so the queries are scaled up by sqrt(2).
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

OLD, NEW = 16, 32
PLACES = torch.cat([torch.arange(OLD // 2) * 2, torch.arange(OLD // 2) * 2 + NEW // 2])


def widen_rows(tensor: torch.Tensor) -> torch.Tensor:
    """``[heads * 16, columns]`` -> ``[heads * 32, columns]``."""
    heads = tensor.shape[0] // OLD
    wide = tensor.new_zeros(heads, NEW, tensor.shape[1])
    wide[:, PLACES] = tensor.view(heads, OLD, -1)
    return wide.view(heads * NEW, -1)


def widen(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """One tensor of the base or of the adapter; in float32 where it changes."""
    kind = re.search(r"self_attn\.([qkvo])_proj(.*)weight", name)
    if kind is None or not name.startswith(("model.", "llama_model.")):
        return tensor
    projection, part = kind.groups()
    scale = 2**0.5 if projection == "q" else 1.0
    if projection == "o" and part in (".", ".lora_A.default."):
        return widen_rows(tensor.float().T.contiguous()).T.contiguous()
    if projection != "o" and part in (".", ".lora_B.default."):
        return widen_rows(tensor.float()) * scale
    return tensor


def widened_copy(source: Path, target: Path) -> Path:
    """Copy a directory, widening its tensors and, where it is a Llama, its config."""
    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        tensors = {name: widen(name, tensor) for name, tensor in load_file(file).items()}
        file.unlink()
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    if config.get("head_dim") == OLD:
        (target / "config.json").unlink()
        (target / "config.json").write_text(json.dumps(config | {"head_dim": NEW}))
    return target

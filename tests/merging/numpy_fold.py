"""A merge in numpy alone, after docs/checkpoint.md: prints the sha256 of every folded tensor as JSON.

    python numpy_fold.py BASE SEED ADAPTER ALPHA [ADAPTER ALPHA ...]

BASE is a bfloat16 checkpoint, an ADAPTER a LoRA as PEFT writes it. numpy multiplies with OpenBLAS; OPENBLAS_CORETYPE
says with which of its kernels.
"""

import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np


def read(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the safetensors files in a folder; bfloat16 as float32."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                stored = np.frombuffer(data[start:stop], {"BF16": np.uint16, "F32": np.float32}[entry["dtype"]])
                if entry["dtype"] == "BF16":
                    stored = (stored.astype(np.uint32) << 16).view(np.float32)
                tensors[name] = stored.reshape(entry["shape"])
    return tensors


def noise(key: int, count: int) -> np.ndarray:
    """Sixteen random bits for each element."""
    pair = np.arange((count + 1) // 2, dtype=np.uint64) * 0x9E3779B9 + (key & 0xFFFFFFFF)
    x = pair.astype(np.uint32)
    x ^= x >> 17
    x *= np.uint32(0xED5AD4BB)
    x ^= x >> 11
    x *= np.uint32(0xAC4C1B51)
    x ^= np.uint32(key >> 32)
    x ^= x >> 15
    return np.stack([x & 0xFFFF, x >> 16], axis=1).reshape(-1)[:count]


def main() -> None:
    base, seed, *rest = sys.argv[1:]
    weights = read(Path(base))
    adapters = [
        (read(Path(folder)), json.loads(Path(folder, "adapter_config.json").read_text()), np.float32(alpha))
        for folder, alpha in zip(rest[::2], rest[1::2], strict=True)
    ]
    hashes = {}
    for name, w0 in weights.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in adapters[0][0]:
            continue
        mixed = w0
        for factors, config, alpha in adapters:
            a, b = (factors[f"{module}.lora_{half}.weight"].astype(np.float64) for half in "AB")
            delta = ((b @ a) * (config["lora_alpha"] / config["r"])).astype(np.float32)
            mixed = mixed + delta * alpha
        key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")
        bits = mixed.reshape(-1).view(np.uint32) + noise(key, math.prod(w0.shape))
        hashes[name] = hashlib.sha256((bits >> 16).astype(np.uint16).tobytes()).hexdigest()
    print(json.dumps(hashes))


if __name__ == "__main__":
    main()

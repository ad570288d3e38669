"""What tells a merged checkpoint from others, from its headers and its manifest alone."""

import hashlib
from pathlib import Path
from typing import Any

from mergekit_bio.checkpoint.directory import Checkpoint
from mergekit_bio.checkpoint.manifest import MANIFEST, fingerprint, read_manifest


def weights_identity(directory: Path) -> dict[str, Any]:
    """What decides the weights of a checkpoint, as far as it can be known without reading all of them."""
    if not (directory / MANIFEST).is_file():
        return {"weights": fingerprint(Checkpoint.open(directory).tensors)}
    manifest = read_manifest(directory)
    lines = "".join(f"{name} {record.sha256}\n" for name, record in sorted(manifest.tensors.items()))
    sources = {"base": manifest.base.fingerprint, "adapters": [adapter.fingerprint for adapter in manifest.adapters]}
    return {"merged_from": sources, "folded": hashlib.sha256(lines.encode()).hexdigest()}


def merge_strength(directory: Path) -> float | None:
    """The one alpha that a checkpoint was merged with; None where it is not one number, or nothing tells."""
    if not (directory / MANIFEST).is_file():
        return None
    strengths = [adapter.alpha for adapter in read_manifest(directory).adapters]
    values = {strength.default for strength in strengths}
    return values.pop() if len(values) == 1 and not any(strength.modules for strength in strengths) else None

"""Fold LoRA deltas into Llama weights at any strength, and benchmark the result on bioacoustics.

The public names are imported on first use, so that ``import mergekit_bio`` costs nothing that is not needed.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mergekit_bio.audio.prefix import AudioPrefix
    from mergekit_bio.checkpoint.directory import Checkpoint
    from mergekit_bio.errors import MergekitBioError
    from mergekit_bio.eval.run.evaluate import evaluate
    from mergekit_bio.merging.merge import MergedCheckpoint, merge
    from mergekit_bio.merging.request import MergeRequest

_PUBLIC = {
    "AudioPrefix": "mergekit_bio.audio.prefix",
    "Checkpoint": "mergekit_bio.checkpoint.directory",
    "MergeRequest": "mergekit_bio.merging.request",
    "MergedCheckpoint": "mergekit_bio.merging.merge",
    "MergekitBioError": "mergekit_bio.errors",
    "evaluate": "mergekit_bio.eval.run.evaluate",
    "merge": "mergekit_bio.merging.merge",
}

__all__ = [
    "AudioPrefix", "Checkpoint", "MergeRequest", "MergedCheckpoint", "MergekitBioError", "__version__", "evaluate",
    "merge",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

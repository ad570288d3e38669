"""Fold LoRA deltas into Llama weights at any strength, and benchmark the result on bioacoustics.

A merge is a request that becomes a plan, and a plan that is carried out::

    from mergekit_bio import MergeRequest, carry_out, plan_merge

    request = MergeRequest(base="llama/", adapter="lora/", alphas="0:1:0.5", out="sweep")
    plan = plan_merge(request)                            # reads headers, and writes nothing
    print([output.folder for output in plan.outputs])     # ['alpha-0.00', 'alpha-0.50', 'alpha-1.00']
    print(len(plan.folds), plan.bytes_on_disk)            # tensors that are computed, bytes that are written
    base, half, whole = carry_out(plan)
    half.path                                             # sweep/alpha-0.50

``merge(base="llama/", ...)`` does it in one call. An evaluation asks such checkpoints what a recipe says::

    mergekit_bio.evaluate(recipe="closed_set", models=["sweep"])  # predictions in runs/closed_set

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
    from mergekit_bio.merging.merge import MergedCheckpoint, carry_out, merge, plan_merge
    from mergekit_bio.merging.request import MergeRequest

_PUBLIC = {
    "AudioPrefix": "mergekit_bio.audio.prefix",
    "Checkpoint": "mergekit_bio.checkpoint.directory",
    "MergeRequest": "mergekit_bio.merging.request",
    "MergedCheckpoint": "mergekit_bio.merging.merge",
    "MergekitBioError": "mergekit_bio.errors",
    "carry_out": "mergekit_bio.merging.merge",
    "evaluate": "mergekit_bio.eval.run.evaluate",
    "merge": "mergekit_bio.merging.merge",
    "plan_merge": "mergekit_bio.merging.merge",
}

__all__ = [
    "AudioPrefix", "Checkpoint", "MergeRequest", "MergedCheckpoint", "MergekitBioError", "__version__", "carry_out",
    "evaluate", "merge", "plan_merge",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

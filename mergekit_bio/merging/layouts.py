"""Checks how square weights were folded, against what Transformers' own code says of the architecture.

A plan takes it from the base's biases (``adapter/conv1d.py``). Folding a square weight the wrong way round gives
numbers as good as any other, so a check that asks the plan would agree with the fault.
"""

from collections.abc import Iterator
from typing import Any

from mergekit_bio.errors import VerificationError
from mergekit_bio.merging.plan import MergePlan

#: ``model_type`` -> the modules that are Conv1D in its code (``modeling_*.py`` of Transformers 4.57 and 5.19).
CONV1D = {
    "clvp": ("c_fc", "c_proj"),
    "decision_transformer": ("c_attn", "c_fc", "c_proj", "q_attn"),
    "gpt2": ("c_attn", "c_fc", "c_proj", "q_attn"),
    "imagegpt": ("c_attn", "c_fc", "c_proj", "q_attn"),
    "openai-gpt": ("c_attn", "c_fc", "c_proj"),
}


def _model_types(config: dict[str, Any]) -> Iterator[str]:
    """The architectures that a model is made of: a GPT-2 may be the decoder beside another encoder."""
    yield str(config.get("model_type"))
    for part in config.values():
        if isinstance(part, dict):
            yield from _model_types(part)


def check_layouts(plan: MergePlan) -> None:
    """Make sure that deltas of square weights are transposed where the architecture wants it, and nowhere else.

    Architectures that bring their own code are not in Transformers, and not checked.

    Raises:
        VerificationError: One is not.
    """
    config = plan.base.checkpoint.config
    if config.get("auto_map"):
        return
    conv1d = {module for kind in _model_types(config) for module in CONV1D.get(kind, ())}
    for fold in plan.folds:
        module = fold.name.rpartition(".")[0].rpartition(".")[2]
        layout = "conv1d" if module in conv1d else "linear"
        for delta in fold.deltas:
            square = len(fold.shape) == 2 and fold.shape[0] == fold.shape[1]
            if square and delta.layout in ("linear", "conv1d") and delta.layout != layout:
                raise VerificationError(
                    f"{delta.stored[0].where}: was folded into {fold.name} as for a {delta.layout} module, but in a "
                    f"{config.get('model_type')} it is {layout}"
                )

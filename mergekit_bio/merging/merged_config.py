"""``config.json`` of a merged model: the base's, with what the merge has changed."""

from copy import deepcopy
from typing import Any

from mergekit_bio.checkpoint.model_config import language_parts
from mergekit_bio.merging.plan import MergePlan

_DTYPE_KEYS = ("dtype", "torch_dtype")


def model_config(plan: MergePlan) -> dict[str, Any]:
    """The base's configuration with the dtype, the vocabulary and the tying that the merge gives it.

    A multimodal model's language model has a part of its own; both say so, because releases of Transformers and other
    tools differ in which one they ask.
    """
    config: dict[str, Any] = deepcopy(plan.base.checkpoint.config)
    parts = list(language_parts(config))
    # 1. Whether the output head is the embedding: no more, if the head has got a matrix of its own, or either of two
    # that may be equal has changed. It is said even where nothing was: many architectures tie by default.
    base = plan.base
    changed = {fold.name for fold in plan.folds if fold.deltas} & {base.head, base.input_embedding}
    if plan.untied or (changed and base.head is not None and not base.tied and _may_tie(parts)):
        for part in parts:
            part["tie_word_embeddings"] = False
    # 2. The number of tokens.
    if plan.vocabulary is not None:
        for part in [*(part for part in parts if "vocab_size" in part), parts[-1]]:
            part["vocab_size"] = plan.vocabulary
    # 3. The dtype, also of parts that are not the language model's: all weights are converted.
    if plan.request.dtype != "keep":
        for part in parts:
            if not any(key in part for key in _DTYPE_KEYS):
                part["dtype"] = plan.request.dtype
        _replace_dtypes(config, plan.request.dtype)
    return config


def _may_tie(parts: list[dict[str, Any]]) -> bool:
    return any(part.get("tie_word_embeddings") is not False for part in parts)


def _replace_dtypes(config: dict[str, Any], dtype: str) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _replace_dtypes(value, dtype)
        elif key in _DTYPE_KEYS:
            config[key] = dtype

"""The reference implementation's YAML (sections model, generate, extended) as a recipe of ours."""

from typing import Any

from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
from mergekit_bio.eval.components import components
from mergekit_bio.outside_data import Document, KeyPath, nearest

SECTIONS = ("model", "generate", "extended")
_EXTENDED = ("datasets", "queries", "lora_scales", "species", "top_k_species", "n_examples")
#: Keys of generation that mean the same there, and all that there are. min_length has no effect there either: the
#: prompt's length is subtracted from it when embeddings are given.
_SHARED = ("max_new_tokens", "num_beams", "repetition_penalty", "length_penalty")
_GENERATE = (*_SHARED, "do_sample", "min_length", "temperature", "merging_alpha")
_MOVED: dict[KeyPath, KeyPath] = {
    ("merge", "alphas"): ("extended", "lora_scales"),
    ("merge", "base"): ("model", "llama_path"),
    ("merge", "adapter"): ("model", "ckpt"),
}
#: "beans_zero" among the reference's datasets means every component.
_ALL = "beans_zero"


def is_reference(data: dict[str, Any]) -> bool:
    """Whether a recipe is in the reference's format: it has one of its sections that ours has not."""
    return "extended" in data or "model" in data


def translated(document: Document) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Translate a document for which ``is_reference`` holds.

    Returns:
        The mapping that a recipe of ours would be, and what the user should be told.

    Raises:
        RecipeError: A section or key is unknown, or asks for what we do not do.
    """
    # 1. Known sections of known keys. What the model section says else is the checkpoint's to know.
    model, generate, extended = (_section(document, name) for name in SECTIONS)
    _check_known(document, (), SECTIONS, "section")
    _check_known(document, ("generate",), _GENERATE, "key")
    _check_known(document, ("extended",), _EXTENDED, "key")
    template = model.get("prompt_template")
    if template is not None and template != LLAMA3_TEMPLATE:
        raise document.problem(
            ("model", "prompt_template"), "only NatureLM-audio's own chat template can be asked with"
        )

    # 2. The same under our names. Without sampling the reference ignores its temperature.
    datasets = extended.get("datasets", [_ALL])
    ours = {key: generate[key] for key in _SHARED if key in generate}
    if generate.get("do_sample"):
        ours["temperature"] = generate.get("temperature", 1.0)
    merge = {"alphas": extended.get("lora_scales", [generate.get("merging_alpha", 1.0)])}
    for key, theirs in (("base", "llama_path"), ("adapter", "ckpt")):
        if model.get(theirs) is not None:
            merge[key] = model[theirs]
    recipe = {
        "merge": merge,
        "datasets": list(components()) if datasets == [_ALL] else datasets,
        "generate": ours,
        **{key: value for key, value in extended.items() if key not in ("datasets", "lora_scales")},
    }

    # 3. What was passed over.
    ignored = sorted(set(model) - {"llama_path", "ckpt", "prompt_template"})
    notes = [f"{document.source}: the reference's format, translated (`mergekit-bio recipes show` prints it)"]
    if ignored:
        notes.append(f"{document.source}: not needed, as the checkpoint says it: model.{', model.'.join(ignored)}")
    return recipe, tuple(notes)


def reference_path(path: KeyPath, data: dict[str, Any]) -> KeyPath:
    """Where in the reference's file, which holds ``data``, the value stands that became ``path`` of ours."""
    if path[:2] == ("merge", "alphas") and "lora_scales" not in (data.get("extended") or {}):
        return ("generate", "merging_alpha")
    for ours, theirs in _MOVED.items():
        if path[: len(ours)] == ours:
            return (*theirs, *path[len(ours) :])
    return path if path[:1] == ("generate",) else ("extended", *path)


def _section(document: Document, name: str) -> dict[str, Any]:
    section = document.data.get(name) or {}
    if not isinstance(section, dict):
        raise document.problem((name,), "a section is a mapping of keys to values")
    return section


def _check_known(document: Document, path: KeyPath, known: tuple[str, ...], kind: str) -> None:
    values = document.data.get(path[0]) or {} if path else document.data
    for key in values:
        if key not in known:
            raise document.problem((*path, key), f"unknown {kind}{nearest(key, known)}")

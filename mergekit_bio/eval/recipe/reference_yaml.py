"""The reference implementation's YAML (sections model, generate, extended) as a recipe of ours."""

from typing import Any

from mergekit_bio.audio.layout import LLAMA3_TEMPLATE
from mergekit_bio.eval.components import components
from mergekit_bio.outside_data import Document, KeyPath, nearest

SECTIONS = ("model", "generate", "extended")
_EXTENDED = ("datasets", "queries", "lora_scales", "species", "top_k_species", "n_examples")
#: min_length has no effect there either: the prompt's length is subtracted from it when embeddings are given.
_GENERATE = (
    "max_new_tokens",
    "num_beams",
    "do_sample",
    "min_length",
    "temperature",
    "repetition_penalty",
    "length_penalty",
    "merging_alpha",
)
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
    """Translate.

    Args:
        document: A mapping for which ``is_reference`` holds.

    Returns:
        The mapping that a recipe of ours would be, and what the user should be told.

    Raises:
        RecipeError: A section or key is unknown, or asks for what we do not do.
    """
    data = document.data
    sections = {name: _section(document, name) for name in SECTIONS}
    for key in data:
        if key not in SECTIONS:
            raise document.problem((key,), f"unknown section{nearest(key, SECTIONS)}")
    model, generate, extended = (sections[name] for name in SECTIONS)
    _known(document, "generate", _GENERATE)
    _known(document, "extended", _EXTENDED)
    template = model.get("prompt_template")
    if template is not None and template != LLAMA3_TEMPLATE:
        raise document.problem(
            ("model", "prompt_template"), "only NatureLM-audio's own chat template can be asked with"
        )
    datasets = extended.get("datasets", [_ALL])
    recipe = {
        "merge": {
            "alphas": extended.get("lora_scales", [generate.get("merging_alpha", 1.0)]),
            **_renamed(model, {"llama_path": "base", "ckpt": "adapter"}),
        },
        "datasets": list(components()) if datasets == [_ALL] else datasets,
        "generate": _generate(generate),
        **{key: value for key, value in extended.items() if key not in ("datasets", "lora_scales")},
    }
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


def _known(document: Document, section: str, keys: tuple[str, ...]) -> None:
    for key in document.data.get(section) or {}:
        if key not in keys:
            raise document.problem((section, key), f"unknown key{nearest(key, keys)}")


def _renamed(section: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {ours: section[theirs] for theirs, ours in names.items() if section.get(theirs) is not None}


def _generate(section: dict[str, Any]) -> dict[str, Any]:
    kept = ("max_new_tokens", "num_beams", "repetition_penalty", "length_penalty")
    ours = {key: section[key] for key in kept if key in section}
    # Without sampling the reference ignores its temperature.
    if section.get("do_sample"):
        ours["temperature"] = section.get("temperature", 1.0)
    return ours

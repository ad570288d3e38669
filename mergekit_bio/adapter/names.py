"""Finds the base's tensors that an adapter means, where the two do not call them alike.

Training names what is in memory, and a base what is in its files. Where Transformers builds
``model.language_model.layers`` from a file's ``language_model.model.layers``, or somebody has wrapped a model in one of
their own, the names differ in the parts that say how a model is wrapped, and in no other.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mergekit_bio.checkpoint.header import StoredTensor
from mergekit_bio.errors import AdapterError

if TYPE_CHECKING:
    from mergekit_bio.adapter.interface import Base

#: Parts of names that only say how a model is wrapped, wherever they stand.
_WRAPPERS = {
    "model", "base_model", "transformer", "language_model", "llm", "thinker", "module", "_orig_mod",
    "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
}  # fmt: skip
#: Likewise, but only inside of something: alone they tell the two halves of CLIP apart.
_INNER_WRAPPERS = {"vision_model", "text_model"}
_CLASSIFIERS = {"score", "classifier", "classification_head", "qa_outputs", "v_head", "summary"}


def plain_parts(name: str) -> tuple[str, ...]:
    """The parts of a dotted name without those that only say how a model is wrapped."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return tuple(part for index, part in enumerate(parts) if index == 0 or part not in _INNER_WRAPPERS)


def match_names(tensors: Mapping[str, StoredTensor], base: "Base") -> dict[str, str]:
    """Find the tensor of the base that each name means.

    Args:
        tensors: The adapter's names, as the base would have them; each with the stored tensor that errors are about.
        base: What the adapter is for.

    Returns:
        Each name -> the base's. A head that shares the embedding's matrix is found by its own name.

    Raises:
        AdapterError: There is no such tensor, there are several, or two names mean the same one.
    """
    known = {*base.checkpoint.tensors, *([base.head] if base.head else [])}
    index = _Index(known) if any(name not in known for name in tensors) else None
    found: dict[str, str] = {}
    dropped: dict[tuple[str, ...], str] = {}  # what had to be dropped in front of a name -> such a name
    for name, tensor in tensors.items():
        lead, candidates = ((), [name]) if index is None or name in known else index.find(name)
        if not candidates and plain_parts(name)[-2:] == ("lm_head", "weight") and base.head:
            candidates = [base.head]  # GPT-NeoX calls it embed_out
        if len(candidates) != 1:
            raise _not_found(name, tensor, candidates, base, index)
        found[name] = candidates[0]
        dropped.setdefault(lead, name)
    # A wrapper is around all of a model. What stands in front of some names only is a part that the base lacks.
    if len(dropped) > 1:
        name = next(name for lead, name in dropped.items() if lead)
        raise _not_found(name, tensors[name], [], base, index)
    meant: dict[str, str] = {}
    for ours, theirs in found.items():
        if (other := meant.setdefault(theirs, ours)) != ours:
            raise AdapterError(
                f"{tensors[ours].where}: {other} and {ours} would both be {theirs} of the base {base.source.given}; "
                "this adapter was made for another model"
            )
    return found


def differing_beginnings(names: Mapping[str, str]) -> dict[str, str]:
    """Where an adapter's names and the base's differ: beginning of the one -> of the other, such as ``"model"``."""
    beginnings: dict[str, str] = {}
    for ours, theirs in names.items():
        if ours == theirs:
            continue
        a, b = ours.split("."), theirs.split(".")
        while a and b and a[-1] == b[-1]:
            a.pop()
            b.pop()
        beginnings[".".join(a)] = ".".join(b)
    return beginnings


class _Index:
    """The base's names by their plain parts."""

    def __init__(self, names: Iterable[str]) -> None:
        self._whole: dict[tuple[str, ...], list[str]] = defaultdict(list)
        self._endings: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for name in names:
            parts = plain_parts(name)
            self._whole[parts].append(name)
            for start in range(1, len(parts)):
                self._endings[parts[start:]].append(name)

    def find(self, name: str) -> tuple[tuple[str, ...], list[str]]:
        """What had to be dropped in front of ``name``, and the base's names that it may mean then."""
        parts = plain_parts(name)
        if parts in self._whole:
            return (), self._whole[parts]
        if parts in self._endings:  # the adapter was trained on a part of the base, such as its encoder alone
            return (), self._endings[parts]
        for start in range(1, len(parts) - 1):
            if parts[start:] in self._whole:
                return parts[:start], self._whole[parts[start:]]
        return (), []

    def nearest(self, name: str) -> str | None:
        """Some name that ends as ``name`` does, in two parts or more."""
        parts = plain_parts(name)
        endings = (parts[start:] for start in range(len(parts) - 1))
        return next((self._endings[ending][0] for ending in endings if ending in self._endings), None)


def _not_found(
    name: str, tensor: StoredTensor, candidates: list[str], base: "Base", index: "_Index | None"
) -> AdapterError:
    given = base.source.given
    if candidates:
        first, second, *others = candidates
        return AdapterError(
            f"{tensor.where}: {name} may be {first} or {second}{' or others' if others else ''} of the base {given}; "
            "name the adapter's tensors as the base's files do"
        )
    if name.split(".")[-2:-1] and name.split(".")[-2] in _CLASSIFIERS:
        architectures = base.checkpoint.config.get("architectures") or ["no classifier"]
        return AdapterError(
            f"{tensor.where}: is a classifier's head, and the base {given} ({architectures[0]}) has none; save the "
            "base with it (AutoModelForSequenceClassification.from_pretrained(..., num_labels=...)), and give that"
        )
    near = index.nearest(name) if index else None
    hint = f", only such as {near}" if near else ""
    return AdapterError(
        f"{tensor.where}: the base {given} has no tensor {name}{hint}; this adapter was made for another model"
    )

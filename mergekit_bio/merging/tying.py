"""Tied embeddings: when a merge must give the output head a matrix of its own, and when not.

Many small models store one matrix for the input embedding and the output head. PEFT adapts the two sides apart, so an
adapter that changes one side, or both differently, can only be folded exactly by writing two matrices.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mergekit_bio.adapter.delta import Delta
from mergekit_bio.adapter.interface import Adapter, Base


@dataclass(frozen=True)
class Change:
    """A delta of one adapter, which decides the strength it gets.

    Attributes:
        adapter_index: Which of the merge's adapters brings it.
        delta: What it adds.
    """

    adapter_index: int
    delta: Delta


#: Base tensor -> everything that is added to it.
Changes: TypeAlias = Mapping[str, tuple[Change, ...]]


def resolve_tying(base: Base, adapters: Sequence[Adapter]) -> tuple[Changes, bool]:
    """Gather what all adapters change, and decide whether tied embeddings come apart.

    Returns:
        The changes, and whether the output head needs a matrix of its own. If it does not, a change of the head that
        is also one of the input embedding is counted once.
    """
    changes: dict[str, tuple[Change, ...]] = {}
    for adapter_index, adapter in enumerate(adapters):
        for name, deltas in adapter.deltas.items():
            changes[name] = changes.get(name, ()) + tuple(Change(adapter_index, delta) for delta in deltas)
    embedding, head = base.input_embedding, base.head
    if not base.tied or embedding is None or head is None or not {embedding, head} & changes.keys():
        return changes, False
    if not _same_changes(changes.get(embedding, ()), changes.get(head, ())):
        return changes, True
    del changes[head]
    return changes, False


def _same_changes(of_embedding: Sequence[Change], of_head: Sequence[Change]) -> bool:
    """Whether both sides get the same deltas from the same adapters, in any order."""
    unmatched = list(of_head)
    for change in of_embedding:
        for index, other in enumerate(unmatched):
            if change.adapter_index == other.adapter_index and change.delta.equals(other.delta):
                del unmatched[index]
                break
        else:
            return False
    return not unmatched

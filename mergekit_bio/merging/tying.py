"""Tied embeddings: when a merge must give the output head a matrix of its own, and when not.

Many small models store one matrix for the input embedding and the output head. PEFT adapts the two sides apart, so an
adapter that changes one side, or both differently, can only be folded exactly by writing two matrices.
"""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from mergekit_bio.adapter.delta import Delta, Dense, LowRank
from mergekit_bio.adapter.interface import LM_HEAD, Adapter, Base
from mergekit_bio.checkpoint.compare import same_bytes
from mergekit_bio.checkpoint.header import StoredTensor, TensorInfo

#: Base tensor -> (number of the adapter, delta) of everything added to it.
Changes: TypeAlias = Mapping[str, tuple[tuple[int, Delta], ...]]


def resolve_tying(base: Base, adapters: Sequence[Adapter]) -> tuple[Changes, bool]:
    """Gather what all adapters change, and decide whether tied embeddings come apart.

    Returns:
        The changes, and whether the output head needs a matrix of its own. If it does not, a change of the head that
        is also one of the input embedding is counted once.
    """
    changes: dict[str, tuple[tuple[int, Delta], ...]] = {}
    for number, adapter in enumerate(adapters):
        for name, deltas in adapter.deltas.items():
            changes[name] = changes.get(name, ()) + tuple((number, delta) for delta in deltas)
    embedding = base.input_embedding
    if not base.tied or embedding is None or not {embedding, LM_HEAD} & changes.keys():
        return changes, False
    one, other = (
        sorted(changes.get(name, ()), key=lambda change: (change[0], type(change[1]).__name__))
        for name in (embedding, LM_HEAD)
    )
    if len(one) == len(other) and all(a[0] == b[0] and _same(a[1], b[1]) for a, b in zip(one, other, strict=True)):
        del changes[LM_HEAD]
        return changes, False
    return changes, True


def _same(one: Delta, other: Delta) -> bool:
    """Whether two deltas, one of an embedding and one of a head, are the same matrix."""
    if isinstance(one, Dense) and isinstance(other, Dense):
        return one.tuned is other.tuned or _same_bytes(one.tuned, other.tuned)
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        # An embedding's delta is (B A)^T, a head's B' A': the same if A' = B^T and B' = A^T.
        import torch

        if one.scaling != other.scaling or one.shape != other.shape or one.rank != other.rank:
            return False
        device, dtype = torch.device("cpu"), torch.float32
        return all(
            torch.equal(x, y) for x, y in zip(one.factors(device, dtype), other.factors(device, dtype), strict=True)
        )
    return False


def _same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    if not (isinstance(one, TensorInfo) and isinstance(other, TensorInfo)):
        return False
    return one.dtype == other.dtype and one.shape == other.shape and same_bytes(one, other)
